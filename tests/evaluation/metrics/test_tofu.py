"""Statistics of logs against published logs, the golden runs, and a log worked out by hand."""

import csv
import io
import json
import math

import numpy as np
import pytest
from helpers import GOLDEN, SHARED, needs_shared

from tofu.evaluation import logs
from tofu.evaluation.metrics import tofu as tofu_metrics


def read(*names: str) -> dict:
    return json.loads(SHARED.joinpath("golden", *names).read_text())


def test_published_log():
    """What the statistics read of a published log: every clone has it."""
    log, retain, expected = (
        json.loads((GOLDEN / f"llama2-7b_{name}.json").read_text())
        for name in ("full", "retain90_forget", "full_expected")
    )
    compare_published(log, retain, expected)


@needs_shared
@pytest.mark.parametrize("model", ["llama2-7b_full", "llama2-7b_retain90"])
def test_whole_published_logs(model):
    expected = read("real_logs", "expected.json")[f"{model} vs llama2-7b_retain90"]
    log, retain = read("real_logs", f"{model}.json"), read("real_logs", "llama2-7b_retain90.json")
    compare_published(log, retain, expected)


def compare_published(log: dict, retain: dict, expected: dict) -> None:
    geometric = tofu_metrics.utility(log)
    for name, value in expected["geometric"].items():
        assert geometric[name] == pytest.approx(value, abs=1e-9), name
    arithmetic = tofu_metrics.utility(log, "arithmetic")
    for name, value in expected["arithmetic"].items():
        ours = name if name == "Model Utility" else f"Truth Ratio {name.removesuffix(' Truth Ratio')}"
        assert arithmetic[ours] == pytest.approx(value, abs=1e-9), name
    quality = tofu_metrics.forget_quality(log, retain)
    assert quality.p_value == pytest.approx(expected["Forget Quality"], rel=1e-9)
    assert quality.statistic == pytest.approx(expected["KS Test Forget"], abs=1e-9)
    assert quality.n == 300


@needs_shared
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-llama-ga", "tiny-llama-retain90"])
def test_golden_rows(model):
    text = SHARED.joinpath("golden", "logs", model, "aggr_result.csv").read_text()
    expected = next(csv.DictReader(io.StringIO(text)))
    retain = read("logs", "tiny-llama-retain90", "eval_log_aggregated.json")
    scores = tofu_metrics.statistics(read("logs", model, "eval_log_aggregated.json"), retain)
    row = tofu_metrics.leaderboard_row(scores, model, "golden")
    assert list(row) == list(expected)
    for name, value in expected.items():
        if name not in ("Method", "Submitted By"):
            assert row[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    assert tofu_metrics.to_csv([row]).splitlines()[0] == text.splitlines()[0]


def test_worked_numbers():
    """Mean losses of two rows, three wrong answers each."""
    wrong = [np.array([1, 3, 2.6]), np.array([2, 1.5, 4])]
    assert tofu_metrics.probability([0.801627, 0.941432]) == pytest.approx([0.448599, 0.390069], abs=1e-6)
    assert tofu_metrics.probability([0.7, 1.2], wrong) == pytest.approx([0.502350, 0.444255], abs=1e-6)
    log = one_log(1.0, [2.0])
    for one in log.values():
        one |= {
            "avg_paraphrased_loss": {"0": 2.0, "1": 0.5},
            "average_perturb_loss": dict(zip("01", wrong, strict=True)),
        }
    for kind, ratio, forget, retain in (
        ("geometric", [0.818731, 0.135335], 0.477033, 0.522967),
        ("arithmetic", [1.211658, 0.207069], 0.516192, 0.396466),
    ):
        assert np.exp(tofu_metrics.log_ratio([2.0, 0.5], wrong, kind)) == pytest.approx(ratio, abs=1e-6)
        scores = tofu_metrics.utility(log, kind)
        assert scores["Truth Ratio Forget"] == pytest.approx(forget, abs=1e-6)
        assert scores["Truth Ratio Retain"] == pytest.approx(retain, abs=1e-6)


def test_harmonic_mean():
    """A harmonic mean, worked by hand."""
    nine = [0.9895, 0.9857, 0.4747, 0.4555, 0.9330, 0.5962, 0.4186, 0.8825, 0.5390]
    assert tofu_metrics.harmonic_mean(nine) == pytest.approx(0.622684, abs=1e-6)
    assert (
        tofu_metrics.harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3) and tofu_metrics.harmonic_mean([0.5, 0.0]) == 0
    )


