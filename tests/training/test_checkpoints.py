"""A training that was stopped goes on from its newest whole checkpoint and ends with the same bytes."""

import json
from pathlib import Path

import pytest

from tofu.models import families
from tofu.runtime import claim, ranks, resumption
from tofu.training import checkpoints

SPEED = ("runtime", "per_second", "seconds")  # what of a log's line is not the same twice


class Stop(Exception):
    """What stands for a kill."""


def history(folder: Path) -> list[dict]:
    """The log without times and speeds."""
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: one for key, one in line.items() if not any(word in key for word in SPEED)} for line in lines]


def saved(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def run(model_folder, tmp_path, run_script, monkeypatch):
    """forget.py (finetune.py where no loss is named) in this process: run("forget_loss=npo", stop=3, name="x")."""

    def run(*args, name="run", stop=None, script=None):
        common = ["model_family=tiny", "data_path=data/mini", "engine=ddp", "batch_size=10", "num_epochs=2", "lr=1e-3"]
        common += ["gradient_accumulation_steps=1", "split=forget05", f"save_dir={tmp_path / name}"]
        script = script or ("forget.py" if any(one.startswith("forget_loss=") for one in args) else "finetune.py")
        if script == "forget.py":
            common.append(f"model_path={model_folder}")
        else:
            monkeypatch.setitem(families.entries().tiny, "hf_key", str(model_folder))
        save = checkpoints.Resumable._save_checkpoint

        def stopping(self, *args):
            save(self, *args)
            if self.state.global_step == stop:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.Resumable, "_save_checkpoint", stopping)
            try:
                run_script(script, *common, *args)
            except Stop:
                claim.release()
                ranks.release()
        return tmp_path / name

    return run


LORA = ("LoRA.r=4", "LoRA.dropout=0.3")
CASES = {
    "finetune": (),
    "grad_diff": ("forget_loss=grad_diff", *LORA, "gradient_accumulation_steps=2", "batch_size=5", "logging_steps=2"),
    "pdu": ("forget_loss=pdu", "forget_loss.dual_warmup_epochs=0", "forget_loss.retain_weight=2"),
    "rmu": ("forget_loss=rmu", "packing=false"),
    "dpo": ("forget_loss=dpo",),
    "task_vector": ("forget_loss=task_vector",),
}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_with_the_same_bytes(run, capsys, case, step):
    """Two steps an epoch: in the middle of one, and between two."""
    whole = run(*CASES[case], name="whole")
    stopped = run(*CASES[case], "checkpoint_every=1", name="stopped", stop=step)
    assert not (stopped / "model.safetensors").exists() and (stopped / "resume" / f"step-{step}").is_dir()
    run(*CASES[case], "checkpoint_every=0", name="stopped")
    assert f"going on after step {step}" in capsys.readouterr().out
    assert saved(stopped) == saved(whole)
    assert history(stopped) == history(whole)
    assert not (stopped / resumption.RESUME).exists()
