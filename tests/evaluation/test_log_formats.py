"""Logs of other suites: OpenUnlearning's golden files give its golden numbers; ours written in its format come back."""

import json
import math

import numpy as np
import pytest
from helpers import GOLDEN, MINI, SHARED, needs_shared

from tofu.evaluation import log_formats, logs
from tofu.evaluation.metrics import privacy
from tofu.evaluation.metrics import tofu as tofu_metrics

UTILITY = ("retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised")
UTILITY += tuple(f"{prefix}_{metric}" for prefix in ("retain", "ra", "wf") for metric in ("Q_A_ROUGE", "Truth_Ratio"))


def reduced(model: str) -> dict:
    return json.loads((GOLDEN / f"{model}_TOFU_EVAL.json").read_text())


def shared(model: str, name: str = "TOFU_EVAL.json") -> dict:
    return json.loads((SHARED / "golden" / "logs" / model / "openunlearning" / name).read_text())


def aggregate(name: str, rows: list[dict]) -> float:
    """OpenUnlearning's aggregate of one metric, from its numbers per row."""
    if name.lower().endswith("truth_ratio"):
        scores = np.array([row["score"] for row in rows])
        return np.minimum(scores, 1 / scores).mean() if name.startswith("forget") else np.maximum(0, 1 - scores).mean()
    return np.mean([row["rougeL_recall" if name.endswith("ROUGE") else "prob"] for row in rows])


def exact_ks(first: np.ndarray, second: np.ndarray) -> float:
    """The p-value of two samples of n: the share of the C(2n, n) orders that are as far apart, by counting them.

    An order of both samples is a path in a grid from (0, 0) to (n, n), and its distance the largest |i - j| on it.
    """
    n = len(first)
    distance = max(abs((first <= x).sum() - (second <= x).sum()) for x in (*first, *second))
    paths = {(0, 0): 1}
    for i in range(n + 1):
        for j in range(n + 1):
            if i + j > 0:
                paths[i, j] = (paths.get((i - 1, j), 0) + paths.get((i, j - 1), 0)) if abs(i - j) < distance else 0
    every = math.comb(2 * n, n)
    return (every - paths[n, n]) / every


def log_ratios(raw: dict) -> np.ndarray:
    """Of every row of the forget set, the loss of the paraphrase minus the mean loss of the perturbed answers."""
    right, wrong = (raw[f"forget_Q_A_{name}_Prob"]["value_by_index"] for name in ("PARA", "PERT"))
    return np.array([row["avg_loss"] - np.mean(wrong[i]["avg_loss"]) for i, row in right.items()])


@pytest.fixture(
    params=["reduced", *(pytest.param(name, marks=needs_shared) for name in ("tiny-llama", "tiny-llama-ga"))]
)
def openunlearning(request) -> tuple[dict, dict, dict]:
    """A TOFU_EVAL.json of OpenUnlearning's with its aggregates, the retain model's, and its summary.

    The reduced one has a few rows of tiny-llama's; its aggregates are computed here.
    """
    if request.param != "reduced":
        return shared(request.param), shared("tiny-llama-retain90"), shared(request.param, "TOFU_SUMMARY.json")
    raw, retain = reduced("tiny-llama"), reduced("tiny-llama-retain90")
    summary = {name: aggregate(name, list(metric["value_by_index"].values())) for name, metric in raw.items()}
    summary["forget_quality"] = exact_ks(log_ratios(raw), log_ratios(retain))
    summary["model_utility"] = len(UTILITY) / sum(1 / summary[name] for name in UTILITY)
    return {name: {**raw.get(name, {}), "agg_value": value} for name, value in summary.items()}, retain, summary


def test_golden_openunlearning(openunlearning):
    """Its forget quality to 1e-6 relative, its model utility to 1e-6."""
    raw, retain, _ = openunlearning
    scores = tofu_metrics.statistics(log_formats.as_aggregated(raw), log_formats.as_aggregated(retain))
    assert scores.values["Forget Quality"] == pytest.approx(raw["forget_quality"]["agg_value"], rel=1e-6)
    assert scores.values["Model Utility"] == pytest.approx(raw["model_utility"]["agg_value"], abs=1e-6)
    assert scores.rows["Forget Rows"] == len(raw["forget_Q_A_Prob"]["value_by_index"])
    assert scores.values["Prob. Forget"] == pytest.approx(raw["forget_Q_A_Prob"]["agg_value"], abs=1e-6)
    assert scores.values["ROUGE Forget"] == pytest.approx(raw["forget_Q_A_ROUGE"]["agg_value"], abs=1e-6)


