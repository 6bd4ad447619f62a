"""From two evaluation logs to one line of the leaderboard, as a CSV and a small table.

    python aggregate_eval_stat.py retain_result=A/eval_log_aggregated.json ckpt_result=B/eval_log_aggregated.json \\
        method_name=grad_diff submitted_by=me save_file=out.csv
"""

import logging
from pathlib import Path

from omegaconf import DictConfig

import utils
from tofu.cli import checks, command_line, schema
from tofu.evaluation import log_formats, logs
from tofu.evaluation.metrics import privacy
from tofu.evaluation.metrics import tofu as tofu_metrics

log = logging.getLogger(__name__)

MORE = (  # told where the evaluation of ckpt_result has them
    *("Extraction Strength Forget", "Exact Memorisation Forget", *privacy.ATTACKS, "PrivLeak"),
)
BESIDE = ("KS Statistic", "log10 Forget Quality", "Forget Rows")  # told, though the leaderboard has no columns for them


@command_line.entry("aggregate_eval_stat")
def main(cfg: DictConfig) -> None:
    """Read both logs, whichever suite wrote them, work out the row, write it."""
    cfg = checks.check(cfg, schema.Aggregate)
    out = Path(cfg.save_file)
    if out.is_dir():
        raise utils.BadInput(f"save_file={out} is a folder: name the CSV to write, save_file={out / 'out.csv'}")
    retain = log_formats.read(cfg.retain_result, "retain_result")
    unlearned = log_formats.read(cfg.ckpt_result, "ckpt_result")
    measured = log_formats.metrics_beside(cfg.ckpt_result, "ckpt_result") or {}
    of_retain = log_formats.metrics_beside(cfg.retain_result, "retain_result") or {}
    areas = [known.get(privacy.LEAKS, {}).get("value") for known in (measured, of_retain)]
    if None not in areas:  # a file may have it against another retain model, or against none
        measured = {**measured, "PrivLeak": {"value": privacy.privleak(*areas)}}
    if out.exists() and any(out.samefile(utils.find(path)) for path in (cfg.retain_result, cfg.ckpt_result)):
        raise utils.BadInput(f"save_file={out} is one of the two logs: name another file")
    try:
        scores = tofu_metrics.statistics(unlearned, retain, cfg.truth_ratio)
        if missing := logs.missing_sets(unlearned):
            raise ValueError(f"no {', '.join(missing)} in the log of ckpt_result: evaluate that set too")
        if bare := logs.uncompared(unlearned):
            raise ValueError(f"{', '.join(bare)} in the log of ckpt_result has no wrong answers, so no truth ratio")
        row = tofu_metrics.leaderboard_row(scores, cfg.method_name, cfg.submitted_by)
    except ValueError as error:
        raise utils.BadInput(f"ckpt_result={cfg.ckpt_result}, retain_result={cfg.retain_result}: {error}") from None
    text = tofu_metrics.to_csv([row])
    if out.exists() and not cfg.overwrite:
        text = _appended(out, text)
    try:
        utils.write_text(out, text)
    except OSError as error:
        raise utils.BadInput(f"save_file={out} cannot be written: {error}") from None
    found = {**row, **{name: {**scores.values, **scores.rows}[name] for name in BESIDE}}
    found |= {name: measured.get(name, {}).get("value") for name in MORE}
    for name, value in found.items():
        interval = scores.intervals.get(name) or measured.get(name, {}).get("interval")
        between = f"  (95 % interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
        shown = f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
        log.info("%-26s %s%s", name, shown, between)


def _appended(out: Path, text: str) -> str:
    """A CSV of one row joined to those in a file.

    Raises:
        BadInput: the file is no leaderboard's CSV.
    """
    header, row = text.splitlines(keepends=True)
    old = out.read_text(encoding="utf-8-sig", errors="replace").rstrip()
    if old.split("\n")[0].rstrip() != header.rstrip():
        raise utils.BadInput(
            f"save_file={out} exists and is no leaderboard CSV (its first line differs): name another file, or "
            "overwrite=true to replace it"
        )
    log.info("appended to %s", out)
    return f"{old}\n{row}"


if __name__ == "__main__":
    main()
