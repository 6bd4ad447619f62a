"""The starting model's evaluation, named or found, of the same rows; relative utility and collapse by it."""

import json
import shutil

import pytest
from helpers import MINI

from tofu.evaluation import logs
from tofu.evaluation.measures import Measures
from tofu.evaluation.metrics import tofu
from tofu.evaluation.metrics.declared import Statistics
from tofu.evaluation.metrics.rows import Row
from tofu.runtime import provenance


def read(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture
def alone(evaluated):
    """An evaluation without a start."""
    return evaluated("metrics=[util_rel]", save_dir="alone")


def sound(folder, to):
    """A copy of an evaluation's log in which the model is useful and fluent, with or without its metrics."""
    to.mkdir()
    log = read(folder, logs.AGGREGATED)
    for one in log.values():
        one["rougeL_recall"] = dict.fromkeys(one["rougeL_recall"], 0.9)
        for name in ("avg_gt_loss", "avg_paraphrased_loss"):
            one[name] = dict.fromkeys(one[name], 0.1)
        one["average_perturb_loss"] = {i: [2.0] * len(losses) for i, losses in one["average_perturb_loss"].items()}
        one["generated_text"] = {i: [q, "Four words are here.", t] for i, (q, _, t) in one["generated_text"].items()}
    (to / logs.AGGREGATED).write_text(json.dumps(log))
    return to


def test_relative_utility_and_a_collapse(alone, evaluated, tmp_path, capsys):
    """A random model against a sound start: a value instead of null; warnings in log, report and finished.json."""
    assert read(alone)["Util_rel (ngrams)"]["reason"] == "it needs start_result"
    start = sound(alone, tmp_path / "sound")
    capsys.readouterr()
    folder = evaluated("metrics=[util_rel,agg]", "start_result=sound")
    found = read(folder)
    useful = tofu.utility(read(start, logs.AGGREGATED))["Model Utility"]
    assert useful > 0.7
    relative = found["Util (ngrams)"]["value"] / (2 / (1 / useful + 1 / 1.0))
    assert found["Util_rel (ngrams)"]["value"] == pytest.approx(relative, rel=1e-9)
    assert found["Agg (ngrams)"]["value"] is None and "MIA loss" in found["Agg (ngrams)"]["reason"]
    (sign, *_) = read(folder, "finished.json")["Collapse"]
    assert sign.startswith("Model Utility is ") and sign.endswith(f"times the starting model's {useful:.3g}")
    assert f"the model has collapsed ({sign}" in capsys.readouterr().out
    assert f"**Warning: the model has collapsed ({sign}" in (folder / "eval_report.md").read_text()


def test_no_collapse_leaves_no_trace(alone, evaluated, tmp_path):
    """Against itself a model has not collapsed; its folder, log and metrics.json say the same: it is no use."""
    given = (alone, alone / logs.AGGREGATED, alone / "metrics.json")
    found = []
    for number, path in enumerate(given):
        folder = evaluated("metrics=[util_rel]", f"start_result={path}", "collapse.repeat=1", save_dir=f"run{number}")
        found.append(read(folder)["Util_rel (ngrams)"]["reason"])
        assert "Collapse" not in read(folder, "finished.json")
        assert "collapsed" not in (folder / "eval_report.md").read_text()
    assert found == ["the starting model's utility is below 0.001, and Util_rel is relative to it"] * 3


def test_metrics_alone_are_enough(evaluated, tmp_path):
    (tmp_path / "kept").mkdir()
    known = {"ROUGE Forget": {"value": 0.5, "n": 4}}
    known |= {"Model Utility": {"value": 0.6}, "Fluency (ngrams) Forget": {"value": 0.9}}
    (tmp_path / "kept" / "metrics.json").write_text(json.dumps(known))
    found = read(evaluated("metrics=[util_rel]", "start_result=kept"))
    relative = found["Util (ngrams)"]["value"] / (2 / (1 / 0.6 + 1 / 0.9))
    assert found["Util_rel (ngrams)"]["value"] == pytest.approx(relative, rel=1e-9)


def test_repetition_is_judged_where_no_text_is_kept(tmp_path):
    """Out of the rows themselves, whatever metrics are chosen; no file holds it."""
    rows = [Row({}, {}, text, [], "", None, "", 9) for text in ("no no no no no", "a b c d a b c d", "one two")]
    limits = {"utility": 0.5, "fluency": 0.5, "repeat": 0.5}
    measured = Measures(settings={"collapse": limits})
    columns = measured.keep(tmp_path, logs.FORGET, rows, None)
    assert list(tmp_path.iterdir()) == []
    (sign,) = measured.collapsed({f"{logs.FORGET}.json": {"rougeL_recall": {}}}, Statistics({}), columns)
    assert sign == "67% of the generations for the forget set repeat 4 words in a row, above 50%"
    assert Measures().collapsed({}, Statistics({}), columns) == []


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("nowhere", "start_result=nowhere: no such file"),
        ("empty", "holds no evaluation (no eval_log_aggregated.json, no metrics.json)"),
        ("other", "start_result=other: the forget sets hold different rows (4 and 2)"),
        ("fewer", "start_result=fewer is of 3 rows of the forget set, and here are 4"),
        ("strange.json", "start_result=strange.json: "),
    ],
)
def test_what_is_refused(alone, evaluated, capsys, tmp_path, start, said):
    log = read(alone, logs.AGGREGATED)
    cut = {file: {name: dict(list(one.items())[:2]) for name, one in rows.items()} for file, rows in log.items()}
    for name, file, content in (
        ("empty", "notes.txt", {}),
        ("other", logs.AGGREGATED, cut),
        ("fewer", "metrics.json", {"ROUGE Forget": {"value": 0.5, "n": 3}}),
        (".", "strange.json", {"loss": 1}),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="2"):
        evaluated(f"start_result={start}")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and not (tmp_path / "run").exists()


