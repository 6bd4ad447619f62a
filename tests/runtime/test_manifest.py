"""What a finished run says of its files, and what is refused where they are not so."""

import json
import shutil

import pytest
from helpers import MINI
from omegaconf import OmegaConf

from tofu.evaluation import log_formats
from tofu.models import folders
from tofu.runtime import claim, manifest, provenance, run_folder, trust
from utils import BadInput

CFG = OmegaConf.create({"lr": 1e-5})
HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256 of hello


@pytest.fixture(autouse=True)
def afresh():
    yield
    claim.release()
    trust.settle({"verify": "sizes", "allow_pickle": False})


def fill(folder, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_sizes_and_digests(tmp_path):
    fill(tmp_path, b_txt="hello", a_txt="")
    found = manifest.manifest(tmp_path, ["b.txt", "a.txt", "gone.txt"])
    assert list(found) == ["a.txt", "b.txt"] and found["b.txt"] == {"size": 5, "sha256": HELLO}
    assert manifest.problems(tmp_path, found, True) == []


@pytest.mark.parametrize(
    ("change", "sizes", "full"),
    [
        (lambda folder: (folder / "b.txt").unlink(), ["b.txt is missing"], ["b.txt is missing"]),
        (lambda folder: fill(folder, b_txt="hell"), *(["b.txt has 4 bytes instead of 5"],) * 2),
        (lambda folder: fill(folder, b_txt="HELLO"), [], ["b.txt has other content"]),
        (lambda folder: fill(folder, mine_txt="notes"), [], []),
    ],
)
def test_problems_name_what_is_missing_or_altered(tmp_path, change, sizes, full):
    fill(tmp_path, b_txt="hello", a_txt="")
    known = manifest.manifest(tmp_path, ["b.txt", "a.txt"])
    change(tmp_path)
    assert manifest.problems(tmp_path, known, False) == sizes
    assert manifest.problems(tmp_path, known, True) == full


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_a_foreign_manifest_looks_at_nothing_outside(tmp_path, name):
    (tmp_path / "run").mkdir()
    assert manifest.problems(tmp_path / "run", {name: {"size": 1, "sha256": ""}}, True) == [
        f"{name} leads out of the folder"
    ]


def test_finished_json_covers_what_the_run_wrote(tmp_path):
    """Its own notes, what another tool appends to, and what is the user's are no part."""
    folder = run_folder.start_run(CFG, tmp_path / "run", overwrite=False, inputs=())
    for place, name in ((folder, "model.safetensors"), (folder, run_folder.ALTERABLE), (folder / "checkpoint-3", "x")):
        run_folder.note(place, name, "never_made.json")
        (place / name).write_text("1")
    (folder / "mine.txt").write_text("1")
    run_folder.finish_run(folder, {"loss": 1.5})
    found = json.loads((folder / "finished.json").read_text())
    assert found["loss"] == 1.5
    explained = {*run_folder.EXPLAINS} & {path.name for path in folder.iterdir()}
    assert set(found["manifest"]) == {"model.safetensors", "checkpoint-3/x", *explained}


class TestModels:
    """A model's folder, loaded."""

    @pytest.fixture
    def run(self, model_folder, tmp_path):
        """A finished run of which the model is all there."""
        folder = run_folder.start_run(CFG, tmp_path / "run", overwrite=False, inputs=())
        for path in model_folder.iterdir():
            run_folder.note(folder, path.name)
            shutil.copy(path, folder)
        run_folder.finish_run(folder, {})
        return folder

    def test_a_whole_one_and_what_the_user_adds(self, run):
        (run / "notes.txt").write_text("mine")
        (run / run_folder.WRITTEN).write_text("")
        assert folders.resolve(str(run), "model_path") == str(run)

    def test_one_that_was_cut_while_copied(self, run):
        file = run / "model.safetensors"
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[:10])
        (run / "tokenizer.json").unlink()
        said = f"model_path={run} is not as its run left it: model.safetensors has 10 bytes instead of {size}, "
        with pytest.raises(BadInput, match=said + "tokenizer.json is missing: copy it again"):
            folders.resolve(str(run), "model_path")

    def test_other_content_of_the_same_size_is_seen_by_hashing(self, run):
        file = run / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        folders.resolve(str(run), "model_path")
        trust.settle({"verify": "full", "allow_pickle": False})
        with pytest.raises(BadInput, match="model.safetensors has other content"):
            folders.resolve(str(run), "model_path")

    def test_one_that_was_stopped_between_saving_and_finishing(self, run):
        (run / "finished.json").unlink()
        with pytest.raises(BadInput, match=f"model_path={run} is not finished: the run that made it was stopped"):
            folders.resolve(str(run), "model_path")
        (run / provenance.VERSIONS).unlink()  # somebody else's folder
        assert folders.resolve(str(run), "model_path") == str(run)

    def test_one_of_an_older_version_has_no_manifest(self, run):
        (run / "finished.json").write_text('{"train_loss": 1.0}')
        (run / "tokenizer.json").write_text("{}")
        assert folders.resolve(str(run), "model_path") == str(run)


def test_logs_are_hashed(tmp_path):
    """An evaluation's own log, and one in checkpoint-STEP of the run above it."""
    row = {"eval_log_forget.json": {"avg_paraphrased_loss": {"0": 1.5}}}
    run = run_folder.start_run(CFG, tmp_path / "run", overwrite=False, inputs=())
    for place in (run, run / "checkpoint-0"):
        run_folder.note(place, "eval_log_aggregated.json")
        (place / "eval_log_aggregated.json").write_text(json.dumps(row))
    run_folder.finish_run(run, {})
    for place in (run, run / "checkpoint-0"):
        file = place / "eval_log_aggregated.json"
        assert log_formats.read(str(file), "retain_result") == row
        file.write_text(file.read_text().replace("1.5", "1.4"))
        with pytest.raises(BadInput, match=f"retain_result={file} is not as its run left it: .*has other content"):
            log_formats.read(str(file), "retain_result")


def test_an_evaluation_has_its_own_and_leaves_its_models(evaluated, model_folder, tmp_path, capsys):
    """Done again in the model's folder with other rows: both manifests stay right; `verify` is a key of the script."""
    model = run_folder.start_run(CFG, tmp_path / "model", overwrite=False, inputs=())
    for path in model_folder.iterdir():
        run_folder.note(model, path.name)
        shutil.copy(path, model)
    run_folder.finish_run(model, {})
    for rows in (2, 3):
        folder = evaluated(f"ds_size={rows}", f"model_path={model}", "verify=full", save_dir="model/eval")
        known = manifest.read(folder)
        assert {"eval_log.json", "eval_log_aggregated.json", "config.yaml"} <= set(known)
        assert manifest.problems(folder, known, True) == manifest.problems(model, manifest.read(model), True) == []
    (folder / "eval_log.json").write_text("{}")  # interrupted work is judged by its fingerprints, not by the manifest
    assert evaluated(f"model_path={model}", "overwrite=false", save_dir="model/eval") == folder
    with pytest.raises(SystemExit, match="2"):
        evaluated("verify=hashes", f"data_path={MINI}", save_dir="other")
    assert "verify=hashes is unknown (did you mean sizes?): it may be sizes, full" in capsys.readouterr().err
