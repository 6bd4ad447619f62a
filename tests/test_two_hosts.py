"""One run on two hosts: two network namespaces with a cable between them. One is lost; the other ends, and says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from faults import END, Run
from helpers import MINI, REPO

pytestmark = pytest.mark.slow
NAMES = ("tofu-a", "tofu-b")
PORT = 29621


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def cable():
    """Two namespaces, 10.77.0.1 and 10.77.0.2; the cable is plugged by `cable()` and pulled by `cable(False)`."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root, with ip")
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        ip("link", "add", "cable-a", "netns", NAMES[0], "type", "veth", "peer", "name", "cable-b", "netns", NAMES[1])
        for number, (name, end) in enumerate(zip(NAMES, "ab", strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"cable-{end}")
            ip("-n", name, "link", "set", "lo", "up")

        def plug(up: bool = True) -> None:
            for name, end in zip(NAMES, "ab", strict=True):
                ip("-n", name, "link", "set", f"cable-{end}", "up" if up else "down")

        yield plug
    finally:
        for name in NAMES:
            ip("netns", "del", name)


class Hosts(Run):
    """A run with a process on each of the two hosts."""

    def on_hosts(self, **environment: str) -> list[subprocess.Popen]:
        """Start it on both."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("pulse.*"):
            file.unlink()
        started = []
        for number, (name, end) in enumerate(zip(NAMES, "ab", strict=True)):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            command += [f"--node_rank={number}", "--nproc_per_node=1", "--master_addr=10.77.0.1"]
            command += [f"--master_port={PORT}", str(REPO / "tests" / "fault_worker.py"), self.script, *self.args]
            ours = {"FAULT_PULSE": str(self.folder / "pulse"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
            ours |= {"GLOO_SOCKET_IFNAME": f"cable-{end}", **environment}
            with (self.folder / f"said.{number}").open("w") as said:
                how = {"stdout": said, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
                command.append(f"save_dir={self.out}")
                started.append(subprocess.Popen(command, cwd=self.folder, env={**os.environ, **ours}, **how))
        return started

    def said(self, host: int) -> str:
        """What a host has said."""
        return (self.folder / f"said.{host}").read_text(errors="replace")


def command(script: str, engine: str, model, folder) -> list[str]:
    """The command line of a small run that shares one model over the hosts."""
    config = json.loads((REPO / "config" / "ds_config.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else a tiny model is not shared
    (folder / "ds.json").write_text(json.dumps(config))
    keys = ["engine=fsdp"] if engine == "fsdp" else ["engine=deepspeed", f"ds_config={folder / 'ds.json'}"]
    keys += ["model_family=tiny", f"data_path={MINI}", "progress=false"]
    if script == "evaluate_util.py":
        return [*keys, f"model_path={model}", "split=forget10", "ds_size=4", "generation.max_length=64"]
    keys += ["batch_size=4", "gradient_accumulation_steps=1", "lr=1e-3", "checkpoint_every=1"]
    if script == "finetune.py":
        return [*keys, "split=forget10_perturbed", "num_epochs=2"]
    return [*keys, f"model_path={model}", "split=forget10", "forget_loss=grad_diff", "num_epochs=2"]


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
@pytest.mark.parametrize("script", ["finetune.py", "forget.py", "evaluate_util.py"])
def test_one_host_is_lost(script, engine, cable, model_folder, tmp_path, record_property):
    """The second host goes without a word, as by a power cut: its cable is pulled, then its processes are killed."""
    args = command(script, engine, model_folder, tmp_path)
    more = {"FAULT_MODEL": str(model_folder)}
    cable()
    whole = Hosts(tmp_path / "whole", script, args)
    codes = [one.wait(300) for one in whole.on_hosts(**more)]
    assert codes == [0, 0], whole.said(0)[-4000:] + whole.said(1)[-2000:]

    run = Hosts(tmp_path / "lost", script, args)
    hosts = run.on_hosts(**more, FAULT_PAUSE="0.5")
    assert run.wait_for(hosts[0], 3), run.said(0)[-3000:]
    cable(False)
    for pid in [run.pid(1), hosts[1].pid]:
        os.kill(pid, signal.SIGKILL)
    hosts[1].wait()
    began = time.monotonic()
    assert hosts[0].wait(END) != 0
    record_property("seconds", round(time.monotonic() - began))
    told = [line for line in run.said(0).splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "rank 1 on" in told[0] and "is gone" in told[0], run.said(0)[-3000:]
    assert not run.workers() and not (run.out / "finished.json").exists()

    cable()
    codes = [one.wait(300) for one in run.on_hosts(**more)]
    assert codes == [0, 0], run.said(0)[-4000:] + run.said(1)[-2000:]
    assert ("going on after step" in run.said(0)) == (script != "evaluate_util.py")
    assert run.results() == whole.results() and (run.out / "finished.json").is_file()
