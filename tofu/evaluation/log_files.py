"""The sets' logs of an evaluation in its folder, each with what it was made from: which ones need not be made again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import utils
from tofu.evaluation.sets import Task
from tofu.runtime import provenance, ranks, run_folder

FINGERPRINTS = "fingerprints.json"
VERSION = 2  # part of every fingerprint: raise it whenever a change of the code moves a number


def keep(folder: Path, name: str, made: Mapping[str, Any], made_from: Mapping[str, Any] | None) -> None:
    """Write a set's log and its fingerprint, on rank 0."""
    if ranks.rank() == 0:
        run_folder.note(folder, f"{name}.json", FINGERPRINTS)
        utils.write_json(folder / f"{name}.json", made)
        _remember(folder, name, made_from)


def fingerprint(task: Task, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a set's log is a function of: a log with the same fingerprint need not be made again.

    Args:
        model: the identity of the weights and the tokenizer (`folders.identity`).
        settings: what else moves a number or a text. Not batch_size nor the engine: they move bits beyond the tenth.
    """
    rows = json.dumps([task.data, task.questions], ensure_ascii=False)
    return provenance.fingerprint(model=model, data=provenance.digest(rows), **settings, version=VERSION)


def _remember(folder: Path, name: str, made_from: Mapping[str, Any] | None) -> None:
    """Note a log's fingerprint together with its own digest, so that neither can go with another of the other."""
    path = folder / FINGERPRINTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if made_from is not None:
        utils.write_json(path, known | {name: {**made_from, "log": provenance.file_digest(folder / f"{name}.json")}})


def why_not_complete(folder: Path, name: str, made_from: Mapping[str, Any]) -> str | None:
    """Why a set's log in `folder` can't stand for a new one; None if it can."""
    path, known = folder / f"{name}.json", folder / FINGERPRINTS
    if not path.is_file():
        return "it is not there"
    noted = json.loads(known.read_text(encoding="utf-8")).get(name) if known.is_file() else None
    if noted is None or noted.get("log") != provenance.file_digest(path):
        return "it has no fingerprint"
    differing = provenance.differing(noted, made_from)
    return f"it was made with other {', '.join(differing)}" if differing else None
