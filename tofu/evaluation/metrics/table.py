"""All metrics in one table: which ones a config chooses, what these read, and what they come to."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from tofu.evaluation import logs
from tofu.evaluation.metrics import aggregates, fluency, memorisation, privacy, tofu
from tofu.evaluation.metrics.declared import Column, Metric, Statistics, Value
from tofu.evaluation.metrics.rows import Context, Missing, Row, mean_of

SETS = {**logs.TASKS, privacy.HOLDOUT: "holdout"}  # a set's name -> its task's; the last is scored, and no log
METRICS: tuple[Metric, ...] = (  # one reads only those before it
    *(*tofu.METRICS, *memorisation.METRICS, *privacy.METRICS, *fluency.METRICS),
    *aggregates.METRICS,
)
COLUMNS: tuple[Column, ...] = (*privacy.COLUMNS, *fluency.COLUMNS)
GROUPS = (*dict.fromkeys(metric.group for metric in METRICS), "all")


def slug(name: str) -> str:
    """A name in small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("+", " plus ")).strip("_")


def choice_of(metric: Metric) -> str:
    """What `metrics` in a config calls it, on all its sets: extraction_strength, rouge_l_f1."""
    return slug(metric.label or metric.name)


ALIASES = {  # OpenUnlearning's names, in small letters -> ours
    **{"exact_memorization": "exact_memorisation", "mia_min_k": "mia_min_k_0_4", "mia_gradnorm": "mia_gradient_norm"},
    "mia_min_k_plus_plus": "mia_min_k_plus_plus_0_4",
}
NAMES = (*GROUPS, *dict.fromkeys(choice_of(metric) for metric in METRICS))


def chosen(names: Iterable[str], without: Collection[str] = (), paid: Collection[str] = ()) -> tuple[Metric, ...]:
    """The metrics of groups and names, and those that they need, in the table's order. TOFU's are always there.

    A group stands for its metrics without a pass of their own; `all`, or its name, chooses one with such a pass.

    Args:
        without: metrics that the settings leave out, by name (`aggregates.left_out`).
        paid: passes that the settings ask for: a metric with such a pass is there where another one needs it.
    """
    asked = {"tofu", *names}
    found = [
        metric
        for metric in METRICS
        if metric.name not in without
        and ({"all", choice_of(metric)} & asked or (metric.group in asked and metric.extra is None))
    ]
    known = {metric.name: metric for metric in METRICS}
    for metric in found:  # it grows
        needed = [known[name] for name in metric.needs if name in known]
        found += [one for one in needed if one not in found and (one.extra is None or one.extra in paid)]
    return tuple(metric for metric in METRICS if metric in found)


def of_config(cfg: Any) -> tuple[Metric, ...]:
    """The metrics that a checked `schema.Evaluate` asks for."""
    names, by = [*cfg["metrics"]], cfg["fluency"]["by"]
    names += ["mia_reference"] if cfg["reference_model"] and "privacy" in names else []
    names += ["fluency_classifier"] if by == fluency.CLASSIFIER and "fluency" in names else []
    names += ["perplexity"] if cfg["fluency"]["model"] else []
    return chosen(names, aggregates.left_out(by), {by})


def columns(metrics: Sequence[Metric]) -> tuple[Column, ...]:
    """The columns that metrics read, of all sets: their own, and those that they name as needed."""
    own = [_column(metric) for metric in metrics if metric.of is not None and metric.group != "tofu"]
    needed = {name for metric in metrics for name in metric.needs}
    return (*own, *(column for column in COLUMNS if column.name in needed))


def _column(metric: Metric) -> Column:
    return Column(metric.name, metric.function, str(metric.of), metric.extra, metric.theirs)


def set_of(task: str) -> str | None:
    """The name of the set whose task is so called; None for a set of the user's own, which no metric reads."""
    return next((name for name, known in SETS.items() if known == task), None)


def rows_of(wanted: Sequence[Column], rows: Sequence[Row], theirs: bool = False) -> dict[str, list[float | None]]:
    """Columns of one set: name -> a number per row, None where it is undefined.

    Args:
        wanted: that set's.
        theirs: whether OpenUnlearning's form is asked for where it is another one.
    """

    def function(column: Column) -> Callable[[Row], float | None]:
        return column.theirs if theirs and column.theirs is not None else column.function

    return {column.name: [function(column)(row) for row in rows] for column in wanted}


def values(metrics: Sequence[Metric], context: Context) -> dict[str, Value]:
    """What each metric comes to; also put into `context.values`, where those after it find it."""
    for metric in metrics:
        context.values[metric.name] = _value(metric, context)
    return {metric.name: context.values[metric.name] for metric in metrics}


def _value(metric: Metric, context: Context) -> Value:
    if metric.group == "tofu":
        return _of_tofu(metric, context)
    try:
        if metric.of is not None:
            return mean_of(context.column(metric.name), metric.of)
        found = metric.function(context)
    except Missing as why:
        return Value(None, reason=str(why))
    return found if isinstance(found, Value) else Value(float(found))


def _of_tofu(metric: Metric, context: Context) -> Value:
    """One of TOFU's own, which are statistics of the log."""
    found: Statistics = context.statistics
    lacking = [name for name, task in logs.TASKS.items() if f"{task}.json" not in context.log]
    bare = [name for name in logs.TASKS if name not in lacking and not logs.compared(context.log, logs.TASKS[name])]
    if metric.name in found.values:
        n = len(context.log[f"{logs.TASKS[metric.of]}.json"]["avg_gt_loss"]) if metric.of else None
        n = found.rows.get("Forget Rows") if metric in tofu.QUALITY else n
        between, drawn = found.intervals.get(metric.name), found.drawn.get(metric.name)
        return Value(found.values[metric.name], n, between, drawn=drawn)
    sets = [metric.of] if metric.of else ["Forget"] if metric in tofu.QUALITY else list(logs.TASKS)
    if missing := [name for name in sets if name in lacking]:
        return Value(None, reason=f"not evaluated: {', '.join(missing)}")
    if missing := [name for name in sets if name in bare]:
        return Value(None, reason=f"without wrong answers: {', '.join(missing)}")
    return Value(None, reason="it needs retain_result")


def record(metrics: Sequence[Metric], found: Mapping[str, Value]) -> dict[str, dict[str, Any]]:
    """As metrics.json holds them."""
    return {metric.name: _record(metric, found[metric.name]) for metric in metrics}


def _record(metric: Metric, found: Value) -> dict[str, Any]:
    known = {
        "value": found.value,
        "n": found.n,
        "interval": found.interval,
        "direction": metric.direction,
        "group": metric.group,
        "unit": metric.unit,
    }
    known |= found.about or {}
    return known if found.value is not None else {**known, "reason": found.reason}
