"""A page's figures as Plotly takes them: the ones of `plots`, each point of which is a run that can be opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tofu.evaluation import logs
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.reporting import figures, grouping, plots
from tofu.reporting.canvas import (
    BLACK,
    QUALITY,
    ROUGE,
    UTILITY,
    Material,
    Undrawn,
    asked_again,
    method_of,
    need,
    styles,
    values,
)
from tofu.reporting.records import RETAIN
from tofu.reporting.results import BROKEN
from tofu.reporting.runs import Collected, Run

SYMBOLS = {
    **{"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x"},
    **{"p": "pentagon", "h": "hexagon", "<": "triangle-left", ">": "triangle-right", "*": "star", "8": "octagon"},
    **{"d": "diamond-tall"},
}
PATTERNS = {"": "", "////": "/", "....": ".", "xxxx": "x"}
LABELS = {UTILITY: "model utility", QUALITY: "log<sub>10</sub> forget quality"}
Trace = dict[str, Any]


def draw(found: Collected, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Every figure of every problem: its title, traces and layout, or why it is not there.

    Args:
        metrics: those that a reader may choose among where a figure shows one of several.

    Returns:
        Figures with `name`, `title`, `problem`, and `data` and `layout` or `why`. A trace's `customdata` are numbers of
        runs, -1 where a point is none; its `choice` is the metric that it shows, where the figure has `choices`.
    """
    known = styles(method_of(run) for run in found.runs)
    problems = dict.fromkeys(map(grouping.problem_of, found.final()))
    index = {run.name: i for i, run in enumerate(found.runs)}
    drawn = []
    for of in problems:
        material = figures.material_of(found, of, known)
        label = figures.label_of(of, problems) if len(problems) > 1 else ""
        for name, (title, function) in FIGURES.items():
            one = {"name": name, "title": title, "problem": label}
            try:
                drawn.append(one | function(material, index, metrics))
            except (Undrawn, *BROKEN) as why:
                drawn.append(one | {"why": str(why)})
    return drawn


def _marker(style: Any, size: float = 9, hollow: bool = False) -> dict[str, Any]:
    symbol = SYMBOLS[style.marker] + ("-open" if hollow else "")
    return {"color": style.colour, "symbol": symbol, "size": size, "line": {"width": 1.5 if hollow else 0}}


def tradeoff(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """Model utility against log10 forget quality; a thin line goes through a run's checkpoints."""
    final = need(material.final, UTILITY, QUALITY)
    data: list[Trace] = []
    for method in material.methods():
        style, ends = material.styles[method], [run for run in final if method_of(run) == method]
        way = _joined([_known(material.trajectories.get(run.of, ()), UTILITY, QUALITY) for run in ends])
        if way:
            line = {"color": style.colour, "width": 1}
            data.append(
                _points(way, UTILITY, QUALITY, index)
                | {"mode": "lines+markers", "line": line, "marker": {"color": style.colour, "size": 4}, "opacity": 0.6}
                | {"name": f"{method}, checkpoints", "legendgroup": method, "showlegend": False}
            )
        for collapsed in (False, True):
            points: list[Run | None] = [run for run in ends if bool(run.collapsed) == collapsed]
            if points:
                marker = _marker(style, 15 if method == RETAIN else 10, collapsed)
                name = f"{method} (collapsed)" if collapsed else method
                data.append(
                    _points(points, UTILITY, QUALITY, index)
                    | {"mode": "markers", "marker": marker, "name": name, "legendgroup": method}
                )
    level = math.log10(0.05)
    line = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": level,
        "y1": level,
        "line": {"dash": "dot", "width": 1},
    }
    label = {"xref": "paper", "x": 0.01, "y": level, "text": "p = 0.05", "showarrow": False, "font": {"size": 10}}
    label |= {"xanchor": "left", "yanchor": "bottom"}
    layout = _axes(UTILITY, QUALITY) | {"shapes": [line], "annotations": [label]}
    return {"data": data, "layout": layout}


def _known(way: Sequence[Run], *metrics: str) -> list[Run]:
    return [run for run in way if all(run.value(name) is not None for name in metrics)]


def _joined(ways: Sequence[Sequence[Run]]) -> list[Run | None]:
    """Lines of several runs as one trace: None lifts the pen."""
    found: list[Run | None] = []
    for way in ways:
        if len(way) > 1:
            found += [*way, None]
    return found[:-1]


def _points(runs: Sequence[Run | None], x: str, y: str, index: Mapping[str, int]) -> Trace:
    def of(metric: str) -> list[float | None]:
        return [None if run is None else run.value(metric) for run in runs]

    numbers = [-1 if run is None else index[run.name] for run in runs]
    return {"type": "scatter", "x": of(x), "y": of(y), "customdata": numbers}


