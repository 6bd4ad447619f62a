"""Groups of runs as LaTeX tables with booktabs' rules, no wider than the column they stand in."""

import re
from collections.abc import Sequence
from itertools import groupby

from tofu.reporting import grouping, tables
from tofu.reporting.grouping import Group

ARROWS = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→ 0": r"$\to 0$", "→ retain": r"$\to$ retain", "": ""}
PARTS = {  # metric -> the line above and its own
    "Model Utility": ("Model", "Utility"),
    "Forget Quality": ("Forget Quality", "$p$"),
    "log10 Forget Quality": ("Forget Quality", r"$\log_{10} p$"),
}
ABOVE = {"Real Authors": "Real Authors", "Real World": "Real World", "Retain": "Retain set", "Forget": "Forget set"}
LATIN = 0x17F  # the last letter of Unicode's Latin Extended-A, which pdflatex knows
PACKAGES = "% needs \\usepackage{booktabs,graphicx}\n"
OTHERS = "% has letters beyond the Latin ones: compile it with xelatex or lualatex\n"
SIGNS = {  # a bracket or a star at a row's beginning would belong to the line's end before it
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "]": "{]}", "*": "{*}", tables.MARK: r"$^\dagger$"},
}


def to_latex(
    groups: Sequence[Group], metrics: Sequence[str], intervals: bool = False, caption: str = "", label: str = ""
) -> str:
    """The groups as a LaTeX table: metrics of one set, or of one kind, under a common title.

    A table that is wider than the line is shrunk to it, so that it needs graphicx besides booktabs.
    """
    keys = list(groups[0].keys)
    above, rules, own = _titles(metrics, len(keys))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}" if caption else "",
        rf"\label{{{label}}}" if label else "",
        r"\smallskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * len(keys)}{'r' * len(metrics)}}}",
        r"\toprule",
        rf"{' & '.join([*('' for _ in keys), *above])} \\",
        "".join(rules),
        rf"{' & '.join([*map(text, keys), *own])} \\",
        r"\midrule",
        *(rf"{' & '.join(_row(group, metrics, intervals))} \\" for group in groups),
        r"\bottomrule",
        r"\end{tabular}%",
        "}",
        r"\end{table}",
    ]
    whole = "\n".join(line for line in lines if line) + "\n"
    return PACKAGES + (OTHERS if any(ord(sign) > LATIN for sign in whole) else "") + whole


def _titles(metrics: Sequence[str], first: int) -> tuple[list[str], list[str], list[str]]:
    """The upper line of titles, the rules below it, and the lower line; `first` columns come before.

    An arrow that all columns of a title share stands beside the title.
    """
    above, rules, own, column = [], [], [], first
    for title, of in groupby(metrics, lambda metric: _parts(metric)[0]):
        below = list(of)
        arrows = [ARROWS[tables.ARROWS[grouping.direction_of(metric)]] for metric in below]
        shared = len(below) > 1 and len(set(arrows)) == 1 and bool(title)
        said = f"{title} {arrows[0]}".strip() if shared else title
        above.append(rf"\multicolumn{{{len(below)}}}{{c}}{{{said}}}" if title else " & ".join("" for _ in below))
        rules += [rf"\cmidrule(lr){{{column + 1}-{column + len(below)}}}"] if title else []
        own += [
            f"{_parts(metric)[1]} {'' if shared else arrow}".strip()
            for metric, arrow in zip(below, arrows, strict=True)
        ]
        column += len(below)
    return above, rules, own


def _parts(metric: str) -> tuple[str, str]:
    """What stands above a metric's column, and its own title: ROUGE Forget -> Forget set, ROUGE."""
    if metric in PARTS:
        return PARTS[metric]
    for name, title in ABOVE.items():
        if metric.endswith(f" {name}"):
            return title, text(metric.removesuffix(f" {name}"))
    if metric.startswith("MIA "):
        return "MIA", text(metric.removeprefix("MIA "))
    return "", text(metric)


def _row(group: Group, metrics: Sequence[str], intervals: bool) -> list[str]:
    """A group's cells."""
    marks = {1: r"\textbf{%s}", 2: r"\underline{%s}"}
    cells = [text(one) for one in tables.labels(group).values()]
    for name in metrics:
        one = group.cells[name]
        cells.append(marks.get(one.rank or 0, "%s") % number(tables.cell(one, intervals, name)))
    return cells


def text(plain: str) -> str:
    """A text as LaTeX shows it."""
    return "".join(SIGNS.get(sign, sign) for sign in plain)


def number(plain: str) -> str:
    """A cell's number, deviation or interval as LaTeX shows it."""
    plain = re.sub(r"(-?[\d.]+)e([+-])0*(\d+)", lambda m: rf"${m[1]}\times10^{{{m[2].strip('+')}{m[3]}}}$", plain)
    plain = re.sub(r"(?<![\d^{$])-(?=\d)", r"$-$", plain)
    return plain.replace("±", r"$\pm$")


def caption(name: str, chosen: bool = False) -> str:
    """A table's caption; `chosen` as of `tables.note`."""
    table, _, baseline = name.partition("_minus_")
    title = text(tables.TITLES.get(table, table))
    if baseline:
        return f"{title}, differences of means to {text(baseline.replace('_', ' '))}."
    return f"{title}. {number(text(tables.note(chosen)))}"
