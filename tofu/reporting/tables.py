"""Runs and groups of runs as tables: CSV and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tofu.reporting import grouping
from tofu.reporting.grouping import Cell, Group
from tofu.reporting.runs import Run

if TYPE_CHECKING:
    import pandas as pd

ARROWS = {"max": "↑", "min": "↓", "zero": "→ 0", "retain": "→ retain", "none": ""}
MARK = "†"  # of a model that has collapsed
TITLES = {
    "main": "Forgetting and utility",
    "utility": "Model utility's nine scores",
    "aggregates": "Aggregates",
    "memorisation": "Memorisation",
    "privacy": "Privacy",
    "fluency": "Fluency and behaviour",
}
NOTE = (
    "Best in bold, second underlined, among the methods of one problem (split, family, rows); finetuned, retain and "
    f"collapsed models ({MARK}) do not compete. ± is the standard deviation over "
)


def note(chosen: bool) -> str:
    """What a reader must know of the tables.

    Args:
        chosen: whether the keys of the lines were chosen by hand (`group_by`).
    """
    mixed = " A line with runs of several problems does not compete either."
    return f"{NOTE}the runs of a line.{mixed}" if chosen else f"{NOTE}runs that differ in the seed alone."


def frame(runs: Sequence[Run], intervals: bool = False) -> pd.DataFrame:
    """One line for each run: every key that varies, every metric, where it came from and the digests.

    Args:
        intervals: also two columns for each metric that has an interval, `NAME low` and `NAME high`.
    """
    import pandas as pd

    keys = [grouping.METHOD, *(name for name in grouping.varying(runs) if name not in (grouping.METHOD, grouping.KIND))]
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    lines = []
    for run in runs:
        line: dict[str, Any] = {"run": run.name, "kind": run.kind, "step": run.step, "checkpoint": run.checkpoint}
        line |= {name: run.keys.get(name) for name in keys}
        for name in metrics:
            line[name] = run.value(name)
            if intervals and any(name in one.metrics and one.metrics[name].interval for one in runs):
                between = run.metrics[name].interval if name in run.metrics else None
                line |= dict(zip((f"{name} low", f"{name} high"), between or (None, None), strict=True))
        line |= {"collapsed": "; ".join(run.collapsed), "left out": "; ".join(run.said), "trajectory": run.of}
        line |= {"folder": str(run.folder), "log": run.log, "log sha256": run.digest}
        line["metrics from"] = "; ".join(dict.fromkeys(str(one.file) for one in run.metrics.values()))
        line |= {"retain_result": run.retain, "start_result": run.start}
        line["files sha256"] = "; ".join(f"{name}={digest}" for name, digest in sorted(run.files.items()))
        lines.append(line)
    found = pd.DataFrame(lines)
    if "step" in found:
        found["step"] = found["step"].astype("Int64")
    return found


def number(value: float | None, fixed: bool = False) -> str:
    """A number in a table: three decimals, four digits from 100 on, scientific below a thousandth; never -0.

    Args:
        fixed: three decimals also where that is 0.000.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 5e-4 and not fixed:
        return f"{value:.1e}"
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
    return text.removeprefix("-") if not float(text) else text


def cell(one: Cell, intervals: bool = False, metric: str = "") -> str:
    """A cell's text: mean ± standard deviation, or with `intervals` a single run's value [low, high]."""
    fixed = metric.startswith("log10")
    text = number(one.mean, fixed)
    if one.mean is not None and one.deviation is not None:
        return f"{text} ± {number(one.deviation, fixed or 'e' not in text)}"
    if one.mean is not None and intervals and one.interval:
        return f"{text} [{', '.join(number(end, fixed) for end in one.interval)}]"
    return text


def header(metric: str) -> str:
    """A metric's column: its name and an arrow to what is good."""
    return f"{metric} {ARROWS[grouping.direction_of(metric)]}".strip()


def shown(key: str, value: Any) -> str:
    """A key's value in a table."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_csv(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """The groups with full numbers: of each metric the mean, the standard deviation, the runs, and the interval."""
    import pandas as pd

    lines = []
    for group in groups:
        line = {**group.keys, "runs": len(group.runs), "collapsed": sum(bool(run.collapsed) for run in group.runs)}
        for name in metrics:
            one = group.cells[name]
            low, high = one.interval or (None, None)
            line |= {name: one.mean, f"{name} std": one.deviation, f"{name} n": one.n}
            line |= {f"{name} low": low, f"{name} high": high}
        lines.append(line)
    return pd.DataFrame(lines).dropna(axis=1, how="all").to_csv(index=False, lineterminator="\n")


def labels(group: Group) -> dict[str, str]:
    """A group's keys as text, its method marked where it has collapsed."""
    found = {name: shown(name, value) for name, value in group.keys.items()}
    if group.collapsed:
        name = grouping.METHOD if grouping.METHOD in found else next(iter(found))
        found[name] += f" {MARK}"
    return found


def to_markdown(groups: Sequence[Group], metrics: Sequence[str], intervals: bool = False) -> str:
    """The groups as a table in Markdown."""
    keys = list(groups[0].keys)
    lines = [
        f"| {' | '.join((*keys, *map(header, metrics)))} |",
        f"| {' | '.join([*('---' for _ in keys), *('---:' for _ in metrics)])} |",
    ]
    for group in groups:
        cells = [plain(text) for text in labels(group).values()]
        for name in metrics:
            text, rank = cell(group.cells[name], intervals, name), group.cells[name].rank
            cells.append({1: f"**{text}**", 2: f"<u>{text}</u>"}.get(rank or 0, text))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """A text within one cell of a Markdown table, shown as it is."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def differences(groups: Sequence[Group], baseline: str, metrics: Sequence[str]) -> list[Group]:
    """What each line's means are above those of a method's line of the same problem; lines without one are left out.

    Of several lines of that method the one that has the other keys alike counts.
    """
    of: dict[tuple, list[Group]] = {}
    for group in groups:
        if group.method == baseline:
            of.setdefault(grouping.problem(group), []).append(group)
    found = []
    for group in groups:
        same = of.get(grouping.problem(group), [])
        alike = same if len(same) == 1 else [one for one in same if _others(one) == _others(group)]
        base = alike[0] if alike else None
        if base is not None and group.method != baseline:
            cells = {name: _minus(group.cells[name], base.cells[name]) for name in metrics}
            found.append(Group(group.keys, group.runs, cells))
    return found


def _others(group: Group) -> dict[str, Any]:
    """The keys of a line but the method."""
    return {name: value for name, value in group.keys.items() if name != grouping.METHOD}


def _minus(one: Cell, base: Cell) -> Cell:
    if one.mean is None or base.mean is None:
        return Cell(None)
    return Cell(one.mean - base.mean, n=one.n)
