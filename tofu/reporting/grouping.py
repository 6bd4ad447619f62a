"""Which runs are one line of a table: those that differ in their seed alone; and which metrics a table has."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import utils
from tofu.evaluation.metrics import aggregates, privacy, table
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.reporting.records import FINETUNED, PRETRAINED, RANDOM, RETAIN
from tofu.reporting.runs import DIRECTIONS, Run

SEED, KIND, METHOD = "seed", "kind", "method"
REFERENCES = (FINETUNED, RETAIN, PRETRAINED, RANDOM)  # no unlearning method: they compete for nothing
PROBLEM = (KIND, "split", "family", "ds_size", "rows", "truth_ratio")  # numbers are compared within one, and `eval.*`
FIRST = (*PROBLEM, METHOD, "lr", "num_epochs")  # keys as tables have them
FORGETTING = ("Model Utility", "Forget Quality", "log10 Forget Quality", "ROUGE Forget", "Prob. Forget")
TABLES = {  # table -> its metrics, as far as runs have them
    "main": (*FORGETTING, "Truth Ratio Forget"),
    "utility": (*tofu_metrics.USEFUL, "Model Utility"),
    "aggregates": tuple(metric.name for metric in aggregates.METRICS),
    **{
        group: tuple(metric.name for metric in table.METRICS if metric.group == group)
        for group in ("memorisation", "fluency")
    },
    "privacy": (*privacy.ATTACKS, "PrivLeak"),  # the rates at a threshold stand in runs.csv
}


@dataclass(frozen=True)
class Cell:
    """A metric of one group of runs."""

    mean: float | None  # None: no run of the group has it
    deviation: float | None = None  # standard deviation over the runs (n - 1); None of a single one
    n: int = 0
    interval: Sequence[float] | None = None  # of a single run, 95 %
    rank: int | None = None  # 1: the best of its problem, 2: the second; None of all others


@dataclass(frozen=True)
class Group:
    """Runs that are alike in the keys of a table."""

    keys: dict[str, Any]
    runs: list[Run]
    cells: dict[str, Cell]

    @property
    def collapsed(self) -> bool:
        """Whether one of the models has collapsed: its forget quality is no success."""
        return any(run.collapsed for run in self.runs)

    @property
    def competes(self) -> bool:
        """Whether its numbers are a method's success: no reference model's, and of no model that has collapsed."""
        pairs = [(run.log, run.retain) for run in self.runs if run.log is not None and run.retain is not None]
        retain = any(log.resolve() == other.resolve() for log, other in pairs)  # compared with itself
        mixed = len({problem_of(run) for run in self.runs}) > 1
        return self.method not in REFERENCES and not self.collapsed and not retain and not mixed

    @property
    def method(self) -> str:
        """The method of its runs."""
        return str(self.runs[0].keys.get(METHOD))


def key_of(run: Run, name: str) -> Any:
    """A key of a run; `kind` is one. A key that it has not is the empty text."""
    value = run.kind if name == KIND else run.keys.get(name)
    return "" if value is None else value


def varying(runs: Sequence[Run]) -> list[str]:
    """The keys that are not the same in all runs."""
    names = dict.fromkeys((*FIRST, *(name for run in runs for name in run.keys)))
    return [name for name in names if len({str(key_of(run, name)) for run in runs}) > 1]


def grouping(runs: Sequence[Run], group_by: Sequence[str] | None = None) -> list[str]:
    """The keys that make a line of a table: those asked for, or all that vary but the seed.

    By default a key is left out that says nothing beyond those before it: a method's own hyper-parameter that every
    run of that method has alike, say.

    Raises:
        BadInput: a key that no run has.
    """
    known = [KIND, *dict.fromkeys(name for run in runs for name in run.keys)]
    for name in group_by or ():
        if name not in known:
            raise utils.BadInput(utils.no_key(f"group_by={name}", [f"group_by={one}" for one in known], " of the runs"))
    if group_by:
        return list(group_by)
    chosen: list[str] = [METHOD]
    for name in varying(runs):
        if name not in (SEED, METHOD) and not _follows(runs, name, chosen):
            chosen.append(name)
    return sorted(chosen, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def _follows(runs: Sequence[Run], name: str, chosen: Sequence[str]) -> bool:
    """Whether a key's value is known from those of other keys."""
    seen: dict[tuple, str] = {}
    return all(
        seen.setdefault(tuple(str(key_of(run, one)) for one in chosen), str(key_of(run, name)))
        == str(key_of(run, name))
        for run in runs
    )


