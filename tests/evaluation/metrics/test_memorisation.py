"""Metrics of a row on worked numbers, on made rows, and against OpenUnlearning's golden values row by row."""

import json
import math

import numpy as np
import pytest
from helpers import SHARED, checked, needs_shared

import data_module
from tofu.evaluation import inference, measures, row_logs, sets
from tofu.evaluation.inference import TokenScores
from tofu.evaluation.metrics import memorisation, table
from tofu.evaluation.metrics.rows import Row, mean_of
from tofu.models import families, folders, loading


def tokens(nll, right=None, ended: int = 1) -> TokenScores:
    """Scores of an answer whose end token, if there is one, has the last of the losses and is wrong."""
    nll = np.asarray(nll, dtype=float)
    right = np.array([*(right if right is not None else [False] * (len(nll) - ended)), *[False] * ended], dtype=bool)
    return TokenScores(nll, right, np.zeros(len(nll)), np.ones(len(nll)))


def row(right=None, *, gt=None, a=None, w=(), text="", truth="", paraphrase=None, ended: bool = True, **more) -> Row:
    """A row: which tokens are right, or the mean losses of the answer, the paraphrase and the wrong answers."""
    n = 1 if right is None else len(right)
    answers = {("gt", 0): tokens([1.0 if gt is None else gt] * (n + ended), right, ended)}
    if a is not None:
        answers["paraphrased", 0] = tokens([a, a])
    answers |= {("perturb", j): tokens([loss] * 3) for j, loss in enumerate(w)}
    return Row(answers, {answer: ended for answer in answers}, text, [], truth, paraphrase, "", 9, **more)


PREDICTED, LABELS = [3, 1, 4, 1, 5, 9, 2], [3, 1, 0, 1, 5, 9, 2]
ALIKE = [p == t for p, t in zip(PREDICTED, LABELS, strict=True)]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    ("right", "strength", "theirs", "exact"),
    [
        (ALIKE, 4 / 7, 4 / 7, 6 / 7),  # 0.571429 and 0.857143
        ([False] * 7, 0.0, 1 / 7, 0.0),
        ([True] * 7, 1.0, 1.0, 1.0),
        ([False] * 6 + [True], 1 / 7, 1 / 7, 1 / 7),
        ([True] * 6 + [False], 0.0, 1 / 7, 6 / 7),
        ([True], 1.0, 1.0, 1.0),
        ([False], 0.0, 1.0, 0.0),
    ],
)
def test_extraction_and_exact_memorisation(right, strength, theirs, exact, ended):
    """The end token counts in neither, where the answer has one."""
    one = row(right, ended=ended)
    assert memorisation.extraction_strength(one) == pytest.approx(strength, abs=1e-12)
    assert memorisation.extraction_strength_theirs(one) == pytest.approx(theirs, abs=1e-12)
    assert memorisation.exact_memorisation(one) == pytest.approx(exact, abs=1e-12)


def test_extraction_strength_is_its_definition():
    """The fewest tokens k after which all predictions are the labels, tried one by one."""
    draw = np.random.default_rng(0)
    for n in (1, 2, 3, 8):
        for _ in range(20):
            right = draw.random(n) < 0.7
            k = next(k for k in range(n + 1) if right[k:].all())
            assert memorisation.extraction_strength(row(right)) == pytest.approx(1 - k / n, abs=1e-12)


def test_an_answer_of_its_end_token_alone_has_none():
    empty = row([])
    for function in (
        memorisation.extraction_strength,
        memorisation.extraction_strength_theirs,
        memorisation.exact_memorisation,
    ):
        assert function(empty) is None
    assert memorisation.probability(empty) == pytest.approx(math.exp(-1))


def test_truth_ratios():
    """a = [2, 0.5], w = [[1, 3, 2.6], [2, 1.5, 4]]."""
    both = [row(a=2.0, w=(1, 3, 2.6)), row(a=0.5, w=(2, 1.5, 4))]
    for name, value in (
        ("Truth Ratio (geometric) Forget", 0.477033),
        ("Truth Ratio (arithmetic) Forget", 0.516192),
        ("Truth Ratio (geometric) Retain", 0.522967),
        ("Truth Ratio (arithmetic) Retain", 0.396466),
        ("Truth Ratio (prob_mean) Forget", 0.715316),
        ("Truth Ratio (prob_mean) Retain", 0.715316),
    ):
        (metric,) = [one for one in memorisation.METRICS if one.name == name]
        assert mean_of([metric.function(one) for one in both], name).value == pytest.approx(value, abs=1e-6)
    assert [memorisation.prob_mean_theirs(one) for one in both] == pytest.approx(
        [memorisation.prob_mean(one) for one in both], abs=1e-8
    )


def test_a_collapsed_row_has_a_truth_ratio():
    """The losses' difference decides: OpenUnlearning's epsilon would."""
    lost = row(a=800.0, w=(790.0,))
    assert memorisation.prob_mean(lost) == pytest.approx(1 / (1 + math.exp(10)))
    assert memorisation.prob_mean_theirs(lost) == 0
    assert memorisation.prob_mean(row(a=5000.0, w=(1.0,))) == 0 and memorisation.prob_mean(row(a=1.0, w=(5e3,))) == 1
    assert memorisation.prob_mean(row(a=1.0)) is None and memorisation.log_ratio(row(gt=2.0, w=(1.0,))) == 1.0


def test_probabilities():
    one = row(gt=0.801627, a=0.941432)
    assert memorisation.probability(one) == pytest.approx(0.448599, abs=1e-6)
    assert memorisation.paraphrased_probability(one) == pytest.approx(0.390069, abs=1e-6)
    assert memorisation.paraphrased_probability(row(gt=1.0)) is None


