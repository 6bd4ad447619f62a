"""Put every metric of two evaluations side by side: both values, their difference, intervals, and which one is better.

python scripts/compare.py results=[A,B]
python scripts/compare.py results=[runs/tiny/npo/eval,runs/tiny/rmu/eval/metrics.json] save_file=npo_rmu.csv
"""

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the project is not installed

import utils
from tofu.cli import checks, command_line, schema

log = logging.getLogger(__name__)


def metrics_of(path: str) -> dict[str, Any]:
    """The metrics of an evaluation: its folder, its metrics.json, or OpenUnlearning's TOFU_EVAL.json.

    Raises:
        BadInput: no such file, or another one.
    """
    from tofu.evaluation import log_formats  # here: it imports numpy

    file, place = log_formats.METRICS, Path(utils.find(path))
    if place.is_dir():
        theirs = place / log_formats.EVAL
        place = theirs if theirs.is_file() and not (place / file).is_file() else place / file
    found = utils.read_json(place, "results")
    if isinstance(found, dict) and any(isinstance(one, dict) and "agg_value" in one for one in found.values()):
        found = log_formats.metrics_of(found)
    if found != {} and not log_formats.are_metrics(found):
        raise utils.BadInput(f"results: {path} is no {file}: name the folder of an evaluation, or the {file} in it")
    return found


@command_line.entry("compare")
def main(cfg: DictConfig) -> None:
    """Read both, print the table, write the CSV."""
    cfg = checks.check(cfg, schema.Compare)
    from tofu.reporting import side_by_side

    found = side_by_side.pairs(*map(metrics_of, cfg.results))
    if cfg.save_file is not None:
        utils.write_text(cfg.save_file, side_by_side.to_csv(found))
    sys.stdout.write(side_by_side.to_text(found, cfg.results))


if __name__ == "__main__":
    main()
