"""Which architectures take the evaluation's 4-D masks: each against plain forwards of the same tiny random model."""

import pytest
import torch
import transformers
from helpers import COMMON, rows
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data_module import IGNORE
from tofu.evaluation import inference, plain
from tofu.models import architectures

SMALL = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {  # model type -> what its config needs besides
    "gemma4_text": {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
}
WRONG = {  # types that would be wrong without a word, and how they must be set up to show it
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_heads": 4, "num_layers": 2},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "falcon": {"alibi": True, "head_dim": None},
    "qwen3_5_text": {
        **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
}


def tiny(kind: str) -> transformers.PreTrainedModel:
    """Two layers of random weights."""
    torch.manual_seed(0)
    values = {**SMALL, **SPECIAL.get(kind, {}), **WRONG.get(kind, {})}
    config = transformers.AutoConfig.for_model(
        kind, **{key: value for key, value in values.items() if value is not None}
    )
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


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_takes_no_masks_is_evaluated_as_it_is(kind, caplog):
    """Each answer's losses are those of a forward with labels, and the warning says why it takes longer."""
    model = tiny(kind)
    with inference.ready(model, 64) as masks:
        assert not masks and f"{kind} is not known to keep to attention masks" in caplog.text
        for samples in rows():
            (scores,) = plain.score_trees(model, [inference.tree(samples)])
            for sample, score in zip(samples, scores, strict=True):
                logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0]
                targets = torch.tensor(sample.targets)
                right = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
                assert score.nll.sum() == pytest.approx(right.item(), rel=1e-5)
        prompt = rows()[1][0].input_ids[:7]
        (answer,) = plain.greedy(model, [prompt], [5], [2])
        ids = list(prompt)
        while len(ids) < len(prompt) + 5 and ids[-1] != 2:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert answer == [token for token in ids[len(prompt) :] if token != 2]


def test_the_local_window_of_gpt_neo_would_be_lost_under_masks():
    assert differ(tiny("gpt_neo"))[0] > 1e-3


def test_a_model_that_also_sees_takes_no_masks():
    """Its text config names a proved type; the whole is another class."""
    config = transformers.Gemma3Config(text_config=SMALL)
    assert "gemma3 is not known" in str(architectures.why_no_masks(config, 64))
    assert architectures.why_no_masks(config.text_config, 64) is None
