"""The retain result of an evaluation's split: named, found where it lies, or made."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import MINI, REPO
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tofu.cli import oracle
from tofu.runtime import signals
from utils import BadInput

LOG = oracle.LOG


def asked(split="forget10_perturbed", **keys):
    """What of an evaluation's config is read."""
    values = {"model_family": "tiny", "model_path": "r/full", "split": split, "ds_size": 5, "oracle": None}
    return OmegaConf.create({**values, "generation": {"max_length": 200}, "retain_result": "auto", **keys})


def run(folder, evaluation=None, finetunes=True, **config):
    """A complete run's folder; an evaluation's has a log."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    (folder / "finished.json").write_text("{}")
    if evaluation:
        (folder / LOG).write_text("{}")


def evaluation(folder, **keys):
    cfg = asked(model_path=str(folder.parent if folder.name.startswith("eval_f") else folder.parent.parent), **keys)
    run(folder, evaluation=True, **OmegaConf.to_container(cfg), eval_task=["eval_log"])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_named():
    named = {"forget01": "a", "forget10_perturbed": "b"}
    assert oracle.resolve(asked(retain_result="x/y")) == "x/y" and oracle.resolve(asked(retain_result=None)) is None
    assert oracle.resolve(asked(retain_result=named)) == "b"
    assert oracle.resolve(asked("forget01_perturbed", retain_result=named)) == "a"
    for keys, said in (
        (
            {"split": "forget05_perturbed", "retain_result": named},
            "a path for forget01, forget10, and none for split=forget",
        ),
        ({"retain_result": [1]}, "it must be a path, auto, or a path for each split"),
        (
            {"retain_result": None, "oracle": "make"},
            "oracle=make makes what is not found: it needs eval.retain_result=auto",
        ),
        ({"oracle": "find"}, "eval.oracle=find is unknown"),
        ({"split": "mine"}, "split=mine does not say what its retain split is"),
    ):
        with pytest.raises(BadInput, match=said):
            oracle.resolve(asked(**keys), "eval.")


def test_found_beside_the_finetuned_model(here):
    """As scripts/tofu.sh lays it out, also of a model that was unlearned from it; the newest that fits."""
    run(here / "r" / "full", split="full", save_dir="r/full")
    run(here / "r" / "forget10_KL", split="forget10", forget_loss={}, model_path="r/full")
    run(here / "r" / "retain90", split="retain90", save_dir="r/retain90")
    evaluation(here / "r" / "retain90" / "eval_forget10", ds_size=300)
    with pytest.raises(BadInput, match="split=forget10_perturbed ds_size=5 is in r/retain90, runs/tiny/retain90: make"):
        oracle.resolve(asked())
    evaluation(here / "r" / "retain90" / "eval_results" / "ds_size5")
    for model in ("r/full", "r/forget10_KL"):
        assert oracle.resolve(asked(model_path=model)) == f"r/retain90/eval_results/ds_size5/{LOG}"
    run(
        here / "r" / "retain90" / "KL" / "eval_forget10",
        evaluation=True,
        eval_task=[],
        **asked(model_path="r/retain90/KL"),
    )
    assert oracle.resolve(asked()) == f"r/retain90/eval_results/ds_size5/{LOG}"
    with pytest.raises(BadInput, match="is in r/retain95, runs/tiny/retain95"):
        oracle.resolve(asked("forget05_perturbed"))


def test_found_by_finetunes_own_name_and_for_a_hub_model(here):
    run(here / "runs" / "ft_epoch5_lr1e-05_tiny_full_wd0.01_seed42", split="full")
    mine = here / "runs" / "ft_epoch5_lr1e-05_tiny_retain90_wd0.01_seed42"
    evaluation(mine / "eval_forget10")
    path = "runs/ft_epoch5_lr1e-05_tiny_full_wd0.01_seed42"
    assert oracle.resolve(asked(model_path=path)) == f"runs/{mine.name}/eval_forget10/{LOG}"
    evaluation(here / "runs" / "tiny" / "retain90" / "eval_forget10")
    assert oracle.resolve(asked(model_path="owner/model")) == f"runs/tiny/retain90/eval_forget10/{LOG}"


def test_where_it_will_be_made(here):
    run(here / "r" / "full", split="full")
    assert oracle.resolve(asked(oracle="make")) == f"r/retain90/eval_forget10_ds_size5_max_length200/{LOG}"
    with pytest.raises(BadInput, match="owner/model does not say how it was finetuned"):
        oracle.resolve(asked(oracle="make", model_path="owner/model"))
    assert not (here / "r" / "retain90").exists()


def test_an_evaluation_with_other_settings_is_no_match(here):
    """Neither of the name that is chosen here nor of an older one: the one to be made gets a folder of its own."""
    run(here / "r" / "full", split="full")
    evaluation(here / "r" / "retain90" / "eval_forget10", ds_size=300)
    names = {oracle.resolve(asked(oracle="make", ds_size=size)) for size in (5, 6, None)}
    names |= {oracle.resolve(asked(oracle="make", generation={"max_length": n})) for n in (80, 140)}
    assert len(names) == 5 and not any((here / name).exists() for name in names)
    assert oracle.resolve(asked(oracle="make", ds_size=300)) == f"r/retain90/eval_forget10/{LOG}"


def test_another_recipe_is_told(here, caplog):
    recipe = {"lr": 0.009, "seed": 1, "LoRA": {"r": 2}, "progress": True}
    run(here / "r" / "full", split="full", **recipe)
    run(here / "r" / "retain90", split="retain90", **{**recipe, "lr": 0.001, "LoRA": {"r": 4}, "progress": False})
    evaluation(here / "r" / "retain90" / "eval_forget10")
    assert oracle.resolve(asked())
    said = "r/retain90 was finetuned otherwise: lr=0.001 (r/full: 0.009), LoRA.r=4 (r/full: 2)"
    assert [one.getMessage() for one in caplog.records] == [f"retain_result=auto: {said}"]


SAVES = """
import pathlib, signal, sys, time
sys.path.insert(0, {repo!r})
from tofu.runtime import parent, signals
parent.end_with_parent()
with signals.handled():
    pathlib.Path({folder!r}, 'begun').touch()
    while not signals.requested():
        time.sleep(0.02)
    pathlib.Path({folder!r}, 'saved').write_text(signals.requested())
