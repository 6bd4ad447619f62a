"""Statistics over evaluation logs: model utility, forget quality, the leaderboard's row. No model, no I/O.

A log here is an aggregated one: file name -> metric -> {row number as a string: value}, as `eval_log_aggregated.json`
holds it; lists in row order, which forks of the benchmark write, are understood too. `as_aggregated` makes one of what
other suites write.
"""

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from scipy.stats import ks_2samp, kstwobign

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


TRUTH_RATIOS = ("geometric", "arithmetic")
REAL = ("Real Authors", "Real World")  # their probability is the right answer's share among the options
EMPTY = "an empty log: the original code's evaluation during training writes one; evaluate from disk"
RESAMPLES, LEVEL = 1000, 0.95  # of the bootstrap


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
        return float(kstwobign.logsf(self.statistic * math.sqrt(self.n / 2))) / math.log(10)  # the limit for many rows


def rows(log: Mapping[str, Any], task: str, metric: str) -> dict[str, Any]:
    """One metric of one set, in row order: row number as a string -> value as logged.

    Raises:
        ValueError: no aggregated log, or the set, the metric or its rows are missing.
    """
    if not isinstance(log, Mapping):
        raise ValueError("not an aggregated log: its top level must be the names of the sets' logs")
    if not log:
        raise ValueError(EMPTY)
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


def row_scores(log: Mapping[str, Any], name: str, truth_ratio: str = "geometric") -> dict[str, np.ndarray]:
    """What every row of one set counts in its scores, (rows,) each in [0, 1]; a score is the mean.

    ROUGE-L recall; the probability, on the two real-world sets among the options; and the truth ratio, max(0, 1 - R)
    where knowing is good and min(R, 1 / R) on the forget set.

    Args:
        name: the leaderboard's name of the set (TASKS), or any other log's, without .json, that has the same metrics.
    """
    found = columns(log, TASKS.get(name, name), "rougeL_recall", "avg_gt_loss", RIGHT, WRONG)
    logs = log_ratio(found[RIGHT], found[WRONG], truth_ratio)
    return {
        "ROUGE": np.asarray(found["rougeL_recall"]),
        "Prob.": probability(found["avg_gt_loss"], found[WRONG] if name in REAL else None),
        "Truth Ratio": np.exp(-np.abs(logs)) if name == "Forget" else -np.expm1(np.minimum(0, logs)),
    }


def set_scores(log: Mapping[str, Any], name: str, truth_ratio: str = "geometric") -> dict[str, float]:
    """ROUGE-L recall, probability and truth ratio of one set: the means of `row_scores`."""
    return {f"{score} {name}": float(rows.mean()) for score, rows in row_scores(log, name, truth_ratio).items()}


def utility(log: Mapping[str, Any], truth_ratio: str = "geometric") -> dict[str, float]:
    """The twelve set scores and `Model Utility`, the harmonic mean of the nine that are not the forget set's.

    Raises:
        ValueError: see `columns` and `log_ratio`.
    """
    scores = {}
    for name in TASKS:
        scores |= set_scores(log, name, truth_ratio)
    return {**scores, "Model Utility": harmonic_mean([value for name, value in scores.items() if counts(name)])}


def counts(name: str) -> bool:
    """Whether a score is one of the nine whose harmonic mean is the model utility."""
    return name.endswith(("Real Authors", "Real World", "Retain"))


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
    test = cast(Any, ks_2samp(ours, theirs))  # scipy declares no type for its result
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


