"""Logs of other suites: OpenUnlearning's golden files give its golden numbers; ours written in its format come back."""

import json
import math

import pytest
from conftest import MINI, SHARED, needs_shared

from tofu.evaluation import log_formats, logs
from tofu.evaluation.metrics import tofu as tofu_metrics


def golden(model: str, name: str = "TOFU_EVAL.json") -> dict:
    return json.loads((SHARED / "golden" / "logs" / model / "openunlearning" / name).read_text())


@needs_shared
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-llama-ga"])
def test_golden_openunlearning(model):
    """Its forget quality over all 400 rows to 1e-6 relative, its model utility to 1e-6."""
    raw = golden(model)
    log, retain = (log_formats.as_aggregated(golden(name)) for name in (model, "tiny-llama-retain90"))
    scores = tofu_metrics.statistics(log, retain)
    assert scores.values["Forget Quality"] == pytest.approx(raw["forget_quality"]["agg_value"], rel=1e-6)
    assert scores.values["Model Utility"] == pytest.approx(raw["model_utility"]["agg_value"], abs=1e-6)
    assert scores.rows["Forget Rows"] == 400
    assert scores.values["Prob. Forget"] == pytest.approx(raw["forget_Q_A_Prob"]["agg_value"], abs=1e-6)
    assert scores.values["ROUGE Forget"] == pytest.approx(raw["forget_Q_A_ROUGE"]["agg_value"], abs=1e-6)


@needs_shared
def test_written_in_openunlearnings_format_is_its_own():
    """Golden file -> our log -> its format: its own numbers to 1e-6; and read back, the same to the last bit."""
    raw = golden("tiny-llama")
    log, retain = (log_formats.as_aggregated(golden(name)) for name in ("tiny-llama", "tiny-llama-retain90"))
    scores = tofu_metrics.statistics(log, retain)
    f1 = {
        f"{logs.TASKS[ours]}.json": {
            i: row["rougeL_f1"] for i, row in raw[f"{prefix}_Q_A_ROUGE"]["value_by_index"].items()
        }
        for prefix, ours in log_formats.PREFIXES.items()
    }
    written, summary = log_formats.to_openunlearning(log, scores, f1)
    assert list(written) == sorted(written) and set(written) < set(raw)
    for name, metric in written.items():
        assert metric["agg_value"] == pytest.approx(raw[name]["agg_value"], rel=1e-6, abs=1e-6), name
        for i, row in metric.get("value_by_index", {}).items():
            for key, value in row.items():
                expected = raw[name]["value_by_index"][i][key]
                assert value == (expected if isinstance(value, str) else pytest.approx(expected, rel=1e-5, abs=1e-7)), (
                    name
                )
    its = golden("tiny-llama", "TOFU_SUMMARY.json")
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
    from test_evaluate_util import evaluate

    log = evaluate(model_folder, MINI, tmp_path, ds_size=8, max_length=80, save_format=("tofu", "openunlearning"))
    raw = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert tofu_metrics.statistics(log_formats.as_aggregated(raw), log) == tofu_metrics.statistics(log, log)
    assert raw["forget_quality"] == {"agg_value": None}  # no retain log was given
    summary = json.loads((tmp_path / "TOFU_SUMMARY.json").read_text())
    assert set(summary) == {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "model_utility"}
