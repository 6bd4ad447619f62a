"""Result folders as people leave them: copied, renamed, linked, unreadable, without their logs, under other names."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import sweep

from tofu.cli import command_line
from tofu.evaluation import logs
from tofu.reporting import grouping, places, records, results
from tofu.runtime.provenance import file_digest

ONE = {"splits": ("forget10",), "methods": ("grad_ascent", "npo"), "rates": (1e-4,), "seeds": (1,)}
COUNT = 2 * 4 + 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two unlearned models with three checkpoints each, the retain model and the finetuned one."""
    top = tmp_path_factory.mktemp("places") / "runs"
    assert sweep.sweep(top, **ONE) == COUNT
    return top


@pytest.fixture
def mine(runs, tmp_path):
    """A copy of the runs to change, with the paths in their records."""
    top = Path(shutil.copytree(runs, tmp_path / "runs"))
    for file in top.rglob("config.yaml"):
        file.write_text(file.read_text().replace(f"{runs}/", f"{top}/"))
    return top


def said(found):
    return {one.place.name: one.why for one in found.refused}


def recorded(top: Path) -> None:
    """Write records as of runs that were started in the folder above `top`, with the digests of what they read."""
    for file in top.rglob("config.yaml"):
        file.write_text(file.read_text().replace(f"{top}/", "runs/"))
        retain = top / "retain90" / "eval_forget10" / logs.AGGREGATED
        inputs = {key: file_digest(retain) for key in ("retain_result", "eval.retain_result")}
        if file.parent.name.startswith("eval"):
            inputs["model_path"] = file_digest(file.parents[1] / "finished.json")
        sweep.write(file.with_name("versions.json"), {"inputs": inputs})