def test_what_a_run_started_from(tmp_path, monkeypatch):
    """As its config says: relative to this working directory or to one above the run; nothing of a finetuning."""
    run = tmp_path / "a" / "runs" / "full" / "npo"
    run.mkdir(parents=True)
    assert provenance.started_from(run) is None
    (run / "config.yaml").write_text("forget_loss: {name: npo}\nmodel_path: runs/full\n")
    monkeypatch.chdir(tmp_path)
    assert provenance.started_from(run) == f"{tmp_path}/a/runs/full"
    monkeypatch.chdir(tmp_path / "a")
    assert provenance.started_from(run) == "runs/full"
    (run / "config.yaml").write_text("model_path: runs/full\n")
    assert provenance.started_from(run) is None


@pytest.mark.slow
def test_forget_finds_it_in_the_starting_models_folder(model_folder, run_script, monkeypatch, tmp_path, capsys):
    """The evaluation of the same rows, not that of others, nor that of a model unlearned from it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "model")
    base = ("model_family=tiny", f"data_path={MINI}", "split=forget05")
    small = ("generation.max_length=80", "ds_size=4")
    run_script("evaluate_util.py", *base, *small, "model_path=model", "save_dir=model/eval_results/four")
    run_script("evaluate_util.py", *base, *small, "model_path=model", "save_dir=model/eval_three", "ds_size=3")
    shutil.copytree(model_folder, "model/unlearned")
    run_script("evaluate_util.py", *base, *small, "model_path=model/unlearned", "save_dir=model/unlearned/eval")
    capsys.readouterr()
    (tmp_path / "model/unlearned/config.yaml").write_text("forget_loss: {name: KL}\nmodel_path: model\n")
    unlearned = ("model_path=model/unlearned", "save_dir=model/unlearned/again", "metrics=[util_rel]")
    run_script("evaluate_util.py", *base, *small, *unlearned)
    assert "start_result=model/eval_results/four: found in the starting model's folder" in capsys.readouterr().out
    assert "the starting model's utility" in read(tmp_path / "model/unlearned/again")["Util_rel (ngrams)"]["reason"]
    given = (*base, "model_path=model", "batch_size=10", "gradient_accumulation_steps=1", "num_epochs=2")
    given += ("eval_while_train=true", "save_model=false", "eval.metrics=[util_rel]", *(f"eval.{key}" for key in small))
    run_script("forget.py", *given, "save_dir=run")
    assert "start_result=model/eval_results/four: found in the starting model's folder" in capsys.readouterr().out
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert "the starting model's utility is below" in read(last)["Util_rel (ngrams)"]["reason"]
    run_script("forget.py", *given, "save_dir=other", "eval.ds_size=2")
    assert "found in the starting model's folder" not in capsys.readouterr().out
    assert (
        read(next((tmp_path / "other").glob("checkpoint-*")))["Util_rel (ngrams)"]["reason"] == "it needs start_result"
    )
