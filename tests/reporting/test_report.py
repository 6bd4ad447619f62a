"""Results of many runs: read in any format, told where they can't be, as runs.csv, tables and figures."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
from helpers import GOLDEN, REPO, SHARED, needs_shared

import utils
from tofu.evaluation import logs
from tofu.reporting import (
    canvas,
    figures,
    folder,
    foreign,
    grouping,
    interactive,
    latex,
    leaderboard,
    plots,
    records,
    results,
    tables,
)
from tofu.reporting.runs import Number, Run

pd = pytest.importorskip("pandas")
matplotlib = pytest.importorskip("matplotlib")
ONE = {"splits": ("forget10",), "methods": ("grad_ascent", "npo"), "rates": (1e-5, 1e-4)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep of one split, two methods, two rates and two seeds, with checkpoints."""
    top = tmp_path_factory.mktemp("runs")
    sweep.sweep(top, **ONE)
    return top


@pytest.fixture(scope="module")
def found(runs):
    return results.collect([runs])


def test_a_run_knows_what_made_it(found):
    """8 unlearned models with three checkpoints each, two retain models, the finetuned one."""
    assert len(found.runs) == 8 * 4 + 3 and found.refused == []
    run = next(run for run in found.runs if run.name == "forget10_npo_0.0001_seed2/eval_forget10")
    known = ("method", "split", "lr", "seed", "family", "num_epochs", "ds_size", "train_split")
    assert [run.keys[name] for name in known] == ["npo", "forget10", 1e-4, 2, "tiny", 3, 300, "forget10"]
    assert (run.kind, run.step, run.checkpoint) == ("ours", 15, False)
    assert run.retain.is_file() and run.retain.parent.parent.name == "retain90"
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert run.value("Model Utility") == metrics["Model Utility"]["value"]
    assert run.metrics["Model Utility"].file == run.folder / "metrics.json" and run.metrics["Prob. Retain"].n == 12
    assert {run.keys["method"] for run in found.runs} == {"finetuned", "retain model", "grad_ascent", "npo"}
    (way,) = [way for of, way in found.trajectories().items() if of.endswith("forget10_npo_0.0001_seed2")]
    assert [one.step for one in way] == [5, 10, 15] and not way[-1].checkpoint
    assert len(found.final()) == 8 + 3
    text = run.rows()["eval_log_forget.json"]["generated_text"]["0"]
    assert text[0].startswith("Question: ") and len(run.digest) == 64


def test_paths_recorded_elsewhere_are_found_if_the_file_is_the_same(tmp_path):
    (tmp_path / "a" / "runs" / "oracle" / "eval").mkdir(parents=True)
    (tmp_path / "a" / "runs" / "npo").mkdir()
    log = tmp_path / "a" / "runs" / "oracle" / "eval" / "log.json"
    log.write_text("{}")
    at = tmp_path / "a" / "runs" / "npo"
    assert records.located(at, "runs/oracle/eval/log.json") == log
    assert records.located(at, "/gone/elsewhere/oracle/eval/log.json") == log
    assert records.located(at, "runs/oracle/eval/log.json", "0" * 64) is None
    assert records.located(at, "runs/other/eval/log.json") is None


