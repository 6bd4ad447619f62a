"""Two evaluations' metrics side by side: a table as text, and as a CSV. Pure."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

A, B = "A", "B"
SAME = 1e-9  # values that differ by less are equal: another order of the sums moves so much
Metrics = Mapping[str, Mapping[str, Any]]  # name -> value, n, interval, direction, as metrics.json holds them


class Pair(NamedTuple):
    """One metric of two evaluations; None where one of them has no number."""

    metric: str
    direction: str
    a: float | None
    b: float | None
    difference: float | None  # b - a
    better: str  # A or B; = where both are equal; empty where it can't be said
    interval_a: Sequence[float] | None
    interval_b: Sequence[float] | None
    n_a: int | None
    n_b: int | None
    reason_a: str | None = None  # why it is null
    reason_b: str | None = None


def pairs(first: Metrics, second: Metrics) -> list[Pair]:
    """Every metric that one of two evaluations names, in the first one's order."""
    return [_pair(name, first.get(name, {}), second.get(name, {})) for name in dict.fromkeys((*first, *second))]


def _pair(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Pair:
    direction = first.get("direction") or second.get("direction") or ""
    a, b = first.get("value"), second.get("value")
    known = [one.get(key) for key in ("interval", "n", "reason") for one in (first, second)]
    both = a is not None and b is not None
    return Pair(name, direction, a, b, b - a if both else None, better(direction, a, b) if both else "", *known)


def better(direction: str, a: float, b: float) -> str:
    """Which value is the better one: A, B, = for both, or nothing where the direction is neither max, min nor zero."""
    signs = {"max": (a, b), "min": (-a, -b), "zero": (-abs(a), -abs(b))}
    if direction not in signs:
        return ""
    first, second = signs[direction]
    return "=" if abs(first - second) < SAME else A if first > second else B


def to_text(found: Sequence[Pair], names: Sequence[str]) -> str:
    """A table in columns, below a line for each of the two evaluations.

    Args:
        names: what A and B are.
    """
    rows = [("metric", A, B, f"{B} - {A}", "better", "goal", f"interval {A}", f"interval {B}", "n")]
    for one in found:
        counts = [str(n) for n in dict.fromkeys((one.n_a, one.n_b)) if n is not None]
        numbers = [_number(value) for value in (one.a, one.b)]
        change = "-" if one.difference is None else f"{one.difference:+.4g}"
        between = [_between(interval) for interval in (one.interval_a, one.interval_b)]
        rows.append((one.metric, *numbers, change, one.better, one.direction, *between, " / ".join(counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{label} = {name}" for label, name in zip((A, B), names, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if any(one.interval_a and one.interval_b and one.better in (A, B) and _overlap(one) for one in found):
        lines.append("Where the intervals overlap, which one is better may be chance.")
    for label, reasons in ((A, [one.reason_a for one in found]), (B, [one.reason_b for one in found])):
        lines += [f"{label} has no {one.metric}: {why}" for one, why in zip(found, reasons, strict=True) if why]
    return "\n".join(lines) + "\n"


def to_csv(found: Sequence[Pair]) -> str:
    """The table as a CSV, a header first; what is not known is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["metric", "direction", "a", "b", "difference", "better", "low_a", "high_a", "low_b", "high_b", "n_a", "n_b"]
    )
    for one in found:
        bounds = (*(one.interval_a or (None, None)), *(one.interval_b or (None, None)))
        writer.writerow([*one[:6], *bounds, one.n_a, one.n_b])
    return text.getvalue()


def _overlap(one: Pair) -> bool:
    (low, high), (least, most) = one.interval_a, one.interval_b
    return low <= most and least <= high


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
