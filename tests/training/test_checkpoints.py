"""A training that was stopped goes on from its newest whole checkpoint and ends with the same bytes."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MINI, REPO
from omegaconf import OmegaConf

from tofu.models import families
from tofu.runtime import claim, manifest, provenance, ranks, resumption, run_folder
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


FAST = (("grad_diff", 1),)
ALL = [(case, step) for case in CASES for step in (1, 2)]


@pytest.mark.parametrize(
    ("case", "step"), [pytest.param(*one, marks=() if one in FAST else pytest.mark.slow) for one in ALL]
)
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


class TestFolders:
    """What of a run's folder is a checkpoint, and what a run makes of it."""

    def written(self, folder: Path, *steps: int, limit: int = 9) -> None:
        for step in steps:
            aside = resumption.aside(folder, step)
            aside.mkdir(parents=True)
            (aside / "state").write_text(f"{step}")
            resumption.keep(aside, limit)

    def test_the_newest_whole_one(self, tmp_path, caplog):
        """One that is half written is removed, and a damaged one passed over: missing, cut or with other bytes."""
        self.written(tmp_path, 2, 9, 10, 11, 12)
        resumption.aside(tmp_path, 13).mkdir()
        at = tmp_path / resumption.RESUME
        (at / "step-12" / resumption.MANIFEST).unlink()
        (at / "step-11" / "state").write_text("x1")
        (at / "step-10" / "state").write_text("1")
        assert resumption.newest(tmp_path) == at / "step-9"
        assert not resumption.aside(tmp_path, 13).exists()
        for said in ("step-12 is damaged", "state has other content", "state has 1 bytes instead of 2"):
            assert said in caplog.text

    def test_so_many_are_kept(self, tmp_path):
        self.written(tmp_path, 1, 2, 3, limit=2)
        assert {path.name for path in (tmp_path / resumption.RESUME).iterdir()} == {"step-2", "step-3"}
        (tmp_path / resumption.RESUME / "mine.txt").write_text("mine")
        resumption.remove(tmp_path)
        assert [path.name for path in (tmp_path / resumption.RESUME).iterdir()] == ["mine.txt"]

    def test_a_manifest(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "b").write_text("one")
        known = manifest.manifest(tmp_path)
        assert known == {"a/b": {"size": 3, "sha256": provenance.digest("one")}}
        (tmp_path / "a" / "b").write_text("two")
        assert manifest.problems(tmp_path, known, full=False) == []
        assert manifest.problems(tmp_path, known, full=True) == ["a/b has other content"]
        (tmp_path / "a" / "b").unlink()
        assert manifest.problems(tmp_path, known, full=False) == ["a/b is missing"]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [("15min", ("seconds", 900)), ("30s", ("seconds", 30)), ("1.5h", ("seconds", 5400)), ("epoch", ("epoch", 1))]
        + [(200, ("steps", 200)), (0, ("steps", 0))],
    )
    def test_an_interval(self, value, expected):
        assert resumption.interval(value) == expected


def test_evaluations_that_choose_the_weights_must_be_the_same():
    for chooses, cfg in (
        (False, {}),
        (True, {"keep_best": {"metric": "Agg"}}),
        (True, {"stop_on": {"collapse": True}}),
    ):
        found = resumption.not_weights(OmegaConf.create({"keep_best": {"metric": None}, **cfg}))
        assert ("eval" in found, "eval_while_train" in found, "save_model" in found) == (not chooses, not chooses, True)