sys.exit(75)
"""
STARTS = "import sys; sys.path.insert(0, {repo!r}); from tofu.cli import oracle; oracle._script({script!r})"


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_is_passed_on_and_a_kill_ends_the_script(here):
    words = {"repo": str(REPO), "folder": str(here), "script": str(here / "saves.py")}
    (here / "saves.py").write_text(SAVES.format(**words))

    def send():
        until((here / "begun").is_file)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send).start()
    with (
        signals.handled(),
        pytest.raises(signals.Interrupted, match="by SIGUSR1: what .*saves.py has saved"),
    ):
        oracle._script(str(here / "saves.py"))
    assert (here / "saved").read_text() == "SIGUSR1"
    (here / "begun").unlink()
    process = subprocess.Popen([sys.executable, "-c", STARTS.format(**words)])
    until((here / "begun").is_file)
    process.kill()
    process.wait()
    until(lambda: (here / "saved").read_text() == "SIGTERM")


def test_who_waits_for_another_job_can_be_stopped(here):
    with signals.handled(), oracle._alone(here / "r"):
        with oracle._alone(here / "other"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Interrupted, match="interrupted by SIGTERM"), oracle._alone(here / "r"):
            pass


def test_values_in_hydras_grammar():
    values = {"a": "it's [x], {y}", "b": [1, None, "c,d"], "e": {"f": True, "g": 1e-05, "h": 1, "i": 0}, "j": "a\\b"}
    assert oracle._overrides(OmegaConf.create(values)) == [
        *(r"a='it\'s [x], {y}'", "b=[1,null,'c,d']", "e.f=true", "e.g=1e-05", "e.h=1", "e.i=0", r"j='a\b'"),
    ]
    (read,) = OverridesParser.create().parse_overrides([oracle._overrides(OmegaConf.create(values))[-1]])
    assert read.value() == values["j"]  # Hydra doubles no backslash but before a quote


@pytest.mark.slow
def test_made_once_by_the_suites_scripts(launch, model_folder, here):
    """As the starting model was finetuned; a second evaluation finds it."""
    (here / "data").mkdir()
    (here / "data" / "tiny").symlink_to(model_folder)  # the family's own model, unless the checkout has built it
    common = ("model_family=tiny", f"data_path={MINI}", "progress=false")
    launch(
        "finetune.py",
        *common,
        "split=full",
        "batch_size=40",
        "num_epochs=1",
        "lr=3e-4",
        "seed=7",
        "save_dir=r/full",
        cwd=here,
    )
    args = (
        *common,
        "model_path=r/full",
        "split=forget10",
        "ds_size=3",
        "generation.max_new_tokens=3",
        "retain_result=auto",
    )
    done = launch("evaluate_util.py", *args, "oracle=make", cwd=here)
    made = OmegaConf.load(here / "r" / "retain90" / "config.yaml")
    assert (made.split, made.lr, made.seed, made.batch_size, made.num_epochs) == ("retain90", 3e-4, 7, 40, 1)
    made = "eval_forget10_ds_size3_max_length200"
    assert "Forget Quality" in done.stdout and (here / "r" / "retain90" / made / "finished.json").is_file()
    again = launch("evaluate_util.py", *args, "oracle=make", "overwrite=true", "save_dir=again", cwd=here)
    assert "oracle=make" not in again.stdout
    assert OmegaConf.load(here / "again" / "config.yaml").retain_result == f"r/retain90/{made}/{LOG}"
    launch("evaluate_util.py", "from=again", "save_dir=repeated", cwd=here)
    name = "eval_log_aggregated.json"
    assert (here / "repeated" / name).read_bytes() == (here / "again" / name).read_bytes()


@pytest.mark.slow
def test_stopped_while_it_is_made(launch, model_folder, here):
    """The retain model's training saves, the script ends with 75, and the same command goes on."""
    (here / "data").mkdir()
    (here / "data" / "tiny").symlink_to(model_folder)
    common = ("model_family=tiny", f"data_path={MINI}", "progress=false")
    recipe = ("batch_size=10", "gradient_accumulation_steps=1", "num_epochs=10", "checkpoint_every=40")
    launch("finetune.py", *common, "split=full", *recipe, "lr=1e-5", "save_dir=r/full", cwd=here)
    args = (*common, "model_path=r/full", "split=forget10", "ds_size=3", "generation.max_new_tokens=3")
    args += ("retain_result=auto", "oracle=make")
    with (here / "said").open("w") as out:
        words = [sys.executable, str(REPO / "evaluate_util.py"), *args]
        process = subprocess.Popen(words, cwd=here, stdout=out, stderr=out)
    until(lambda: list((here / "r" / "retain90").glob("resume/step-*/manifest.json")), 200)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (here / "said").read_text()
    assert list((here / "r" / "retain90").glob("resume/step-*/manifest.json"))
    assert "interrupted by SIGTERM: what finetune.py has saved of the retain model" in (here / "said").read_text()
    assert "going on after step" in launch("evaluate_util.py", *args, cwd=here).stdout
