"""Passes that some metrics cost beside scoring and generation. All ranks run them, and know what they found.

`Metric.extra` names one; what it finds of a row is in `Row.extra` under that name.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tofu.evaluation import gradients, inference, judges, row_logs
from tofu.evaluation.metrics.rows import Missing
from tofu.evaluation.sets import Task, reach


class Asked(NamedTuple):
    """What a pass is given."""

    model: PreTrainedModel  # unwrapped; a pass that only reads it uses `inference.ready`
    tokenizer: PreTrainedTokenizerBase
    task: Task
    texts: list[str]  # the generations; none of a set that is only scored
    at_once: tuple[int, int]  # `slots.resolve`
    sharded: bool
    settings: Any  # the evaluation's config, a mapping
    reference: Sequence[float] | None = (
        None  # the reference model's losses of the set's true answers, scored beforehand
    )


def completion(asked: Asked) -> list[tuple[str, str] | None]:
    """Of each row the second half of the answer, and what greedy decoding writes in its place after the first half.

    Half of the answer's tokens, rounded down, are given; at most as many as the rest has are written. None for a row of
    fewer than two tokens.
    """
    task, tokenizer = asked.task, asked.tokenizer
    wholes, rests = [], []
    for i, likely in enumerate(task.likely):
        ended, n = task.ended[i][0], len(task.trees[i].paths[0])
        whole = list(likely[0][: len(likely[0]) - ended])
        wholes.append(whole)
        rests.append(n - ended - (n - ended) // 2 if n - ended > 1 else 0)
    given = [whole[: len(whole) - rest] for whole, rest in zip(wholes, rests, strict=True)]
    halves = task._replace(data=task.data._replace(task=f"{task.data.task}, halves"), prompts=given, budgets=rests)
    batch_size, among = asked.at_once
    with inference.ready(asked.model, reach(task), asked.sharded) as masks:
        written = row_logs.generate_rows(asked.model, tokenizer, halves, batch_size, asked.sharded, masks, among)
    truths = row_logs.decoded(tokenizer, [whole[len(one) :] for whole, one in zip(wholes, given, strict=True)])
    texts = row_logs.decoded(tokenizer, written)
    return [pair if rest else None for pair, rest in zip(zip(truths, texts, strict=True), rests, strict=True)]


def classifier(asked: Asked) -> list[float]:
    """`judges.clean` of the generations."""
    return judges.clean(asked.texts, asked.settings["fluency"]["classifier"])


def perplexity(asked: Asked) -> list[float | None]:
    """`judges.losses` of the generations."""
    if asked.settings["fluency"]["model"] is None:
        raise Missing("it needs fluency.model")
    return judges.losses(asked.texts, asked.settings)


def gradient(asked: Asked) -> list[float | None]:
    """Of each row the norm of the model's gradient (`gradients.norms`)."""
    if why := gradients.why_not(asked.model, asked.sharded):
        raise Missing(why)
    return gradients.norms(asked.model, asked.task)


def reference(asked: Asked) -> Sequence[float]:
    """Of each row the reference model's loss."""
    if asked.reference is None:
        raise Missing("it needs reference_model")
    return asked.reference


PASSES: dict[str, Callable[[Asked], Sequence[Any]]] = {
    "generation": completion,
    "classifier": classifier,
    "perplexity": perplexity,
    "gradient": gradient,
    "reference": reference,
}


def found(names: Iterable[str], asked: Asked) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Of each row, what the passes find, by name; and by name why a pass that could not be run found nothing."""
    each, reasons = {}, {}
    for name in sorted(set(names)):
        try:
            each[name] = PASSES[name](asked)
        except Missing as why:
            reasons[name] = str(why)
    return [{name: rows[i] for name, rows in each.items()} for i in range(len(asked.task.prompts))], reasons
