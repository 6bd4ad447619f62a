"""Attention over samples of many lengths in one row, by the flash kernel that is in torch itself: no mask, no package.

`register` makes it known to transformers as `varlen`. A model that attends so is given one packed row and where its
samples begin (`batches.collate` with ONE_ROW, `forward.score`).
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig

from tofu.models import architectures

NAME = "varlen"
CAPABILITY = (8, 0)  # of the oldest cards that its kernel runs on: A100
WIDEST = 256  # of a head


def register() -> None:
    """Make it known. It has no entry among transformers' masks, so that no mask is made and none is looked for."""
    AttentionInterface.register(NAME, attend)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside of each sample, as transformers calls it.

    Args:
        query, key, value: (1, H, T, D); key and value may have fewer heads.
        cu_seq_lens_q: (S + 1,) int32, where the samples of the row begin and end.
        max_length_q: tokens of the longest.
        sliding_window: tokens that each one attends to, itself included; None: all before it.

    Returns:
        (1, T, H, D), and no weights.

    Raises:
        RuntimeError: nothing says where the samples begin: they would see each other.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise RuntimeError("attention=varlen is for packed rows alone: cu_seq_lens_q is missing")
    # under autocast a norm in float32 may have widened the first two; the kernel is no operation that autocast knows
    rows = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = on_card if query.is_cuda else plain
    return kernel(*rows, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None


def on_card(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float, window: int | None
) -> Tensor:
    """(T, H, D) by torch's kernel, on a card."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    how = {"window_size": (left, 0)} if _has("window_size") else {"is_causal": True}
    return varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **how,
    )


@functools.cache
def _has(name: str) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return name in inspect.signature(varlen_attn).parameters


def plain(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float, window: int | None
) -> Tensor:
    """(T, H, D) by plain attention, sample by sample: what the kernel is compared with, where there is no card."""
    found, ends = [], bounds.tolist()
    for first, last in zip(ends, ends[1:], strict=False):
        of = [x[first:last].transpose(0, 1)[None] for x in (query, key, value)]
        at = torch.arange(last - first, device=query.device)
        near = (at <= at[:, None]) & (at > at[:, None] - (window or longest + 1))
        sample = F.scaled_dot_product_attention(*of, attn_mask=near, scale=scaling, enable_gqa=True)
        found.append(sample[0].transpose(0, 1))
    return torch.cat(found)


def why_not(config: PretrainedConfig, *, bf16: bool, packing: bool, compiled: bool) -> str | None:
    """Why a training cannot attend so; None if it can.

    Args:
        bf16: whether the model computes in bf16.
        packing: whether samples are packed.
        compiled: whether the model is compiled.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        return "it needs a CUDA GPU of the Ampere generation or a newer one"
    return why_not_there(config, bf16=bf16, packing=packing, compiled=compiled)


def why_not_there(config: PretrainedConfig, *, bf16: bool, packing: bool, compiled: bool) -> str | None:
    """`why_not` on such a card."""
    config = config.get_text_config()
    if not (bf16 and packing) or compiled:
        return "it goes with precision=bf16, packing=true and torch_compile=false"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.model_type not in architectures.PACKABLE or not architectures.has_attention(kind, NAME):
        return f"it is not known whether {config.model_type} keeps packed samples apart so"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0):
        return f"it has neither the soft cap nor the dropout that this {config.model_type} has in its attention"
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if width > WIDEST or width % 8:
        return f"a head of this {config.model_type} is {width} wide: it takes multiples of 8 up to {WIDEST}"
    return None
