"""The figures themselves: each a function of one problem's runs, or the reason why these do not allow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import utils
from tofu.evaluation import logs
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.reporting import foreign, grouping
from tofu.reporting.canvas import (
    BLACK,
    GREY,
    LINE,
    QUALITY,
    ROUGE,
    UTILITY,
    Material,
    Undrawn,
    asked_again,
    bars,
    figure,
    legend,
    method_of,
    need,
    short,
    values,
)
from tofu.reporting.records import RETAIN
from tofu.reporting.results import BROKEN
from tofu.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LABELS = {UTILITY: "model utility", QUALITY: r"$\log_{10}$ forget quality", ROUGE: "forget ROUGE"}


def tradeoff(material: Material) -> Figure:
    """Model utility against log10 forget quality; a line goes through a run's checkpoints, its end has the marker."""
    final = need(material.final, UTILITY, QUALITY)
    page, axes = figure(2.7)
    for method in material.methods():
        colour, marker, _ = material.styles[method]
        ends = [run for run in final if method_of(run) == method]
        for run in ends:
            way = [
                one
                for one in material.trajectories.get(run.of, ())
                if None not in (one.value(UTILITY), one.value(QUALITY))
            ]
            axes.plot(values(way, UTILITY), values(way, QUALITY), color=colour, alpha=0.6, lw=0.8, marker=".", ms=2.5)
        size = 55 if method == RETAIN else 22
        for collapsed in (False, True):
            points = [run for run in ends if bool(run.collapsed) == collapsed]
            if points:
                face = {"facecolors": "none", "edgecolors": colour} if collapsed else {"color": colour}
                axes.scatter(
                    *(values(points, UTILITY), values(points, QUALITY)),
                    **{"marker": marker, "s": size, "zorder": 3, "linewidths": 0.8, **face},
                    label=f"{method} (collapsed)" if collapsed else method,
                )
    axes.axhline(math.log10(0.05), color=GREY, lw=0.6, ls=":", zorder=0, label="p = 0.05")
    axes.set(xlabel=LABELS[UTILITY], ylabel=LABELS[QUALITY])
    axes.margins(0.08)
    legend(page, axes)
    return page


def nine(material: Material) -> Figure:
    """The nine scores of model utility as grouped bars: a panel for each kind of score, a group for each set."""
    final = need(material.best(), *tofu_metrics.USEFUL)
    page, panels = figure(3.6, 3, sharey=True)
    sets = [name for name in logs.TASKS if name != "Forget"]
    for axes, label in zip(panels, ("ROUGE", "Prob.", "Truth Ratio"), strict=True):
        bars(axes, material, final, [f"{label} {of}" for of in sets], sets)
        axes.set_ylabel(label)
    legend(page, panels[0])
    return page


