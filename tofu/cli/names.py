"""Names in a config that become names of files and folders: none leads out of where it is put."""

import re
from collections.abc import Sequence

from utils import BadInput

PLAIN = re.compile(r"\w[\w .,+=@-]*")  # of a file or folder: no separator, no leading point
TAKEN = ("versions", "finished", "fingerprints", "metrics", "metric_rows", "reference_losses", "eval_log_aggregated")


def check_tasks(tasks: Sequence[str], sets: int, prefix: str = "") -> None:
    """Raise BadInput unless `eval_task` names a log for each set, and no file that an evaluation writes besides."""
    if taken := [name for name in tasks if name in TAKEN]:
        raise BadInput(f"{prefix}eval_task={taken[0]}: an evaluation writes a {taken[0]}.json of its own: rename it")
    if len(set(tasks)) < sets or not sets or not all(map(PLAIN.fullmatch, tasks)):
        raise BadInput(
            f"{prefix}eval_task={list(tasks)}: it must name a log for each set, none twice; one of your own is "
            "eval_log_NAME"
        )


def check_method(name: str) -> None:
    """Raise BadInput unless a method's name can name a folder."""
    if not PLAIN.fullmatch(name):
        raise BadInput(f"forget_loss.name={name}: it names the run's folder: take letters, digits, _ . and -")
