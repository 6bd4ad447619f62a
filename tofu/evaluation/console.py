"""An evaluation's scores in the log of a run: small tables that no terminal wraps."""

from collections.abc import Mapping, Sequence

from tofu.evaluation import logs

SCORES = ("ROUGE", "Prob.", "Truth Ratio")  # of each set, in the order of the columns


def number(value: float) -> str:
    """Four digits; never -0."""
    return f"{value + 0.0:.4g}"


def table(values: Mapping[str, float], truth_ratio: str) -> str:
    """TOFU's scores: a line for each set, then the others, a line each.

    Args:
        values: by name.
        truth_ratio: the form that they were made with.
    """
    named = {name: [f"{score} {name}" for score in SCORES] for name in logs.TASKS}
    found = {name: [number(values[one]) if one in values else "-" for one in of] for name, of in named.items()}
    sets = [(name, *cells) for name, cells in found.items() if set(cells) != {"-"}]
    lines = _aligned([("", "ROUGE", "Prob.", f"Truth Ratio ({truth_ratio})"), *sets]) if sets else []
    known = {name for of in named.values() for name in of}
    return "\n".join([*lines, *columns({name: value for name, value in values.items() if name not in known})])


def columns(values: Mapping[str, float]) -> list[str]:
    """Names and values, a line each."""
    return _aligned([(name, number(value)) for name, value in values.items()])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
