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
UTILITY = ("Real Authors", "Real World", "Retain")
COLUMNS = (
    *(f"{metric} {name}" for name in TASKS for metric in ("ROUGE", "Prob.", "Truth Ratio")),
    *("Model Utility", "Forget Quality", "Method", "Submitted By"),
)


class ForgetQuality(NamedTuple):
    """A two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget set."""

    p_value: float  # forget quality, in (0, 1]: 1 is indistinguishable from the model that never saw the forget set
    statistic: float  # the largest distance of the two empirical distributions, in [0, 1]
    n: int  # rows on each side


def column(log: Mapping[str, Any], task: str, metric: str) -> list[np.ndarray]:
    """One metric of one set in row order: a scalar a row, or (answers,) a row for what perturbed answers have.

    Raises:
        ValueError: the set, the metric or the rows are missing, or a value is not finite.
    """
    if not log:
        raise ValueError("an empty log: the original code's evaluation during training writes one; evaluate from disk")
    if f"{task}.json" not in log:
        raise ValueError(f"no {task}.json in the log (it has {', '.join(log)}): evaluate that set too")
    values = log[f"{task}.json"].get(metric)
    if not values:
        raise ValueError(f"{task}.json: no {metric} in the log")
    rows = [values[key] for key in row_keys(values)] if isinstance(values, Mapping) else values
    rows = [np.asarray(row, dtype=float) for row in rows]
    bad = [i for i, row in enumerate(rows) if not np.isfinite(row).all()]
    if bad:
        raise ValueError(f"{task}.json: {metric} of row {bad[0]} is not a finite number")
    return rows


def row_keys(values: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    """The rows of one metric, in order of their numbers."""
    return sorted(values, key=int) if isinstance(values, Mapping) else [str(i) for i in range(len(values))]


def log_ratio(log: Mapping[str, Any], task: str) -> np.ndarray:
    """(rows,) log of the truth ratio R = geometric mean of wrong answers' probabilities / the right one's.

    Probabilities are length-normalised, exp(-mean token loss), so log R = loss of the right answer - mean loss of the
    wrong ones. Source: Maini et al. 2024, arXiv 2401.06121; the geometric form is the leaderboard script's.
    """
    wrong = [row.mean() for row in column(log, task, "average_perturb_loss")]
    return np.array(column(log, task, "avg_paraphrased_loss")) - wrong


def ratio(log: Mapping[str, Any], task: str, truth_ratio: str) -> np.ndarray:
    """(rows,) the truth ratio: `geometric` as the leaderboard computes it, `arithmetic` (mean of the wrong answers'
    probabilities) as the paper writes it.

    Raises:
        ValueError: another `truth_ratio`.
    """
    if truth_ratio == "geometric":
        logs = log_ratio(log, task)
    elif truth_ratio == "arithmetic":
        wrong = [np.logaddexp.reduce(-row) - np.log(len(row)) for row in column(log, task, "average_perturb_loss")]
        logs = np.array(column(log, task, "avg_paraphrased_loss")) + wrong
    else:
        raise ValueError(f"truth_ratio={truth_ratio}: geometric or arithmetic")
    return np.exp(np.clip(logs, -700, 700))  # beyond, float64 would overflow; min(R, 1/R) and 1 - R have long saturated


def probability(log: Mapping[str, Any], name: str) -> np.ndarray:
    """(rows,) exp(-mean token loss) of the answer; for the two real-world sets its share among the options'."""
    right = -np.array(column(log, TASKS[name], "avg_gt_loss"))
    if name in ("Real Authors", "Real World"):
        wrong = [np.logaddexp.reduce(-row) for row in column(log, TASKS[name], "average_perturb_loss")]
        return np.exp(right - np.logaddexp(right, wrong))
    return np.exp(right)


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of values >= 0; 0 if any is 0."""
    return 0.0 if min(values) <= 0 else float(len(values) / np.sum(1 / np.asarray(values, dtype=float)))


def set_scores(log: Mapping[str, Any], name: str, truth_ratio: str = "geometric") -> dict[str, float]:
    """ROUGE-L recall, probability and truth ratio of one set, each a mean over rows in [0, 1].

    The truth ratio counts max(0, 1 - R) where knowing is good and min(R, 1/R) on the forget set.
    """
    r = ratio(log, TASKS[name], truth_ratio)
    score = np.minimum(r, 1 / r) if name == "Forget" else np.maximum(0, 1 - r)
    return {
        f"ROUGE {name}": float(np.mean(column(log, TASKS[name], "rougeL_recall"))),
        f"Prob. {name}": float(probability(log, name).mean()),
        f"Truth Ratio {name}": float(score.mean()),
    }


def utility(log: Mapping[str, Any], truth_ratio: str = "geometric") -> dict[str, float]:
    """The twelve set scores and `Model Utility`, the harmonic mean of the nine that are not the forget set's.

    Raises:
        ValueError: see `column`.
    """
    scores = {}
    for name in TASKS:
        scores |= set_scores(log, name, truth_ratio)
    nine = [value for name, value in scores.items() if not name.endswith("Forget")]
    return {**scores, "Model Utility": harmonic_mean(nine)}


def forget_quality(log: Mapping[str, Any], retain: Mapping[str, Any], truth_ratio: str = "geometric") -> ForgetQuality:
    """How like a model that never saw the forget set: see `ForgetQuality`.

    Args:
        log: the unlearned model's.
        retain: that of a model finetuned on the retain set alone.

    Raises:
        ValueError: the two logs hold different rows; or see `column`.
    """
    keys = [row_keys(one.get(f"{FORGET}.json", {}).get("avg_paraphrased_loss", {})) for one in (log, retain)]
    if keys[0] != keys[1]:
        raise ValueError(
            f"the forget sets hold different rows ({len(keys[0])} and {len(keys[1])}): evaluate both with the same "
            "split and ds_size (ds_size=null for all rows)"
        )
    logs = log_ratio if truth_ratio == "geometric" else _log_arithmetic
    test = ks_2samp(logs(log, FORGET), logs(retain, FORGET))
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(keys[0]))


def _log_arithmetic(log: Mapping[str, Any], task: str) -> np.ndarray:
    return np.log(ratio(log, task, "arithmetic"))


def leaderboard_row(
    log: Mapping[str, Any], retain: Mapping[str, Any] | None, method: str, submitted_by: str
) -> dict[str, float | str | None]:
    """One line of the leaderboard, by column; without a retain log its forget quality is None."""
    quality = None if retain is None else forget_quality(log, retain).p_value
    found = {**utility(log), "Forget Quality": quality, "Method": method, "Submitted By": submitted_by}
    return {name: found[name] for name in COLUMNS}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the leaderboard's CSV, a header first; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
