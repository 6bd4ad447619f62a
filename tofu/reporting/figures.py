"""Every figure of a report, drawn into its folder: the same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from tofu.reporting import grouping
from tofu.reporting.canvas import STYLE, Material, Style, Undrawn, method_of, styles
from tofu.reporting.plots import FIGURES
from tofu.reporting.runs import Collected

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawn:
    """A figure of a report."""

    title: str
    files: tuple[str, ...] = ()  # none: `why` says why
    why: str = ""


def draw(found: Collected, out: Path, formats: Sequence[str]) -> dict[str, Drawn]:
    """Draw what the runs allow, a file for each figure, problem and format.

    Args:
        out: the folder.
        formats: svg, png, pdf.

    Returns:
        Figure -> its files, or why it is not there.
    """
    import matplotlib

    drawn: dict[str, Drawn] = {}
    known = styles(method_of(run) for run in found.runs)
    problems = dict.fromkeys(map(grouping.problem_of, found.final()))
    with matplotlib.rc_context(STYLE):
        for name, (title, function) in FIGURES.items():
            files: list[str] = []
            reasons: list[str] = []
            for of in problems:
                suffix = f"_{label_of(of, problems)}" if len(problems) > 1 else ""
                try:
                    figure = function(material_of(found, of, known))
                except Undrawn as why:
                    reasons.append(str(why))
                    continue
                files += [f"{name}{suffix}.{kind}" for kind in formats]
                _save(figure, out, f"{name}{suffix}", formats)
            drawn[name] = Drawn(title, tuple(files), reasons[0] if reasons and not files else "")
    return drawn


def label_of(of: tuple[str, ...], problems: Iterable[tuple[str, ...]]) -> str:
    """The first parts of a problem that tell it from all others, for a file's name."""
    every, chosen = list(problems), []

    def told(parts: Sequence[int]) -> int:
        return len({tuple(one[i] for i in parts) for one in every})

    for i in range(len(of)):
        chosen += [i] if told([*chosen, i]) > told(chosen) else []
    text = "_".join(of[i] or "unknown" for i in chosen)
    return "".join(sign if sign.isalnum() or sign in "-._" else "-" for sign in text)


def material_of(found: Collected, of: tuple[str, ...], known: Mapping[str, Style]) -> Material:
    """What the figures of one problem read; `known` are the styles of all methods."""
    here = Collected([run for run in found.runs if grouping.problem_of(run) == of], [])
    return Material(here.runs, here.final(), here.trajectories(), known)


def _save(figure: Figure, out: Path, name: str, formats: Sequence[str]) -> None:
    """Save a figure without dates: the same runs give the same bytes of SVG and PDF."""
    figure.draw_without_rendering()  # it lays the figure out, which takes as long as drawing it: once for all formats
    figure.set_layout_engine("none")
    for kind in formats:
        about: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        with utils.atomic(out / f"{name}.{kind}") as aside:
            figure.savefig(aside, format=kind, metadata=about)