def metrics_of(runs: Sequence[Run], asked: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Table -> its metrics, those that some run has a value of; only the table `main` where metrics are asked for.

    Args:
        asked: names as metrics.json has them, or as an evaluation's config does (`extraction_strength`).

    Raises:
        BadInput: a metric that no run has.
    """
    there = dict.fromkeys(name for run in runs for name in run.metrics if run.value(name) is not None)
    if not asked:
        found = {name: [one for one in metrics if one in there] for name, metrics in TABLES.items()}
        return {name: metrics for name, metrics in found.items() if metrics}
    known = {name: [name] for name in there}
    for metric in table.METRICS:
        if metric.name in there:
            for choice in (table.choice_of(metric), metric.group):
                known[choice] = [*known.get(choice, []), metric.name]
    for name in asked:
        utils.choice("metrics", name, known)
    return {"main": list(dict.fromkeys(one for name in asked for one in known[name]))}


def groups(runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> list[Group]:
    """The lines of a table, sorted by their keys, methods in the order of `order`; see `Cell` for what each holds."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(key_of(run, name) for name in keys), []).append(run)
    lines = [
        Group(dict(zip(keys, values, strict=True)), of, {name: _cell(of, name) for name in metrics})
        for values, of in found.items()
    ]
    lines.sort(key=lambda group: [_sortable(name, value) for name, value in group.keys.items()])
    for name in metrics:
        _rank(lines, name)
    return lines


def measured(lines: Sequence[Group]) -> list[Group]:
    """The lines that have a value."""
    return [line for line in lines if any(cell.mean is not None for cell in line.cells.values())]


def _cell(runs: Sequence[Run], metric: str) -> Cell:
    known = [run.metrics[metric] for run in runs if run.value(metric) is not None]
    values = [one.value for one in known if one.value is not None]
    if not values:
        return Cell(None)
    if len(values) == 1:
        return Cell(values[0], n=1, interval=known[0].interval)
    if not all(map(math.isfinite, values)):
        return Cell(sum(values) / len(values), n=len(values))
    mean = statistics.fmean(values)
    return Cell(mean, statistics.stdev(values), len(values))


def _sortable(name: str, value: Any) -> tuple:
    if name == METHOD:
        return order(str(value))
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def order(method: str) -> tuple:
    """Where a method stands in tables, legends and colours: references first, then by name."""
    return (REFERENCES.index(method), "") if method in REFERENCES else (len(REFERENCES), method.lower(), method)


def problem_of(run: Run) -> tuple[str, ...]:
    """What numbers in one comparison have in common."""
    return tuple(str(key_of(run, name)) for name in PROBLEM)


def problem(group: Group) -> tuple:
    """What two groups must have in common for their numbers to be compared."""
    run = group.runs[0]
    asked = sorted(name for name in run.keys if name.startswith("eval.") and name in group.keys)
    return (*problem_of(run), *(str(key_of(run, name)) for name in asked))


def _rank(lines: Sequence[Group], metric: str) -> None:
    """Say which lines have the best and the second value of a metric, within each problem.

    Models that are no method's, and those that have collapsed, do not compete.
    """
    for of in dict.fromkeys(map(problem, lines)):
        here = [line for line in lines if problem(line) == of]
        retain = [line.cells[metric].mean for line in here if line.method == RETAIN]
        scores: dict[int, float] = {}
        for i, line in enumerate(here):
            mean = line.cells[metric].mean
            goal = _distance(metric, mean, retain[0] if retain else None)
            if goal is not None and line.competes:
                scores[i] = goal
        if len(scores) < 2:
            continue
        for rank, goal in enumerate(sorted(set(scores.values()))[:2], 1):
            for i in (i for i, one in scores.items() if one == goal):
                cell = here[i].cells[metric]
                here[i].cells[metric] = Cell(cell.mean, cell.deviation, cell.n, cell.interval, rank)


def _distance(metric: str, value: float | None, retain: float | None) -> float | None:
    """How far a value is from what is good, the less the better; None where that can't be said."""
    direction = direction_of(metric)
    if value is None or not math.isfinite(value):
        return None
    goals = {"max": -value, "min": value, "zero": abs(value)}
    if direction == "retain" and retain is not None:
        return abs(value - retain)
    return goals.get(direction)


def direction_of(metric: str) -> str:
    """What a good unlearned model has of a metric, as `Metric.direction`."""
    return DIRECTIONS.get(metric, "none")