def same_rows(log: Mapping[str, Any], retain: Mapping[str, Any]) -> None:
    """Raise ValueError unless both logs hold the same rows of the forget set.

    Row 0 of forget05 is row 200 of forget10, so equal numbers alone would let two splits cut to one ds_size pass:
    questions and answers are compared where both logs have them, and the answers' token counts where they have not.
    """
    ours, theirs = (list(rows(one, FORGET, RIGHT)) for one in (log, retain))
    if ours != theirs:
        least, most = sorted((len(ours), len(theirs)))
        remedy = "evaluate both with the same split and ds_size"
        if least < most:
            remedy = f"if it is one split, evaluate the one of {least} again with ds_size=null or ds_size={most}"
        raise ValueError(f"the forget sets hold different rows ({len(ours)} and {len(theirs)}): {remedy}")
    forget, other = (one[f"{FORGET}.json"] for one in (log, retain))
    if forget.get("generated_text") and other.get("generated_text"):
        first, second = (rows(one, FORGET, "generated_text") for one in (log, retain))
        shared = [key for key in ours if key in first and key in second]
        for what, texts in (
            ("answers", [[_letters(one[key][-1]) for key in shared] for one in (first, second)]),
            ("questions", [_cores([_letters(one[key][0]) for key in shared]) for one in (first, second)]),
        ):
            # the original logs texts decoded and cut; a question without a text has none to compare
            differ = sum(not (a.startswith(b) or b.startswith(a)) for a, b in zip(*texts, strict=True))
            if differ > len(shared) / 2:
                raise ValueError(
                    f"the forget sets hold different rows ({differ} of {len(shared)} {what} differ): evaluate both "
                    "with the same split and question_key"
                )
        return
    tallies = [name for name in ("num_token_gt", "num_token_paraphrased") if forget.get(name) and other.get(name)]
    counted = [[rows(one, FORGET, name) for name in tallies] for one in (log, retain)]
    differ = sum(any(a.get(key) != b.get(key) for a, b in zip(*counted, strict=True)) for key in ours)
    if differ > len(ours) / 2:
        raise ValueError(
            f"the forget sets hold different rows ({differ} of {len(ours)} answers have other lengths, and there are "
            "no texts to compare): evaluate both with the same split and tokenizer"
        )


def _letters(text: str) -> str:
    """A text without what a tokenizer's round trip may change."""
    return "".join(filter(str.isalnum, text)).lower()


def _cores(texts: list[str]) -> list[str]:
    """The texts without what all of them begin and end with: the tags of a prompt, which suites write differently."""
    if len(texts) < 2:
        return [""] * len(texts)
    first, last = min(texts), max(texts)
    start = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, (first, last))))
    ends = [text[start:][::-1] for text in texts]
    first, last = min(ends), max(ends)
    end = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, (first, last))))
    return [text[end:][::-1] for text in ends]


def statistics(
    log: Mapping[str, Any], retain: Mapping[str, Any] | None, truth_ratio: str = "geometric"
) -> dict[str, Any]:
    """Everything that a log allows, by name: set scores, `Model Utility` where all four sets are there; with a retain
    log `Forget Quality`, `KS Statistic`, `log10 Forget Quality` and `Forget Rows`; and `Confidence Intervals` of all.

    Raises:
        ValueError: see `columns`, `log_ratio` and `same_rows`.
    """
    names = [name for name, task in TASKS.items() if f"{task}.json" in log]
    if len(names) == len(TASKS):
        found: dict[str, Any] = utility(log, truth_ratio)
    else:
        found = {key: value for name in names for key, value in set_scores(log, name, truth_ratio).items()}
    if retain is not None and "Forget" in names:
        quality = forget_quality(log, retain, truth_ratio)
        found |= {
            "Forget Quality": quality.p_value,
            "KS Statistic": quality.statistic,
            "log10 Forget Quality": quality.log10_p,
            "Forget Rows": quality.n,
        }
    return {**found, "Confidence Intervals": intervals(log, retain, truth_ratio)}


def intervals(
    log: Mapping[str, Any],
    retain: Mapping[str, Any] | None = None,
    truth_ratio: str = "geometric",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile bootstrap intervals, [2.5 %, 97.5 %], of the set scores, model utility and forget quality.

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
        if name == "Forget" and retain is not None:
            ours, theirs = _both_log_ratios(log, retain, truth_ratio)
            drawn["Forget Quality"] = np.array([_ks_p(ours[pick], theirs[pick]) for pick in picks])
    nine = [values for name, values in drawn.items() if counts(name)]
    if len(nine) == 9:
        drawn["Model Utility"] = np.array([harmonic_mean(values) for values in np.transpose(nine)])
    tail = (1 - LEVEL) / 2
    return {name: np.quantile(values, [tail, 1 - tail]).tolist() for name, values in drawn.items()}


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
    ladder = np.arange(n, dtype=float)
    return float(cast(Any, ks_2samp(ladder, ladder + (steps - 0.5 if steps else 0.0))).pvalue)


def leaderboard_row(scores: Mapping[str, Any], method: str, submitted_by: str) -> dict[str, float | str | None]:
    """One line of the leaderboard from `statistics` of all four sets; without a retain log forget quality is None."""
    found = {"Forget Quality": None, **scores, "Method": method, "Submitted By": submitted_by}
    return {name: found[name] for name in COLUMNS}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the leaderboard's CSV, a header first; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
