"""Names in a config: those that become names of files and folders lead nowhere else, others are names at all."""

import re
from collections.abc import Sequence
from typing import Any

from utils import BadInput, choice

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


def check_objective(value: Any) -> None:
    """Raise BadInput unless `objective` is null, a score's name, or a list of names."""
    names = [value] if isinstance(value, str) else value if value is not None else [""]
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise BadInput(f"objective={value}: it must be the name of a score, or a list of names")


def check_method(name: str) -> None:
    """Raise BadInput unless a method's name can name a folder."""
    if not PLAIN.fullmatch(name):
        raise BadInput(f"forget_loss.name={name}: it names the run's folder: take letters, digits, _ . and -")


def metrics(asked: Any, prefix: str = "") -> list[str]:
    """What `metrics` chooses, by our names; `MIA loss` and OpenUnlearning's names are taken too.

    Raises:
        BadInput: there is no such metric or group.
    """
    from tofu.evaluation.metrics import table  # it imports numpy

    found = []
    for name in asked if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]:
        meant = table.slug(str(name))
        meant = table.ALIASES.get(meant, meant)
        choice(f"{prefix}metrics", meant if meant in table.NAMES else name, table.NAMES)
        found.append(meant)
    return found
