"""Statistics of logs against published logs, the golden runs, and a log worked out by hand."""

import csv
import io
import json
import math

import pytest
from conftest import SHARED, needs_shared

import metrics


def read(*names: str) -> dict:
    return json.loads(SHARED.joinpath("golden", *names).read_text())


@needs_shared
@pytest.mark.parametrize("model", ["llama2-7b_full", "llama2-7b_retain90"])
def test_published_logs(model):
    expected = read("real_logs", "expected.json")[f"{model} vs llama2-7b_retain90"]
    log, retain = read("real_logs", f"{model}.json"), read("real_logs", "llama2-7b_retain90.json")
    geometric = metrics.utility(log)
    for name, value in expected["geometric"].items():
        assert geometric[name] == pytest.approx(value, abs=1e-9), name
    arithmetic = metrics.utility(log, "arithmetic")
    for name, value in expected["arithmetic"].items():
        ours = name if name == "Model Utility" else f"Truth Ratio {name.removesuffix(' Truth Ratio')}"
        assert arithmetic[ours] == pytest.approx(value, abs=1e-9), name
    quality = metrics.forget_quality(log, retain)
    assert quality.p_value == pytest.approx(expected["Forget Quality"], rel=1e-9)
    assert quality.statistic == pytest.approx(expected["KS Test Forget"], abs=1e-9)
    assert quality.n == 300


@needs_shared
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-llama-ga", "tiny-llama-retain90"])
def test_golden_rows(model):
    text = SHARED.joinpath("golden", "logs", model, "aggr_result.csv").read_text()
    expected = next(csv.DictReader(io.StringIO(text)))
    retain = read("logs", "tiny-llama-retain90", "eval_log_aggregated.json")
    row = metrics.leaderboard_row(read("logs", model, "eval_log_aggregated.json"), retain, model, "golden")
    assert list(row) == list(expected)
    for name, value in expected.items():
        if name not in ("Method", "Submitted By"):
            assert row[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    assert metrics.to_csv([row]).splitlines()[0] == text.splitlines()[0]


def one_log(right: float, wrong: list[float], rouge: float = 0.5, rows: int = 2) -> dict:
    """Every row of every set alike: mean losses `right` and `wrong`."""
    keys = [str(i) for i in range(rows)]
    columns = {
        "avg_gt_loss": right,
        "avg_paraphrased_loss": right,
        "average_perturb_loss": wrong,
        "rougeL_recall": rouge,
    }
    return {
        f"{task}.json": {name: dict.fromkeys(keys, v) for name, v in columns.items()} for task in metrics.TASKS.values()
    }


def test_by_hand():
    """P = 1/2 for the right answer, 1/4 and 1/8 for the wrong ones: R is sqrt(1/32) / (1/2) or (3/16) / (1/2)."""
    log = one_log(math.log(2), [math.log(4), math.log(8)])
    geometric, arithmetic = metrics.utility(log), metrics.utility(log, "arithmetic")
    assert geometric["Prob. Retain"] == pytest.approx(0.5)
    assert geometric["Prob. Real World"] == pytest.approx(0.5 / 0.875)
    assert geometric["Truth Ratio Retain"] == pytest.approx(1 - 2 / math.sqrt(32))
    assert geometric["Truth Ratio Forget"] == pytest.approx(2 / math.sqrt(32))
    assert arithmetic["Truth Ratio Forget"] == pytest.approx(3 / 8)
    nine = [0.5, 0.5, 1 - 2 / math.sqrt(32)] + 2 * [0.5, 4 / 7, 1 - 2 / math.sqrt(32)]
    assert geometric["Model Utility"] == pytest.approx(9 / sum(1 / x for x in nine))
    assert metrics.utility(one_log(1.0, [2.0], rouge=0.0))["Model Utility"] == 0


def test_collapsed_models_do_not_overflow():
    scores = metrics.utility(one_log(5000.0, [1.0]))
    assert scores["Truth Ratio Forget"] == pytest.approx(0) and scores["Model Utility"] == 0
    assert metrics.forget_quality(one_log(5000.0, [1.0], rows=9), one_log(1.0, [2.0], rows=9)).p_value < 0.001


def test_lists_and_rows_of_unequal_numbers_of_wrong_answers():
    log = one_log(1.0, [2.0, 3.0])
    log["eval_log_forget.json"] = {
        **{name: [1.0, 1.0] for name in ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")},
        "average_perturb_loss": [[2.0, 3.0], [2.5]],
    }
    assert metrics.utility(log)["Truth Ratio Forget"] == pytest.approx(math.exp(-1.5))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda log: log.clear(), "empty log"),
        (lambda log: log.pop("eval_log.json"), "no eval_log.json"),
        (lambda log: log["eval_log.json"].pop("avg_gt_loss"), "no avg_gt_loss"),
        (
            lambda log: log["eval_log_forget.json"]["avg_paraphrased_loss"].update({"1": math.nan}),
            "row 1 is not a finite",
        ),
    ],
)
def test_refusals(spoil, why):
    log = one_log(1.0, [2.0])
    spoil(log)
    with pytest.raises(ValueError, match=why):
        metrics.utility(log)


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"different rows \(2 and 3\).*ds_size=null"):
        metrics.forget_quality(one_log(1.0, [2.0], rows=2), one_log(1.0, [2.0], rows=3))
