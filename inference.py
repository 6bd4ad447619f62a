"""The two forwards of an evaluation: scoring answers that share a question, and greedy generation. Pure token ids.

Both give a model their own 4-D attention masks, so that what a row's question and answers have in common is read once,
and a finished answer's place goes to the next prompt. `ready` makes any family of attention models take such masks.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from data_module import IGNORE, Sample
from utils import BadInput

REFILL = 4  # free places are given to new prompts a quarter of all at a time: each time costs a forward of its own


@contextmanager
def ready(model: PreTrainedModel, reach: int) -> Iterator[None]:
    """The model in eval mode, without gradients, taking 4-D attention masks; as it was, afterwards.

    Args:
        model: unwrapped, with or without adapters; sharded or not.
        reach: the longest text that it will see, in tokens.

    Raises:
        BadInput: the model has layers that are no attention, or attends to a window shorter than `reach`, which our
            masks would not keep.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise BadInput(f"{config.model_type} has {', '.join(sorted(strange))} layers: only attention can be evaluated")
    window = getattr(config, "sliding_window", None)
    if window and ("sliding_attention" in kinds or not kinds) and reach > window:
        raise BadInput(
            f"{config.model_type} attends to the last {window} tokens and a text has up to {reach}: take a smaller "
            "generation.max_length (or max_new_tokens)"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, attention = model.training, base.config._attn_implementation
    if attention not in ("sdpa", "eager"):  # flash attention takes no masks
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    model.eval()
    # the mode is faster; where parameters train or an engine's hooks write them, its tensors would get in the way
    frozen = not any(p.requires_grad or hasattr(p, "ds_id") or hasattr(p, "to_local") for p in model.parameters())
    try:
        with torch.inference_mode() if frozen else torch.no_grad():
            yield
    finally:
        model.train(training)
        if attention not in ("sdpa", "eager"):
            base.set_attn_implementation(attention)


class Tree(NamedTuple):
    """Samples that begin alike as one prefix tree: tokens that they share are there once.

    A node is a token in its context. An edge is a scored prediction, (node, next token), of one sample or of several.
    """

    tokens: list[int]  # (T,) a parent stands before its children
    parents: list[int]  # (T,) the node before; -1 for a first one
    depths: list[int]  # (T,) its position in every sample that passes through it
    nodes: list[int]  # (E,) where each edge starts
    targets: list[int]  # (E,) the token that it predicts
    paths: list[list[int]]  # the edges of each sample; never empty


def tree(samples: Sequence[Sample]) -> Tree:
    """The prefix tree of some samples, one path a sample."""
    built = Tree([], [], [], [], [], [])
    known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    edges: dict[tuple[int, int], int] = {}  # (node, target) -> edge
    for sample in samples:
        node, path = -1, []
        for depth, (token, target) in enumerate(zip(sample.input_ids, sample.targets, strict=True)):
            parent, node = node, known.setdefault((node, token), len(built.tokens))
            if node == len(built.tokens):
                built.tokens.append(token)
                built.parents.append(parent)
                built.depths.append(depth)
            if target != IGNORE:
                edge = edges.setdefault((node, target), len(built.nodes))
                if edge == len(built.nodes):
                    built.nodes.append(node)
                    built.targets.append(target)
                path.append(edge)
        built.paths.append(path)
    return built


def score_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> list[list[tuple[float, int]]]:
    """One forward over a batch of trees, logits at scored nodes only.

    Returns:
        A tree's samples in its order: (sum of the negative log-likelihoods of the scored tokens in nats, their number).
    """
    device, width = model.device, max(len(one.tokens) for one in trees)
    shape = (len(trees), width)
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    keep, visible = np.zeros(shape, dtype=bool), np.zeros((*shape, width), dtype=bool)
    visible[:] = np.eye(width, dtype=bool)  # a filler sees itself: a row that sees nothing would be NaN
    for i, one in enumerate(trees):
        ids[i, : len(one.tokens)], positions[i, : len(one.tokens)] = one.tokens, one.depths
        keep[i, one.nodes] = True
        for node, parent in enumerate(one.parents):
            if parent >= 0:
                visible[i, node] |= visible[i, parent]
    logits = model(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=_additive(torch.from_numpy(visible).to(device)[:, None], model.dtype),
        position_ids=torch.from_numpy(positions).to(device),
        logits_to_keep=torch.from_numpy(keep).to(device),
        use_cache=False,
    ).logits.float()
    row = keep.ravel().cumsum().reshape(shape) - 1  # of the logits, for each scored node
    at = torch.from_numpy(np.concatenate([row[i, one.nodes] for i, one in enumerate(trees)])).to(device)
    targets = torch.tensor([target for one in trees for target in one.targets], device=device)
    nll = (logits.logsumexp(-1)[at] - logits[at, targets]).double().cpu().numpy()
    found, first = [], 0
    for one in trees:
        found.append([(float(nll[first:][path].sum()), len(path)) for path in one.paths])
        first += len(one.nodes)
    return found


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that every attention implementation adds to its scores: 0 where visible, the smallest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


class _Places:
    """Which rows of the cache the next forward writes, and where; all layers look here."""

    def __init__(self, count: int, room: int) -> None:
        self.count, self.room = count, room
        self.first = 0  # a prefill's prompts go to the places from here on
        self.positions: Tensor | None = None  # (n,) a step's token of place i goes there; None in a prefill
        self.length = 0  # positions that a step looks at

    def layer(self) -> "_Layer":
        return _Layer(self)


class _Layer(DynamicLayer):
    """One layer's keys and values, written in place into room that is allocated once."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate room for all places."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.places.count, states.shape[1], self.places.room, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states; return what the queries may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places, n = self.places, len(key_states)
        if places.positions is None:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                kept[places.first : places.first + n, :, : new.shape[2]] = new
            return key_states, value_states
        rows = torch.arange(n, device=self.device)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[rows, :, places.positions] = new[:, :, 0]
        return self.keys[:n, :, : places.length], self.values[:n, :, : places.length]

    def get_seq_length(self) -> int:
        """Tokens seen; models ask only to number positions, which they are given."""
        return self.places.length if self.is_initialized else 0

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy places to others."""
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]


