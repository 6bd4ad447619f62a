"""Statistics over evaluation logs: model utility, forget quality, the leaderboard's row. No model, no I/O.

A log here is an aggregated one: file name -> metric -> {row number as a string: value}, as `eval_log_aggregated.json`
holds it; lists in row order, which forks of the benchmark write, are understood too.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ks_2samp

TASKS = {  # the leaderboard's name of each set -> its log's name, without .json
    "Real Authors": "eval_real_author_wo_options",
    "Real World": "eval_real_world_wo_options",
    "Retain": "eval_log",
    "Forget": "eval_log_forget",
}
FORGET = TASKS["Forget"]
RIGHT, WRONG = "avg_paraphrased_loss", "average_perturb_loss"  # mean token losses, nats: a float and a list a row
COLUMNS = (
    *(f"{metric} {name}" for name in TASKS for metric in ("ROUGE", "Prob.", "Truth Ratio")),
    *("Model Utility", "Forget Quality", "Method", "Submitted By"),
)


class ForgetQuality(NamedTuple):
    """A two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget set."""

    p_value: float  # forget quality, in (0, 1]: 1 is indistinguishable from the model that never saw the forget set
    statistic: float  # the largest distance of the two empirical distributions, in [0, 1]
    n: int  # rows on each side


def rows(log: Mapping[str, Any], task: str, metric: str) -> dict[str, Any]:
    """One metric of one set, in row order: row number as a string -> value as logged.

    Raises:
        ValueError: no aggregated log, or the set, the metric or its rows are missing.
    """
    if not isinstance(log, Mapping):
        raise ValueError("not an aggregated log: its top level must be the names of the sets' logs")
    if not log:
        raise ValueError("an empty log: the original code's evaluation during training writes one; evaluate from disk")
    found = log.get(f"{task}.json")
    if not isinstance(found, Mapping):
        raise ValueError(f"no {task}.json in the log (it has {', '.join(list(log)[:6])}): evaluate that set too")
    values = found.get(metric)
    if isinstance(values, list):
        values = {str(i): value for i, value in enumerate(values)}
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{task}.json: no {metric} in the log")
    if strange := [key for key in values if not key.isdecimal()]:
        raise ValueError(f"{task}.json: {metric} has a row {strange[0]!r}; rows are named by their numbers")
    return {key: values[key] for key in sorted(values, key=int)}


def columns(log: Mapping[str, Any], task: str, *names: str) -> dict[str, list[np.ndarray]]:
    """Metrics of one set in row order: () a row, or (answers,) a row for those of the perturbed answers.

    Raises:
        ValueError: see `rows`; or a value that is no finite number; or metrics of different rows.
    """
    logged = {name: rows(log, task, name) for name in names}
    for name, values in logged.items():
        if list(values) != list(logged[names[0]]):
            raise ValueError(
                f"{task}.json: {names[0]} has {len(logged[names[0]])} rows and {name} {len(values)}, which are not the "
                "same: the log is not whole; make it again"
            )
    return {name: [_number(row, task, name, key) for key, row in values.items()] for name, values in logged.items()}


def _number(value: Any, task: str, name: str, key: str) -> np.ndarray:
    try:
        number = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        number = np.array(np.nan)
    if number.ndim != (name == WRONG) or not number.size or not np.isfinite(number).all():
        what = "a list of finite numbers" if name == WRONG else "a finite number"
        raise ValueError(f"{task}.json: {name} of row {key} is {value!r}, not {what}")
    return number


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


def set_scores(log: Mapping[str, Any], name: str, truth_ratio: str = "geometric") -> dict[str, float]:
    """ROUGE-L recall, probability and truth ratio of one set, each a mean over rows in [0, 1].

    The two real-world sets' probability is among the options. The truth ratio counts max(0, 1 - R) where knowing is
    good and min(R, 1 / R) on the forget set.
    """
    found = columns(log, TASKS[name], "rougeL_recall", "avg_gt_loss", RIGHT, WRONG)
    logs = log_ratio(found[RIGHT], found[WRONG], truth_ratio)
    score = np.exp(-np.abs(logs)) if name == "Forget" else -np.expm1(np.minimum(0, logs))
    options = found[WRONG] if name in ("Real Authors", "Real World") else None
    return {
        f"ROUGE {name}": float(np.mean(found["rougeL_recall"])),
        f"Prob. {name}": float(probability(found["avg_gt_loss"], options).mean()),
        f"Truth Ratio {name}": float(score.mean()),
    }


def utility(log: Mapping[str, Any], truth_ratio: str = "geometric") -> dict[str, float]:
    """The twelve set scores and `Model Utility`, the harmonic mean of the nine that are not the forget set's.

    Raises:
        ValueError: see `columns` and `log_ratio`.
    """
    scores = {}
    for name in TASKS:
        scores |= set_scores(log, name, truth_ratio)
    nine = [value for name, value in scores.items() if not name.endswith("Forget")]
    return {**scores, "Model Utility": harmonic_mean(nine)}


def forget_quality(log: Mapping[str, Any], retain: Mapping[str, Any], truth_ratio: str = "geometric") -> ForgetQuality:
    """How like a model that never saw the forget set: see `ForgetQuality`.

    The test sees only order, so it takes log R: any monotone transform of both sides gives the same.

    Args:
        log: the unlearned model's.
        retain: that of a model finetuned on the retain set alone.

    Raises:
        ValueError: the two logs hold different rows; or see `columns` and `log_ratio`.
    """
    ours = columns(log, FORGET, RIGHT, WRONG)
    try:
        theirs = columns(retain, FORGET, RIGHT, WRONG)
    except ValueError as error:
        raise ValueError(f"retain log: {error}") from None
    same_rows(log, retain)
    test = ks_2samp(*(log_ratio(one[RIGHT], one[WRONG], truth_ratio) for one in (ours, theirs)))
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(ours[RIGHT]))


def same_rows(log: Mapping[str, Any], retain: Mapping[str, Any]) -> None:
    """Raise ValueError unless both logs hold the same rows of the forget set, by number and, where logged, by answer.

    Row 0 of forget05 is row 200 of forget10, so equal numbers alone would let two splits cut to one ds_size pass.
    """
    ours, theirs = (list(rows(one, FORGET, RIGHT)) for one in (log, retain))
    remedy = "evaluate both with the same split and ds_size (ds_size=null for all rows)"
    if ours != theirs:
        raise ValueError(f"the forget sets hold different rows ({len(ours)} and {len(theirs)}): {remedy}")
    if all(one[f"{FORGET}.json"].get("generated_text") for one in (log, retain)):
        first, second = (rows(one, FORGET, "generated_text") for one in (log, retain))
        pairs = [
            (_letters(first[key][-1]), _letters(second[key][-1])) for key in ours if key in first and key in second
        ]
        other = sum(not (a.startswith(b) or b.startswith(a)) for a, b in pairs)  # the original logs answers cut short
        if other > len(pairs) / 2:
            raise ValueError(f"the forget sets hold different rows ({other} of {len(pairs)} answers differ): {remedy}")


def _letters(text: str) -> str:
    """A text without what a tokenizer's round trip may change."""
    return "".join(filter(str.isalnum, text)).lower()


def partial_row(log: Mapping[str, Any], retain: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What a log of some of the four sets allows: those sets' scores, and forget quality with the forget set."""
    scores = {}
    for name, task in TASKS.items():
        if f"{task}.json" in log:
            scores |= set_scores(log, name)
    if retain is not None and f"{FORGET}.json" in log:
        scores["Forget Quality"] = forget_quality(log, retain).p_value
    return scores


def leaderboard_row(
    log: Mapping[str, Any], retain: Mapping[str, Any] | None, method: str, submitted_by: str
) -> dict[str, float | str | None]:
    """One line of the leaderboard, by column; without a retain log its forget quality is None."""
    scores = utility(log)
    quality = None if retain is None else forget_quality(log, retain).p_value
    found = {**scores, "Forget Quality": quality, "Method": method, "Submitted By": submitted_by}
    return {name: found[name] for name in COLUMNS}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the leaderboard's CSV, a header first; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
