"""The memory that a run's step takes at most, from its model's sizes and its settings: nothing is loaded or measured.

The bytes are those of tensors. What the CUDA context, kernels' workspaces and the allocator's gaps take comes on top.
"""

from typing import NamedTuple

import torch

import dataloader
from tofu.cli.schema import STOCHASTIC
from tofu.models.engines import Engine
from tofu.models.sizes import Sizes

LOSS = 12  # bytes per logit at most: float32 log-probabilities, their gradient and the logits'
LOSS_LIVE = 20  # where the loss reads the reference model's distribution too: both models' logits and their logarithms
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight in NF4: 8 bits for 64 weights, a float32 for 256 of these
LIVE = 10**9  # DeepSpeed's default of stage3_max_live_parameters: gathered weights that ZeRO-3 keeps for a later use


class Setting(NamedTuple):
    """What of a run's config its memory depends on."""

    engine: Engine
    processes: int
    optim: str  # transformers' name, or adamw_8bit_stochastic
    weights: torch.dtype  # of the trained weights where all train, of the base model where adapters do
    rank: int = 0  # of LoRA's adapters; 0: all weights train
    dropout: bool = False  # whether the adapters' inputs are dropped
    quantize: str | None = None
    checkpointing: bool = False
    accumulation: int = 1
    compares: str = "none"  # what the method needs of the reference model: none, log-probabilities, live
    reference: torch.dtype | None = None  # of the live copy's weights; None: there is no copy
    cuda: bool = False
    blocks: range | None = None  # whose feed-forward layers' last weights alone train, of which they are; None: all

    @property
    def adapted(self) -> bool:
        """Whether adapters train."""
        return self.rank > 0

    @property
    def partial(self) -> bool:
        """Whether the embeddings and most other weights are frozen."""
        return self.adapted or self.blocks is not None


class Batch(NamedTuple):
    """The widest micro-batch of one process."""

    rows: int
    width: int  # tokens of a row
    scored: int  # positions with logits
    samples: int  # places in an epoch; a place's parts stay together


class Estimate(NamedTuple):
    """Bytes on one process's device. The parts do not exist all at once: `peak` is the largest sum in a step."""

    weights: int
    copies: int  # of weights, while it computes: autocast's in bf16, and what ZeRO-3 gathers
    gradients: int
    states: int  # of the optimiser
    paged: bool  # whether the states leave for the host where the device is full; then `peak` is without them
    activations: int
    logits: int
    reference: int
    peak: int


def estimate(sizes: Sizes, setting: Setting, batch: Batch) -> Estimate:
    """What one optimiser step takes: forward, backward, update."""
    size, held = _Weights.of(sizes, setting, batch), _kept(sizes, setting, batch)
    paged = "paged" in setting.optim
    reference = 0
    if setting.reference is not None:
        short = sizes.linear + sizes.head if setting.engine.name == "ddp" else sizes.weights  # see `loading.narrow`
        reference = short * setting.reference.itemsize + (sizes.weights - short) * 4
        reference //= setting.processes if setting.engine.sharded else 1
    base = size.weights + reference + (0 if paged else size.states)
    many = setting.accumulation > 1 or setting.processes > 1 or setting.engine.name == "deepspeed"
    there = size.gradients if many else 0  # gradients of an earlier micro-batch, or in buckets that stay
    head = 0 if setting.partial else sizes.vocabulary * sizes.hidden * 4
    pieces = batch.scored * sizes.vocabulary > dataloader.LOGITS and batch.samples > 1
    most = min(batch.scored * sizes.vocabulary, dataloader.LOGITS) if pieces else batch.scored * sizes.vocabulary
    logits = most * (LOSS_LIVE if setting.compares == "live" else LOSS)
    again = head * (2 * (not sizes.head) + (there > 0))  # a gradient that is added to another one
    moments = (
        there + held.all + size.cached + most * 2,  # the forward's end
        there + held.all + size.copies + logits + (head if pieces else 0),  # the loss's backward
        there + held.all + size.copies + most * 4 + head + size.head_copy,  # the output head's
        max(there, head) + held.all + held.one + held.work + size.copies + size.block,  # the last block's
        size.gradients + again,  # the embedding's
        size.gradients + size.update,
    )
    return Estimate(
        weights=int(size.weights),
        copies=int(max(size.cached, size.copies) + size.gathered),
        gradients=int(size.gradients),
        states=int(size.states),
        paged=paged,
        activations=int(held.all + held.one),
        logits=int(logits),
        reference=int(reference),
        peak=int(base + max(moments) + size.gathered),
    )


