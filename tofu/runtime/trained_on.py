"""Which questions a model was trained on: kept beside its weights, so that an evaluation knows who is a non-member."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import utils
from tofu.runtime import provenance, ranks, run_folder

log = logging.getLogger(__name__)

FILE = "trained_on.json"
DIGITS = 16  # of a sha256 in hexadecimal, which stand for a question


class Taught(NamedTuple):
    """The questions of all rows that taught a model, as far as they are known."""

    questions: frozenset[str]  # their digests
    whole: bool  # False: there may be others


UNKNOWN = Taught(frozenset(), False)
NOTHING = Taught(frozenset(), True)  # of a pretrained model: its corpus is nobody's set of questions


def digest(question: str) -> str:
    """What stands for a question; white space does not count."""
    return provenance.digest(" ".join(question.split()))[:DIGITS]


def joined(start: Taught, questions: Iterable[str]) -> Taught:
    """What a run has taught: what its starting model knew, and its own rows, those to forget and those to keep."""
    return Taught(start.questions | {digest(question) for question in questions}, start.whole)


def write(folder: str | Path, taught: Taught) -> None:
    """Keep it beside the model that a run leaves. Rank 0 only."""
    if ranks.rank() == 0:
        run_folder.note(folder, FILE)
        known = {"whole": taught.whole, "questions": sorted(taught.questions)}
        utils.write_text(Path(folder) / FILE, json.dumps(known) + "\n")  # one line: there may be thousands


def read(path: str | Path, otherwise: Taught = UNKNOWN) -> Taught:
    """What the model in a folder was taught.

    Args:
        path: a folder, or a hub id.
        otherwise: of a model without a record.
    """
    file = Path(path) / FILE
    if not file.is_file():
        return otherwise
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return Taught(frozenset(known["questions"]), bool(known["whole"]))
    except (ValueError, KeyError, TypeError):
        log.warning("%s is not whole: what this model was trained on is not known", file)
        return UNKNOWN
