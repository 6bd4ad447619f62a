"""Print one table of evaluated runs: python scripts/table.py NAME=RUN/eval_forget10 ...

python scripts/table.py --only COLUMN FOLDER prints one column of a folder's aggregate_stat.csv.
"""

import csv
import json
import sys
from pathlib import Path

SHOWN = ("Model Utility", "ROUGE Forget")
MORE = {"Extraction Strength Forget": "extraction", "Agg (ngrams)": "Agg"}  # from metrics.json, where some run has them


def scores_of(folder: Path) -> dict:
    """What an evaluation left in a folder."""
    file = folder / "finished.json"
    if not file.is_file():
        sys.exit(f"error: {folder}: no finished evaluation there (no {file.name}): evaluate the model, or run it again")
    scores = json.loads(file.read_text())
    if lacking := [name for name in SHOWN if name not in scores]:
        sys.exit(f"error: {folder}: no finished evaluation there (its {file.name} has no {', '.join(lacking)})")
    measured = folder / "metrics.json"
    known = json.loads(measured.read_text()) if measured.is_file() else {}
    return {**scores, **{name: known[name]["value"] for name in MORE if name in known}}


def column_of(folder: Path, column: str) -> str:
    """One value of a folder's statistics."""
    file = folder / "aggregate_stat.csv"
    if not file.is_file():
        sys.exit(f"error: {folder}: no {file.name} there: evaluate with retain_result=...")
    with file.open(newline="") as lines:
        row = next(csv.DictReader(lines))
    if column not in row:
        sys.exit(f"error: {file}: no column {column}: it has {', '.join(row)}")
    return row[column]


def shown(value: float | None) -> str:
    """A number between 0 and 1 that may be very small; - where there is none."""
    return "-" if value is None else f"{value:.2e}" if 0 < value < 0.001 else f"{value:.4f}"


def main() -> None:
    """One line per run, from the scores that its evaluation left; or one number."""
    args = sys.argv[1:]
    if args[:1] == ["--only"]:
        if len(args) != 3:
            sys.exit("error: python scripts/table.py --only COLUMN FOLDER")
        print(column_of(Path(args[2]), args[1]))
        return
    if not args:
        sys.exit("error: python scripts/table.py NAME=RUN/eval_forget10 ...")
    rows = [(name, scores_of(Path(folder or name))) for name, _, folder in (arg.partition("=") for arg in args)]
    more = [name for name in MORE if any(name in scores for _, scores in rows)]
    head = f"{'':<22}{'model utility':>15}{'forget quality':>16}{'forget ROUGE':>14}"
    print(head + "".join(f"{MORE[name]:>12}" for name in more))
    for name, scores in rows:
        line = f"{name:<22}{scores['Model Utility']:>15.4f}{shown(scores.get('Forget Quality')):>16}"
        print(f"{line}{scores['ROUGE Forget']:>14.4f}" + "".join(f"{shown(scores.get(one)):>12}" for one in more))


if __name__ == "__main__":
    main()
