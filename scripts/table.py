"""Print one table of evaluated runs: python scripts/table.py NAME=RUN/eval_forget10 ...

python scripts/table.py --only COLUMN FOLDER prints one column of a folder's aggregate_stat.csv.
"""

import csv
import json
import sys
from pathlib import Path


def main() -> None:
    """One line per run, from the scores that its evaluation left; or one number."""
    if sys.argv[1] == "--only":
        column, folder = sys.argv[2:]
        with (Path(folder) / "aggregate_stat.csv").open(newline="") as file:
            print(next(csv.DictReader(file))[column])
        return
    print(f"{'':<22}{'model utility':>15}{'forget quality':>16}{'forget ROUGE':>14}")
    for arg in sys.argv[1:]:
        name, _, folder = arg.partition("=")
        scores = json.loads((Path(folder) / "finished.json").read_text())
        quality = scores.get("Forget Quality")
        shown = "-" if quality is None else f"{quality:.2e}" if quality < 0.001 else f"{quality:.4f}"
        print(f"{name:<22}{scores['Model Utility']:>15.4f}{shown:>16}{scores['ROUGE Forget']:>14.4f}")


if __name__ == "__main__":
    main()
