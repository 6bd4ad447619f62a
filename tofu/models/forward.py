"""A training's forwards: what a model predicts at the scored positions of a batch, and its hidden states there."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
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
    compiled: bool = False,
) -> dict[str, Scored | States]:
    """One forward over the samples of a batch, and what each part of it predicts at its scored positions.

    Args:
        model: a causal language model, wrapped by an engine or not.
        batch: what `batches.collate` makes.
        only: the parts to read; None for all.
        headless: stop before the output head: the views hold its inputs, (N, hidden) as the model computes them, and
            `headed` makes logits of them.
        block: the one whose output is the view of the batch's `states` parts. No block above it is run if no logits
            are asked for (in GPT-NeoX and StableLM they are).
        compiled: the model is, so its head is not looked into: a GPU waits while it looks for the scored positions.

    Returns:
        One view per part, logits and states in float32 whatever the model computes in.
    """
    names = [name for name in batch["parts"] if only is None or name in only]
    inputs, shift = _cut(batch, names)
    spans = {name: slice(*batch["blocks"][name].scored) for name in names}
    stated = [name for name in names if name in batch["states"]]
    at = torch.cat([batch["at"][spans[name]] for name in names if name not in stated] or [batch["at"][:0]]) - shift
    if compiled:
        keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        inputs["logits_to_keep"] = keep.view(-1).index_fill_(0, at, True).view_as(keep)
    with (
        contextlib.nullcontext() if compiled else _selected(model, at, headless),
        _watched(model, block, len(stated) == len(names)) if stated else contextlib.nullcontext() as outputs,
    ):
        # a cache would make packed samples see each other
        logits = model(**inputs, use_cache=False).logits
    logits = logits if logits.ndim == 2 else logits.flatten(0, -2).index_select(0, at)  # it has not called its head
    logits = logits if headless else logits.float()
    views, start = {}, 0
    for name in names:
        about = batch["labels"][spans[name]], batch["sample"][spans[name]], batch["blocks"][name].lengths
        if name in stated:
            states = outputs[0].flatten(0, -2).index_select(0, batch["at"][spans[name]] - shift)
            views[name] = States(states.float(), *about[1:])
            continue
        its = slice(start, start + len(about[0]))
        views[name], start = Scored(logits[its], *about), its.stop
    return views


def _cut(batch: dict[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], int]:
    """What a model reads of a batch from the first to the last of some parts, and how far that is from its begin."""
    blocks = [batch["blocks"][name] for name in names]
    start, stop = blocks[0].tokens[0], blocks[-1].tokens[1]
    one_row, width = len(batch["input_ids"]) == 1, batch["input_ids"].shape[1]
    shape = (1, stop - start) if one_row else (-1, width)
    inputs = {name: batch[name].view(-1)[start:stop].view(shape) for name in INPUTS if name in batch}
    if "cu_seqlens" in batch:  # else the attention looks for them in every layer
        first, last = blocks[0].samples[0], blocks[-1].samples[1]
        last = len(batch["cu_seqlens"]) - 1 if names[-1] == batch["parts"][-1] else last  # and what fills up the row
        bounds = batch["cu_seqlens"][first : last + 1] - start
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        inputs |= {"max_length_q": batch["longest"], "max_length_k": batch["longest"]}
    return inputs, start


@contextmanager
def _selected(model: torch.nn.Module, at: torch.Tensor, headless: bool) -> Iterator[None]:
    """The model's output head is given the states at some places alone, (N, hidden) out of (R, T, hidden).

    Logits of the whole vocabulary exist there only. `logits_to_keep` would take a mask, whose places a GPU must count
    before the forward can go on.

    Args:
        headless: it hands them on, and nothing comes after it.
    """
    whole = _whole(model)
    head, key = whole.get_output_embeddings(), architectures.soft_cap_key(whole.config)
    cap = getattr(whole.config, key) if key else None
    select = lambda module, args: (args[0].flatten(0, -2).index_select(0, at), *args[1:])  # noqa: E731
    handle = head.register_forward_pre_hook(select)
    if headless:
        head.forward = lambda states: states
        if key:
            setattr(whole.config, key, None)
    try:
        yield
    finally:
        handle.remove()
        if headless:
            del head.forward
            if key:
                setattr(whole.config, key, cap)


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