def truth_ratios(material: Material) -> Figure:
    """The forget set's truth ratios of each method's model and of the retain model: distributions and their KS gap."""
    chosen: dict[str, Run] = {}
    for run in material.best():
        if run.log is not None and run.retain is not None and method_of(run) != RETAIN:
            chosen.setdefault(method_of(run), run)
    if not chosen:
        raise Undrawn("no run has a log and a retain model's log")
    read: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, run in chosen.items():
        try:
            read[name] = ratios(run, Path(str(run.log))), ratios(run, Path(str(run.retain)))
        except BROKEN as error:
            run.said.append(f"no truth ratios: {utils.one_line(error)}")
    if not read:
        raise Undrawn("no log of a run and of its retain model can be read")
    names = sorted(read, key=grouping.order)
    columns = min(2, len(names))
    lines = math.ceil(len(names) / columns)
    page, panels = figure(0.5 + 1.35 * lines, lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        ours, theirs = read[name]
        _gap(axes, ours, theirs, material.styles[name].colour)
        axes.set_title(short(name, LINE // 2 - 6))
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(names) - columns) : len(names)]:  # the lowest of each column that is there
        axes.tick_params(labelbottom=True)
    page.supxlabel("log truth ratio of the forget set", fontsize=7)
    page.supylabel("share of rows", fontsize=7)
    legend(page, panels.flat[0])
    return page


def ratios(run: Run, file: Path) -> np.ndarray:
    """(rows,) sorted log truth ratios of the forget set in a log, nats."""
    found = logs.columns(foreign.read_log(file), logs.FORGET, logs.RIGHT, logs.WRONG)
    form = run.keys.get("truth_ratio") or "geometric"
    return np.sort(tofu_metrics.log_ratio(found[logs.RIGHT], found[logs.WRONG], form))


def _gap(axes: Axes, ours: np.ndarray, theirs: np.ndarray, colour: str) -> None:
    """Both distributions, and their largest distance, which the KS test reads."""
    axes.ecdf(theirs, color=BLACK, lw=1, label="retain model")
    axes.ecdf(ours, color=colour, lw=1, label="_")
    at, low, high = widest(ours, theirs)
    axes.plot([at] * 2, [low, high], color=BLACK, lw=1, ls=":", marker="_", ms=5, label="KS gap")
    gap = abs(low - high)
    axes.text(0.97, 0.06, f"KS {gap:.2f}", transform=axes.transAxes, ha="right", fontsize=6)


def widest(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Where two sorted samples' distributions are farthest apart, and both shares there."""
    at = np.concatenate([ours, theirs])
    shares = [np.searchsorted(one, at, "right") / len(one) for one in (ours, theirs)]
    i = int(np.abs(shares[0] - shares[1]).argmax())
    return float(at[i]), float(shares[0][i]), float(shares[1][i])


def over_steps(material: Material) -> Figure:
    """Model utility and log10 forget quality over the steps, the mean of a method's runs with their range."""
    best = {run.of for run in material.best()}
    ways = [way for of, way in material.trajectories.items() if of in best]
    if not ways:
        raise Undrawn("no run was evaluated on its way (eval_while_train=true)")
    page, panels = figure(1.9, 1, 2)
    for axes, metric in zip(panels, (UTILITY, QUALITY), strict=True):
        for name, by_step in sorted(_by_method(ways, metric).items(), key=lambda item: grouping.order(item[0])):
            steps = sorted(by_step)
            colour, marker, _ = material.styles[name]
            axes.plot(steps, [np.mean(by_step[s]) for s in steps], color=colour, marker=marker, ms=2.5, label=name)
            if any(len(by_step[s]) > 1 for s in steps):
                low, high = ([end(by_step[s]) for s in steps] for end in (min, max))
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="optimiser steps", ylabel=LABELS[metric])
        axes.margins(0.06)
    if not any(axes.lines for axes in panels):
        raise Undrawn("no checkpoint has a model utility or a forget quality")
    legend(page, max(panels, key=lambda axes: len(axes.lines)))
    return page


def _by_method(ways: Sequence[list[Run]], metric: str) -> dict[str, dict[int, list[float]]]:
    """Method -> step -> the values of its runs."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in (run for way in ways for run in way):
        value = run.value(metric)
        if value is not None and run.step is not None:
            found.setdefault(method_of(run), {}).setdefault(run.step, []).append(value)
    return found


def aggregates(material: Material) -> Figure:
    """Mem, Priv and utility: what an unlearned model must have all of."""
    utilities = ("Util_rel (ngrams)", "Util_rel", "Util (ngrams)", "Util")
    last = next((name for name in utilities if any(run.value(name) is not None for run in material.final)), None)
    if last is None:
        raise Undrawn("no run has Mem, Priv and Util: evaluate with metrics=[aggregates]")
    names = ("Mem", "Priv", last)
    final = need(material.best(), "Mem", "Priv")
    page, axes = figure(2.1)
    bars(axes, material, final, names, names)
    legend(page, axes)
    return page


def of_several_rates(material: Material) -> dict[str, list[Run]]:
    """Method -> its final runs, of the methods that have several learning rates, in the order of legends.

    Raises:
        Undrawn: none has.
    """
    lines: dict[str, list[Run]] = {}
    for run in material.final:
        if isinstance(run.keys.get("lr"), int | float) and method_of(run) not in grouping.REFERENCES:
            lines.setdefault(method_of(run), []).append(run)
    several = [name for name, runs in lines.items() if len({run.keys["lr"] for run in runs}) > 1]
    if not several:
        raise Undrawn("no method has runs of several learning rates")
    return {name: lines[name] for name in sorted(several, key=grouping.order)}


def rates(material: Material) -> Figure:
    """The learning rate against model utility and log10 forget quality, mean and range over the seeds."""
    several = of_several_rates(material)
    page, panels = figure(1.9, 1, 2)
    for axes, metric in zip(panels, (UTILITY, QUALITY), strict=True):
        for name in several:
            colour, marker, _ = material.styles[name]
            by_rate = {
                rate: known
                for rate in sorted({run.keys["lr"] for run in several[name]})
                if (known := values([run for run in several[name] if run.keys["lr"] == rate], metric))
            }
            means = [float(np.mean(of)) for of in by_rate.values()]
            ends = [[mean - min(of), max(of) - mean] for mean, of in zip(means, by_rate.values(), strict=True)]
            spread = {"yerr": np.transpose(ends)} if np.any(ends) else {}
            axes.errorbar(
                *(list(by_rate), means),
                color=colour,
                marker=marker,
                ms=3,
                capsize=1.5,
                elinewidth=0.6,
                label=name,
                **spread,
            )
        axes.set(xscale="log", xlabel="learning rate")
        shown = rates_shown(several)
        axes.set_xticks(shown, labels=[f"{rate:g}" for rate in shown])
        axes.minorticks_off()
        axes.set_ylabel(LABELS[metric])
        axes.margins(0.12)
    legend(page, panels[0])
    return page


def rates_shown(lines: Mapping[str, Sequence[Run]], most: int = 5) -> list[float]:
    """The rates that an axis names: all that runs have, or every second one and so on, that their texts have room."""
    found = sorted({float(run.keys["lr"]) for runs in lines.values() for run in runs})
    return found[:: math.ceil(len(found) / most)]


def robustness(material: Material) -> Figure:
    """Forget ROUGE and model utility when the same models are asked in another way: the means of each method."""
    ways = asked_again(material)
    page, panels = figure(1.9, 1, 2)
    for axes, metric in zip(panels, (ROUGE, UTILITY), strict=True):
        for method in material.methods():
            each = [values([run for run in runs if method_of(run) == method], metric) for runs in ways.values()]
            known = [(i, float(np.mean(of))) for i, of in enumerate(each) if of]
            if known:
                colour, marker, _ = material.styles[method]
                axes.plot(*zip(*known, strict=True), color=colour, marker=marker, ms=3, label=method)
        axes.set(xticks=range(len(ways)), xticklabels=[way.replace("_", "\n") for way in ways])
        axes.set_ylabel(LABELS[metric])
        axes.margins(0.15)
    legend(page, panels[0])
    return page


Function = Callable[[Material], "Figure"]
FIGURES: dict[str, tuple[str, Function]] = {
    "tradeoff": (
        "Model utility against log10 forget quality, with each run's trajectory over its checkpoints",
        tradeoff,
    ),
    "utility": ("The nine scores of model utility, each method at its best setting", nine),
    "truth_ratios": (
        "Truth ratios of the forget set, model and retain model, with the KS gap, each method at its best setting",
        truth_ratios,
    ),
    "over_steps": (
        "Model utility and forget quality over the steps, each method at its best setting, with the seeds' range",
        over_steps,
    ),
    "aggregates": ("Mem, Priv and Util, each method at its best setting", aggregates),
    "rates": ("The learning rate against model utility and forget quality", rates),
    "robustness": ("Forget ROUGE and model utility when the same models are asked in another way", robustness),
}
