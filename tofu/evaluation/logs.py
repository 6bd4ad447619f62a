"""An evaluation's log in memory: which sets there are, their rows in order, and whether two logs hold the same rows.

A log here is an aggregated one: file name -> metric -> {row number as a string: value}, as `eval_log_aggregated.json`
holds it; lists in row order, which forks of the benchmark write, are understood too. `log_formats.as_aggregated` makes
one of what other suites write.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

TASKS = {  # the leaderboard's name of each set -> its log's name, without .json
    "Real Authors": "eval_real_author_wo_options",
    "Real World": "eval_real_world_wo_options",
    "Retain": "eval_log",
    "Forget": "eval_log_forget",
}
FORGET = TASKS["Forget"]
AGGREGATED = "eval_log_aggregated.json"  # the file of all sets' logs in one
REAL = ("Real Authors", "Real World")  # multiple choice: the right answer and three wrong ones
RIGHT, WRONG = "avg_paraphrased_loss", "average_perturb_loss"  # mean losses per token, nats: a float and a list per row
EMPTY = "an empty log: the original code's evaluation during training writes one; evaluate from disk"


def missing_sets(log: Mapping[str, Any]) -> list[str]:
    """Which of the four sets' logs an aggregated log lacks."""
    return [task for task in TASKS.values() if f"{task}.json" not in log]


def compared(log: Mapping[str, Any], task: str) -> bool:
    """Whether a set's log has wrong answers to compare the right one with; one without any trace of them has none."""
    one = log.get(f"{task}.json") if isinstance(log, Mapping) else None
    return not isinstance(one, Mapping) or bool({RIGHT, WRONG, "perturb_loss", "truth_ratio"} & one.keys())


def uncompared(log: Mapping[str, Any]) -> list[str]:
    """Which of the four sets are in the log without wrong answers."""
    return [task for task in TASKS.values() if not compared(log, task)]


def multiple_choice(task: str) -> bool:
    """Whether the set whose log is named `task` asks for the right answer's share among the options."""
    return task in [TASKS[name] for name in REAL]


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
    """Metrics of one set in row order: () per row, or (answers,) per row for those of the perturbed answers.

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
