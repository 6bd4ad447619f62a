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
    out = Path(cfg.save_file)
    if out.is_dir():
        raise utils.BadInput(f"save_file={out} is a folder: name the CSV to write, save_file={out / 'out.csv'}")
    retain = utils.read_json(cfg.retain_result, "retain_result")
    unlearned = utils.read_json(cfg.ckpt_result, "ckpt_result")
    if out.exists() and any(out.samefile(utils.find(path)) for path in (cfg.retain_result, cfg.ckpt_result)):
        raise utils.BadInput(f"save_file={out} is one of the two logs: name another file")
    try:
        row = metrics.leaderboard_row(unlearned, retain, cfg.method_name, cfg.submitted_by)
    except ValueError as error:
        raise utils.BadInput(f"ckpt_result={cfg.ckpt_result}, retain_result={cfg.retain_result}: {error}") from None
    if out.exists():
        log.info("replacing %s", out)
    try:
        utils.write_text(out, metrics.to_csv([row]))
    except OSError as error:
        raise utils.BadInput(f"save_file={out} cannot be written: {error}") from None
    for name, value in row.items():
        log.info("%-24s %s", name, f"{value:.6g}" if isinstance(value, float) else value)


if __name__ == "__main__":
    main()