def test_written_in_openunlearnings_format_is_its_own(openunlearning):
    """Golden file -> our log -> its format: its own numbers to 1e-6; and read back, the same to the last bit."""
    raw, retain, its = openunlearning
    log, retain = log_formats.as_aggregated(raw), log_formats.as_aggregated(retain)
    scores = tofu_metrics.statistics(log, retain)
    f1 = {
        f"{logs.TASKS[ours]}.json": {
            i: row["rougeL_f1"] for i, row in raw[f"{prefix}_Q_A_ROUGE"]["value_by_index"].items()
        }
        for prefix, ours in log_formats.PREFIXES.items()
    }
    written, summary = log_formats.to_openunlearning(log, scores, f1)
    assert list(written) == sorted(written) and set(written) <= set(raw)
    for name, metric in written.items():
        assert metric["agg_value"] == pytest.approx(raw[name]["agg_value"], rel=1e-6, abs=1e-6), name
        for i, row in metric.get("value_by_index", {}).items():
            for key, value in row.items():
                expected = raw[name]["value_by_index"][i][key]
                assert value == (expected if isinstance(value, str) else pytest.approx(expected, rel=1e-5, abs=1e-7)), (
                    name
                )
    assert summary == pytest.approx({name: its[name] for name in summary}, rel=1e-6, abs=1e-6)
    again = tofu_metrics.statistics(log_formats.as_aggregated(json.loads(json.dumps(written))), retain)
    assert again == scores


def test_forget_truth_ratio_alone_is_enough_for_forget_quality(caplog):
    """Stored scores only: log R = log(score), so the ranks and the KS test are those of the losses."""
    ratios = {"0": 2.0, "1": 0.5, "2": 0.25}
    log = log_formats.as_aggregated(
        {"forget_truth_ratio": {"value_by_index": {i: {"score": score} for i, score in ratios.items()}}}
    )
    found = logs.columns(log, logs.FORGET, logs.RIGHT, logs.WRONG)
    assert tofu_metrics.log_ratio(found[logs.RIGHT], found[logs.WRONG]) == pytest.approx(
        [math.log(r) for r in ratios.values()]
    )
    assert tofu_metrics.forget_quality(log, log).p_value == 1 and "prob_mean" not in caplog.text
    log_formats.as_aggregated({"forget_truth_ratio": {"value_by_index": {"0": {"score": 0.5}}}})
    assert "prob_mean" in caplog.text


def test_a_bare_forget_log_is_one():
    one = {logs.RIGHT: {"0": 1.0}, logs.WRONG: {"0": [2.0]}}
    assert log_formats.as_aggregated(one) == {"eval_log_forget.json": one}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({}, "an empty log"),
        ([1], "not an aggregated log"),
        ({"loss": 1, "steps": 2}, "neither eval_log_forget.json.*but loss, steps"),
    ],
)
def test_what_is_no_log_is_refused(raw, why):
    with pytest.raises(ValueError, match=why):
        log_formats.as_aggregated(raw)


def test_a_row_without_its_loss_is_told(tmp_path):
    row = {"value_by_index": {"0": {"prob": 0.5}}}
    raw = {name: row for name in ("forget_Q_A_Prob", "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob")}
    (tmp_path / "log.json").write_text(json.dumps(raw))
    with pytest.raises(log_formats.BadInput, match="retain_result=.*a row without 'avg_loss'"):
        log_formats.read(str(tmp_path / "log.json"), "retain_result")