@pytest.mark.slow
def test_what_is_refused_of_an_interrupted_run(run, capsys, tmp_path):
    """Other settings by name, resume=false; damaged, the one before; overwrite_dir starts again."""
    args = ("forget_loss=grad_diff", "checkpoint_every=1", "save_total_limit=2")
    folder = run(*args, stop=2)
    for more, said in (
        (("lr=2e-3", "seed=7"), "lr=0.001 (now 0.002), seed=42 (now 7): take the same"),
        (("batch_size=5",), "batch_size x gradient_accumulation_steps x processes=10 (now 5)"),
        (("resume=false",), "holds resume/step-2 of an interrupted run, and resume=false"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*args, *more)
        assert said in capsys.readouterr().err
    (folder / "resume" / "step-2" / "model.safetensors").write_bytes(b"")
    whole = run(*args[:1], name="whole")
    run(*args, "batch_size=5", "gradient_accumulation_steps=2", "logging_steps=3", stop=3)  # the same global batch
    assert "step-2 is damaged, and passed over: model.safetensors has 0 bytes" in (told := capsys.readouterr().out)
    assert "going on after step 1" in told
    run(*args, "overwrite_dir=true")
    assert "going on" not in capsys.readouterr().out and saved(folder) == saved(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "whole"}


def signal_at(step, patch):
    """Let a step of the next run get a SIGTERM."""
    wishes = checkpoints.Resumable.wishes

    def asked(self):
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return wishes(self)

    patch.setattr(checkpoints.Resumable, "wishes", asked)


def test_a_signal_saves_and_stops_the_run(run, monkeypatch, capsys, tmp_path):
    """Also where no checkpoints are asked for; a folder without one starts again, with its reference kept."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="75"):
        signal_at(3, patch)
        run("forget_loss=dpo", "checkpoint_every=0", "overwrite_dir=true", name="stopped")
    said = "interrupted by SIGTERM: saved at step 3; run the same command again, without overwrite_dir=true, to"
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "stopped" / "interrupted.json").read_text())["step"] == 3
    ranks.release()
    resumption.remove(tmp_path / "stopped")
    before = (tmp_path / "stopped" / "reference_logps.json").stat().st_mtime_ns
    logging.getLogger().handlers.clear()
    run("forget_loss=dpo", name="stopped")
    assert (tmp_path / "stopped" / "finished.json").is_file()
    assert (tmp_path / "stopped" / "reference_logps.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_an_evaluation_that_was_left_out_is_made(run, monkeypatch, step):
    """The signal comes at an epoch's last step, or before: all evaluations are there, with the same bytes."""
    small = ("eval.ds_size=4", "eval.generation.max_length=80", "eval.generation.max_new_tokens=2")
    args = ("forget_loss=grad_diff", "eval_while_train=true", *small)
    whole = run(*args, name="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="75"):
        signal_at(step, patch)
        run(*args, name="stopped")
    ranks.release()
    stopped = run(*args, name="stopped")
    assert saved(stopped) == saved(whole)
    for path in whole.glob("checkpoint-*/eval_log*.json"):
        assert (stopped / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_best_epoch_is_saved_and_the_run_is_killed_before_it_is_complete(run, monkeypatch):
    """The same weights are saved when it goes on, from the last checkpoint and from one before."""
    small = ("eval.ds_size=4", "eval.generation.max_length=80", "eval.generation.max_new_tokens=2")
    args = ("forget_loss=grad_ascent", "lr=3e-3", "eval_while_train=true", "keep_best.metric=Prob. Retain", *small)

    def killed(*args):
        raise Stop

    whole = run(*args, name="whole")
    assert json.loads((whole / "finished.json").read_text())["best"]["step"] == 2
    for every in (1, 3):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "finish_run", killed)
            run(*args, f"checkpoint_every={every}", name=f"every{every}")
        again = run(*args, name=f"every{every}")
        assert saved(again) == saved(whole) and not list(again.glob("best-*"))


SHARES = {  # engine -> what the command line says
    "ddp": ("engine=ddp",),
    "fsdp": ("engine=fsdp",),
    "zero2": ("engine=deepspeed", "ds_config=config/ds_config_zero2.json"),
    "zero3": ("engine=deepspeed", "ds_config={folder}/ds.json"),
}


def launch(folder: Path, processes: int, cases: list[dict], model: Path) -> str:
    """What cases say that run in one launch of tests/engine_worker.py."""
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = [str(REPO / "tests" / "engine_worker.py"), str(folder / "cases.json"), str(model)]
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, *worker], cwd=REPO, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARES)
@pytest.mark.parametrize("more", [("forget_loss=grad_diff",), ("forget_loss=rmu",)], ids=["grad_diff", "rmu"])
def test_two_processes(engine, more, model_folder, tmp_path):
    """Bit for bit with two processes; under ddp one process goes on too, with losses to 1e-4, else it is refused."""
    config = json.loads((REPO / "config" / "ds_config.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(config))
    keys = [key.format(folder=tmp_path) for key in SHARES[engine]]
    common = ["model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "split=forget05", "lr=1e-3"]
    common += ["batch_size=5", "gradient_accumulation_steps=1", "num_epochs=2", *keys, *more]

    def case(name: str, *args: str, **how: object) -> dict:
        return {"script": "forget", "args": [*common, *args, f"save_dir={tmp_path / name}"], **how}

    every = "checkpoint_every=1"
    cases = [case("whole"), case("stopped", every, stop=1), case("stopped"), case("alone", every, stop=2)]
    launch(tmp_path, 2, cases, model_folder)
    assert saved(tmp_path / "stopped") == saved(tmp_path / "whole")
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
    alone = [key for key in keys if engine != "fsdp"] or ["engine=ddp"]
    refused = {} if engine == "ddp" else {"refused": str(tmp_path / "said")}
    launch(tmp_path, 1, [case("alone", *alone, "batch_size=10", **refused)], model_folder)
    if engine == "ddp":
        losses = [[line.get("loss") for line in history(tmp_path / name)] for name in ("whole", "alone")]
        assert losses[1][:-1] == pytest.approx(losses[0][:-1], abs=1e-4)
    else:
        assert "start 2 processes under" in (tmp_path / "said").read_text()


@pytest.mark.slow
def test_another_number_of_processes_under_fsdp(model_folder, tmp_path):
    """Two processes write shards, three read them: the same data in the same order, losses to 1e-4, said in the log."""
    common = ["model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "split=forget05", "lr=1e-3"]
    common += ["gradient_accumulation_steps=1", "num_epochs=4", "engine=fsdp", "forget_loss=grad_diff"]

    def case(name: str, *args: str, **how: object) -> dict:
        return {"script": "forget", "args": [*common, *args, f"save_dir={tmp_path / name}"], **how}

    launch(tmp_path, 2, [case("more", "batch_size=6", "checkpoint_every=1", stop=2)], model_folder)
    told = launch(tmp_path, 3, [case("more", "batch_size=4"), case("whole", "batch_size=4")], model_folder)
    losses = [[line.get("loss") for line in history(tmp_path / name)] for name in ("whole", "more")]
    assert len(losses[0]) > 4
    assert losses[1][:-1] == pytest.approx(losses[0][:-1], abs=1e-4)
    assert "with 2 processes, now 3" in told