def test_rouge():
    """4 of 5 words of the truth in order, in a text of 8; the paraphrase has 2 of 4; other scripts by their words."""
    one = row(
        text="she was born in the old Oslo harbour", truth="She was born near Oslo", paraphrase="Oslo born her boat"
    )
    values = {metric.label: metric.function(one) for metric in memorisation.METRICS if "ROUGE" in metric.name}
    assert values["ROUGE-L Recall"] == values["ROUGE-1 Recall"] == pytest.approx(4 / 5)
    assert values["ROUGE-L F1"] == values["ROUGE-1 F1"] == pytest.approx(2 * 0.8 * 0.5 / 1.3)
    assert values["Paraphrased ROUGE"] == pytest.approx(1 / 4)
    assert memorisation.paraphrased_rouge(row(text="a", truth="a")) is None
    other = row(text="Осло город", truth="Осло", rouge="unicode")
    assert memorisation._rouge("rougeL", "recall")(other) == 1


def test_completion_of_what_was_given():
    assert memorisation.verbatim_completion(row(extra={"generation": ("in Oslo", "in Oslo")})) == 1
    assert memorisation.verbatim_completion(row(extra={"generation": ("in Oslo", "in Rome")})) == 0.5
    assert memorisation.verbatim_completion(row(extra={"generation": None})) is None
    assert memorisation.verbatim_completion(row()) is None


def test_choices():
    """A group, a name on all its sets, all; what costs a pass is chosen by its own name or all."""
    names = [metric.name for metric in table.chosen(["memorisation"])]
    assert "Extraction Strength Retain" in names and "Model Utility" in names
    assert "Verbatim Completion Forget" not in names
    assert "Verbatim Completion Forget" in [metric.name for metric in table.chosen(["verbatim_completion"])]
    assert [metric.name for metric in table.chosen(["all"])] == [metric.name for metric in table.METRICS]
    alone = [metric.name for metric in table.chosen(["extraction_strength"]) if metric.group != "tofu"]
    assert alone == ["Extraction Strength Forget", "Extraction Strength Retain"]
    assert {metric.group for metric in table.chosen([])} == {"tofu"}
    assert checked("eval_everything", "model_path=o/m", "metrics=memorisation").metrics == ["memorisation"]


def test_every_metric_is_declared():
    assert len({metric.name for metric in table.METRICS}) == len(table.METRICS)
    before = {column.name for column in table.COLUMNS}
    for metric in table.METRICS:
        assert (
            metric.direction in ("max", "min", "zero", "retain", "none")
            and metric.group in table.GROUPS
            and metric.unit
            and metric.source
        )
        assert metric.of in (*table.SETS, None)
        if metric.of is None and metric.group != "tofu":
            assert set(metric.needs) <= before, f"{metric.name} needs what does not stand before it"
        before.add(metric.name)
    for name in table.NAMES:
        assert name == name.lower() and " " not in name


def scored(model: str, rows: int | None, path=SHARED / "tofu", split: str = "forget10_perturbed") -> list[Row]:
    """The first rows of a forget set as one of the golden models scores them, nothing cut, nothing generated."""
    folder = SHARED / "golden" / "models" / model
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    data = sets.EvalSet("eval_log_forget", data_module.load_rows(str(path), split, keys, rows), *keys)
    tokenizer = folders.load_tokenizer(str(folder), None)
    task = sets.prepare(data, tokenizer, families.family("llama2-7b"), max_length=1000)
    loaded = loading.load(str(folder))
    with inference.ready(loaded, sets.reach(task)):
        found = row_logs.score_rows(loaded, task, False)
    n = len(data.rows)
    return measures.rows_of(task, found, [[]] * n, [""] * n, [{}] * n, "default")


THEIRS = {  # OpenUnlearning's name -> ours, what it calls the number of a row
    "extraction_strength": ("Extraction Strength Forget", "score"),
    "exact_memorization": ("Exact Memorisation Forget", "score"),
    "forget_Q_A_PARA_Prob": ("Paraphrased Probability Forget", "prob"),
    "forget_Q_A_Prob": ("Probability Forget", "prob"),
}


@needs_shared
@pytest.mark.parametrize(
    ("model", "rows"),
    [
        ("tiny-llama", 40),
        *(pytest.param(f"tiny-llama{one}", 400, marks=pytest.mark.slow) for one in ("", "-ga", "-retain90")),
    ],
)
def test_golden_rows(model, rows):
    """Each row to 1e-5, all of them to 1e-6; ours differs in the extraction strength of a total miss alone."""
    golden = json.loads((SHARED / "golden" / "logs" / model / "openunlearning" / "TOFU_EVAL.json").read_text())
    found = scored(model, rows)
    wanted = table.columns(table.chosen(["memorisation"]))
    theirs, ours = (
        table.rows_of([one for one in wanted if one.name in dict(THEIRS.values())], found, which)
        for which in (True, False)
    )
    for name, (metric, key) in THEIRS.items():
        expected = [golden[name]["value_by_index"][str(i)][key] for i in range(rows)]
        assert theirs[metric] == pytest.approx(expected, abs=1e-5), name
        if rows == 400:
            assert np.mean(theirs[metric]) == pytest.approx(golden[name]["agg_value"], abs=1e-6), name
    for one, mine, other in zip(
        found, ours["Extraction Strength Forget"], theirs["Extraction Strength Forget"], strict=True
    ):
        n = len(one.content().right)
        assert (mine, other) == (0, pytest.approx(1 / n)) if not one.content().right[-1] else mine == other