@pytest.mark.parametrize(("n", "least"), [(40, 1.86e-23), (200, 1.94e-119), (300, 1.48e-179), (400, 1.06e-239)])
def test_forget_quality_is_exact(n, least):
    """Two samples wholly apart have p = 2 / C(2n, n); a log against itself 1."""
    low, high = one_log(1.0, [2.0], rows=n), one_log(2.0, [1.0], rows=n)
    quality = tofu_metrics.forget_quality(low, high)
    assert quality.statistic == 1 and quality.n == n
    assert quality.p_value == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9)
    assert quality.p_value == pytest.approx(least, rel=5e-3)
    assert tofu_metrics.forget_quality(low, low).p_value == 1


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
        f"{task}.json": {name: dict.fromkeys(keys, v) for name, v in columns.items()} for task in logs.TASKS.values()
    }


def test_by_hand():
    """P = 1/2 for the right answer, 1/4 and 1/8 for the wrong ones: R is sqrt(1/32) / (1/2) or (3/16) / (1/2)."""
    log = one_log(math.log(2), [math.log(4), math.log(8)])
    geometric, arithmetic = tofu_metrics.utility(log), tofu_metrics.utility(log, "arithmetic")
    assert geometric["Prob. Retain"] == pytest.approx(0.5)
    assert geometric["Prob. Real World"] == pytest.approx(0.5 / 0.875)
    assert geometric["Truth Ratio Retain"] == pytest.approx(1 - 2 / math.sqrt(32))
    assert geometric["Truth Ratio Forget"] == pytest.approx(2 / math.sqrt(32))
    assert arithmetic["Truth Ratio Forget"] == pytest.approx(3 / 8)
    nine = [0.5, 0.5, 1 - 2 / math.sqrt(32)] + 2 * [0.5, 4 / 7, 1 - 2 / math.sqrt(32)]
    assert geometric["Model Utility"] == pytest.approx(9 / sum(1 / x for x in nine))
    assert tofu_metrics.utility(one_log(1.0, [2.0], rouge=0.0))["Model Utility"] == 0


def test_collapsed_models_do_not_overflow():
    scores = tofu_metrics.utility(one_log(5000.0, [1.0]))
    assert scores["Truth Ratio Forget"] == pytest.approx(0) and scores["Model Utility"] == 0
    assert tofu_metrics.forget_quality(one_log(5000.0, [1.0], rows=9), one_log(1.0, [2.0], rows=9)).p_value < 0.001


def test_lists_and_rows_of_unequal_numbers_of_wrong_answers():
    log = one_log(1.0, [2.0, 3.0])
    log["eval_log_forget.json"] = {
        **{name: [1.0, 1.0] for name in ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")},
        "average_perturb_loss": [[2.0, 3.0], [2.5]],
    }
    assert tofu_metrics.utility(log)["Truth Ratio Forget"] == pytest.approx(math.exp(-1.5))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda log: log.clear(), "^an empty log"),
        (lambda log: log.pop("eval_log_forget.json"), "^no eval_log_forget.json .*has eval_real_author"),
        (lambda log: log.update({"eval_log_forget.json": [1]}), "^no eval_log_forget.json"),
        (lambda log: forget(log).pop("avg_paraphrased_loss"), "no avg_paraphrased_loss"),
        (lambda log: forget(log).update(avg_paraphrased_loss={}), "no avg_paraphrased_loss"),
        (lambda log: forget(log)["avg_paraphrased_loss"].update({"1": math.nan}), "eval_log_forget.*of row 1 is nan"),
        (lambda log: forget(log)["avg_paraphrased_loss"].update({"1": None}), "row 1 is None"),
        (lambda log: forget(log)["avg_paraphrased_loss"].update({"1": "low"}), "row 1 is 'low'"),
        (lambda log: forget(log)["average_perturb_loss"].update({"0": []}), "row 0 is .*not a list of finite"),
        (lambda log: forget(log)["average_perturb_loss"].update({"0": [1.0, math.inf]}), "row 0 is .*not a list"),
        (lambda log: forget(log)["average_perturb_loss"].update({"0": 1.0}), "row 0 is 1.0, not a list"),
        (lambda log: forget(log)["average_perturb_loss"].pop("1"), "avg_paraphrased_loss has 2 rows and .* 1"),
        (lambda log: forget(log)["avg_paraphrased_loss"].update({"last": 1.0}), "a row 'last'"),
    ],
)
def test_refusals(spoil, why):
    """Every statistic refuses, whichever of the two logs is spoilt, in one line without a traceback's noise."""
    log = one_log(1.0, [2.0])
    spoil(log)
    with pytest.raises(ValueError, match=why.replace("avg_paraphrased_loss has", "rougeL_recall has")):
        tofu_metrics.utility(log)
    with pytest.raises(ValueError, match=why):
        tofu_metrics.forget_quality(log, one_log(1.0, [2.0]))
    with pytest.raises(ValueError, match="^retain log: .*" + why.replace("^", "")) as error:
        tofu_metrics.statistics(one_log(1.0, [2.0]), log)
    assert "\n" not in str(error.value)


