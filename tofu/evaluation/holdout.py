"""The non-members of membership inference: a set like the forget set that the model was not trained on."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig

import data_module
from tofu.evaluation import logs
from tofu.evaluation.sets import INSTEAD, EvalSet
from tofu.runtime import provenance, trained_on
from tofu.runtime.trained_on import Taught
from utils import BadInput

log = logging.getLogger(__name__)

TASK = "holdout"  # it names no log: the set is only scored
AUTO = "auto"
TAUGHT = "non-members were trained on"


class Holdout(NamedTuple):
    """The non-members that a config asks for, or why there are none."""

    data: EvalSet | None
    why_not: str | None  # where data is None
    about: dict[str, Any]  # what a result says of them


def of_split(split: str) -> str | None:
    """The split of non-members that belongs to a forget split, holdout10 for forget10; None where no name says it."""
    match = re.fullmatch(r"forget(\d\d)(_perturbed)?", split)
    return f"holdout{match[1]}" if match else None


def load(cfg: DictConfig, sets: Sequence[EvalSet], taught: Taught) -> Holdout:
    """Read the non-members of a checked `schema.Evaluate`.

    They are asked as the forget set is: the same columns, and the first `ds_size` rows.

    Args:
        sets: `sets.load_sets`.
        taught: what the model was trained on.

    Raises:
        BadInput: an explicit split that is not there, or without these columns; or one with the members' questions.
    """
    members = next((data for data in sets if data.task == logs.FORGET), None)
    if members is None:
        return Holdout(None, f"no {logs.FORGET} among eval_task, whose rows are the members", {})
    asked, split = cfg.holdout.split, cfg.holdout.split
    if asked == AUTO:
        forget = cfg.split_list[list(cfg.eval_task).index(logs.FORGET)]
        split = of_split(forget)
        if split is None:
            return Holdout(None, f"no non-members: which split belongs to {forget} is not known: holdout.split=...", {})
    columns = (members.question_key, members.answer_key)
    try:
        rows = data_module.load_rows(cfg.holdout.path, split, columns, cfg.ds_size, instead=INSTEAD)
        _check(rows, columns, f"{cfg.holdout.path}, {split}")
    except BadInput as error:
        if asked != AUTO:
            raise
        return Holdout(None, f"no non-members: {error}", {})
    both = {row[columns[0]] for row in rows} & {row[columns[0]] for row in members.rows}
    if both:
        raise BadInput(
            f"holdout.split={split}: {len(both)} of its {len(rows)} questions are the forget set's, whose rows are the "
            "members: name a split that the model was not trained on"
        )
    seen = sum(trained_on.digest(row[columns[0]]) in taught.questions for row in rows)
    about = {"holdout": split, "rows": _digest(members, rows)}
    if seen:
        told = f"the model was trained on {seen} of the {len(rows)} questions of {split}"
        if asked == AUTO:
            return Holdout(None, f"no non-members: {told} (holdout.split={split} takes them all the same)", {})
        log.warning("%s: attacks that compare the forget set with them tell nothing of privacy", told)
        about["note"] = TAUGHT
    elif not taught.whole:
        log.info("what the model was trained on is not recorded, so it is not known whether %s is new to it", split)
        about["note"] = "whether non-members were trained on is not known"
    return Holdout(EvalSet(TASK, rows, *columns, members.answer_key, None), None, about)


def _check(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> None:
    for i, row in enumerate(rows):
        for column in columns:
            data_module.check_text(row[column], where, i, column)


def _digest(members: EvalSet, rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands for the rows of both sides: AUCs of two models can be compared where it is the same."""
    texts = [[[row[members.question_key], row[members.answer_key]] for row in side] for side in (members.rows, rows)]
    return provenance.digest(json.dumps(texts, ensure_ascii=False))[: trained_on.DIGITS]