class _Weights(NamedTuple):
    """Bytes that follow from the weights alone."""

    weights: float
    gradients: float
    states: float
    cached: float  # copies that autocast makes of float32 weights and keeps until the forward ends
    copies: float  # of these, the ones that a backward waits for
    head_copy: float  # of the output head's gradient, in 16 bits
    block: float  # gradients of one block, before they are where they stay
    gathered: float  # whole weights of what is sharded, while they are used
    update: float  # the optimiser's own temporary tensors

    @classmethod
    def of(cls, sizes: Sizes, setting: Setting, batch: Batch) -> "_Weights":
        engine, n = setting.engine, setting.processes
        computed = 2 if engine.bf16 else 4
        trained, frozen = _trained(sizes, setting), _frozen(sizes, setting)
        each = 4 if setting.adapted else setting.weights.itemsize
        tables = 0 if setting.partial else sizes.embedding
        states = (trained - tables) * states_per_weight(setting.optim, each)
        states += tables * states_per_weight(setting.optim, each, embedding=True)
        gathered, share = 0.0, n if engine.sharded else 1
        weights, gradients = (trained * each + frozen) / share, trained * each / share
        if engine.name == "deepspeed":  # a copy in float32 beside what computes; gradients are summed in float32
            weights = (trained * computed + frozen) / share + trained * 4 / n
            gradients, states = trained * 4 / n, states / n
            if engine.sharded:
                limit = (engine.deepspeed or {})["zero_optimization"].get("stage3_max_live_parameters", LIVE)
                gathered = min(sizes.weights, limit if isinstance(limit, int | float) else LIVE) * computed
        elif engine.name == "fsdp":
            states = states / n
            gathered = (sizes.embedding + sizes.head + 3 * sizes.layer) * computed  # two blocks, and one's gradients
        casts = engine.bf16 and engine.name == "ddp" and setting.weights == torch.float32
        head = sizes.vocabulary * sizes.hidden * (batch.scored > 0)
        blocks = sizes.matrices / sizes.layers * (1 if setting.checkpointing else _active(sizes, setting, batch))
        foreach = setting.optim == "adamw_torch" and setting.cuda  # temporary tensors, one per weight
        return cls(
            weights=weights,
            gradients=gradients,
            states=states,
            cached=2 * (sizes.matrices * _active(sizes, setting, batch) / sizes.layers + head) if casts else 0,
            copies=2 * (blocks + head) if casts else 0,
            head_copy=2 * head if casts and not setting.partial else 0,
            block=0 if setting.partial else sizes.layer * 4,
            gathered=gathered,
            update=4 * trained / (1 if engine.name == "ddp" else n) if foreach else 0,
        )


def _trained(sizes: Sizes, setting: Setting) -> float:
    """How many weights train."""
    share = len(setting.blocks) / sizes.layers if setting.blocks is not None else 1
    if setting.adapted:
        return setting.rank * sizes.adapted * share
    return sizes.weights if setting.blocks is None else len(setting.blocks) * sizes.hidden * sizes.intermediate


def _frozen(sizes: Sizes, setting: Setting) -> float:
    """Bytes of the weights that don't train: the base model of adapters, the layers that a method leaves alone."""
    if setting.quantize:
        return sizes.linear * FOUR_BITS + (sizes.weights - sizes.linear) * setting.weights.itemsize
    sharded = setting.engine.name == "deepspeed" and setting.engine.bf16
    whole = sizes.weights if setting.adapted else sizes.weights - _trained(sizes, setting)
    return whole * (2 if sharded else setting.weights.itemsize)


def _active(sizes: Sizes, setting: Setting, batch: Batch) -> int:
    """How many blocks have a backward: those from the first that trains to the last that a term looks at."""
    if setting.blocks is None:
        return sizes.layers
    return (sizes.layers if batch.scored else setting.blocks.stop) - setting.blocks.start