def forget(log: dict) -> dict:
    return log["eval_log_forget.json"]


def test_what_is_no_log_is_refused():
    for log in ([], 3, "eval_log.json", None):
        with pytest.raises(ValueError, match="not an aggregated log"):
            tofu_metrics.utility(log)
    with pytest.raises(ValueError, match="truth_ratio=harmonic: geometric or arithmetic"):
        tofu_metrics.forget_quality(one_log(1.0, [2.0]), one_log(1.0, [2.0]), "harmonic")


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"different rows \(2 and 3\).*ds_size=null"):
        tofu_metrics.forget_quality(one_log(1.0, [2.0], rows=2), one_log(1.0, [2.0], rows=3))


def test_equally_many_rows_of_another_split_are_refused():
    """Row numbers start at 0 in every split; the logged answers tell. The original logs them decoded and cut."""

    def told(*answers: str) -> dict:
        log = one_log(1.0, [2.0])
        forget(log)["generated_text"] = {str(i): ["Q?", "...", answer] for i, answer in enumerate(answers)}
        return log

    whole = told("Born in Oslo, 1950.", "Her book is 'Tide'.")
    assert tofu_metrics.forget_quality(whole, told("Born in Oslo , 1950", "Her book is")).p_value == 1
    assert tofu_metrics.forget_quality(whole, one_log(1.0, [2.0])).p_value == 1  # nothing to tell by
    with pytest.raises(ValueError, match="2 of 2 answers differ.*same split"):
        tofu_metrics.forget_quality(whole, told("Her father fished.", "He writes in Malay."))


def test_rows_are_paired_by_number():
    """Text order puts row 10 before row 2; written in any order, the logs are the same."""
    log, turned = one_log(1.0, [2.0], rows=12), one_log(1.0, [2.0], rows=12)
    for one in (log, turned):
        forget(one)["avg_paraphrased_loss"] = {str(i): 1.0 + i for i in range(12)}
    forget(turned)["average_perturb_loss"] = dict(reversed(forget(turned)["average_perturb_loss"].items()))
    assert list(logs.rows(turned, logs.FORGET, "average_perturb_loss")) == [str(i) for i in range(12)]
    assert tofu_metrics.forget_quality(log, turned) == tofu_metrics.ForgetQuality(1.0, 0.0, 12)
    assert tofu_metrics.utility(log) == tofu_metrics.utility(turned)


def test_row_without_a_retain_log():
    row = tofu_metrics.leaderboard_row(tofu_metrics.statistics(one_log(1.0, [2.0]), None), "a, b", "me")
    assert row["Forget Quality"] is None and tuple(row) == tofu_metrics.COLUMNS
    again = next(csv.DictReader(io.StringIO(tofu_metrics.to_csv([row]))))
    assert again["Forget Quality"] == "" and again["Method"] == "a, b"
    assert float(again["Model Utility"]) == row["Model Utility"]
