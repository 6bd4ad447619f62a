"""A training's forwards: what a model predicts at the scored positions of a batch, and its hidden states there."""

import contextlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tofu.models import architectures
from tofu.models.views import Scored, States

INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a model's forward, where a batch has them


def score(
    model: torch.nn.Module,
    batch: dict[str, Any],
    only: Collection[str] | None = None,
    *,
    headless: bool = False,
    block: int | None = None,
) -> dict[str, Scored | States]:
    """One forward over the samples of a batch, and what each part of it predicts at its scored positions.

    Args:
        model: a causal language model, wrapped by an engine or not.
        batch: what `data_module.collate` makes.
        only: the parts to read; None for all.
        headless: stop before the output head: the views hold its inputs, (N, hidden) as the model computes them, and
            `headed` makes logits of them.
        block: the one whose output is the view of the batch's `states` parts. No block above it is run if no logits
            are asked for (in GPT-NeoX and StableLM they are).

    Returns:
        One view per part, logits and states in float32 whatever the model computes in.
    """
    number = {name: k for k, name in enumerate(batch["parts"]) if only is None or name in only}
    wanted = torch.isin(batch["part"], torch.tensor(list(number.values()), device=batch["part"].device))
    rows, states = wanted.any(1), batch["states"]
    batch = {name: batch[name][rows] for name in (*INPUTS, "targets", "part", "sample") if name in batch} | {
        "keep": (batch["keep"] & wanted)[rows]
    }
    stated = {name: number.pop(name) for name in states if name in number}
    keep = batch["keep"]  # (R, T) bool: logits of the whole vocabulary exist at these positions only
    at = {name: keep & (batch["part"] == k) for name, k in stated.items()}
    for positions in at.values():
        keep = keep & ~positions
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    with (
        _headless(model) if headless else contextlib.nullcontext(),
        _watched(model, block, not number) if stated else contextlib.nullcontext() as outputs,
    ):
        # a cache would make packed samples see each other
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    logits = logits if headless else logits.float()
    labels, part, sample = (batch[name][keep] for name in ("targets", "part", "sample"))
    views, start = {}, 0
    for name, k in number.items():
        its = slice(start, start + int((part == k).sum()))
        views[name] = Scored(logits[its], labels[its], sample[its])
        start = its.stop
    for name, positions in at.items():
        views[name] = States(outputs[0][positions].float(), batch["sample"][positions])
    return views


@contextmanager
def _watched(model: torch.nn.Module, block: int, to_there: bool) -> Iterator[list[torch.Tensor]]:
    """What a block hands on in the forward inside: (R, T, hidden), the list's one entry.

    Args:
        to_there: leave out the blocks above.
    """
    outputs: list[torch.Tensor] = []
    config = _whole(model).config
    note = lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handle, count = blocks_of(model)[block].register_forward_hook(note), config.num_hidden_layers
    if to_there:
        config.num_hidden_layers = block + 1
    try:
        yield outputs
    finally:
        handle.remove()
        config.num_hidden_layers = count


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder blocks of a model of a known type, inside of engines' and adapters' wrappers."""
    whole = _whole(model)
    return architectures.blocks_of(whole.base_model, whole.config.model_type)


def _whole(model: torch.nn.Module) -> PreTrainedModel:
    """The causal language model inside of engines' and adapters' wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@contextmanager
def _headless(model: torch.nn.Module) -> Iterator[None]:
    """The model's output head hands on what it is given, and nothing comes after it."""
    whole = _whole(model)
    head, key = whole.get_output_embeddings(), architectures.soft_cap_key(whole.config)
    cap = getattr(whole.config, key) if key else None
    head.forward = lambda states: states
    if key:
        setattr(whole.config, key, None)
    try:
        yield
    finally:
        del head.forward
        if key:
            setattr(whole.config, key, cap)


def headed(model: torch.nn.Module, view: Scored, bf16: bool) -> Scored:
    """The view whose logits are made of a `headless` one's states, in float32.

    Args:
        bf16: whether the head computes in bf16 over weights of another type, as the model's forward does.
    """
    whole = _whole(model)
    head, key = whole.get_output_embeddings(), architectures.soft_cap_key(whole.config)
    cap = getattr(whole.config, key) if key else None
    with torch.autocast(view.logits.device.type, torch.bfloat16, enabled=bf16):
        logits = head(view.logits.to(head.weight.dtype)).float()
    return view._replace(logits=logits if cap is None else torch.tanh(logits / cap) * cap)


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """The reference model of a LoRA run: the same network, its adapters switched off, dropout too."""
    peft = next(module for module in model.modules() if isinstance(module, PeftModel))
    training, trained = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval()
    try:
        with peft.disable_adapter():
            yield
    finally:  # switching them on again lets all of them train
        model.train(training)
        for parameter, before in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