def states_per_weight(optim: str, size: int, embedding: bool = False) -> float:
    """Bytes of an optimiser's states for each trained weight.

    Args:
        size: bytes of the weight.
        embedding: whether it is one of an embedding, whose states bitsandbytes' 8-bit optimisers keep in float32.
    """
    states = next((count for name, count in STATES.items() if name in optim), 2)
    if optim == STOCHASTIC or optim in ("adamw_torch_8bit", "adamw_torch_4bit"):  # torchao's: a scale for each block
        return states * (0.5 + 4 / 128 if "4bit" in optim else 1 + 4 / 256)
    if "8bit" in optim:
        return states * (4 if embedding else 1 + 4 / 256)
    return states * (4 if "paged" in optim or "32bit" in optim else size)


STATES = {  # what stands in an optimiser's name -> numbers that it keeps for each weight; the first that fits, else 2
    **{"ademamix": 3, "adafactor": 0, "adagrad": 1, "lion": 1, "rmsprop": 1, "lomo": 0, "schedule_free_sgd": 1},
    **{"sgd": 0, "galore": 0.5, "apollo": 0.5},
}


class _Kept(NamedTuple):
    """Bytes of activations."""

    all: float  # when the forward has ended
    one: float  # one block's, made again for its backward
    work: float  # gradients of activations, inside a block


def _kept(sizes: Sizes, setting: Setting, batch: Batch) -> _Kept:
    tokens = batch.rows * batch.width
    computed = 2 if setting.engine.bf16 else 4
    stream = 2 if in_16_bits(setting) else 4  # hidden states between blocks
    block = tokens * per_token(sizes, setting, batch.width)
    last = tokens * 2 * 4 * sizes.hidden + batch.scored * computed * sizes.hidden + tokens * batch.width
    work = tokens * (2 * computed * sizes.intermediate * max(1, sizes.experts) + 4 * stream * sizes.hidden)
    active = _active(sizes, setting, batch)
    if setting.checkpointing:
        return _Kept(tokens * active * stream * sizes.hidden + last, block, work)
    return _Kept(block * active + last, 0, work)


def in_16_bits(setting: Setting) -> bool:
    """Whether hidden states are bf16: autocast over float32 weights keeps them, and its norms, in float32."""
    return setting.engine.bf16 and (setting.weights == torch.bfloat16 or setting.engine.name != "ddp")


def per_token(sizes: Sizes, setting: Setting, width: int) -> float:
    """Bytes that one decoder block keeps of one token for its backward.

    Args:
        width: tokens of a row: its mask, or its attention's scores, are kept too.
    """
    computed, half = 2 if setting.engine.bf16 else 4, in_16_bits(setting)
    hidden, wide = sizes.hidden, sizes.intermediate * max(1, sizes.experts)
    weighted = 0 if setting.adapted else 2 if half else 4  # a norm's output before its weight, where that trains
    norms = sizes.rms * (4 + weighted) + sizes.layer_norm * (2 if half else 4)
    norms += sizes.float_rms * 2 if half and weighted else 0
    own = setting.adapted and (setting.dropout or setting.engine.bf16)  # each adapter has an input of its own
    if own:
        inputs = sizes.inputs * (computed + setting.dropout * (1 if setting.cuda else 4))
    elif setting.engine.bf16 and not half:  # each layer makes 16 bits of its own of them
        inputs = hidden * 2 * sizes.readers
    else:
        inputs = hidden * computed * (1 if sizes.rms + sizes.layer_norm == hidden else 2)
    inputs += computed * setting.rank * sizes.linears
    attention = computed * 4 * sizes.queries + 4 * sizes.heads
    if sizes.attention == "eager":
        softmax = 6 if setting.engine.bf16 else 4
        attention += sizes.heads * width * (softmax + computed * sizes.cap)
    elif not sizes.attention.startswith(("flash", "flex", "varlen")):
        attention += computed * width  # the mask
    copies = sizes.copies - own  # the frozen layer beside it doesn't need its input
    mixed = hidden * sizes.experts * (4 * 2 if not setting.engine.bf16 else 2 * 2 if half else 2 * 2 + 6)
    return norms + inputs + attention + computed * copies * wide + mixed
