"""from=RUN: a run repeated from its record."""

import json
import shutil

import pytest
from helpers import MINI, checked
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tofu.cli import repeat
from tofu.runtime import machine, provenance
from utils import BadInput

SMALL = (f"data_path={MINI}", "batch_size=8", "gradient_accumulation_steps=1", "progress=false")


@pytest.fixture
def script(run_script, model_folder, tmp_path, monkeypatch):
    """Run a script in tmp_path: script("forget.py", "lr=1e-3", save_dir="x") -> the folder."""
    monkeypatch.chdir(tmp_path)

    def go(name, *args, save_dir):
        run_script(name, *args, f"save_dir={save_dir}")
        return tmp_path / save_dir

    return go


@pytest.fixture
def unlearned(script, model_folder):
    args = ("model_family=tiny", f"model_path={model_folder}", "split=forget05", "forget_loss=simnpo_grad_diff")
    more = ("lr=3e-4", "num_epochs=2", "forget_loss.forget_args.beta=3.5", "seed=7")
    return script("forget.py", *args, *SMALL, *more, save_dir="run")


def losses(folder) -> list[dict]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def config(folder) -> dict:
    return {
        key: one for key, one in provenance.flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))).items()
    }


def differing(first, second) -> set[str]:
    first, second = config(first), config(second)
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def test_twice_the_same_bytes(script, unlearned, capsys):
    """Weights and losses are the run's; the record tells where it was made, of what, and how long each stage took."""
    for again in ("one", "two"):
        folder = script("forget.py", "from=run", save_dir=again)
        assert differing(unlearned, folder) == {"save_dir", "eval.save_dir"}
        for name in ("model.safetensors", "trained_on.json", "tofu_family.json"):
            assert (folder / name).read_bytes() == (unlearned / name).read_bytes(), name
        assert losses(folder) == losses(unlearned)
    assert capsys.readouterr().out.count("repeats run: versions, commit and inputs are equal") == 2
    about = json.loads((folder / "versions.json").read_text())
    assert about["command"] == ["forget.py", "from=run", "save_dir=two"] and about["directory"] == str(folder.parent)
    assert len(about["models"]) == 1 and len(about["data"]) == 2 and about["hardware"]["cores"] >= 1
    stages = json.loads((folder / "finished.json").read_text())["stages"]
    assert set(stages) == {"loading", "reference pass", "training", "saving"}
    assert all(one["seconds"] >= 0 and one["host_mb"] > 50 for one in stages.values())
    assert (folder / machine.PATCH).is_file() == about["uncommitted_changes"]


def test_what_follows_from_other_keys_follows(script, unlearned):
    """Another split brings its rows to keep, its evaluation set and, of this method, its own numbers but those set."""
    folder = script("forget.py", "from=run", "split=forget01", "batch_size=2", "LoRA.r=2", save_dir="other")
    now = config(folder)
    assert (now["split"], now["retain_split"], now["eval.split"]) == ("forget01", "retain99", "forget01_perturbed")
    assert now["eval.split_list"][-1] == "forget01_perturbed"
    assert (now["lr"], now["seed"], now["forget_loss.forget_args.beta"], now["LoRA.r"]) == (3e-4, 7, 3.5, 2)


@pytest.mark.slow
def test_an_evaluation_and_a_sweep(script, evaluated, run_script, tmp_path):
    folder = evaluated("split=forget05", save_dir="run")
    again = script("evaluate_util.py", "from=run", save_dir="again")
    assert differing(folder, again) == {"save_dir"}
    for path in folder.glob("eval_log*"):
        assert path.read_bytes() == (again / path.name).read_bytes()
    run_script("evaluate_util.py", "-m", "from=run", "ds_size=2,3", "save_dir='n${ds_size}'")
    for rows in (2, 3):
        assert differing(folder, tmp_path / f"n{rows}") == {"save_dir", "ds_size"}


def test_from_another_directory_with_other_data(script, unlearned, tmp_path, monkeypatch, capsys):
    """Paths are those of then; what differs is named and does not stop the run."""
    versions = json.loads((unlearned / "versions.json").read_text())
    versions["commit"], versions["data"][f"{MINI} forget05"] = "0" * 40, "other"
    (unlearned / "versions.json").write_text(json.dumps(versions))
    known = OmegaConf.load(unlearned / "config.yaml")
    known.eval.retain_result = "there/log.json"
    OmegaConf.save(known, unlearned / "config.yaml")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "log.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    args, _ = repeat.expanded(["forget.py", "from=../run", "save_dir=x"], "forget", "forget")
    assert f"eval.retain_result='{tmp_path}/there/log.json'" in args
    monkeypatch.chdir(tmp_path)
    script("forget.py", "from=run", "eval.retain_result=null", "num_epochs=1", save_dir="again")
    said = capsys.readouterr().out
    assert "repeats run: these are others than then: commit (0000" in said and f"data: {MINI} forget05" in said


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        (
            "forget.py",
            ["save_dir=x"],
            "from=run was made by finetune.py, not by forget.py: python finetune.py",
        ),
        ("finetune.py", [], "from=run needs a folder of its own: give save_dir=..."),
        ("finetune.py", ["save_dir=./run"], "save_dir=./run is the run that from=run repeats: name another save_dir"),
        ("finetune.py", ["from=gone", "save_dir=x"], "from=gone holds no run of this suite (no config.yaml)"),
        ("finetune.py", ["from=old", "save_dir=x"], "from=old: its config has warmth, which finetune.yaml has no long"),
        ("finetune.py", ["from=hidden", "save_dir=x"], "the record of data_path leaves a credential out: give data_pa"),
        ("aggregate_eval_stat.py", ["save_file=x.csv"], "from=run: finetune.py and forget.py and evaluate_util.py rep"),
    ],
)
def test_refused(run_script, tmp_path, monkeypatch, capsys, name, args, said):
    monkeypatch.chdir(tmp_path)
    for folder, own in (("run", {}), ("old", {"warmth": 3}), ("hidden", {"data_path": "https://***@host/x"})):
        (tmp_path / folder).mkdir()
        OmegaConf.save(OmegaConf.create({"lr": 1e-5, "split": "full", **own}), tmp_path / folder / "config.yaml")
    with pytest.raises(SystemExit, match="2"):
        run_script(name, "from=run", *args)
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "value", ["it's", "a\\", "a\\'b", "x\ny", "1e-5", 1e-05, None, True, ["a", "b,c"], {"f1": "a,b", "c d": 2}]
)
def test_values_come_through_hydras_grammar(value):
    (override,) = OverridesParser.create().parse_overrides([f"key={repeat.quoted(value)}"])
    assert override.value() == value


