"""The same command twice gives the same bytes, another seed gives others: full and with adapters, on every engine."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MINI, REPO

LORA = ("LoRA.r=4", "LoRA.dropout=0.1")
KINDS = {"full": (), "lora": LORA}


def command(model: Path, *more: str, seed: int = 1) -> list[str]:
    """A short run of forget.py on 20 rows; lr=0.01 moves a random model's every adapter."""
    common = [
        "model_family=tiny",
        f"data_path={MINI}",
        f"model_path={model}",
        "split=forget05",
        "forget_loss=grad_diff",
    ]
    common += ["batch_size=5", "gradient_accumulation_steps=1", "num_epochs=2", "lr=1e-2", f"seed={seed}"]
    return [*common, *more]


def bytes_of(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_one_process(model_folder, tmp_path, run_script, kind):
    """Whatever was drawn in this process before, the evaluation and the references of a run included."""
    made = {}
    for name, seed, more in (("one", 1, ()), ("two", 1, ()), ("other", 2, ())):
        args = [*command(model_folder, *KINDS[kind], *more, seed=seed), f"save_dir={tmp_path / name}"]
        run_script("forget.py", *args)
        made[name] = bytes_of(tmp_path / name)
    assert made["one"] == made["two"] != made["other"]


def launched(folder: Path, model: Path, engine: tuple[str, ...], processes: int, kinds: dict, times: int) -> dict:
    """Name -> digest of the weights of `times` equal runs and one of another seed of each kind, in one launch."""
    folder.mkdir(exist_ok=True)
    cases = []
    for kind, more in kinds.items():
        for name, seed in (*((f"{kind}{i}", 1) for i in range(times)), (f"{kind}_other", 2)):
            args = [*command(model, *more, *engine, seed=seed), f"save_dir={folder / name}"]
            cases.append({"script": "forget", "args": args})
    (folder / "cases.json").write_text(json.dumps(cases))
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    worker = [str(REPO / "tests" / "engine_worker.py"), str(folder / "cases.json"), str(model)]
    done = subprocess.run([*start, *worker], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.name: bytes_of(path) for path in folder.iterdir() if path.is_dir()}


@pytest.mark.slow
def test_adapters_on_two_processes(model_folder, tmp_path):
    first = launched(tmp_path, model_folder, ("engine=ddp",), 2, {"lora": LORA}, 2)
    assert first["lora0"] == first["lora1"] != first["lora_other"]


@pytest.mark.slow
def test_adapters_of_two_launches(model_folder, tmp_path):
    first = launched(tmp_path / "first", model_folder, ("engine=ddp",), 2, {"lora": LORA}, 2)
    assert launched(tmp_path / "second", model_folder, ("engine=ddp",), 2, {"lora": LORA}, 1) == {
        name: digest for name, digest in first.items() if name != "lora1"
    }


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp"])
def test_every_engine(model_folder, tmp_path, engine, processes):
    """ZeRO-3 shards even a tiny model here; fsdp needs two processes."""
    if engine == "fsdp" and processes == 1:
        pytest.skip("fsdp shards over processes: with one it is refused (tests/cli/test_checks.py)")
    config = json.loads((REPO / "config" / "ds_config.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(config))
    keys = ("engine=deepspeed", f"ds_config={tmp_path / 'ds.json'}") if engine == "zero3" else (f"engine={engine}",)
    made = launched(tmp_path / "runs", model_folder, keys, processes, KINDS, 2)
    for kind in KINDS:
        assert made[f"{kind}0"] == made[f"{kind}1"] != made[f"{kind}_other"], kind
