"""The log of the retain model, which forget quality compares with: read, known to fit, or how to make it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

import data_module
import utils
from data_module import Tags
from tofu.evaluation import log_formats, logs
from tofu.evaluation.sets import EvalSet
from tofu.runtime import provenance
from utils import BadInput

log = logging.getLogger(__name__)


def load_retain_log(cfg: DictConfig, sets: Sequence[EvalSet], tags: Tags) -> Mapping[str, Any] | None:
    """The log that `retain_result` names, known to fit the sets; None, with the way to make one, without it.

    Raises:
        BadInput: no such file, no evaluation log, or one of other rows than the forget set's.
    """
    if cfg.retain_result is None:
        _tell_how(cfg)
        return None
    retain = log_formats.read(cfg.retain_result, "retain_result")
    for data in sets:
        if data.task == logs.FORGET:
            shell = {
                str(i): [data_module.prompt(tags, row[data.question_key]), "", row[data.answer_key]]
                for i, row in enumerate(data.rows)
            }
            ours = {f"{logs.FORGET}.json": {logs.RIGHT: shell, "generated_text": shell}}
            try:
                logs.columns(retain, logs.FORGET, logs.RIGHT, logs.WRONG)
                logs.same_rows(ours, retain)
            except ValueError as error:
                raise BadInput(f"retain_result={cfg.retain_result}: {error}") from None
    return retain


def _tell_how(cfg: DictConfig) -> None:
    """Log the two commands that make the missing retain result."""
    retain = utils.complement(cfg.split) or "the retain split"
    made, data = f"runs/{cfg.model_family}/{retain}", cfg.data_path[-1]
    size = "null" if cfg.ds_size is None else cfg.ds_size
    log.info(
        "no forget quality: retain_result is missing, the log of a model finetuned on %s alone with the same settings. "
        "Two commands make it: (1) python finetune.py model_family=%s data_path=%s split=%s save_dir=%s %s "
        "(2) python evaluate_util.py model_family=%s data_path=%s model_path=%s split=%s ds_size=%s "
        "generation.max_length=%s save_dir=%s/eval_%s; then retain_result=%s/eval_%s/%s",
        *(
            retain,
            cfg.model_family,
            data,
            retain,
            made,
            provenance.recipe(cfg.model_path) or "(lr=... as the finetuned model)",
        ),
        *(cfg.model_family, data, made, cfg.split, size, cfg.generation.max_length, made, cfg.split),
        *(made, cfg.split, logs.AGGREGATED),
    )
