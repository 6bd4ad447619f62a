"""What all figures share: the page's column, a palette that colour-blind readers can tell apart, styles, legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tofu.reporting import grouping
from tofu.reporting.grouping import METHOD
from tofu.reporting.records import FINETUNED, RETAIN
from tofu.reporting.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.3  # inches: a column of a two-column page
LINE = 62  # letters of a legend's size over this width
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # Okabe and Ito's
GREY, BLACK = "#7F7F7F", "#000000"
MARKERS = "osD^vPXhp<>*8d"

KEPT = ("grad_ascent", "grad_diff", "idk", "npo", "KL", "rmu", "simnpo")  # each has its colour in every report
HATCHES = ("", "////", "....", "xxxx")  # of bars, from the eighth method on
UTILITY, QUALITY, ROUGE = "Model Utility", "log10 Forget Quality", "ROUGE Forget"
ATTACKS = ("eval.question_key", "eval.data_path")  # keys that ask a model in another way
STYLE = {
    **{"font.size": 7, "axes.labelsize": 7, "xtick.labelsize": 6, "ytick.labelsize": 6, "legend.fontsize": 6},
    **{
        "axes.titlesize": 7,
        "lines.linewidth": 1,
        "lines.markersize": 4,
        "axes.linewidth": 0.6,
        "font.family": "DejaVu Sans",
    },
    **{"svg.hashsalt": "tofu", "svg.fonttype": "path", "pdf.fonttype": 42, "axes.spines.top": False},
    **{"axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False, "savefig.dpi": 300},
}


class Style(NamedTuple):
    """How a method looks."""

    colour: str
    marker: str
    hatch: str = ""


REFERENCE = {FINETUNED: Style(GREY, "s"), RETAIN: Style(BLACK, "*")}


class Undrawn(Exception):
    """Why a figure is not drawn."""


@dataclass(frozen=True)
class Material:
    """What the figures of one problem (split, family, rows) read."""

    runs: list[Run]  # all of them
    final: list[Run]
    trajectories: dict[str, list[Run]]
    styles: Mapping[str, Style]  # by method

    def methods(self) -> list[str]:
        """The methods, in the order of legends."""
        return sorted({method_of(run) for run in self.final}, key=grouping.order)

    def best(self) -> list[Run]:
        """The final runs of each method's best setting: the largest mean over seeds of model utility x forget quality.

        One in which a model has collapsed is taken only where there is no other.
        """
        names = [name for name in grouping.varying(self.final) if name != grouping.SEED]
        settings: dict[str, dict[tuple, list[Run]]] = {}
        for run in self.final:
            setting = tuple(str(grouping.key_of(run, name)) for name in names)
            settings.setdefault(method_of(run), {}).setdefault(setting, []).append(run)

        def score(runs: list[Run]) -> tuple:
            each = [(run.value(UTILITY) or 0.0) * (run.value("Forget Quality") or 0.0) for run in runs]
            return (not any(run.collapsed for run in runs), float(np.mean(each)))

        return [run for of in settings.values() for run in max(of.values(), key=score)]


def method_of(run: Run) -> str:
    """A run's method."""
    return str(run.keys.get(METHOD))


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Method -> how it looks, the same in every figure: those of KEPT have their own colour, others the free ones."""
    found = dict(REFERENCE)
    others = [name for name in sorted(set(methods), key=grouping.order) if name not in found]
    kept = [name for name in KEPT if name in others]
    free = [i for i in range(len(COLOURS)) if KEPT[i] not in kept]
    places = {name: KEPT.index(name) for name in kept}
    more = [*free, *range(len(COLOURS), len(COLOURS) + len(others))]
    places |= dict(zip((name for name in others if name not in kept), more, strict=False))
    for name, i in places.items():
        turn, colour = divmod(i, len(COLOURS))
        found[name] = Style(COLOURS[colour], MARKERS[i % len(MARKERS)], HATCHES[turn % len(HATCHES)])
    return found


def figure(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """A column's figure, `height` inches, with axes; without pyplot, which keeps a state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, **kwargs)


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """A legend above the axes, where it covers nothing, in as many columns as its names leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    unique = {short(label, LINE): handle for label, handle in zip(labels, handles, strict=True)}
    room = max(1, LINE // (max(map(len, unique), default=1) + 6))  # the sign before a name takes 6 letters' room
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=min(columns, room, len(unique)))


def short(name: str, most: int) -> str:
    """A name of at most `most` letters: what is too much goes out of its middle, for both ends tell names apart."""
    if len(name) <= most:
        return name
    kept = most - 1
    return f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"


def need(runs: Sequence[Run], *metrics: str) -> list[Run]:
    """The runs that have all of these metrics.

    Raises:
        Undrawn: none has.
    """
    known = [run for run in runs if all(run.value(name) is not None for name in metrics)]
    if not known:
        raise Undrawn(f"no run has {' and '.join(metrics)}")
    return known


def values(runs: Sequence[Run], metric: str) -> list[float]:
    """The values of a metric, of the runs that have one."""
    return [value for run in runs if (value := run.value(metric)) is not None]


def bars(axes: Axes, material: Material, final: Sequence[Run], metrics: Sequence[str], names: Sequence[str]) -> None:
    """Grouped bars from 0 to 1: a group for each metric, a bar for each method, whiskers of a standard deviation.

    Args:
        names: what stands below the groups.
    """
    methods = [name for name in material.methods() if any(method_of(run) == name for run in final)]
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        style, runs = material.styles[method], [run for run in final if method_of(run) == method]
        known = [values(runs, name) or [np.nan] for name in metrics]
        at = np.arange(len(metrics)) + (i - (len(methods) - 1) / 2) * width
        spread = [np.std(one, ddof=1) if len(one) > 1 else 0.0 for one in known]
        whiskers = {"yerr": spread, "error_kw": {"lw": 0.6, "ecolor": "#444444"}} if any(spread) else {}
        look = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
        axes.bar(at, [np.mean(one) for one in known], width * 0.9, label=method, **look, **whiskers)
    axes.set(ylim=(0, 1.05), xticks=range(len(metrics)), xticklabels=names)
    axes.tick_params(axis="x", length=0)


def asked_again(material: Material) -> dict[str, list[Run]]:
    """Way of asking -> the final evaluations in it of the models that were asked in the first way and in another one.

    First the way in which most models were asked.

    Raises:
        Undrawn: there are no such models.
    """
    asked: dict[str, dict[str, Run]] = {}
    names = [name for name in ATTACKS if len({str(run.keys.get(name)) for run in material.final}) > 1]
    for run in material.final:
        way = ", ".join(str(run.keys.get(name)).replace("question,", "") for name in names)
        asked.setdefault(way, {})[run.of] = run
    ways = sorted(asked, key=lambda way: -len(asked[way]))
    both = [of for of in asked[ways[0]] if any(of in asked[way] for way in ways[1:])] if ways else []
    if not both:
        raise Undrawn("no model was asked in two ways (question_key=paraphrased_question, or another data_path)")
    return {way: [asked[way][of] for of in both if of in asked[way]] for way in ways}
