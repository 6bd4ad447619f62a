"""From two evaluation logs to one line of the leaderboard, as a CSV and a small table.

    python aggregate_eval_stat.py retain_result=A/eval_log_aggregated.json ckpt_result=B/eval_log_aggregated.json \\
        method_name=grad_diff submitted_by=me save_file=out.csv
"""

import logging
from pathlib import Path

from omegaconf import DictConfig

import metrics
import schema
import utils

log = logging.getLogger(__name__)


@schema.entry("aggregate_eval_stat")
def main(cfg: DictConfig) -> None:
    """Read both logs, work out the row, write it."""
    cfg = schema.check(cfg, schema.Aggregate)
    retain = utils.read_json(cfg.retain_result, "retain_result")
    unlearned = utils.read_json(cfg.ckpt_result, "ckpt_result")
    try:
        row = metrics.leaderboard_row(unlearned, retain, cfg.method_name, cfg.submitted_by)
    except ValueError as error:
        raise utils.BadInput(f"ckpt_result={cfg.ckpt_result}, retain_result={cfg.retain_result}: {error}") from None
    if Path(cfg.save_file).exists():
        log.info("replacing %s", cfg.save_file)
    utils.write_text(cfg.save_file, metrics.to_csv([row]))
    for name, value in row.items():
        log.info("%-24s %s", name, f"{value:.6g}" if isinstance(value, float) else value)


if __name__ == "__main__":
    main()