def test_what_can_not_be_read_is_listed_and_stops_nothing(runs, tmp_path):
    """Cut and foreign files, a half-written evaluation, trainings without one: each has its reason."""
    good = tmp_path / "good"
    sweep.training(good, "full", 1e-3, 1, {})
    sweep.evaluation(good / "eval", sweep.log_of(0.1, 0.1, 1), None, "forget10", good)
    cut = tmp_path / "cut"
    sweep.evaluation(cut, sweep.log_of(0.1, 0.1, 1), None, "forget10", good)
    (cut / "metrics.json").write_text('{"a": ')
    half = tmp_path / "half"
    sweep.evaluation(half, sweep.log_of(0.1, 0.1, 1), None, "forget10", good)
    (half / "finished.json").unlink()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "eval_log_forget.json").write_text("{}")
    sweep.training(tmp_path / "bare", "full", 1e-3, 1, {})
    sweep.training(tmp_path / "stopped", "full", 1e-3, 1, {})
    (tmp_path / "stopped" / "finished.json").unlink()
    sweep.write(tmp_path / "nan" / logs.AGGREGATED, {"eval_log_forget.json": {"avg_gt_loss": {"0": None}}})
    sweep.write(tmp_path / "empty" / logs.AGGREGATED, {})
    sweep.write(tmp_path / "list" / logs.AGGREGATED, [1])
    sweep.write(tmp_path / "theirs" / "TOFU_EVAL.json", {"forget_Q_A_Prob": 3})
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "aggregate_stat.csv").write_text("a,b\n1,2\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    other = sweep.write(tmp_path / "notes" / "other.json", {"a": 1})
    read = results.collect([tmp_path, other, tmp_path / "notes", tmp_path / "nowhere"])
    assert [run.name for run in read.runs] == ["eval"]
    said = {one.place.name: one.why for one in read.refused}
    for name, why in {
        **{"cut": "metrics.json is not whole JSON", "half": "an evaluation that is not finished (no finished.json)"},
        **{"set": f"not finished (no {logs.AGGREGATED})", "bare": "a training without an evaluation: python evaluate"},
        **{"stopped": "a training that is not finished", "nan": "eval_log_forget.json", "empty": "an empty log"},
        **{"list": "not an aggregated log", "theirs": "no evaluation log", "csv": "is no leaderboard's CSV"},
        **{"other.json": "no evaluation log", "notes": "no evaluation in it", "nowhere": "no such file or folder"},
    }.items():
        assert why in said[name] and "\n" not in said[name], name
    assert len(said) == 13


def test_a_retain_result_for_those_that_have_none(runs, tmp_path):
    """It is taken for results without one of their own, if the rows are the same; else it is said."""
    sweep.write(tmp_path / "foreign" / logs.AGGREGATED, sweep.log_of(0.5, 0.1, 3))
    sweep.write(tmp_path / "longer" / logs.AGGREGATED, sweep.log_of(0.5, 0.1, 3, rows=14))
    retain = runs / "retain90" / "eval_forget10" / logs.AGGREGATED
    without = results.collect([tmp_path])
    assert all(run.said == ["no forget quality: no retain_result is known"] for run in without.runs)
    compared, longer = results.collect([tmp_path], [retain.parent]).runs
    assert compared.retain == retain and 0 < compared.value("Forget Quality") < 1 and compared.said == []
    assert "different rows (14 and 12)" in longer.said[0] and longer.value("Forget Quality") is None
    with pytest.raises(utils.BadInput, match="retain_result="):
        results.collect([tmp_path], [tmp_path / "gone.json"])


def test_groups_of_runs_that_differ_in_their_seed(found):
    """Keys that follow from the method are no columns; mean and deviation by hand; collapsed ones do not compete."""
    keys = grouping.grouping(found.final())
    assert keys == ["method", "lr"]
    groups = grouping.groups(found.final(), keys, ["Model Utility", "ROUGE Forget"])
    assert [group.method for group in groups][:2] == ["finetuned", "retain model"] and len(groups) == 6
    line = next(group for group in groups if group.keys == {"method": "npo", "lr": 1e-4})
    first, second = (run.value("Model Utility") for run in line.runs)
    cell = line.cells["Model Utility"]
    assert cell.mean == pytest.approx((first + second) / 2) and cell.n == 2
    assert cell.deviation == pytest.approx(abs(first - second) / 2**0.5)
    collapsed = next(group for group in groups if group.keys == {"method": "grad_ascent", "lr": 1e-4})
    assert collapsed.collapsed and collapsed.cells["ROUGE Forget"].rank is None
    ranks = {tuple(group.keys.values()): group.cells["Model Utility"].rank for group in groups}
    assert sorted(rank for rank in ranks.values() if rank) == [1, 2] and ranks["npo", 1e-5] == 1
    with pytest.raises(utils.BadInput, match="group_by=lrr is no key of the runs .did you mean group_by=lr"):
        grouping.grouping(found.final(), ["lrr"])
    with pytest.raises(utils.BadInput, match="metrics=Model Utilit is unknown .did you mean Model Utility"):
        grouping.metrics_of(found.runs, ["Model Utilit"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.000"), (-0.0, "0.000"), (-0.0004999, "-5.0e-04"), (1.9e-4, "1.9e-04"), (-87.0, "-87.000")]
    + [(123.456, "123.5"), (1.0, "1.000"), (2.4e-17, "2.4e-17"), (float("nan"), "nan")],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def test_tables(found):
    """Markdown and LaTeX: bold, underlined, arrows, escapes; a difference to a baseline."""
    keys, metrics = grouping.grouping(found.final()), ["Model Utility", "ROUGE Forget", "Forget Quality"]
    groups = grouping.groups(found.final(), keys, metrics)
    text = tables.to_markdown(groups, metrics)
    assert text.startswith("| method | lr | Model Utility ↑ | ROUGE Forget ↓ | Forget Quality ↑ |")
    assert text.count("**") == 6 and "<u>" in text and "grad\\_ascent †" in text and " ± " in text
    tex = latex.to_latex(groups, metrics, caption="a", label="tab:a")
    titles = (
        r" &  & Model & Forget set & Forget Quality \\ "
        r"\cmidrule(lr){3-3}\cmidrule(lr){4-4}\cmidrule(lr){5-5} "
        r"method & lr & Utility $\uparrow$ & ROUGE $\downarrow$ & $p$ $\uparrow$ \\"
    )
    assert titles in re.sub(r"\\multicolumn\{1\}\{c\}\{(.*?)\}", r"\1", tex).replace("\n", " ")
    for part in (r"\toprule", r"\midrule", r"\textbf{", r"\underline{", r"grad\_ascent $^\dagger$", r"$\uparrow$"):
        assert part in tex
    assert r"\times10^{-" in tex and "±" not in tex and "_ascent" not in tex.replace(r"\_ascent", "")
    minus = tables.differences(groups, "npo", metrics)
    lines = {tuple(group.keys.values()): group.cells["Model Utility"].mean for group in groups}
    for group in minus:  # each with npo's line of the same rate; the finetuned and the retain model have another rate
        rate = group.keys["lr"]
        assert group.cells["Model Utility"].mean == pytest.approx(lines["grad_ascent", rate] - lines["npo", rate])
    assert [tuple(group.keys.values()) for group in minus] == [("grad_ascent", 1e-5), ("grad_ascent", 1e-4)]
    mixed = grouping.groups(found.final(), ["split"], metrics)
    assert not any(group.cells[name].rank for group in mixed for name in metrics)
    full = pd.read_csv(pd.io.common.StringIO(tables.to_csv(groups, metrics)))
    assert list(full["runs"]) == [1, 2, 2, 2, 2, 2] and {"Model Utility std", "Model Utility n"} <= set(full)


def test_a_model_that_is_asked_in_another_way(tmp_path):
    """Two models of each method, one of them evaluated again with other questions: a line between the two."""
    top = tmp_path / "runs"
    sweep.sweep(top, splits=("forget05",), methods=("npo", "rmu"), rates=(1e-4,))
    for method in ("npo", "rmu"):
        model = top / f"forget05_{method}_0.0001_seed1"
        cfg = sweep.evaluation(model / "again", sweep.log_of(0.3, 0.2, 5), None, "forget05", model)
        cfg |= {"question_key": ["question"] * 3 + ["paraphrased_question"], "model_path": str(model)}
        sweep.write(model / "again" / "config.yaml", cfg)
    found = results.collect([top])
    drawn = figures.draw(found, tmp_path / "figures", ["png"])
    assert drawn["robustness"].files == ("robustness.png",)
    axes = plots.robustness(canvas.Material(found.runs, found.final(), {}, canvas.styles(["npo", "rmu"]))).axes
    lines = {line.get_label(): line.get_ydata() for line in axes[0].lines}
    first = {run.keys["method"]: run for run in found.runs if run.name.endswith("seed1/eval_forget05")}
    assert set(lines) == {"npo", "rmu"} and [label.get_text() for label in axes[0].get_xticklabels()][0] == "question"
    page = [one for one in interactive.draw(found, ["ROUGE Forget"]) if one["name"] == "robustness"][0]
    for method, (before, after) in lines.items():
        assert [before, after] in [line["y"] for line in page["data"] if line["name"] == method]
        assert before == first[method].value("ROUGE Forget") and after > before


def test_a_seed_without_a_number(tmp_path):
    """A mean over a NaN is none, and has no deviation."""
    runs_ = [Run(f"{i}", tmp_path, "ours", {"method": "npo", "seed": i}, {}, f"{i}") for i in range(2)]
    for run, value in zip(runs_, (0.5, math.nan), strict=True):
        run.metrics["Model Utility"] = Number(value, "max", tmp_path)
    (line,) = grouping.groups(runs_, ["method"], ["Model Utility"])
    cell = line.cells["Model Utility"]
    assert math.isnan(cell.mean) and cell.deviation is None and cell.n == 2 and tables.cell(cell) == "nan"


def test_names_of_any_length_and_signs(tmp_path):
    """A legend as wide as its figure, with both ends of each name; LaTeX's signs; names that are no UTF-8."""
    assert canvas.short("forget10_grad_ascent_1e-05_seed1", 20) == "forget10_g…-05_seed1"
    with matplotlib.rc_context(canvas.STYLE):
        page, axes = canvas.figure(2)
        for i in range(6):
            axes.plot([0, 1], [i, 1], label=f"tofu_Llama-3.2-1B-Instruct_forget10_a_method_of_mine_with_a_name_{i}")
        canvas.legend(page, axes)
        page.draw_without_rendering()
    shown, whole = page.legends[0].get_window_extent(), page.bbox
    assert whole.x0 <= shown.x0 and shown.x1 <= whole.x1 and len({t.get_text() for t in page.legends[0].texts}) == 6
    assert latex.text("[x]* a_b <c>|") == r"{[}x{]}{*} a\_b \textless{}c\textgreater{}\textbar{}"
    name = os.fsdecode(b"r\xff")
    utils.write_text(tmp_path / "a.csv", f"{name},1\n")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "r\\udcff,1\n"


def test_a_cut_log_costs_its_own_figure_alone(tmp_path):
    """Of two methods one has a log that is cut: the other's distributions are drawn, and it is said."""
    top = tmp_path / "runs"
    sweep.sweep(top, splits=("forget05",), methods=("npo", "rmu"), rates=(1e-4,), seeds=(1,))
    log = top / "forget05_rmu_0.0001_seed1" / "eval_forget05" / logs.AGGREGATED
    found = results.collect([top])
    log.write_text('{"eval_log_forget.json": {')
    drawn = figures.draw(found, tmp_path / "figures", ["svg"])
    said = [one for run in found.runs if run.keys["method"] == "rmu" for one in run.said]
    assert drawn["truth_ratios"].files == ("truth_ratios.svg",) and any("no truth ratios: " in one for one in said)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(found, tmp_path):
    """All tables, without a warning of a line too wide."""
    keys, lines = grouping.grouping(found.final()), []
    for name, metrics in grouping.metrics_of(found.runs).items():
        groups = grouping.measured(grouping.groups(found.final(), keys, metrics))
        lines.append(latex.to_latex(groups, metrics, caption=latex.caption(name), label=f"tab:{name}"))
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    (tmp_path / "t.tex").write_text("\n".join((head, *lines, r"\end{document}")))
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout[-2000:]


def test_the_report(runs, found, run_script, monkeypatch, tmp_path, capsys):
    """A bare path; what stands in runs.csv is the metrics' own; a second report replaces the first, whole, alike."""
    monkeypatch.chdir(tmp_path)
    run_script("report.py", str(runs), "format=[csv,md,tex,svg]", "baseline=npo")
    out = tmp_path / "report"
    lines = list(csv.DictReader((out / "runs.csv").open()))
    assert len(lines) == len(found.runs)
    for line, run in zip(lines, found.runs, strict=True):
        assert line["run"] == run.name and float(line["Model Utility"]) == run.value("Model Utility")
        assert line["log sha256"] == run.digest and line["folder"] == str(run.folder)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    drawn = ("tradeoff", "utility", "truth_ratios", "over_steps", "aggregates", "rates")
    assert names >= {*(f"figures/{name}.svg" for name in drawn), "tables/main.tex", "tables/main_minus_npo.csv"}
    assert set(json.loads((out / folder.RECORD).read_text())["files"]) == names - {folder.RECORD}
    index = (out / "report.md").read_text()
    assert "asked in another way: not drawn, no model was asked in two ways" in index and "collapsed" in index
    before = {name: (out / name).read_bytes() for name in names}
    run_script("report.py", f"results=[{runs}]", "format=[csv,md,tex,svg]", "baseline=npo")
    assert {name: (out / name).read_bytes() for name in names} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    (out / "mine.txt").write_text("")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_script("report.py", str(runs))
    assert "save_dir=report holds something else than a report (mine.txt)" in capsys.readouterr().err


def test_a_leaderboard_of_submissions(runs, tmp_path):
    """Who, what, how to reproduce, the digest; one without its author is listed; the public CSV's columns."""
    for name, text in (
        ("a", "submitted_by: me\nmethod: my|npo\nreproduce: python forget.py forget_loss=npo\n"),
        ("b", "submitted_by: you\nmethod: other\nreproduce: see README\n"),
        ("c", "method: nobody's\nreproduce: x\n"),
    ):
        sweep.write(
            tmp_path / name / "log" / logs.AGGREGATED, sweep.log_of({"a": 0.6, "b": 0.9, "c": 0.5}[name], 0.1, 3)
        )
        (tmp_path / name / leaderboard.SUBMISSION).write_text(text)
    found = results.collect([tmp_path], [runs / "retain90" / "eval_forget10"])
    submitted, refused = leaderboard.submissions(found.runs)
    (why,) = refused
    assert why.place == tmp_path / "c" / "submission.yaml" and why.why == "the submission has no submitted_by"
    text = leaderboard.page(found.runs, submitted)
    lines = [line for line in text.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    qualities = [found.runs[1].value("Forget Quality"), found.runs[0].value("Forget Quality")]
    assert qualities[0] > qualities[1] and ["other | you" in lines[0], "my\\|npo | me" in lines[1]] == [True, True]
    assert found.runs[0].digest in text and "`python forget.py forget_loss=npo`" in text
    rows = list(csv.DictReader(leaderboard.to_csv(found.runs, submitted).splitlines()))
    assert [row["Submitted By"] for row in rows] == ["me", "you", ""] and len(rows[0]) == 16
    assert float(rows[0]["Model Utility"]) == found.runs[0].value("Model Utility")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "results is missing"),
        (("nowhere",), "has no run that can be read: nowhere: no such file or folder"),
        (("a", "results=b"), "name all of them in one list"),
        (("x", "format=gif"), "format=gif is unknown"),
        (("x", "save_dir=taken"), "holds something else than a report (notes.txt)"),
        (("x", "metrics=3"), "it must be a text, or a list of texts"),
    ],
)
def test_what_report_refuses(run_script, monkeypatch, tmp_path, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        run_script("report.py", *args)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_without_the_extra(monkeypatch):
    from tofu.reporting import report

    monkeypatch.setattr(report, "NEEDED", ("pandas", "no_such_package"))
    with pytest.raises(utils.BadInput, match=r"no_such_package is not installed: pip install -e '.\[report\]'"):
        report.require()


def test_a_method_looks_the_same_everywhere():
    """Known methods keep their colour whatever else is there, others take free ones; no two look alike."""
    one, two = canvas.styles(["npo", "rmu", "wga"]), canvas.styles(["npo", "dpo", "undial", "ceu", "pdu", "KL"])
    assert one["npo"] == two["npo"] and one["retain model"] == two["retain model"]
    many = canvas.styles([f"m{i}" for i in range(14)])
    assert len({*many.values()}) == len(many)


def expected_of(run):
    """The golden numbers of a run."""
    if run.folder.name == "real_logs":
        known = json.loads((SHARED / "golden/real_logs/expected.json").read_text())
        one = known[f"{run.log.stem} vs llama2-7b_retain90"]
        return {**one["geometric"], "Forget Quality": one["Forget Quality"], "KS Statistic": one["KS Test Forget"]}
    if run.kind == "openunlearning":
        summary = json.loads((run.folder / "TOFU_SUMMARY.json").read_text())
        return {foreign.NAMES.get(name, name): value for name, value in summary.items()}
    row = next(csv.DictReader((run.folder / "aggr_result.csv").open()))
    return {name: float(value) for name, value in row.items() if name not in ("Method", "Submitted By")}


@needs_shared
def test_all_formats_in_one_report_have_the_golden_numbers():
    """The original's logs, OpenUnlearning's, and the published 7B logs: three retain models, each run with its own."""
    golden = SHARED / "golden"
    real = [golden / "real_logs" / f"llama2-7b_{name}.json" for name in ("full", "retain90")]
    retain = golden / "logs" / "tiny-llama-retain90"
    found = results.collect([golden / "logs", *real], [retain, retain / "openunlearning", real[1]])
    assert len(found.runs) == 8 and found.refused == []
    for run in found.runs:
        expected = expected_of(run)
        assert len(expected) >= 13
        got = {name: run.value(name) for name in expected}
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-300), run.name
    groups = grouping.groups(found.final(), grouping.grouping(found.final()), ["Forget Quality"])
    best = {group.method for group in groups if group.cells["Forget Quality"].rank == 1}
    assert best == {"tiny-llama-ga"}, "a retain model, compared with itself, does not compete"


def test_the_embedded_golden_log(tmp_path):
    """As above with what every clone has: the 7B model's log, compared with the retain model's forget set."""
    expected = json.loads((GOLDEN / "llama2-7b_full_expected.json").read_text())
    (run,) = results.collect([GOLDEN / "llama2-7b_full.json"], GOLDEN / "llama2-7b_retain90_forget.json").runs
    (known,) = [one for one in (expected, *expected.values()) if isinstance(one, dict) and "geometric" in one]
    got = {name: run.value(name) for name in known["geometric"]}
    assert got == pytest.approx(known["geometric"], rel=1e-9)


def test_no_torch():
    code = "import sys, tofu.reporting.figures, tofu.reporting.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert Path(REPO / "report.py").read_text().count("\n") < 40