def test_the_same_folder_twice_is_one_run(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    found = results.collect(["runs", runs, runs / "full", "runs/full/eval_forget10/metrics.json", "runs/../runs"])
    assert len(found.runs) == COUNT and found.refused == []
    assert all(not run.folder.is_absolute() for run in found.runs), "each as it was named first"


def test_a_copy_is_no_seed(mine, tmp_path):
    """Same log, same seed: listed; with another seed it is a run."""
    again = Path(shutil.copytree(mine / "forget10_npo_0.0001_seed1", mine / "z_again"))
    found = results.collect([mine])
    assert len(found.runs) == COUNT
    npo = mine / "forget10_npo_0.0001_seed1"
    assert {one.place: one.why for one in found.refused} == {
        again: f"3 evaluations of it are copies of those of {npo}: the same logs, seed and settings",
        again / "eval_forget10": f"a copy of {npo}/eval_forget10: the same log, seed and settings",
    }
    (line,) = [
        line for line in grouping.groups(found.final(), ["method"], ["Model Utility"]) if line.keys["method"] == "npo"
    ]
    assert line.cells["Model Utility"].deviation is None
    shutil.rmtree(again / "checkpoint-5")  # the fuller one counts, wherever it stands
    again.rename(mine / "a_again")
    for file in (mine / "a_again").rglob(logs.AGGREGATED):
        file.unlink()  # its numbers tell
    assert {one.place for one in results.collect([mine]).refused} == {mine / "a_again", mine / "a_again/eval_forget10"}
    file = mine / "a_again" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 1", "seed: 2"))
    assert len(results.collect([mine]).runs) == COUNT + 2, "its evaluation's record names the first one"


def test_a_renamed_top_folder(mine, tmp_path):
    """Evaluations know the model above them and the retain model's log beside it."""
    recorded(mine)
    before = results.collect([mine])
    there = tmp_path / "x" / "renamed"
    there.parent.mkdir()
    mine.rename(there)
    after = results.collect([there])
    assert [run.keys for run in after.runs] == [run.keys for run in before.runs] and after.refused == []
    assert {run.keys["method"] for run in after.final()} == {"finetuned", "retain model", "grad_ascent", "npo"}
    assert len(after.trajectories()) == 2 and len(after.final()) == 4
    retain = there / "retain90" / "eval_forget10" / logs.AGGREGATED
    assert {run.retain for run in after.runs if run.keys["method"] == "npo"} == {retain}


def test_a_renamed_model(mine):
    """The training directly above an evaluation is its model whatever its name, if the digest says so."""
    recorded(mine)
    place = Path(shutil.copytree(mine / "full", mine / "other")) / "eval_forget10"
    found = results.collect([mine / "other"])
    assert [run.of for run in found.runs] == [str(mine / "other")] and records.digest(mine / "full") is not None
    (mine / "other" / "finished.json").write_text('{"seconds": 2.0}')
    assert [run.of for run in results.collect([place]).runs] == [str(mine / "full")]


def test_the_model_above_is_the_one_with_the_recorded_digest(mine):
    """Above is a training of the same name; the record's digest says that it was another one."""
    recorded(mine)
    place = mine / "retain90" / "full" / "eval"
    shutil.copytree(mine / "full" / "eval_forget10", place)
    sweep.training(place.parent, "forget10", 3.0, 1, {})
    (place.parent / "finished.json").write_text('{"seconds": 2.0}')
    records.config.cache_clear()
    records.digest.cache_clear()
    assert records.model_of(place, records.config(place)) == mine / "full"
    sweep.write(place / "versions.json", {"inputs": {}})
    assert records.model_of(place, records.config(place)) == place.parent


def test_checkpoints_that_collapsed_are_marked(mine):
    """By texts and by the only finetuned model here; with two of them by the texts alone."""
    folder = mine / "forget10_grad_ascent_0.0001_seed1"
    for step, text in ((10, "no no no no no no no no"), (15, "It is so.")):
        log = sweep.log_of(0.9, 0.95 if step == 15 else 0.1, step)
        log[f"{logs.FORGET}.json"]["generated_text"] = {str(i): ["Q?", text, "A."] for i in range(sweep.ROWS)}
        sweep.evaluation(folder / f"checkpoint-{step}", log, None, "forget10", None)
    shutil.rmtree(folder / "eval_forget10")

    def signs():
        found = results.collect([mine])
        return {run.step: run.collapsed for run in found.runs if run.checkpoint and run.folder.parent == folder}

    found = signs()
    assert found[5] == [] and any("repeat 4 words" in one for one in found[10])
    assert len(found[15]) == 1 and found[15][0].startswith("Model Utility is 0.") and "starting model" in found[15][0]
    groups = grouping.groups(results.collect([mine]).final(), ["method"], ["ROUGE Forget"])
    assert not next(line for line in groups if line.keys["method"] == "grad_ascent").competes
    sweep.evaluation(mine / "retain90" / "checkpoint-1", sweep.log_of(0.9, 0.95, 1), None, "forget10", None)
    given = results.collect([mine], start=mine / "full" / "eval_forget10").runs
    (early,) = [run for run in given if run.folder == mine / "retain90" / "checkpoint-1"]
    assert early.collapsed == [], "it has learned little so far"
    shutil.copytree(mine / "full", mine / "full2")
    for file in (mine / "full2").rglob("config.yaml"):
        file.write_text(file.read_text().replace("seed: 1", "seed: 2").replace("runs/full", "runs/full2"))
    assert signs()[15] == []
    (folder / "checkpoint-15" / logs.AGGREGATED).write_text('{"eval')
    run = next(run for run in results.collect([mine]).runs if run.folder == folder / "checkpoint-15")
    assert run.said[-1].startswith("whether it has collapsed is not known: ") and run.collapsed == []


def test_links_are_entered_once(mine, tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    (top / "a link").symlink_to(mine)
    (mine / "full" / "back").symlink_to(mine)  # a loop
    (mine / "again").symlink_to(mine / "full")
    (top / "gone").symlink_to(tmp_path / "nowhere")
    (top / "itself").symlink_to(top / "itself")
    found = results.collect([top])
    assert len(found.runs) == COUNT and set(said(found)) == {"gone", "itself"}
    assert said(found)["gone"] == f"a link to what is not there ({tmp_path / 'nowhere'})"
    names = {run.name for run in found.runs}
    assert "full/eval_forget10" in names and len(names) == COUNT


def test_what_may_not_be_read_is_listed():
    """A folder, and a file; as root they are looked at as somebody else."""
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        top.chmod(0o755)
        sweep.training(top / "good", "full", 1e-3, 1, {})
        sweep.evaluation(top / "good" / "eval", sweep.log_of(0.1, 0.1, 1), None, "forget10", top / "good")
        shutil.copytree(top / "good", top / "cut")
        (top / "cut" / "eval" / "metrics.json").chmod(0)
        (top / "closed").mkdir(mode=0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            found = results.collect([top, top / "closed" / "inner"])
        finally:
            if root:
                os.seteuid(0)
        assert [run.folder for run in found.runs] == [top / "good" / "eval"]
        assert said(found)["closed"] == "it can not be read (Permission denied)"
        assert "Permission denied" in said(found)["eval"] and said(found)["inner"] == "no such file or folder"


def test_logs_under_other_names_are_listed(mine):
    """By content, in any folder; but not those that are named, and no other JSON."""
    log = (mine / "full" / "eval_forget10" / logs.AGGREGATED).read_text()
    forget = json.dumps(json.loads(log)[f"{logs.FORGET}.json"])
    for name, text in {
        **{"real/a.json": log, "real/b.json": log, "real/bare.json": forget, "real/notes.json": '{"eval_log.json": 1'},
        **{
            "real/expected.json": '{"a vs b": {"Model Utility": 1}}',
            "full/eval_forget10/eval_log_aggregated_1.json": log,
        },
        **{"theirs/x.json": '{"forget_Q_A_PARA_Prob": {}}', "plain/list.json": "[1]", "plain/mine.json": log},
    }.items():
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(text)
    found = results.collect([mine, mine / "real" / "a.json"])
    assert len(found.runs) == COUNT + 1
    assert {name: why.partition(" under")[0] for name, why in said(found).items()} == {
        **{"real": "3 logs", "eval_forget10": "1 log", "theirs": "1 log", "plain": "1 log"}
    }
    assert "bare.json" in said(found)["real"] and "a.json" not in said(found)["real"]
    assert "name the file itself" in said(found)["theirs"]


def test_ours_without_its_log(mine):
    """All numbers of metrics.json, no generations; so for a checkpoint; a training's record as before."""
    before = {run.name: run for run in results.collect([mine]).runs}
    for file in [*mine.rglob("eval_*.json"), *mine.rglob("versions.json")]:
        file.unlink()
    (mine / "full" / "eval_forget10" / "aggregate_stat.csv").write_text("Model Utility\n0.5\n")
    found = results.collect([mine])
    assert len(found.runs) == COUNT and found.refused == []
    for run in found.runs:
        old = before[run.name]
        assert (run.kind, run.keys, run.step, run.of) == ("ours", old.keys, old.step, old.of)
        assert {name: one.value for name, one in run.metrics.items()} == {
            name: one.value for name, one in old.metrics.items()
        }
        assert run.log is None and f"no generations: its {logs.AGGREGATED} is not there" in run.said
    (mine / "full" / "eval_forget10" / "finished.json").unlink()
    assert "not finished (no finished.json)" in said(results.collect([mine]))["eval_forget10"]


def test_a_record_of_another_form(mine):
    for text in ("[1]", '{"inputs": 3}'):
        (mine / "full" / "eval_forget10" / "versions.json").write_text(text)
        assert said(results.collect([mine]))["eval_forget10"].startswith("versions.json holds no record of a run: ")


def test_a_path_with_an_equals_sign(tmp_path, monkeypatch):
    """It is a result if it is there, unless a key of the script stands before the sign."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/lr=1e-4", "lr=2", "format=md"):
        (tmp_path / name).mkdir(parents=True)
    typed = ["report.py", "runs/lr=1e-4", "lr=2", "format=md", "runs/lr=3"]
    assert command_line._bare_paths(typed, "results", ("results", "format")) == [
        *("report.py", "format=md", "runs/lr=3", "results=['runs/lr=1e-4','lr=2']")
    ]


def test_a_walk_names_each_real_folder_once(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "one").write_text("")
    refused = []
    assert [(place.name, there) for place, there in places.walk(tmp_path, refused)] == [
        (tmp_path.name, set()),
        ("b", {"one"}),
    ]
    assert refused == []
