"""Run folders: what may be written where, and what may be removed."""

import pytest
from omegaconf import OmegaConf

import utils
from tofu.runtime import provenance, run_folder

CFG = OmegaConf.create({"lr": 1e-5})


def start(folder, **changes):
    return run_folder.start_run(CFG, folder, **{"overwrite": False, "inputs": ()} | changes)


def test_a_run_makes_its_folder_and_a_refused_one_can_start_again(tmp_path):
    for _ in range(2):
        folder = start(tmp_path / "runs" / "one")
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "versions.json"]
    assert OmegaConf.load(folder / "config.yaml") == CFG


@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "notes.txt"])
def test_what_is_not_this_suites_is_never_removed(tmp_path, name):
    """One of the two names alone is as much somebody's as any other file."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(utils.BadInput, match="exists: name another"):
        start(tmp_path)
    if name != "versions.json":
        with pytest.raises(utils.BadInput, match="is not a run of this suite"):
            start(tmp_path, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_start_that_is_killed_can_be_started_again(tmp_path, monkeypatch):
    """Between removing the old run and explaining the new one the folder stays known as this suite's."""
    start(tmp_path)
    for name in ("model.safetensors", run_folder.REFERENCE):
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_explain", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(tmp_path, overwrite=True, keep=(run_folder.REFERENCE,))
    assert {path.name for path in tmp_path.iterdir()} == {"versions.json", run_folder.REFERENCE}
    start(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "versions.json"}


def test_overwriting_leaves_runs_in_folders_of_their_own(tmp_path):
    start(tmp_path)
    (tmp_path / "model.safetensors").write_text("old")
    start(tmp_path / "other")
    start(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "other", "versions.json"]


def test_a_recipe_is_the_finetuned_models(tmp_path):
    """Of an unlearned model: that of the model it began with; of a folder without a record, nothing."""
    made = {"lr": 7e-4, "num_epochs": 10, "batch_size": 16, "gradient_accumulation_steps": 1, "split": "full"}
    for name, cfg in (("full", made), ("npo", {"lr": 1e-4, "forget_loss": {}, "model_path": str(tmp_path / "full")})):
        (tmp_path / name).mkdir()
        OmegaConf.save(OmegaConf.create(cfg), tmp_path / name / provenance.CONFIG)
    expected = "lr=0.0007 num_epochs=10 batch_size=16 gradient_accumulation_steps=1"
    assert provenance.recipe(str(tmp_path / "full")) == provenance.recipe(str(tmp_path / "npo")) == expected
    assert provenance.recipe(str(tmp_path)) == provenance.recipe("owner/model") == provenance.recipe(None) == ""
