"""Which architectures take the evaluation's 4-D masks: each against plain forwards of the same tiny random model."""

import pytest
import torch
import transformers
from helpers import COMMON, rows
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tofu.evaluation import inference, plain
from tofu.models import architectures

SMALL = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {  # model type -> what its config needs besides
}


def tiny(kind: str) -> transformers.PreTrainedModel:
    """Two layers of random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **SPECIAL.get(kind, {})})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def differ(model, reach: int = 64) -> tuple[float, bool]:
    """The largest difference of a token's loss between trees and plain forwards, and whether generations differ."""
    trees = [inference.tree(samples) for samples in rows()]
    prompts = [samples[0].input_ids for samples in rows(1)]
    budgets = [9, 4, 12][: len(prompts)]
    with torch.no_grad():
        pairs = zip(inference.score_trees(model, trees), plain.score_trees(model, trees), strict=True)
        worst = max(abs(a.nll - b.nll).max() for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
        ours = inference.greedy(model, prompts, budgets, [2, 7], at_once=2)
        theirs = plain.greedy(model, prompts, budgets, [2, 7])
    return float(worst), ours != theirs


@pytest.mark.parametrize("kind", sorted(architectures.MASKABLE & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
def test_trees_are_plain_forwards(kind):
    worst, texts = differ(tiny(kind))
    assert worst < 1e-5 and not texts
