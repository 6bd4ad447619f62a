"""The two forwards of an evaluation: scoring answers that share a question, and greedy generation. Pure token ids.

Both give a model their own 4-D attention masks, so that what a row's question and answers have in common is read once,
and a finished answer's slot goes to the next prompt. `ready` makes any family of attention models take such masks.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from data_module import IGNORE, Sample
from tofu.models import architectures
from tofu.runtime import cards
from utils import BadInput

log = logging.getLogger(__name__)

REFILL = 4  # slots are given to prompts a quarter of all at a time: one forward each time, but no large one
PIECE = 64  # nodes whose whole distributions are looked at together
WIDEST = 8  # tokens of a slot in one step: its last one and draft tokens
DRAFTED = 0.4  # a step is as wide as this share of its slots can fill with draft tokens


@contextmanager
def ready(model: PreTrainedModel, reach: int, sharded: bool = False) -> Iterator[bool]:
    """The model in eval mode, without gradients, taking 4-D attention masks if it can; as it was, afterwards.

    Args:
        model: unwrapped, with or without adapters; sharded or not.
        reach: the longest text that it will see, in tokens.
        sharded: whether the ranks share it: then all of them must run equally many forwards.

    Yields:
        Whether it can. If not, `plain` scores and generates, one text at a time.

    Raises:
        BadInput: it cannot, and it is sharded.
    """
    if why := architectures.why_no_masks(model.config, reach):
        if sharded:
            raise BadInput(f"{why}, so it is evaluated by plain forwards, which a sharded model cannot: engine=ddp")
        log.warning("%s: it is evaluated one text at a time, which is slower", why)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, attention = model.training, architectures.attention_in_use(base.config)
    masked = None if why else architectures.masked_attention(base)  # flash attention takes no masks
    if masked is not None:
        base.set_attn_implementation(masked)
    model.eval()
    # the mode is faster; where parameters train or an engine's hooks write them, its tensors would get in the way
    frozen = not any(p.requires_grad or hasattr(p, "ds_id") or hasattr(p, "to_local") for p in model.parameters())
    try:
        with torch.inference_mode() if frozen else torch.no_grad():
            yield not why
    finally:
        model.train(training)
        if masked is not None:
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
    """The prefix tree of some samples, one path per sample."""
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


class TokenScores(NamedTuple):
    """What a model makes of the n scored tokens of one answer, end token included."""

    nll: np.ndarray  # (n,) float64, the tokens' negative log-likelihoods in nats
    right: np.ndarray  # (n,) bool: the token is the likeliest one
    mean: np.ndarray  # (n,) float64, the log-probability's mean under the model's own distribution, minus its entropy
    deviation: np.ndarray  # (n,) float64, its standard deviation there (mu and sigma of min-k++, arXiv 2404.02936)


def score_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> list[list[TokenScores]]:
    """One forward over a batch of trees, logits at scored nodes only.

    Returns:
        Of each tree, its samples' in its order.
    """
    device = model.device
    width = cards.up(max(len(one.tokens) for one in trees), cards.round_to(device))
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
    partition = logits.logsumexp(-1)
    nll = (partition[at] - logits[at, targets]).double()
    mean, deviation = (moment[at].double() for moment in moments(logits, partition))
    each = (nll, logits.argmax(-1)[at] == targets, mean, deviation)
    columns = [column.cpu().numpy() for column in each]
    found, first = [], 0
    for one in trees:
        found.append([TokenScores(*(column[first:][path] for column in columns)) for path in one.paths])
        first += len(one.nodes)
    return found


def moments(logits: Tensor, partition: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the log-probabilities (N, V) under their own distribution, (N,) each.

    Args:
        partition: (N,) the logits' logsumexp.
    """
    means, deviations = [], []
    for piece, constant in zip(logits.split(PIECE), partition.split(PIECE), strict=True):  # no second (N, V)
        logp = piece - constant[:, None]
        p = logp.exp()
        means.append((p * logp).sum(-1))
        deviations.append((p * (logp - means[-1][:, None]).square()).sum(-1).sqrt())
    return torch.cat(means), torch.cat(deviations)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that every attention implementation adds to its scores: 0 where visible, the smallest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