def _axes(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": LABELS.get(x, x)}}, "yaxis": {"title": {"text": LABELS.get(y, y)}}}


def nine(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """The nine scores of model utility, grouped by score and set."""
    final = need(material.best(), *tofu_metrics.USEFUL)
    sets = [name for name in logs.TASKS if name != "Forget"]
    scores = [score for score in ("ROUGE", "Prob.", "Truth Ratio") for _ in sets]
    names = [f"{score} {name}" for score, name in zip(scores, sets * 3, strict=True)]
    return _bars(material, final, names, index, [scores, sets * 3])


def aggregates(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """Mem, Priv and utility."""
    utilities = ("Util_rel (ngrams)", "Util_rel", "Util (ngrams)", "Util")
    last = next((name for name in utilities if values(material.final, name)), None)
    if last is None:
        raise Undrawn("no run has Mem, Priv and Util: evaluate with metrics=[aggregates]")
    return _bars(material, need(material.best(), "Mem", "Priv"), ("Mem", "Priv", last), index)


def _bars(
    material: Material,
    final: Sequence[Run],
    metrics: Sequence[str],
    index: Mapping[str, int],
    labels: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Grouped bars: a group for each metric, a bar for each method, whiskers of a standard deviation over seeds.

    Args:
        labels: what stands below the groups, if not the metrics' names; two lists are labels of two levels.
    """
    data = []
    for method in material.methods():
        runs = [run for run in final if method_of(run) == method]
        if not runs:
            continue
        style, known = material.styles[method], [values(runs, name) for name in metrics]
        spread = [float(np.std(one, ddof=1)) if len(one) > 1 else 0.0 for one in known]
        means = [float(np.mean(one)) if one else None for one in known]
        bar: Trace = {"type": "bar", "x": list(labels or metrics), "y": means}
        bar |= {"name": method, "customdata": [index[runs[0].name]] * len(known)}
        bar["marker"] = {"color": style.colour, "pattern": {"shape": PATTERNS[style.hatch]}}
        bar |= {"error_y": {"type": "data", "array": spread, "thickness": 1, "width": 2}} if any(spread) else {}
        data.append(bar)
    return {"data": data, "layout": {"barmode": "group", "yaxis": {"range": [0, 1.05]}}}


def truth_ratios(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """Distributions of the forget set's log truth ratios, the retain models' too, with each method's KS gap."""
    data: list[Trace] = []
    retains: dict[Path, np.ndarray] = {}
    seen: set[str] = set()
    for run in sorted(material.best(), key=lambda run: grouping.order(method_of(run))):
        method = method_of(run)
        if run.log is None or run.retain is None or method == RETAIN or method in seen:
            continue
        if run.log.resolve() == run.retain.resolve():
            continue
        seen.add(method)
        ours, colour = plots.ratios(run, run.log), material.styles[method].colour
        if run.retain not in retains:
            retains[run.retain] = plots.ratios(run, run.retain)
            more = {"line": {"color": BLACK, "width": 2.5}, "name": "retain model", "legendrank": 1}
            data.append(_distribution(retains[run.retain], -1) | more)
        at, low, high = plots.widest(ours, retains[run.retain])
        name = f"{method} (KS {abs(low - high):.2f})"
        more = {"line": {"color": colour, "width": 1.5}, "name": name, "legendgroup": method}
        data.append(_distribution(ours, index[run.name]) | more)
        gap = {"type": "scatter", "x": [at, at], "y": [low, high], "mode": "lines", "line": {"dash": "dot", "width": 2}}
        gap["line"]["color"] = colour
        gap |= {"name": f"{method}, KS gap", "legendgroup": method, "showlegend": False}
        data.append(gap | {"customdata": [index[run.name]] * 2})
    if not data:
        raise Undrawn("no run has a log and a retain model's log")
    if len(retains) > 1:
        for trace, place in zip((one for one in data if "legendrank" in one), retains, strict=True):
            trace["name"] = f"retain model: {place.stem if place.name != logs.AGGREGATED else place.parent.name}"
    layout = {
        "xaxis": {"title": {"text": "log truth ratio of the forget set"}},
        "yaxis": {"title": {"text": "share of rows"}},
    }
    return {"data": data, "layout": layout}


def _distribution(ratios: np.ndarray, number: int) -> Trace:
    x = [float(f"{value:.4g}") for value in ratios]
    shares = [round((i + 1) / len(x), 4) for i in range(len(x))]
    line = {"type": "scatter", "mode": "lines", "x": x, "y": shares, "customdata": [number] * len(x)}
    return line | {"hoverinfo": "skip"} if number < 0 else line


def _line(
    material: Material, runs: Sequence[Run], x: Sequence[Any], metric: str, index: Mapping[str, int], size: int
) -> Trace:
    """A metric of one method's runs as a line with markers of a size."""
    method = method_of(runs[0])
    style = material.styles[method]
    line: Trace = {"type": "scatter", "mode": "lines+markers", "name": method, "legendgroup": method}
    line |= {"x": list(x), "y": [run.value(metric) for run in runs], "choice": metric}
    line |= {"customdata": [index[run.name] for run in runs], "marker": _marker(style, size)}
    return line | {"line": {"color": style.colour, "width": 1.5}}


def over_steps(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """A metric over the optimiser steps: a line for each run of a method's best setting."""
    best = {run.of for run in material.best()}
    ways = [way for of, way in material.trajectories.items() if of in best]
    if not ways:
        raise Undrawn("no run was evaluated on its way (eval_while_train=true)")
    data: list[Trace] = []
    for metric in metrics:
        for way in sorted(ways, key=lambda way: grouping.order(method_of(way[-1]))):
            if known := _known(way, metric):
                data.append(_line(material, known, [run.step for run in known], metric, index, 7))
    return {"data": _one_entry(data), "layout": {"xaxis": {"title": {"text": "optimiser steps"}}}} | _choices(data)


def rates(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """The learning rate against a metric: each run a point, a line through the means."""
    several = plots.of_several_rates(material)
    data: list[Trace] = []
    for metric in metrics:
        for method in several:
            runs, style = _known(several[method], metric), material.styles[method]
            found = {
                rate: [run for run in runs if run.keys["lr"] == rate]
                for rate in sorted({run.keys["lr"] for run in runs})
            }
            same: Trace = {"type": "scatter", "legendgroup": method, "name": method, "choice": metric}
            mean = [float(np.mean(values(of, metric))) for of in found.values()]
            data.append(
                same
                | {"mode": "lines", "x": list(found), "y": mean, "line": {"color": style.colour, "width": 1.5}}
                | {"hoverinfo": "skip", "showlegend": False}
            )
            points: list[Run | None] = list(runs)
            data.append(
                same
                | _points(points, UTILITY, metric, index)
                | {"x": [run.keys["lr"] for run in runs], "mode": "markers", "marker": _marker(style, 8)}
            )
    shown = plots.rates_shown(several)
    axis = {"type": "log", "title": {"text": "learning rate"}, "tickvals": shown, "ticktext": [f"{x:g}" for x in shown]}
    return {"data": _one_entry(data), "layout": {"xaxis": axis}} | _choices(data)


def _one_entry(data: list[Trace]) -> list[Trace]:
    """Traces of which each method has one entry in the legend."""
    seen: set[tuple[str, str]] = set()
    for trace in data:
        key = (trace["choice"], trace["name"])
        trace["showlegend"] = trace.get("showlegend", True) and key not in seen
        if trace["showlegend"]:
            seen.add(key)
    return data


def _choices(data: Sequence[Trace]) -> dict[str, Any]:
    """The metrics of traces; the first is shown at first."""
    found = list(dict.fromkeys(trace["choice"] for trace in data if any(y is not None for y in trace["y"])))
    if not found:
        raise Undrawn("no run has one of the metrics")
    return {"choices": found}


def robustness(material: Material, index: Mapping[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    """A metric when the same models are asked in another way: a line for each model."""
    ways, data = asked_again(material), list[Trace]()
    for metric in dict.fromkeys((ROUGE, *metrics)):
        for of in dict.fromkeys(run.of for runs in ways.values() for run in runs):
            known = [(way, run) for way, runs in ways.items() for run in _known(runs, metric) if run.of == of]
            if len(known) > 1:
                asked, runs = zip(*known, strict=True)
                data.append(_line(material, runs, asked, metric, index, 8))
    return {"data": _one_entry(data), "layout": {"xaxis": {"type": "category"}}} | _choices(data)


Function = Callable[[Material, Mapping[str, int], Sequence[str]], dict[str, Any]]
FIGURES: dict[str, tuple[str, Function]] = {
    "tradeoff": (plots.FIGURES["tradeoff"][0], tradeoff),
    "utility": (plots.FIGURES["utility"][0], nine),
    "truth_ratios": (plots.FIGURES["truth_ratios"][0], truth_ratios),
    "over_steps": ("A metric over the steps, each run of a method's best setting a line", over_steps),
    "aggregates": (plots.FIGURES["aggregates"][0], aggregates),
    "rates": ("The learning rate against a metric, each run a point, a line through the means", rates),
    "robustness": (plots.FIGURES["robustness"][0], robustness),
}
