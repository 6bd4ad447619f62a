"""The evaluation of the starting model, which relative utility and the signs of a collapse compare with."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.evaluation import log_files, log_formats, logs, measures, retain_log
from tofu.evaluation.metrics import collapse
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.evaluation.sets import Task
from tofu.models import families
from tofu.runtime import manifest, provenance
from utils import BadInput

log = logging.getLogger(__name__)

KEY = "start_result"
OTHERWISE = {"model", "precision", "save_generated_text", "log"}  # parts of a fingerprint that say nothing of the rows


def load(
    cfg: DictConfig,
    tasks: Sequence[Task],
    record: Mapping[str, str],
    prefix: str = "",
    starts_from: str | None = None,
    made_from: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """The metrics of the evaluation that `start_result` names, known to be of the same rows; None without it.

    Where it names none, the folder of the model that a training starts from may hold one (`beside`).

    Args:
        tasks: the sets, tokenised.
        record: the family's (`families.record`).
        prefix: what stands before `start_result` on the command line.
        starts_from, made_from: that model, and what `beside` compares.

    Returns:
        Name -> at least `value`, as metrics.json holds them. What the log tells is worked out from the log.

    Raises:
        BadInput: no such file, no evaluation, one of other rows than the forget set's, or asked with other tags.
    """
    path = cfg.start_result
    if path is None and starts_from is not None:
        names = [task.data.task for task in tasks]
        path = beside(starts_from, {name: parts for name, parts in (made_from or {}).items() if name in names})
    if path is None:
        return None
    key = f"{prefix}{KEY}"
    metrics, found = _read(path, key)
    made = families.recorded_beside(_file(path, key))
    if made is not None and (differ := families.differing(made, record)):
        raise BadInput(
            f"{key}={path} was made with model_family={made['model_family']}, with another {differ}: "
            f"evaluate the starting model with model_family={record['model_family']}"
        )
    for task in (task for task in tasks if task.data.task == logs.FORGET):
        _check_rows(f"{key}={path}", task, metrics, found)
    try:
        return {**metrics, **(_of_log(found, cfg.truth_ratio) if found is not None else {})}
    except ValueError as error:
        raise BadInput(f"{key}={path}: {error}") from None


def _file(path: str, key: str) -> Path:
    """The file that `start_result` means: of a folder the log in it, else its metrics.json.

    Raises:
        BadInput: neither is there.
    """
    place = Path(utils.find(path))
    if not place.is_dir():
        return place
    for name in (logs.AGGREGATED, measures.METRICS):
        if (place / name).is_file():
            return place / name
    raise BadInput(
        f"{key}={path} holds no evaluation (no {logs.AGGREGATED}, no {measures.METRICS}): name the folder, or the log, "
        "that evaluate_util.py made of the starting model"
    )


def _read(path: str, key: str) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The metrics and the log of an evaluation, of which one is named; the other is taken where it lies beside."""
    file = _file(path, key)
    manifest.check_file(file, key)
    raw = utils.read_json(file, key)
    if log_formats.are_metrics(raw):
        beside = file.with_name(logs.AGGREGATED)
        return raw, log_formats.read(str(beside), key) if beside.is_file() else None
    return log_formats.metrics_beside(str(file), key) or {}, log_formats.read(str(file), key)


def _check_rows(what: str, task: Task, metrics: Mapping[str, Any], found: Mapping[str, Any] | None) -> None:
    """Raise BadInput unless an evaluation is of the forget set's rows; its metrics alone tell only how many."""
    if found is not None and task.data.perturbed_answer_key is not None:
        try:
            logs.same_rows({f"{logs.FORGET}.json": retain_log.known(task)}, found)
        except ValueError as error:
            raise BadInput(f"{what}: {error}") from None
        return
    n = metrics.get("ROUGE Forget", {}).get("n")
    if found is None and n is not None and n != len(task.data.rows):
        raise BadInput(
            f"{what} is of {n} rows of the forget set, and here are {len(task.data.rows)}: evaluate the starting model "
            "with the same split and ds_size"
        )


def _of_log(found: Mapping[str, Any], truth_ratio: str) -> dict[str, dict[str, float]]:
    """What relative utility and the signs of a collapse read of a log."""
    values: dict[str, float] = {}
    if not logs.missing_sets(found) and not logs.uncompared(found):
        values[collapse.UTILITY] = tofu_metrics.utility(found, truth_ratio)[collapse.UTILITY]
    texts = found.get(f"{logs.FORGET}.json", {}).get("generated_text")
    if texts:
        values |= collapse.of_texts([row[1] for row in logs.rows(found, logs.FORGET, "generated_text").values()])
    return {name: {"value": value} for name, value in values.items()}


def beside(folder: str, made_from: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The newest evaluation in a model's folder that is of that model, with the same rows and settings, or None.

    Args:
        folder: the starting model; a hub id has none.
        made_from: task -> what a log would be a function of here (`Evaluator.fingerprints`).
    """
    place = Path(folder)
    found = (
        [*place.glob(f"*/{provenance.FINISHED}"), *place.glob(f"*/*/{provenance.FINISHED}")] if place.is_dir() else []
    )
    for file in sorted(found, key=lambda one: one.stat().st_mtime, reverse=True):
        if _is_of(file.parent, place) and _same(file.parent, made_from):
            log.info("%s=%s: found in the starting model's folder", KEY, file.parent)
            return str(file.parent)
    return None


def _is_of(evaluation: Path, model: Path) -> bool:
    """Whether a folder holds an evaluation of a model, not of one that was unlearned from it."""
    if not all((evaluation / name).is_file() for name in (provenance.CONFIG, logs.AGGREGATED)):
        return False
    cfg: Any = OmegaConf.load(evaluation / provenance.CONFIG)
    if "eval_task" not in cfg or cfg.get("model_path") is None or cfg.get("reinitialize_weights"):
        return False
    # it was recorded relative to a working directory that may have been another one
    return f"/{model.resolve()}".endswith(f"/{Path(cfg.model_path)}".replace("/./", "/"))


def _same(evaluation: Path, made_from: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an evaluation's logs are of the same rows, tags and lengths."""
    file = evaluation / log_files.FINGERPRINTS
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return all(
        not provenance.differing(known.get(task), {key: value for key, value in parts.items() if key not in OTHERWISE})
        for task, parts in made_from.items()
    )
