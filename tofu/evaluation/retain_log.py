"""The log of the retain model, which forget quality compares with: read, known to fit, or how to make it."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

import utils
from tofu.evaluation import log_formats, logs
from tofu.evaluation.sets import Task
from tofu.models import families
from tofu.runtime import provenance
from utils import BadInput

log = logging.getLogger(__name__)


def load_retain_log(
    cfg: DictConfig,
    tasks: Sequence[Task],
    record: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
) -> Mapping[str, Any] | None:
    """The log that `retain_result` names, known to fit the sets; None, with the way to make one, without it.

    Args:
        tasks: the sets, tokenised.
        record: the family's (`families.record`).

    Raises:
        BadInput: no such file, no evaluation log, one of other rows than the forget set's, or of a model that was asked
            with other tags.
    """
    if cfg.retain_result is None:
        _tell_how(cfg)
        return None
    retain = log_formats.read(cfg.retain_result, "retain_result")
    made = families.recorded_beside(log_formats.log_in(cfg.retain_result))
    if made is not None and (differ := families.differing(made, record)):
        raise BadInput(
            f"retain_result={cfg.retain_result} was made with model_family={made['model_family']}, with another "
            f"{differ}: evaluate the retain model with model_family={record['model_family']}"
        )
    for task in tasks:
        if task.data.task == logs.FORGET:
            if task.data.perturbed_answer_key is None:
                raise BadInput(
                    f"retain_result={cfg.retain_result}: forget quality compares truth ratios, and the forget set has "
                    f"no column {cfg.perturbed_answer_key[-1]}: leave out retain_result, or add wrong answers"
                )
            ours = {f"{logs.FORGET}.json": known(task)}
            try:
                logs.columns(retain, logs.FORGET, logs.RIGHT, logs.WRONG)
                logs.same_rows(ours, retain)
                if made is None:
                    _check_prompts(cfg.retain_result, ours, retain, tokenizer)
            except ValueError as error:
                raise BadInput(f"retain_result={cfg.retain_result}: {error}") from None
    return retain


def known(task: Task) -> dict[str, dict[str, Any]]:
    """What of a set's log is known before a model has seen it: its rows, their texts and the answers' token counts."""
    answers = [row[task.data.answer_key] for row in task.data.rows]
    texts = {str(i): [asked, "", answer] for i, (asked, answer) in enumerate(zip(task.questions, answers, strict=True))}
    counts = [
        {kind: len(path) for (kind, _), path in zip(names, tree.paths, strict=True)}
        for names, tree in zip(task.answers, task.trees, strict=True)
    ]
    tallies = {
        "num_token_gt": {str(i): count["gt"] for i, count in enumerate(counts)},
        "num_token_paraphrased": {str(i): count.get("paraphrased", count["gt"]) for i, count in enumerate(counts)},
    }
    return {logs.RIGHT: texts, "generated_text": texts, **tallies}


def _check_prompts(
    path: str, ours: Mapping[str, Any], retain: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError if most prompts in the retain log are others than ours; warn where it has none.

    Suites log them with or without special tokens and decode white space differently, so both are left out.
    """
    if not retain[f"{logs.FORGET}.json"].get("generated_text"):
        log.warning("%s has neither prompts nor a family beside it: which tags it was made with is not known", path)
        return
    first, second = (logs.rows(one, logs.FORGET, "generated_text") for one in (ours, retain))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, "<s>", "</s>"}
    pairs = [[_bare(one[key][0], special) for one in (first, second)] for key in first if key in second]
    differ = [(a, b) for a, b in pairs if not (a.startswith(b) or b.startswith(a))]
    if len(differ) > len(pairs) / 2:
        raise ValueError(
            f"the retain model was asked with other tags ({len(differ)} of {len(pairs)} prompts differ): "
            f"{differ[0][1][:60]!r} instead of {differ[0][0][:60]!r}: evaluate it with the same model_family"
        )


def _bare(text: str, special: Collection[str]) -> str:
    """A text without special tokens and white space."""
    for token in special:
        text = text.replace(token, "")
    return "".join(text.split())


def _tell_how(cfg: DictConfig) -> None:
    """Log the two commands that make the missing retain result."""
    retain = utils.complement(cfg.split) or "the retain split"
    made, data = f"runs/{cfg.model_family}/{retain}", cfg.data_path[-1]
    size = "null" if cfg.ds_size is None else cfg.ds_size
    more = (
        "" if list(cfg.metrics) == ["tofu"] else f" metrics=[{','.join(cfg.metrics)}] holdout.split={cfg.holdout.split}"
    )
    log.info(
        "no forget quality: retain_result is missing, the log of a model finetuned on %s alone with the same settings. "
        "Two commands make it: (1) python finetune.py model_family=%s data_path=%s split=%s save_dir=%s %s "
        "(2) python evaluate_util.py model_family=%s data_path=%s model_path=%s split=%s ds_size=%s "
        "generation.max_length=%s%s save_dir=%s/eval_%s; then retain_result=%s/eval_%s/%s",
        *(
            retain,
            cfg.model_family,
            data,
            retain,
            made,
            provenance.recipe(cfg.model_path) or "(lr=... as the finetuned model)",
        ),
        *(cfg.model_family, data, made, cfg.split, size, cfg.generation.max_length, more, made, cfg.split),
        *(made, cfg.split, logs.AGGREGATED),
    )
