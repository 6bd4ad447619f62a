"""The retain result of an evaluation's split: named, found where it lies, or made."""

import pytest
from helpers import MINI
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tofu.cli import oracle
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
    assert oracle.resolve(asked(oracle="make")) == f"r/retain90/eval_forget10/{LOG}"
    with pytest.raises(BadInput, match="owner/model does not say how it was finetuned"):
        oracle.resolve(asked(oracle="make", model_path="owner/model"))
    assert not (here / "r" / "retain90").exists()


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
    assert "Forget Quality" in done.stdout and (here / "r" / "retain90" / "eval_forget10" / "finished.json").is_file()
    again = launch("evaluate_util.py", *args, "oracle=make", "overwrite=true", "save_dir=again", cwd=here)
    assert "oracle=make" not in again.stdout
    assert OmegaConf.load(here / "again" / "config.yaml").retain_result == f"r/retain90/eval_forget10/{LOG}"
