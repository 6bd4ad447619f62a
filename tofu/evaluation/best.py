"""Which of a training's evaluations is the best: by one metric, among those that hold a constraint. Pure."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import utils
from tofu.evaluation import logs
from tofu.evaluation.metrics import aggregates, table
from tofu.evaluation.metrics.declared import Metric
from utils import BadInput

DIRECTIONS = ("max", "min")
RETAIN_KL = Metric("Retain KL", float, (), "min", "training", unit="nats")  # measured where `stop_on.budget` bounds it
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
FORM = re.compile(
    rf"\s*(?P<metric>[^<>=]+?)\s*(?P<sign>>=|<=)\s*(?:(?P<bound>{NUMBER})\s*(?P<of>\*\s*start)?|start)\s*"
)
Known = Mapping[str, Mapping[str, Any]]  # metrics by name, as metrics.json holds them


class Constraint(NamedTuple):
    """What an evaluation must hold to be chosen: `metric >= bound`, or `<=`."""

    metric: str
    sign: str  # >= or <=
    bound: float
    of_start: bool = False  # whether `bound` multiplies the starting model's value

    def gap(self, value: float) -> float:
        """How far a value is from holding it; 0 where it does."""
        return max(0.0, self.bound - value if self.sign == ">=" else value - self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:.4g}{' * start' if self.of_start else ''}"


def parse(text: str) -> Constraint:
    """A constraint as a config writes it: NAME >= NUMBER, NAME >= NUMBER * start, NAME >= start, or with <=.

    Raises:
        BadInput: it has another form.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise BadInput(
            f"keep_best.constraint={text}: it must be a metric, >= or <=, and a number or a share of the starting "
            "model's value, Model Utility >= 0.6 or Model Utility >= 0.95 * start say"
        )
    of_start = found["bound"] is None or found["of"] is not None
    return Constraint(found["metric"], found["sign"], float(found["bound"] or 1), of_start)


class Choice(NamedTuple):
    """How evaluations are compared."""

    metric: str
    direction: str  # max or min; with a target, min of the distance to it
    target: float | None = None
    constraint: Constraint | None = None  # its bound is a value

    def missing(self, scores: Mapping[str, Any]) -> str | None:
        """The first of the metrics compared that an evaluation has no number of."""
        names = [self.metric, *([self.constraint.metric] if self.constraint else [])]
        return next((name for name in names if not _is_number(scores.get(name))), None)

    def rank(self, scores: Mapping[str, Any]) -> tuple[float, float]:
        """The larger, the better: first minus the gap to the constraint, 0 where it holds, then the metric.

        Args:
            scores: of an evaluation that lacks none of the metrics compared.
        """
        value = scores[self.metric]
        good = value if self.direction == "max" else -value
        if self.target is not None:
            good = -abs(value - self.target)
        return -self.constraint.gap(scores[self.constraint.metric]) if self.constraint else 0.0, good

    def holds(self, scores: Mapping[str, Any]) -> bool:
        """Whether an evaluation holds the constraint."""
        return self.rank(scores)[0] == 0

    def told(self, scores: Mapping[str, Any]) -> str:
        """The values compared: Forget Quality 0.12 (Model Utility 0.61, >= 0.57 holds)."""
        said = f"{self.metric} {scores[self.metric]:.4g}"
        if self.constraint is None:
            return said
        name, sign, bound, _ = self.constraint
        return f"{said} ({name} {scores[name]:.4g}, {sign} {bound:.4g} {'holds' if self.holds(scores) else 'fails'})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check(cfg: Any) -> str:
    """Look at a checked config's `keep_best` before anything is loaded.

    Args:
        cfg: forget.yaml's; its `eval.metrics` is a list.

    Returns:
        The metric's name as metrics.json has it.

    Raises:
        BadInput: a metric that is not evaluated or lacks what it compares with, or a constraint that can't be read.
    """
    keep, metrics = cfg.keep_best, known(cfg)
    metric = named("keep_best.metric", keep.metric, metrics)
    parsed = parse(keep.constraint) if keep.constraint is not None else None
    bound = named("keep_best.constraint", parsed.metric, metrics) if parsed else None
    for key, one in (("metric", metric), ("constraint", bound)):
        reads = _behind(one) if one is not None else []
        said = f"keep_best.{key}={one.name}" if one is not None else ""
        own = [one] if key == "constraint" or keep.direction is not None else []  # such a value needs no other
        compares = [other for other in reads if "retain log" in other.needs or other.direction == "retain"]
        if cfg.eval.retain_result is None and [other for other in compares if other not in own]:
            raise BadInput(f"{said} compares with the retain model: give its evaluation, eval.retain_result=...")
        of = {logs.TASKS[other.of]: other.of for other in reads if other.of in logs.TASKS}
        if lost := [name for task, name in of.items() if task not in cfg.eval.eval_task]:
            raise BadInput(f"{said} reads sets that are not evaluated: {', '.join(lost)}: add them to eval.eval_task")
    if keep.direction is None and metric.direction == "none":
        raise BadInput(f"keep_best.metric={metric.name} has no direction: give keep_best.direction=max or min")
    return metric.name