def test_what_we_write_is_read_back(model_folder, tmp_path):
    """An evaluation with save_format=openunlearning, all rows: its two files hold the scores of its own logs."""
    from helpers import evaluate

    log = evaluate(model_folder, MINI, tmp_path, ds_size=8, max_length=80, save_format=("tofu", "openunlearning"))
    raw = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert tofu_metrics.statistics(log_formats.as_aggregated(raw), log) == tofu_metrics.statistics(log, log)
    assert raw["forget_quality"] == {"agg_value": None}  # no retain log was given
    summary = json.loads((tmp_path / "TOFU_SUMMARY.json").read_text())
    assert set(summary) == {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "model_utility"}


BEYOND = {  # what OpenUnlearning's file has of metrics that the benchmark's log has not
    *("exact_memorization", "extraction_strength", "mia_gradnorm", "mia_loss", "mia_min_k", "mia_min_k_plus_plus"),
    *("mia_reference", "mia_zlib", "privleak"),
}


def test_the_keys_of_the_metrics_that_were_computed(evaluated, model_folder):
    """With everything on all 31 of the golden file; a group alone adds its own; the default's file is as it was."""
    retain = evaluated("metrics=privacy", save_dir="retain") / logs.AGGREGATED
    ours = ("save_format=openunlearning", f"retain_result={retain}")
    files = {}
    for name, args in (
        ("default", ()),
        ("memorisation", ("metrics=memorisation", "compat=openunlearning")),
        ("all", ("metrics=[memorisation,privacy,mia_gradient_norm]", f"reference_model={model_folder}")),
    ):
        folder = evaluated(*ours, *args, save_dir=name)
        files[name] = [json.loads((folder / file).read_text()) for file in ("TOFU_EVAL.json", "TOFU_SUMMARY.json")]
    (default, _), (memorisation, _), (whole, summary) = files.values()
    assert len(whole) == 31 and whole.keys() - default.keys() == BEYOND and summary.keys() >= BEYOND
    assert memorisation.keys() - default.keys() == {"exact_memorization", "extraction_strength"}
    for name, value in default.items():
        assert whole[name] == memorisation[name] == value, name
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in BEYOND:
        ours = {**log_formats.OF_ROWS, **privacy.THEIRS, "privleak": "PrivLeak"}[name]
        assert whole[name]["agg_value"] == metrics[ours]["value"], name
    assert (
        whole["mia_loss"]["forget"]["value_by_index"]["0"]["score"]
        == whole["forget_Q_A_Prob"]["value_by_index"]["0"]["avg_loss"]
    )
    one = memorisation["extraction_strength"]["value_by_index"]
    assert all(row["score"] > 0 for row in one.values()) and len(one) == 4  # 1 / n where nothing is right
    if SHARED.is_dir():
        golden = shared("tiny-llama")
        assert whole.keys() == golden.keys()
        for name in BEYOND:
            assert whole[name].keys() == golden[name].keys(), name


@pytest.mark.slow
@needs_shared
def test_the_golden_numbers_through_the_command_line(run_script, tmp_path):
    """All 31 aggregates of OpenUnlearning's own evaluation of all rows, from one command with everything on."""
    models, retain = SHARED / "golden" / "models", SHARED / "golden" / "logs" / "tiny-llama-retain90" / "openunlearning"
    run_script(
        *("evaluate_util.py", "model_family=llama2-7b", f"data_path={SHARED / 'tofu'}", "ds_size=null"),
        *(f"model_path={models / 'tiny-llama'}", f"reference_model={models / 'tiny-llama-retain90'}", "metrics=all"),
        *("compat=openunlearning", "save_format=[tofu,openunlearning]", "holdout.split=retain_perturbed"),
        *("generation.max_length=500", "generation.max_new_tokens=200", f"retain_result={retain}/TOFU_EVAL.json"),
        *(f"save_dir={tmp_path}/out", "progress=false"),
    )
    ours, golden = json.loads((tmp_path / "out" / "TOFU_EVAL.json").read_text()), shared("tiny-llama")
    assert ours.keys() == golden.keys() and len(ours) == 31
    found, expected = ({name: one["agg_value"] for name, one in raw.items()} for raw in (ours, golden))
    assert found.pop("forget_quality") == pytest.approx(expected.pop("forget_quality"), rel=1e-6)
    assert found == pytest.approx(expected, abs=1e-3)
