"""TOFU's statistics of evaluation logs: model utility, forget quality, the leaderboard's row. No model, no I/O."""

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tofu.evaluation.logs import FORGET, RIGHT, TASKS, WRONG, columns, compared, missing_sets, same_rows, uncompared
from tofu.evaluation.metrics.declared import Metric, Statistics
from tofu.evaluation.metrics.rows import RESAMPLES, interval


class ForgetQuality(NamedTuple):
    """A two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget set."""

    p_value: float  # forget quality, in (0, 1]: 1 is indistinguishable from the model that never saw the forget set
    statistic: float  # the largest distance of the two empirical distributions, in [0, 1]
    n: int  # rows on each side

    @property
    def log10_p(self) -> float:
        """log10 of the p-value, which plots and more than 500 rows need: there the p-value itself is 0 in a float."""
        if self.p_value > 0:
            return math.log10(self.p_value)
        from scipy.stats import kstwobign

        return float(kstwobign.logsf(self.statistic * math.sqrt(self.n / 2))) / math.log(10)  # the limit for many rows


def log_ratio(right: Sequence[np.ndarray], wrong: Sequence[np.ndarray], truth_ratio: str = "geometric") -> np.ndarray:
    """Log of the truth ratio R = mean of the wrong answers' probabilities / the right answer's, row by row.

    Probabilities are length-normalised, exp(-mean token loss), so with the geometric mean log R = loss of the right
    answer - mean loss of the wrong ones.

    Args:
        right: (rows,) mean token losses of the right answer (the paraphrase where there is one), nats.
        wrong: (rows, answers) those of the wrong answers; rows may differ in how many they have.
        truth_ratio: the mean; `geometric` as the leaderboard's script has it, `arithmetic` as the paper writes it.

    Returns:
        (rows,) nats; not clipped, so rows of a collapsed model keep their order.

    Raises:
        ValueError: another `truth_ratio`.

    Source: Maini et al. 2024, arXiv 2401.06121.
    """
    if truth_ratio == "geometric":
        means = [-row.mean() for row in wrong]
    elif truth_ratio == "arithmetic":
        means = [np.logaddexp.reduce(-row) - np.log(len(row)) for row in wrong]
    else:
        raise ValueError(f"truth_ratio={truth_ratio}: geometric or arithmetic")
    return np.asarray(right) + means