FORGET = ("model_family=tiny", "model_path=owner/model", f"data_path={MINI}", "split=forget05")


def record(folder, *overrides, command=(), config="forget", **other):
    """A run's folder as it is recorded, with other values where its maker has changed them."""
    made = OmegaConf.create(OmegaConf.to_container(checked(config, *overrides, f"save_dir={folder}")))
    for key, value in other.items():
        OmegaConf.update(made, key.replace("__", "."), value, force_add=True)
    folder.mkdir()
    OmegaConf.save(made, folder / "config.yaml")
    about = {"command": [f"{config}.py", *command], "directory": str(folder.parent)}
    (folder / "versions.json").write_text(json.dumps(about))
    return made


def again(folder, *overrides):
    """The overrides that from=folder stands for, in Python's values."""
    args, _ = repeat.expanded(["forget.py", f"from={folder}", "save_dir=again", *overrides], "forget", "forget")
    return {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(args[1:])}, args[1:]


def test_no_record_asks_for_code_of_others(tmp_path):
    """allow_pickle and a class that is imported are the command line's alone."""
    record(tmp_path / "pickle", *FORGET, allow_pickle=True, eval__allow_pickle=True)
    assert not {"allow_pickle", "eval.allow_pickle"} & again(tmp_path / "pickle")[0].keys()
    record(tmp_path / "class", *FORGET, forget_loss__class="evil.Mine")
    with pytest.raises(BadInput, match=r"evil.Mine, is none of this suite's.* it, \+\+forget_loss.class=evil"):
        again(tmp_path / "class")
    found, _ = again(tmp_path / "class", "++forget_loss.class=nowhere.Mine")
    assert found["forget_loss.class"] == "nowhere.Mine"


@pytest.mark.parametrize(
    "made",
    [
        ("forget_loss=rmu", "forget_loss.name=mine", "forget_loss.depth=0.25"),
        pytest.param(
            ("forget_loss=npo", "forget_loss.name=grad_ascent", "forget_loss.forget_args.beta=0.3"),
            marks=pytest.mark.slow,
        ),
        ("forget_loss=npo", "forget_loss.forget=grad_ascent", "~forget_loss.forget_args.beta"),
    ],
)
def test_a_method_by_another_name_than_its_files(tmp_path, made):
    """The recorded keys make the method, whatever its name and wherever its file is."""
    known = record(tmp_path / "run", *FORGET, *made)
    found = checked("forget", *again(tmp_path / "run")[1])
    assert found.forget_loss == known.forget_loss and (found.lr, found.num_epochs) == (known.lr, known.num_epochs)


@pytest.mark.slow
def test_a_retain_result_that_was_found_is_looked_for_again(tmp_path):
    """Not the log of another split: auto is asked again, also of a repeated run, and so is a path for each split."""

    def leave(name, *command, **other):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        made = OmegaConf.merge(
            OmegaConf.load(tmp_path / "run" / "config.yaml"), {"eval": {"retain_result": "x", **other}}
        )
        OmegaConf.save(made, tmp_path / name / "config.yaml")
        about = {"command": ["forget.py", *command], "directory": str(tmp_path)}
        (tmp_path / name / "versions.json").write_text(json.dumps(about))

    def of(name, *overrides):
        found, _ = again(tmp_path / name, "split=forget10", *overrides)
        return found["eval.retain_result"], found["eval.oracle"]

    record(tmp_path / "run", *FORGET)
    leave("found", "-m", "eval.retain_result=auto", "lr=1,2")
    leave("repeats", "from=found", "save_dir=repeats")
    leave("made", oracle="make")
    leave("split", "eval.retain_result={forget05: x, forget10: 'run/y'}")
    leave("named", "eval.retain_result=x")
    assert of("repeats") == ("auto", None) and of("made") == ("auto", "make")
    assert of("made", "eval.retain_result=z") == ("z", None) and of("named") == ("x", None)
    assert of("split") == ({"forget05": "x", "forget10": "run/y"}, None)