class Together:
    """Keeps ranks that share one model in step: each forward is all ranks', though some have more to do than others."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def work(self) -> None:
        """Call before every forward of this rank's own."""
        self._anyone(True)

    def wait(self) -> None:
        """Run idle forwards until no rank has work left."""
        idle = torch.zeros((1, 1), dtype=torch.long, device=self.model.device)
        while self._anyone(False):
            self.model(input_ids=idle, use_cache=False)

    def _anyone(self, busy: bool) -> bool:
        flag = torch.tensor(float(busy), device=self.model.device)
        torch.distributed.all_reduce(flag)
        return bool(flag > 0)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's, then whatever else the model's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [named] if isinstance(named, int) else list(named or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *named]))


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    ends: Collection[int],
    *,
    at_once: int,
    before_forward: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The most likely next token, again and again, up to an end token or the prompt's own budget.

    At most `at_once` prompts are in work. One that ends makes room: its place goes to a waiting prompt, or away.

    Args:
        model: `ready`.
        prompts: token ids of each, one at least.
        budgets: the most new tokens of each, one at least.
        ends: ids of the tokens that end an answer.
        before_forward: called before every forward (see `Together`).

    Returns:
        The new tokens of each prompt, without the end token.
    """
    device = model.device
    places = _Places(min(at_once, len(prompts)), max(len(p) + b - 1 for p, b in zip(prompts, budgets, strict=True)))
    cache = Cache(layer_class_to_replicate=places.layer)
    waiting, active = list(range(len(prompts)))[::-1], []  # active: the prompt in each place
    answers: list[list[int]] = [[] for _ in prompts]

    while waiting or active:
        before_forward()
        free = places.count - len(active)
        if waiting and (not active or free >= min(len(waiting), -(-places.count // REFILL))):
            new = [waiting.pop() for _ in range(min(free, len(waiting)))]
            places.first, places.positions = len(active), None
            tokens = _read(model, cache, [prompts[i] for i in new], device)
            first = len(active)
            active += new
        else:
            lengths = [len(prompts[i]) + len(answers[i]) for i in active]
            places.positions, places.length = torch.tensor(lengths, device=device) - 1, max(lengths)
            tokens = _step(model, cache, places, [answers[i][-1] for i in active], device)
            first = 0
        over = set()
        for place, token in enumerate(tokens, first):
            answer = answers[active[place]]
            answer.append(token)
            if token in ends or len(answer) >= budgets[active[place]]:
                over.add(place)
        if over:
            active = _close_up(cache, active, over, max(len(prompts[i]) + len(answers[i]) for i in active), device)
    return [answer[:-1] if answer[-1] in ends else answer for answer in answers]


def _read(model, cache: Cache, prompts: list[Sequence[int]], device: torch.device) -> list[int]:
    """Read new prompts into their places; the first token that each is answered with."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    at = torch.arange(width, device=device)
    logits = model(
        input_ids=torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device),
        attention_mask=_additive((at <= at[:, None]).expand(len(prompts), 1, width, width), model.dtype),
        position_ids=at.expand(len(prompts), width),
        past_key_values=cache,
        logits_to_keep=at == lengths[:, None] - 1,
        use_cache=True,
    ).logits
    return logits.argmax(-1).tolist()


def _step(model, cache: Cache, places: _Places, tokens: list[int], device: torch.device) -> list[int]:
    """The next token in every active place."""
    visible = torch.arange(places.length, device=device) <= places.positions[:, None]
    logits = model(
        input_ids=torch.tensor(tokens, device=device)[:, None],
        attention_mask=_additive(visible[:, None, None], model.dtype),
        position_ids=places.positions[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits[:, -1].argmax(-1).tolist()


def _close_up(cache: Cache, active: list[int], over: set[int], length: int, device: torch.device) -> list[int]:
    """Move the last places into those that became free, so that the active ones stay the first."""
    left = len(active) - len(over)
    source = [place for place in range(left, len(active)) if place not in over]
    target = [place for place in sorted(over) if place < left]
    for layer in cache.layers if source else ():
        layer.move(torch.tensor(source, device=device), torch.tensor(target, device=device), length)
    for old, new in zip(source, target, strict=True):
        active[new] = active[old]
    return active[:left]
