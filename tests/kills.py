"""Kill runs with SIGKILL at random moments and compare what they end with.

python tests/kills.py [--kills N] [--jobs "a;b"] [--seed N] [--no-results]

Each kill has a folder of its own: the run is killed, started again with the same command, and ends; what it leaves is
compared with a run that was never killed: weights' and evaluation logs' bytes, and log_history without time and speed.
Every second moment is drawn over the whole run; the others lie between a drawn checkpoint and about the next one. A
checkpoint is written at each step. The table goes into docs/reliability.md.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
PAGE, MARKS = REPO / "docs" / "reliability.md", ("<!-- kills -->", "<!-- end of kills -->")
SPEED = ("runtime", "per_second", "memory", "mem_")
SMALL = ("generation.max_length=80", "generation.max_new_tokens=4", "ds_size=4")
FORGET = ("grad_diff", "KL", "dpo", "npo", "rmu", "pdu")


class Job(NamedTuple):
    """A command line, how many processes run it, and how often it is killed."""

    script: str
    args: tuple[str, ...]
    processes: int
    kills: int


def jobs(model: Path, ds_config: Path) -> dict[str, Job]:
    """The whole matrix."""
    common = ("model_family=tiny", f"data_path={REPO / 'data' / 'mini'}")
    train = (*common, "split=forget05", "lr=1e-3", "checkpoint_every=1", "gradient_accumulation_steps=1")
    forget = (*train, f"model_path={model}", "num_epochs=8")  # 16 steps
    evaluate = (*common, f"model_path={model}", "split=forget10", "overwrite=false", *SMALL)
    zero3 = ("engine=deepspeed", f"ds_config={ds_config}")
    watched = ("eval_while_train=true", "num_epochs=3", *(f"eval.{key}" for key in SMALL), "eval.split=forget05")
    found = {"grad_diff, ddp on 2": Job("forget", (*forget, "forget_loss=grad_diff", "batch_size=5"), 2, 20)}
    found["finetune"] = Job("finetune", (*train, "num_epochs=8", "batch_size=10"), 1, 3)
    for name in FORGET:
        own = {"pdu": ("forget_loss.dual_warmup_epochs=1",), "grad_diff": watched}.get(name, ())
        found[name] = Job("forget", (*forget, f"forget_loss={name}", "batch_size=10", *own), 1, 3)
    best = (*watched, "keep_best.metric=Prob. Retain")
    found["grad_diff, keep_best"] = Job("forget", (*forget, "forget_loss=grad_diff", "batch_size=10", *best), 1, 3)
    found["evaluate"] = Job("evaluate_util", evaluate, 1, 3)
    for name in ("grad_diff", "pdu"):
        args = (*forget, f"forget_loss={name}", "batch_size=5", *zero3, "num_epochs=5")
        found[f"{name}, ZeRO-3 on 2"] = Job("forget", args, 2, 2)
    found["evaluate, ZeRO-3 on 2"] = Job("evaluate_util", (*evaluate, *zero3, "batch_size=4"), 2, 2)
    return found


def start(job: Job, folder: Path, model: Path) -> subprocess.Popen:
    """The job's command, begun; its output goes beside its folder."""
    cases = folder.with_suffix(".cases.json")
    cases.write_text(json.dumps([{"script": job.script, "args": [*job.args, f"save_dir={folder}"]}]))
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={job.processes}", "--standalone"]
    worker = [str(REPO / "tests" / "engine_worker.py"), str(cases), str(model)]
    command = [sys.executable, *(launcher if job.processes > 1 else []), *worker]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with folder.with_suffix(".log").open("a") as out:
        return subprocess.Popen(command, cwd=REPO, stdout=out, stderr=out, env=env)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait for a run; raise where it failed."""
    if process.wait(timeout=600):
        raise RuntimeError(f"{folder} failed:\n{folder.with_suffix('.log').read_text()[-9000:]}")


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a run's launcher and its processes, all at once."""
    for pid in tree(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def left(folder: Path) -> dict[str, object]:
    """What must be the same: bytes of weights and evaluation logs, and the training's log without time and speed."""
    kinds = ("model*.safetensors", "eval_log*.json", "checkpoint-*/eval_log*.json", "eval_real*.json")
    found: dict[str, object] = {
        str(file.relative_to(folder)): file.read_bytes() for kind in kinds for file in sorted(folder.glob(kind))
    }
    if (folder / "trainer_state.json").is_file():
        lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        found["log"] = [{key: one for key, one in line.items() if not any(w in key for w in SPEED)} for line in lines]
    assert found, f"{folder} holds nothing to compare"
    return found


def where(folder: Path) -> str:
    """What the kill has left."""
    steps = sorted(int(path.name[5:]) for path in (folder / "resume").glob("step-*"))
    logs = len(list(folder.glob("eval_*.json")))
    if (folder / "finished.json").is_file():
        return "a complete run"
    return f"step {steps[-1]}" if steps else f"{logs} logs" if logs else "nothing yet"


def reached(folder: Path) -> int:
    """How far a run is: its newest checkpoint's step, or the logs of an evaluation."""
    steps = [int(path.name[5:]) for path in (folder / "resume").glob("step-*")]
    return max(steps, default=len(list(folder.glob("eval_*.json"))))


def wait_for(process: subprocess.Popen, folder: Path, at: int) -> None:
    """Wait until a run is so far, or has ended."""
    while process.poll() is None and reached(folder) < at:
        time.sleep(0.01)


def run_job(name: str, job: Job, kills: int, root: Path, model: Path, draw: random.Random) -> tuple[str, bool]:
    """A job's row of the table, and whether all ended the same."""
    whole, began = root / f"{name.replace(', ', '_').replace(' ', '_')}_whole", time.monotonic()
    process, first, last, seconds = start(job, whole, model), 0.0, 0, 0.0
    while process.poll() is None:
        now, last = time.monotonic() - began, max(last, reached(whole))
        first, seconds = first or now * (last > 0), seconds or now * (whole / "finished.json").is_file()
        time.sleep(0.01)
    finish(process, whole)
    expected, places, same = left(whole), [], 0
    pause = (seconds - first) / max(1, last)  # from one checkpoint to the next, about
    for k in range(kills):
        while True:
            folder = whole.with_name(whole.name.replace("whole", f"{k}_{time.monotonic_ns()}"))
            process, began = start(job, folder, model), time.monotonic()
            if k % 2:
                wait_for(process, folder, draw.randint(1, max(1, last)))
            try:
                process.wait(timeout=draw.uniform(0, pause if k % 2 else seconds))
            except subprocess.TimeoutExpired:
                break
            seconds, pause = seconds * 0.9, pause * 0.9  # it ended before: the machine is less busy now
        kill(process)
        places.append(f"{where(folder)} at {time.monotonic() - began:.1f} s")
        if not (folder / "finished.json").is_file():
            finish(start(job, folder, model), folder)
        same += left(folder) == expected
    row = f"| {name} | {job.processes} | {kills} | {same} | {seconds:.1f} | {'; '.join(places)} |"
    sys.stdout.write(f"{row}\n")
    sys.stdout.flush()
    return row, same == kills


def main(argv: list[str] | None = None) -> bool:
    """Kill, compare, write the table. Returns whether all runs ended the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="kills of each job; default: 20, 3 and 2 as in the table")
    parser.add_argument("--jobs", help="names of jobs, separated by semicolons or commas without a space; default: all")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: drawn and printed")
    parser.add_argument("--no-results", action="store_true", help="leave docs/reliability.md alone")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    sys.path.insert(0, str(REPO / "tests"))
    from conftest import random_llama

    with tempfile.TemporaryDirectory() as scratch:
        root, (ds_config, model) = Path(scratch), (Path(scratch) / "ds.json", Path(scratch) / "model")
        model.mkdir()
        random_llama(model)
        config = json.loads((REPO / "config" / "ds_config.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        ds_config.write_text(json.dumps(config))
        every, draw, began = jobs(model, ds_config), random.Random(seed), time.monotonic()
        asked = [one for part in args.jobs.split(";") for one in _split(part)] if args.jobs else list(every)
        if unknown := [name for name in asked if name not in every]:
            raise SystemExit(f"no job {', '.join(unknown)}: there are {'; '.join(every)}")
        rows = [run_job(name, every[name], args.kills or every[name].kills, root, model, draw) for name in asked]
    head = ["| job | processes | kills | the same | seconds of a run | what each kill left |", "| --- " * 6 + "|"]
    told = f"Seed {seed}, {time.strftime('%Y-%m-%d')}, {(time.monotonic() - began) / 60:.0f} minutes in all."
    if not args.no_results:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        text = "\n".join([MARKS[0], told, "", *head, *(row for row, _ in rows), MARKS[1]])
        PAGE.write_text(before + text + rest.partition(MARKS[1])[2])
    return all(same for _, same in rows)


def _split(part: str) -> list[str]:
    """Names between commas; a comma with a space is part of a name."""
    return [one.replace("\0", ", ") for one in part.strip().replace(", ", "\0").split(",") if one]


if __name__ == "__main__":
    sys.exit(None if main() else "some runs did not end the same")