def probability(right: Sequence[np.ndarray], wrong: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """(rows,) exp(-mean token loss) of the right answer; given wrong ones, its share in the sum of all answers'.

    Args:
        right, wrong: as of `log_ratio`.
    """
    logp = -np.asarray(right)
    return np.exp(logp if wrong is None else logp - np.logaddexp(logp, [np.logaddexp.reduce(-row) for row in wrong]))


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of values >= 0; 0 if any is 0."""
    return 0.0 if min(values) <= 0 else float(len(values) / np.sum(1 / np.asarray(values, dtype=float)))


LOGGED = ("rougeL_recall", "avg_gt_loss", RIGHT, WRONG)  # the columns that scores read, as a log has them
Columns = Mapping[str, list[np.ndarray]]  # of one set's log, by name


def _rouge(found: Columns, truth_ratio: str) -> np.ndarray:
    """ROUGE-L recall of the generation."""
    return np.asarray(found["rougeL_recall"])


def _probability(found: Columns, truth_ratio: str) -> np.ndarray:
    """The probability of the right answer, per token."""
    return probability(found["avg_gt_loss"])


def _share(found: Columns, truth_ratio: str) -> np.ndarray:
    """The right answer's share among the options' probabilities."""
    return probability(found["avg_gt_loss"], found[WRONG])


def _knows(found: Columns, truth_ratio: str) -> np.ndarray:
    """max(0, 1 - R): how much likelier the right answer is than the wrong ones."""
    return -np.expm1(np.minimum(0, log_ratio(found[RIGHT], found[WRONG], truth_ratio)))


def _indifferent(found: Columns, truth_ratio: str) -> np.ndarray:
    """min(R, 1 / R): how little right and wrong answers differ in likelihood."""
    return np.exp(-np.abs(log_ratio(found[RIGHT], found[WRONG], truth_ratio)))


def _of_set(of: str, probable: Any, truth: Any, direction: str) -> tuple[Metric, ...]:
    """The three scores of one set, each the mean of a value per row."""
    shares = (WRONG,) if probable is _share else ()
    return (
        Metric(f"ROUGE {of}", _rouge, ("rougeL_recall",), direction, "tofu", of, "ROUGE"),
        Metric(f"Prob. {of}", probable, ("avg_gt_loss", *shares), direction, "tofu", of, "Prob."),
        Metric(f"Truth Ratio {of}", truth, (RIGHT, WRONG), "max", "tofu", of, "Truth Ratio"),
    )


SET_METRICS = (
    *_of_set("Real Authors", _share, _knows, "max"),
    *_of_set("Real World", _share, _knows, "max"),
    *_of_set("Retain", _probability, _knows, "max"),
    *_of_set("Forget", _probability, _indifferent, "min"),
)
USEFUL = tuple(metric.name for metric in SET_METRICS if metric.of != "Forget")  # model utility's nine
UTILITY = Metric("Model Utility", harmonic_mean, USEFUL, "max", "tofu")
QUALITY = (  # of the test between both models' truth ratios; each reads a ForgetQuality
    Metric("Forget Quality", lambda test: test.p_value, ("retain log",), "max", "tofu"),
    Metric("KS Statistic", lambda test: test.statistic, ("retain log",), "min", "tofu"),
    Metric("log10 Forget Quality", lambda test: test.log10_p, ("retain log",), "max", "tofu"),
)
METRICS = (*SET_METRICS, UTILITY, *QUALITY)
COLUMNS = (*(metric.name for metric in (*SET_METRICS, UTILITY, QUALITY[0])), "Method", "Submitted By")


def row_scores(log: Mapping[str, Any], of: str, truth_ratio: str = "geometric") -> dict[str, np.ndarray]:
    """What every row of one set counts in its scores, (rows,) each in [0, 1]; a score is the mean.

    ROUGE-L recall; the probability, on the two real-world sets among the options; and the truth ratio, max(0, 1 - R)
    where knowing is good and min(R, 1 / R) on the forget set.

    Args:
        of: the leaderboard's name of the set (TASKS), or any other log's, without .json, that has the same metrics.

    Returns:
        ROUGE, Prob. and Truth Ratio, by these names; of a set without wrong answers those that need none.
    """
    entries = [metric for metric in SET_METRICS if metric.of == (of if of in TASKS else "Retain")]
    if not compared(log, TASKS.get(of, of)):
        entries = [metric for metric in entries if not {RIGHT, WRONG} & set(metric.needs)]
    needs = {name for metric in entries for name in metric.needs}
    found = columns(log, TASKS.get(of, of), *(name for name in LOGGED if name in needs))
    return {str(metric.label): metric.function(found, truth_ratio) for metric in entries}


def set_scores(log: Mapping[str, Any], of: str, truth_ratio: str = "geometric") -> dict[str, float]:
    """ROUGE-L recall, probability and truth ratio of one set: the means of `row_scores`."""
    return {f"{label} {of}": float(rows.mean()) for label, rows in row_scores(log, of, truth_ratio).items()}


def utility(log: Mapping[str, Any], truth_ratio: str = "geometric") -> dict[str, float]:
    """The twelve set scores and `Model Utility`, the harmonic mean of the nine that are not the forget set's.

    Raises:
        ValueError: see `columns` and `log_ratio`.
    """
    scores = {}
    for of in TASKS:
        scores |= set_scores(log, of, truth_ratio)
    return {**scores, UTILITY.name: UTILITY.function([scores[name] for name in UTILITY.needs])}


def forget_quality(log: Mapping[str, Any], retain: Mapping[str, Any], truth_ratio: str = "geometric") -> ForgetQuality:
    """How like a model that never saw the forget set: see `ForgetQuality`.

    The test sees only order, so it takes log R: any monotone transform of both sides gives the same.

    Args:
        log: the unlearned model's.
        retain: that of a model finetuned on the retain set alone.

    Raises:
        ValueError: the two logs hold different rows; or see `columns` and `log_ratio`.
    """
    ours, theirs = _both_log_ratios(log, retain, truth_ratio)
    from scipy.stats import ks_2samp  # scipy takes a second to import

    test: Any = ks_2samp(ours, theirs)  # scipy declares no type for its result
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(ours))


def _both_log_ratios(
    log: Mapping[str, Any], retain: Mapping[str, Any], truth_ratio: str
) -> tuple[np.ndarray, np.ndarray]:
    """The forget set's log R of both models, the same rows in the same order."""
    ours = columns(log, FORGET, RIGHT, WRONG)
    try:
        theirs = columns(retain, FORGET, RIGHT, WRONG)
    except ValueError as error:
        raise ValueError(f"retain log: {error}") from None
    same_rows(log, retain)
    first, second = (log_ratio(one[RIGHT], one[WRONG], truth_ratio) for one in (ours, theirs))
    return first, second


def statistics(log: Mapping[str, Any], retain: Mapping[str, Any] | None, truth_ratio: str = "geometric") -> Statistics:
    """Every metric that a log allows: set scores, model utility where all four sets are there, and with a retain log
    forget quality.

    Raises:
        ValueError: see `columns`, `log_ratio` and `same_rows`.
    """
    lacking = missing_sets(log)
    values: dict[str, float] = {}
    rows: dict[str, int] = {}
    if not lacking and not uncompared(log):
        values = utility(log, truth_ratio)
    else:
        for of in (of for of, task in TASKS.items() if task not in lacking):
            values |= set_scores(log, of, truth_ratio)
    if retain is not None and FORGET not in lacking and compared(log, FORGET):
        test = forget_quality(log, retain, truth_ratio)
        values |= {metric.name: metric.function(test) for metric in QUALITY}
        rows["Forget Rows"] = test.n
    drawn = resampled(log, retain, truth_ratio)
    return Statistics(values, {name: interval(of) for name, of in drawn.items()}, rows, drawn)


def intervals(*args: Any, **kwargs: Any) -> dict[str, list[float]]:
    """Percentile bootstrap intervals, [2.5 %, 97.5 %], of what `resampled` gives, which takes the same arguments."""
    return {name: interval(drawn) for name, drawn in resampled(*args, **kwargs).items()}


def resampled(
    log: Mapping[str, Any],
    retain: Mapping[str, Any] | None = None,
    truth_ratio: str = "geometric",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """(resamples,) what the set scores, model utility and forget quality are of other rows, by name.

    Rows are drawn with replacement, each set's by a stream of its own; for forget quality the same rows of both models.
    A resample repeats rows, so a p-value's interval tends to lie below it: it shows how much hangs on a few rows.

    Args:
        seed: of the draws; the same seed gives the same intervals.
    """
    drawn: dict[str, np.ndarray] = {}  # score -> (resamples,)
    for number, (name, task) in enumerate(TASKS.items()):
        if f"{task}.json" not in log:
            continue
        scores = row_scores(log, name, truth_ratio)
        n = len(scores["ROUGE"])
        picks = np.random.default_rng([seed, number]).integers(n, size=(resamples, n))
        drawn |= {f"{score} {name}": values[picks].mean(1) for score, values in scores.items()}
        if name == "Forget" and retain is not None and compared(log, FORGET):
            ours, theirs = _both_log_ratios(log, retain, truth_ratio)
            drawn[QUALITY[0].name] = np.array([_ks_p(ours[pick], theirs[pick]) for pick in picks])
    if all(name in drawn for name in UTILITY.needs):
        nine = np.transpose([drawn[name] for name in UTILITY.needs])
        drawn[UTILITY.name] = np.array([UTILITY.function(values) for values in nine])
    return drawn


def _ks_p(first: np.ndarray, second: np.ndarray) -> float:
    """`ks_2samp`'s p-value for two samples of one size, which depends on the size and the statistic alone."""
    n = len(first)
    first, second = np.sort(first), np.sort(second)
    at = np.concatenate([first, second])
    steps = np.abs(np.searchsorted(first, at, "right") - np.searchsorted(second, at, "right")).max()
    return _ks_table(n, int(steps))


@functools.cache
def _ks_table(n: int, steps: int) -> float:
    """The p-value of two samples of n whose distribution functions are steps / n apart at most."""
    from scipy.stats import ks_2samp

    ladder = np.arange(n, dtype=float)
    test: Any = ks_2samp(ladder, ladder + (steps - 0.5 if steps else 0.0))
    return float(test.pvalue)


def leaderboard_row(scores: Statistics, method: str, submitted_by: str) -> dict[str, float | str | None]:
    """One line of the leaderboard from `statistics` of all four sets; without a retain log forget quality is None."""
    found = {QUALITY[0].name: None, **scores.values, "Method": method, "Submitted By": submitted_by}
    return {name: found[name] for name in COLUMNS}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the leaderboard's CSV, a header first; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