class _Slots:
    """Which rows of the cache the next forward writes, and where; all layers look here."""

    def __init__(self, count: int, room: int) -> None:
        self.count, self.room = count, room
        self.first = 0  # a prefill's prompts go to the slots from here on
        self.positions: Tensor | None = None  # (n, w) a step's tokens of slot i go there; None in a prefill
        self.length = 0  # positions that a step looks at

    def layer(self) -> "_Layer":
        return _Layer(self)


class _Layer(DynamicLayer):
    """One layer's keys and values, written in place into room that is allocated once."""

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate room for all slots."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.slots.count, states.shape[1], self.slots.room, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states; return what the queries may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, n = self.slots, len(key_states)
        if slots.positions is None:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                kept[slots.first : slots.first + n, :, : new.shape[2]] = new
            return key_states, value_states
        rows = torch.arange(n, device=self.device)[:, None]
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[rows, :, slots.positions] = new.transpose(1, 2)
        return self.keys[:n, :, : slots.length], self.values[:n, :, : slots.length]

    def get_seq_length(self) -> int:
        """Tokens seen; models ask only to number positions, which they are given."""
        return self.slots.length if self.is_initialized else 0

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy slots to others."""
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's, then whatever else the model's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [named] if isinstance(named, int) else list(named or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *named]))


class _Drafts:
    """Drafts how a text goes on: as the text that it last agreed with, or that last had the same two tokens before.

    A model that has learned an answer writes it word for word, and one that has lost its way repeats itself: so most
    tokens can be drafted, and a draft costs little where the model reads it together with the token before.
    """

    def __init__(self, prompt: Sequence[int], known: Sequence[Sequence[int]]) -> None:
        self.text: list[int] = list(prompt)
        self.after: dict[tuple[int, int], tuple[Sequence[int], int]] = {}  # two tokens -> a text, and where it goes on
        self.source, self.place = self.text, len(self.text)
        for text in (self.text, *reversed(known)):
            self.after.update({(text[i - 2], text[i - 1]): (text, i) for i in range(len(text) - 1, 1, -1)})

    def append(self, token: int) -> None:
        """The text goes on with this token."""
        followed = self.place < len(self.source) and self.source[self.place] == token
        self.text.append(token)
        self.place += 1
        if not followed or self.place >= len(self.source):
            self.source, self.place = self.after.get(tuple(self.text[-2:]), (self.text, len(self.text)))
        if len(self.text) > 2:
            self.after[self.text[-3], self.text[-2]] = self.text, len(self.text) - 1

    def next(self, count: int) -> Sequence[int]:
        """At most `count` tokens."""
        return self.source[self.place : self.place + count]


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    ends: Collection[int],
    *,
    at_once: int,
    known: Sequence[Sequence[Sequence[int]]] | None = None,
    before_forward: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The most likely next token, again and again, up to an end token or the prompt's own budget.

    At most `at_once` prompts are in work. A finished one gives its slot to a waiting prompt. A step reads each slot's
    last token with draft tokens, and keeps a draft where it is what the model writes (speculative decoding).

    Args:
        model: `ready`.
        prompts, budgets: token ids of each, and its most new tokens; one at least.
        ends: ids of the tokens that end an answer.
        known: of each prompt, drafts of its answer, the likeliest first; they change the time, and no likelier token.
        before_forward: called before every forward (see `Together`).

    Returns:
        The new tokens of each prompt, without the end token.
    """
    device = model.device
    limits = [len(p) + b for p, b in zip(prompts, budgets, strict=True)]
    slots = _Slots(min(at_once, len(prompts)), cards.up(max(limits) + WIDEST, cards.round_to(device)))
    cache = Cache(layer_class_to_replicate=slots.layer)
    waiting, active = list(range(len(prompts)))[::-1], []  # active: the prompt in each slot
    texts = [_Drafts(p, k) for p, k in zip(prompts, known or [[]] * len(prompts), strict=True)]
    refill = -(-slots.count // REFILL)

    while waiting or active:
        before_forward()
        free = slots.count - len(active)
        if waiting and (not active or free >= min(len(waiting), refill)):
            new = [waiting.pop() for _ in range(min(free, len(waiting), refill))]
            slots.first, slots.positions = len(active), None
            read, found = [[]] * len(new), _read(model, cache, [prompts[i] for i in new], device)
            first = len(active)
            active += new
        else:
            read = _draft_tokens([texts[i] for i in active])
            found = _step(model, cache, slots, [texts[i].text for i in active], read, max(limits), device)
            first = 0
        over = set()
        for slot, (drafts, tokens) in enumerate(zip(read, found, strict=True), first):
            text, limit = texts[active[slot]], limits[active[slot]]
            for token, draft in zip(tokens, [*drafts, None], strict=False):
                text.append(token)
                if token in ends or len(text.text) >= limit:
                    over.add(slot)
                    break
                if token != draft:
                    break
        if over:
            active = _close_up(cache, active, over, max(len(texts[i].text) for i in active), device)
    answers = [text.text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [answer[:-1] if answer[-1] in ends else answer for answer in answers]


def _read(model, cache: Cache, prompts: list[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Read new prompts into their slots; the first token that each is answered with, in a list of its own."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = cards.up(max(map(len, prompts)), cards.round_to(device))
    at = torch.arange(width, device=device)
    logits = model(
        input_ids=torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device),
        attention_mask=_additive((at <= at[:, None]).expand(len(prompts), 1, width, width), model.dtype),
        position_ids=at.clamp(max=max(map(len, prompts)) - 1).expand(len(prompts), width),
        past_key_values=cache,
        logits_to_keep=at == lengths[:, None] - 1,
        use_cache=True,
    ).logits
    return logits.argmax(-1)[:, None].tolist()


def _draft_tokens(texts: list[_Drafts]) -> list[Sequence[int]]:
    """What each slot drafts; as many at most as a share of all slots can draft, since a step is one rectangle."""
    drafts = [text.next(WIDEST - 1) for text in texts]
    lengths = sorted((len(draft) for draft in drafts), reverse=True)
    width = lengths[int(DRAFTED * len(lengths))]
    return [draft[:width] for draft in drafts]


def _step(
    model,
    cache: Cache,
    slots: _Slots,
    texts: list[list[int]],
    drafts: list[Sequence[int]],
    limit: int,
    device: torch.device,
) -> list[list[int]]:
    """The next token after each slot's text, and after each of its drafts; no text is longer than `limit`."""
    width = 1 + max(map(len, drafts))
    last = torch.tensor([len(text) - 1 for text in texts], device=device)
    slots.positions = last[:, None] + torch.arange(width, device=device)
    slots.length = cards.up(max(map(len, texts)) + width - 1, cards.round_to(device))
    visible = torch.arange(slots.length, device=device) <= slots.positions[:, :, None]
    ids = [[text[-1], *draft, *[0] * (width - 1 - len(draft))] for text, draft in zip(texts, drafts, strict=True)]
    logits = model(  # what is written of a wrong draft is written over before anything can see it
        input_ids=torch.tensor(ids, device=device),
        attention_mask=_additive(visible[:, None], model.dtype),
        position_ids=slots.positions.clamp(max=limit - 1),  # a draft beyond is nobody's, and perhaps not the model's
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits.argmax(-1).tolist()


def _close_up(cache: Cache, active: list[int], over: set[int], length: int, device: torch.device) -> list[int]:
    """Move the last slots into those that became free, so that the active ones stay the first."""
    left = len(active) - len(over)
    source = [slot for slot in range(left, len(active)) if slot not in over]
    target = [slot for slot in sorted(over) if slot < left]
    for layer in cache.layers if source else ():
        layer.move(torch.tensor(source, device=device), torch.tensor(target, device=device), length)
    for old, new in zip(source, target, strict=True):
        active[new] = active[old]
    return active[:left]
