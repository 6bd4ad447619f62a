"""Scoring and generation by a model's own forwards, one text at a time: for what does not take our 4-D masks.

The numbers and texts are those of `inference`, only slower.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from tofu.evaluation.inference import TokenScores, Tree, moments


def score_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> list[list[TokenScores]]:
    """As `inference.score_trees`: one forward per sample, without a mask or a cache."""
    return [[_score(model, tree, path) for path in tree.paths] for tree in trees]


def _score(model: PreTrainedModel, tree: Tree, path: Sequence[int]) -> TokenScores:
    """One sample of a tree, out of the nodes above its last scored one."""
    ids, node = [], tree.nodes[path[-1]]
    while node >= 0:
        ids.append(tree.tokens[node])
        node = tree.parents[node]
    logits = model(input_ids=torch.tensor([ids[::-1]], device=model.device), use_cache=False).logits[0]
    logits = logits[[tree.depths[tree.nodes[edge]] for edge in path]].float()
    targets = torch.tensor([tree.targets[edge] for edge in path], device=logits.device)
    partition = logits.logsumexp(-1)
    nll = (partition - logits[torch.arange(len(path), device=logits.device), targets]).double()
    mean, deviation = (moment.double() for moment in moments(logits, partition))
    columns = (nll, logits.argmax(-1) == targets, mean, deviation)
    return TokenScores(*(np.asarray(column.cpu()) for column in columns))


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    ends: Collection[int],
    *,
    before_forward: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """As `inference.greedy`: transformers' own generation, one prompt after the other.

    Args:
        before_forward: called before every prompt.
    """
    answers = []
    for prompt, budget in zip(prompts, budgets, strict=True):
        before_forward()
        answers.append(_answer(model, prompt, budget, ends))
    return answers


def _answer(model: PreTrainedModel, prompt: Sequence[int], budget: int, ends: Collection[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    how = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=budget, eos_token_id=list(ends), pad_token_id=next(iter(ends))
    )
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    new = whole[0, len(prompt) :].tolist()
    return new[:-1] if new and new[-1] in ends else new
