"""What a metric declares of itself, and what an evaluation's metrics come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

TOFU = "Maini et al. 2024, arXiv 2401.06121"


class Metric(NamedTuple):
    """An entry of a table of metrics.

    One with a set (`of`) has a function of a row of that set (`rows.Row` -> a number, or None where it is undefined).
    Its value is the mean over the rows. TOFU's own read columns of the log instead. One without a set has a function
    of a `rows.Context`, which raises `rows.Missing` where something that it needs is not there.
    """

    name: str  # as tables and files name it
    function: Callable[..., Any]  # pure: of a row, of columns of a log, of other metrics' values, or of a test's result
    needs: tuple[str, ...]  # what it reads: parts of a row, columns, or metrics, by name
    direction: str  # what a good unlearned model has: max, min, zero, retain (the retain model's value), none
    group: str  # the file of metrics/ that it belongs to
    of: str | None = None  # the set whose rows it reads, by the leaderboard's name; None: it reads no rows itself
    label: str | None = None  # its name within that set
    unit: str = "share"  # of 1, unless said
    source: str = TOFU
    extra: str | None = None  # the pass that it costs beside scoring and generation, by its name in `passes.PASSES`
    theirs: Callable[..., Any] | None = None  # the function as OpenUnlearning has it, where that is another number


class Column(NamedTuple):
    """A number per row that metrics read, and that is no metric's mean: an attack's score, say."""

    name: str  # with its set, as `Metric.needs` names it
    function: Callable[..., Any]  # of a row, as of a metric with a set
    of: str
    extra: str | None = None
    theirs: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Value:
    """What a metric came to."""

    value: float | None  # None: `reason` says why
    n: int | None = None  # rows that it is made of
    interval: list[float] | None = None  # [low, high], 95 %
    reason: str | None = None
    about: Mapping[str, Any] | None = None  # what else a reader of the number must know, by name
    drawn: np.ndarray | None = field(default=None, compare=False, repr=False)  # (resamples,) what it is of other rows


@dataclass(frozen=True)
class Statistics:
    """The metrics that an evaluation's logs allow."""

    values: dict[str, float]  # by name
    intervals: dict[str, list[float]] = field(default_factory=dict)  # [low, high], of those that have one
    rows: dict[str, int] = field(default_factory=dict)  # of a test between two models: rows on either side
    drawn: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)  # what `intervals` are of

    def record(self) -> dict[str, Any]:
        """As finished.json holds them."""
        return {**self.values, **self.rows, "Confidence Intervals": self.intervals}
