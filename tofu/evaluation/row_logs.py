"""From a model and a set to its log: every answer scored, every question answered, numbers and texts for each row."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tofu.evaluation import inference, logs, plain, words
from tofu.evaluation.inference import TokenScores
from tofu.evaluation.metrics.rows import Row
from tofu.evaluation.sets import Task
from tofu.runtime import ranks, signals
from utils import BadInput

SCORED_AT_ONCE = 1024  # nodes in a scoring batch: more are no faster (benchmarks/eval_speed.py) and need more memory
LOGITS_AT_ONCE = 2**28  # numbers, 1 GiB in float32: bounds such a batch where the vocabulary is large
REFILLS = 2  # prompts that share a generation's slots, in multiples of batch_size: more keep the slots full


def scored_at_once(config: PretrainedConfig) -> int:
    """How many nodes a scoring batch of a model holds at most; a row that has more is a batch of its own."""
    return max(1, min(SCORED_AT_ONCE, LOGITS_AT_ONCE // config.get_text_config().vocab_size))


def score_rows(
    model: PreTrainedModel, task: Task, sharded: bool, masks: bool = True
) -> list[dict[tuple[str, int], TokenScores]]:
    """Of each row: (kind, number) -> what the model makes of that answer's tokens.

    Args:
        masks: whether the model takes our 4-D masks, as `inference.ready` says.
    """
    score_trees = inference.score_trees if masks else plain.score_trees
    order = sorted(range(len(task.trees)), key=lambda i: (len(task.trees[i].tokens), i))
    budget = scored_at_once(model.config)
    batches: list[list[int]] = [[]]
    for i in order:  # ascending, so the newest is the widest
        if batches[-1] and (len(batches[-1]) + 1) * len(task.trees[i].tokens) > budget:
            batches.append([])
        batches[-1].append(i)
    found = {}
    for batch in ranks.share(batches, f"{task.data.task}: scoring", sharded):
        found.update(zip(batch, score_trees(model, [task.trees[i] for i in batch]), strict=True))
    found = ranks.merge(found)
    if not all(np.isfinite(one.nll).all() for answers in found.values() for one in answers):
        from tofu.models import saving  # it imports peft, which takes longer than all else here

        why = "the model has diverged" if saving.all_finite(model) else "its weights hold NaN or infinite numbers"
        raise BadInput(f"{task.data.task}: a loss is not finite: {why}")
    return [dict(zip(answers, found[i], strict=True)) for i, answers in enumerate(task.answers)]


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    batch_size: int,
    sharded: bool,
    masks: bool = True,
    among: int = 1,
) -> list[list[int]]:
    """Each row's greedy answer in tokens, up to an end token, which is left out, or its own budget.

    Args:
        batch_size: most prompts generated at once.
        masks: as of `score_rows`.
        among: how many ranks get as much work as each other, if need be with fewer prompts at once; 1: batches do not
            depend on the number of ranks.
    """
    order = sorted((i for i, budget in enumerate(task.budgets) if budget), key=lambda i: (len(task.prompts[i]), i))
    parts, batch_size = cut(len(order), batch_size, among)
    batches = [order[len(order) * k // parts : len(order) * (k + 1) // parts] for k in range(parts)]
    ends = inference.end_tokens(model, tokenizer)
    together = ranks.Together(model) if sharded else None
    found = {}
    before = {"before_forward": together.work if together else signals.look}
    with contextlib.suppress(signals.Flagged):  # `merge` says so to all ranks
        for batch in ranks.share(batches, f"{task.data.task}: generating"):
            asked = [task.prompts[i] for i in batch], [task.budgets[i] for i in batch], ends
            if masks:
                known = [task.likely[i] for i in batch]
                tokens = inference.greedy(model, *asked, at_once=batch_size, known=known, **before)
            else:
                tokens = plain.greedy(model, *asked, **before)
            found.update(zip(batch, tokens, strict=True))
    if together:
        together.wait()
    found = ranks.merge(found)
    return [found.get(i, []) for i in range(len(task.prompts))]


def cut(prompts: int, batch_size: int, among: int) -> tuple[int, int]:
    """Into how many batches of nearly equal size a set's prompts are cut, and how many prompts are in work at once.

    Args:
        batch_size, among: as of `generate_rows`. Ranks take turns with the batches: a multiple of their number is fair.
    """
    if among > 1:
        batch_size = max(1, min(batch_size, -(-prompts // among)))
    parts = -(-prompts // (REFILLS * batch_size))
    return min(prompts, -(-parts // among) * among), batch_size


def decoded(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """The texts of answers in tokens."""
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]


def log_of(task: Task, seen: Sequence[Row], save_text: bool) -> dict[str, dict]:
    """The per-row log in the public benchmark's format: metric -> row number as a string -> value."""
    rows = [_row_of(task, one) for one in seen]
    if not save_text:
        for row in rows:
            del row["generated_text"]
    return {metric: {str(i): row[metric] for i, row in enumerate(rows)} for metric in rows[0]}


def _row_of(task: Task, row: Row) -> dict[str, Any]:
    sums = {answer: (float(tokens.nll.sum()), len(tokens.nll)) for answer, tokens in row.answers.items()}
    gt, count = sums["gt", 0]
    base, base_count = sums.get(("paraphrased", 0), (gt, count))
    perturbed = [score for (kind, _), score in sums.items() if kind == "perturb"]
    averages = [total / n for total, n in perturbed]
    rouge = words.rouge(row.truth, row.text, row.rouge)
    found = {
        "avg_gt_loss": gt / count,
        "gt_loss": gt,
        "num_token_gt": count,
        "generated_text": [row.question, row.text, row.truth],
        "rouge1_recall": rouge["rouge1"].recall,
        "rougeL_recall": rouge["rougeL"].recall,
    }
    if task.data.perturbed_answer_key is None:
        return found
    found |= {
        "average_perturb_loss": averages,
        "avg_paraphrased_loss": base / base_count,
        "truth_ratio": float(np.exp(min(base / base_count - np.mean(averages), 700.0))),
        "paraphrased_loss": base,
        "perturb_loss": [total for total, _ in perturbed],
        "num_token_paraphrased": base_count,
        "num_token_perturb": [n for _, n in perturbed],
    }
    if logs.multiple_choice(task.data.task):
        found["normalized_gt_loss"] = float(np.logaddexp.reduce([-gt / count, *(-a for a in averages)]) + gt / count)
    return found