def known(cfg: Any) -> list[Metric]:
    """What a checked forget.yaml lets one compare: the metrics that are evaluated, and the measure of `stop_on`."""
    return [*table.of_config(cfg.eval), *([RETAIN_KL] if cfg.stop_on.budget is not None else [])]


def named(key: str, name: str, metrics: Sequence[Metric]) -> Metric:
    """The metric that a config means: by its name in metrics.json, or by the one that chooses it in eval.metrics.

    The latter means, of a metric that several sets have, the forget set's.

    Raises:
        BadInput: no such metric, or one that is not evaluated.
    """

    def among(given: Sequence[Metric]) -> list[Metric]:
        called = [one for one in given if name.lower() in (table.choice_of(one), (one.label or "").lower())]
        named = [one for one in given if one.name.lower() == name.lower()]
        return named or sorted(called, key=lambda one: one.of != "Forget")

    if found := among(metrics):
        return found[0]
    if others := among(table.METRICS):
        raise BadInput(f"{key}={name} is not evaluated: add {table.choice_of(others[0])} to eval.metrics")
    raise BadInput(utils.unknown(key, name, [one.name for one in metrics]))


def _behind(metric: Metric) -> list[Metric]:
    """A metric and all that it is made of."""
    every, found = {one.name: one for one in table.METRICS}, [metric]
    for one in found:  # it grows
        found += [every[name] for name in one.needs if name in every and every[name] not in found]
    return found


def choice(keep: Any, metrics: Sequence[Metric], start: Known | None, retain: Known | None, how: str) -> Choice:
    """How evaluations are compared, with the numbers of the starting and the retain model put in.

    Args:
        keep: a checked config's `keep_best`.
        metrics: those that are evaluated.
        start, retain: these models' evaluations; None where they are not known.
        how: how the starting model's is made, for the line that refuses.

    Raises:
        BadInput: such an evaluation is needed and not known, or lacks the metric.
    """
    metric = named("keep_best.metric", keep.metric, metrics)
    if start is None and any(one.label == aggregates.FLUENT[1] for one in _behind(metric)):
        raise BadInput(f"keep_best.metric={metric.name} compares with the starting model: {how}")
    target = None
    if keep.direction is None and metric.direction in ("zero", "retain"):
        target = 0.0 if metric.direction == "zero" else (retain or {}).get(metric.name, {}).get("value")
        if target is None:
            raise BadInput(
                f"keep_best.metric={metric.name} is best where it is the retain model's, and eval.retain_result has "
                "none: evaluate that model with the same metrics, or give keep_best.direction=max or min"
            )
    constraint = parse(keep.constraint) if keep.constraint is not None else None
    if constraint is not None:
        constraint = constraint._replace(metric=named("keep_best.constraint", constraint.metric, metrics).name)
    if constraint is not None and constraint.of_start:
        value = (start or {}).get(constraint.metric, {}).get("value")
        if value is None:
            raise BadInput(f"keep_best.constraint={keep.constraint}: the starting model's value is not known: {how}")
        constraint = constraint._replace(bound=constraint.bound * value, of_start=False)
    direction = keep.direction or ("max" if metric.direction == "max" else "min")
    return Choice(metric.name, direction, target, constraint)
