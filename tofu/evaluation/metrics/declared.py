"""What a metric declares of itself, and what an evaluation's metrics come to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """An entry of a table of metrics."""

    name: str  # as tables and files name it
    function: Callable[..., Any]  # pure: of columns of a log, of other metrics' values, or of a test's result
    needs: tuple[str, ...]  # those columns, or metrics, or logs, by name
    direction: str  # max or min: what a good unlearned model has
    group: str  # the file of metrics/ that it belongs to
    of: str | None = None  # the set whose rows it reads, by the leaderboard's name; None: it reads no rows itself
    label: str | None = None  # its name within that set


@dataclass(frozen=True)
class Statistics:
    """The metrics that an evaluation's logs allow."""

    values: dict[str, float]  # by name
    intervals: dict[str, list[float]] = field(default_factory=dict)  # [low, high], of those that have one
    rows: dict[str, int] = field(default_factory=dict)  # of a test between two models: rows on either side

    def record(self) -> dict[str, Any]:
        """As finished.json holds them."""
        return {**self.values, **self.rows, "Confidence Intervals": self.intervals}
