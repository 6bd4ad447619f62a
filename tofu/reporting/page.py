"""The page on which a person looks at an evaluation. Pure: a log and its statistics in, Markdown out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tofu.evaluation import logs
from tofu.evaluation.console import number
from tofu.evaluation.metrics import collapse
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.evaluation.metrics.declared import Statistics

SCORES = ("ROUGE", "Prob.", "Truth Ratio")  # a row's, in the order of the columns
KNOWS, INDIFFERENT = "max(0, 1 - R)", "min(R, 1 / R)"  # the scores that are made of a row's truth ratio R
FORMS = {  # what R is
    "geometric": "exp(mean loss of the right answer - mean of the wrong ones'), geometric, as the leaderboard has it",
    "arithmetic": "mean probability of the wrong answers / that of the right one, arithmetic, as the paper writes it",
}
SHOWN = 5  # rows of each set from either end


def evaluation_page(
    log: Mapping[str, Any],
    scores: Statistics,
    truth_ratio: str,
    signs: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> str:
    """`eval_report.md`: the scores with their confidence intervals, and each set's best and worst rows with texts.

    Args:
        log: an aggregated log; sets outside the four are shown too and count in nothing.
        scores: its `tofu_metrics.statistics`.
        truth_ratio: the definition that `scores` was made with.
        signs: of a collapse (`collapse.signs`).
        about: what was evaluated: model, split, family, date, ds_size; by name.
    """
    collapsed = [f"**Warning: {collapse.warning(signs)}.**", ""] if signs else []
    head = [f"- {name}: {'all rows' if value is None else _cell(str(value))}" for name, value in (about or {}).items()]
    lines = ["# Evaluation", "", *head, *([""] if head else []), *collapsed, *_table(log, scores, truth_ratio)]
    for file in log:
        task = file.removesuffix(".json")
        name = next((name for name, known in logs.TASKS.items() if known == task), task)
        lines += ["", f"## {name}: `{file}`", "", *_rows(log, task, name, truth_ratio)]
    return "\n".join(lines) + "\n"


def _table(log: Mapping[str, Any], scores: Statistics, truth_ratio: str) -> list[str]:
    intervals = scores.intervals
    names = [metric.name for metric in tofu_metrics.METRICS if metric.name in scores.values]
    lines = ["| score | value | 95 % interval |", "| --- | ---: | --- |"]
    for name in names:
        between = " to ".join(map(number, intervals[name])) if name in intervals else ""
        lines.append(f"| {name} | {number(scores.values[name])} | {between} |")
    lines += [
        "",
        f"Truth ratio R: {FORMS[truth_ratio]}. Its score is {KNOWS} of a row, {INDIFFERENT} on the forget set.",
        f"Intervals: percentile bootstrap by row, {tofu_metrics.RESAMPLES} resamples.",
    ]
    if scores.rows:
        lines.append(f"Forget quality: two-sample KS test, {scores.rows['Forget Rows']} rows a side.")
    else:
        lines.append("Forget quality needs the forget set and a `retain_result`.")
    if missing := logs.missing_sets(log):
        lines.append(f"Model utility needs {', '.join(missing)} too.")
    if bare := logs.uncompared(log):
        lines.append(f"Without wrong answers, so without a truth ratio and model utility: {', '.join(bare)}.")
    return lines


def _rows(log: Mapping[str, Any], task: str, name: str, truth_ratio: str) -> list[str]:
    """The set's means, then its rows with the highest and the lowest ROUGE-L recall, ties by probability."""
    scores = tofu_metrics.row_scores(log, name, truth_ratio)
    means = ", ".join(f"{score} {number(values.mean())}" for score, values in scores.items())
    lines = [f"{means}; {len(scores['ROUGE'])} rows."]
    score_of_ratio = INDIFFERENT if name == "Forget" else KNOWS
    keys = list(logs.rows(log, task, "rougeL_recall"))
    probable = scores.get("Prob.", np.zeros(len(keys)))
    order = sorted(range(len(keys)), key=lambda i: (-scores["ROUGE"][i], -probable[i], i))
    texts = log[f"{task}.json"].get("generated_text")
    texts = logs.rows(log, task, "generated_text") if texts else {}
    for title, chosen in (("Highest", order[:SHOWN]), ("Lowest", order[max(SHOWN, len(order) - SHOWN) :][::-1])):
        if not chosen:
            continue
        lines += ["", f"{title} ROUGE-L recall:", ""]
        lines.append(f"| row | ROUGE-L | P | {score_of_ratio} | prompt | generation | truth |")
        lines.append("| ---: | ---: | ---: | ---: | --- | --- | --- |")
        for i in chosen:
            numbers = " | ".join(number(scores[name][i]) if name in scores else "-" for name in SCORES)
            shown = " | ".join(_cell(text) for text in texts.get(keys[i], ("(not kept)",) * 3))
            lines.append(f"| {keys[i]} | {numbers} | {shown} |")
    return lines


def _cell(text: str) -> str:
    """A text within one cell of a Markdown table, shown as it is."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
