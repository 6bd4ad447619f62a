"""Gradient norms against a plain backward pass, and that they leave the model as it was."""

import pytest
import torch
from helpers import read_table
from torch.nn import functional as F

from tofu.evaluation import gradients, sets
from tofu.models import families, folders, loading


def test_norms_are_those_of_a_backward_pass(model_folder):
    """The mean over all tensors of the L2 norms, without the end token; `grad`, modes and flags stay."""
    tokenizer, model = folders.load_tokenizer(str(model_folder), None), loading.load(str(model_folder))
    data = sets.EvalSet("holdout", read_table("holdout01"), "question", "answer", "answer", None)
    whole = sets.prepare(data, tokenizer, families.family("tiny"), max_length=200)
    longest = max(len(row[0]) for row in whole.likely)
    task = sets.prepare(data, tokenizer, families.family("tiny"), max_length=longest - 2)  # which cuts one of them
    assert sorted({ended for row in task.ended for ended in row}) == [False, True]
    parameters = list(model.train().parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    found = gradients.norms(model, task)
    assert model.training and [p.requires_grad for p in parameters] == [i != 1 for i in range(len(parameters))]
    assert [i for i, p in enumerate(parameters) if p.grad is not None] == [2] and bool((parameters[2].grad == 1).all())
    model.eval().requires_grad_(True)
    for i, (text, *_) in enumerate(task.likely):
        text = torch.tensor([text[:-1] if task.ended[i][0] else text])
        n = len(task.trees[i].paths[0]) - task.ended[i][0]
        model.zero_grad()
        F.cross_entropy(model(text).logits[0, -n - 1 : -1], text[0, -n:]).backward()
        expected = torch.stack([p.grad.norm() for p in parameters]).mean().item()
        assert found[i] == pytest.approx(expected, rel=1e-5)
    frozen = gradients.norms(model.requires_grad_(False), task)  # as an evaluation from disk has it
    assert frozen == found and not any(p.requires_grad for p in parameters)


def test_where_there_are_none(model_folder):
    model = loading.load(str(model_folder))
    assert gradients.why_not(model, False) is None and "engine=ddp" in gradients.why_not(model, True)
    assert "adapters" in gradients.why_not(loading.add_lora(model, r=2, alpha=2, dropout=0), False)
