"""How many weights a model has, and what its decoder blocks consist of: from its config alone, no weight is read."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tofu.models import architectures

FLOAT_NORMS = ("Gemma", "Olmo")  # whose norms multiply by their weight in float32, whatever the model computes in
PIECEWISE = ("NewGELUActivation", "FastGELUActivation")  # made of several operations: 3 more tensors are kept


class Sizes(NamedTuple):
    """Counts, not bytes. Those of a block are of the model's last one; `features` are numbers per token."""

    hidden: int
    intermediate: int  # of the feed-forward layer, of one expert where there are experts
    layers: int
    heads: int
    queries: int  # features of all query heads together
    vocabulary: int
    weights: int  # of the whole model, a shared one once
    embedding: int
    head: int  # of the output head where it is not the embedding
    matrices: int  # weights of all blocks that are multiplied with: what autocast makes copies of
    linear: int  # of these, in linear layers: what adapters stand beside and four bits hold
    layer: int  # weights of the block
    adapted: int  # inputs and outputs of all linear layers of all blocks: adapters have `rank` times so many weights
    rms: int  # features that the block's RMS norms see
    float_rms: int  # of these, in norms that multiply in float32
    layer_norm: int  # features that its other norms see
    linears: int  # linear layers of the block
    readers: int  # of these, those that read hidden states
    inputs: int  # features that its linear layers read
    copies: int  # tensors of the feed-forward layer's width that its backward needs
    experts: int  # that a token passes through; 0: no mixture
    cap: bool  # whether attention's scores go through a tanh
    attention: str  # the implementation in use, by transformers' name for it


def shell(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """The causal language model that a config describes, without numbers (on the meta device).

    Args:
        attention: an implementation by transformers' name for it; None: its own choice.
    """
    kwargs = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **kwargs)


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Count a model, which may be a `shell`.

    Raises:
        Exception: of any type; the config lacks a number that nothing stands in for, or no blocks are found.
    """
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    layers = config.num_hidden_layers
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == layers]
    blocks = max(lists, key=_count)
    block = blocks[-1]
    linear = dict(_linear(block))
    queries = heads * (getattr(config, "head_dim", None) or hidden // heads)
    experts = getattr(config, "num_experts_per_tok", 0) if _is_mixture(block) else 0
    wide = getattr(config, "moe_intermediate_size", None) if experts else None
    wide = wide or getattr(config, "intermediate_size", None) or max(max(one.weight.shape) for one in linear.values())
    gated = any("gate" in name for name, _ in block.named_parameters())
    norms = [(module, _seen(name, module, config)) for name, module in block.named_modules() if _is_norm(module)]
    rms = [(module, seen) for module, seen in norms if not isinstance(module, nn.LayerNorm)]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = [one for each in blocks for _, one in _linear(each)]
    return Sizes(
        hidden=hidden,
        intermediate=wide,
        layers=layers,
        heads=heads,
        queries=queries,
        vocabulary=config.vocab_size,
        weights=_count(model),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        matrices=sum(one.numel() for one in blocks.parameters() if one.dim() > 1),
        linear=sum(one.weight.numel() for one in every),
        layer=_count(block),
        adapted=sum(sum(one.weight.shape) for one in every),
        rms=sum(seen for _, seen in rms),
        float_rms=sum(seen for module, seen in rms if type(module).__name__.startswith(FLOAT_NORMS)),
        layer_norm=sum(seen for _, seen in norms) - sum(seen for _, seen in rms),
        linears=len(linear),
        readers=max(1, len(linear) - 1 - any("attn" not in name and "attention" not in name for name in linear)),
        inputs=sum(one.weight.shape[1] for one in linear.values()),
        copies=(4 if gated else 2) + 3 * any(type(one).__name__ in PIECEWISE for one in block.modules()),
        experts=experts or 0,
        cap=getattr(config, "attn_logit_softcapping", None) is not None,
        attention=architectures.attention_in_use(model.config),
    )


def _count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _linear(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a block by name; GPT-2 has a class of its own for them."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def _seen(name: str, norm: nn.Module, config: PretrainedConfig) -> int:
    """The features per token that a norm sees: of a norm over single heads, those of all heads."""
    width, heads = norm.weight.numel(), config.num_attention_heads
    if width != getattr(config, "head_dim", config.hidden_size // heads) or width == config.hidden_size:
        return width
    groups = getattr(config, "num_key_value_heads", None) or heads
    return width * (groups if name.rpartition(".")[2].startswith("k") else heads)


def _is_mixture(block: nn.Module) -> bool:
    return any("expert" in name for name, _ in block.named_parameters())
