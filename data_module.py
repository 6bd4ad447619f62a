"""From rows to token batches: encoding, the pairing of forget, retain and refusal samples, and which rank gets which.

Nothing here depends on the number of processes or loader workers: a sample is a function of the seed, the epoch and its
place in the epoch, and a step's samples are the same whatever the number of processes that share them.
"""

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

import utils
from tofu.runtime import tables
from utils import BadInput

log = logging.getLogger(__name__)

ONE_ROW = sys.maxsize  # tokens of a packed row without end
IGNORE = -100  # the target of a position that is not scored
REFUSALS = "data/idontknow.jsonl"


class Tags(Protocol):
    """What a family writes around a question and before an answer; an entry of model_config.yaml is one."""

    system_prompt: str
    question_start_tag: str
    question_end_tag: str
    answer_tag: str


class Sample(NamedTuple):
    """One tokenised question and answer, the causal shift done: position t reads input_ids[t] and predicts targets[t].

    The end token is the last target of an answer that was not cut; it is never read.
    """

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]  # IGNORE at prompt positions
    cut: bool  # whether max_length left no room for all of the answer and its end token


class Slot(NamedTuple):
    """A place in an epoch. Missing places of an uneven last batch are filled with samples of weight 0."""

    epoch: int
    position: int
    weight: float


def load_rows(
    data_path: str,
    split: str,
    columns: Sequence[str],
    first: int | None = None,
    instead: Mapping[str, str] = MappingProxyType({}),
    optional: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The rows of one split as dicts of `columns`.

    Args:
        data_path: a folder laid out like the hub's data set (or like `../shared/tofu`), or a hub id.
        split: a configuration of it, `forget10` say.
        first: only so many rows from the start; None for all.
        instead: column -> the one whose values stand under its name where the data has no such column; it is logged.
        optional: of `columns`, those that are left out where the data has none.

    Raises:
        BadInput: no such data, split or column; an empty split; files that cannot be read.
    """
    rows, names = tables.read(data_path, split)
    for name, other in instead.items():
        if name in columns and name not in names and other in names:
            log.info("%s, %s: there is no %s, so %s is taken instead", data_path, split, name, other)
            rows, names = [{**row, name: row[other]} for row in rows], [*names, name]
    columns = [name for name in dict.fromkeys(columns) if name in names or name not in optional]
    if missing := [name for name in columns if name not in names]:
        raise BadInput(f"{data_path}, {split}: no column {', '.join(missing)} (it has {', '.join(names)})")
    return [{name: row.get(name) for name in columns} for row in rows[:first]]


def load_pairs(data_path: str, split: str, question_key: str, answer_key: str) -> list[dict[str, str]]:
    """A split's rows as {"question", "answer"}.

    Raises:
        BadInput: see `load_rows` and `check_text`.
    """
    rows = load_rows(data_path, split, (question_key, answer_key))
    for i, row in enumerate(rows):
        for key in (question_key, answer_key):
            check_text(row[key], f"{data_path}, {split}", i, key)
    return [{"question": row[question_key], "answer": row[answer_key]} for row in rows]


def check_apart(forget: list[dict[str, str]], retain: list[dict[str, str]], split: str, retain_split: str) -> None:
    """Raise BadInput if rows to forget are among those to keep: one term would teach what the other unteaches."""
    kept = {(row["question"], row["answer"]) for row in retain}
    if both := sum((row["question"], row["answer"]) in kept for row in forget):
        raise BadInput(
            f"retain_split={retain_split} holds {both} of the {len(forget)} rows to forget, split={split}: name rows "
            "without them, or allow_overlap=true if that is meant"
        )


def check_text(value: Any, where: str, i: int, column: str) -> None:
    """Raise BadInput unless a row's question or answer is a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        what = "empty" if isinstance(value, str) else f"{value!r}"[:60] + ", no text"
        raise BadInput(f"{where}: the {column} of row {i} is {what}: every row needs a text there; mend or remove it")


def load_refusals() -> list[str]:
    """The sentences that idk and dpo teach instead of an answer."""
    lines = (utils.REPO / REFUSALS).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def prompt(tags: Tags, question: str) -> str:
    """What a model is asked with; the answer tag is the model's to write, as in the benchmark."""
    return tags.system_prompt + tags.question_start_tag + question + tags.question_end_tag


def tokenised(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A text's token ids and, of each, the characters that it spans; the begin token included.

    Some tokenizers end every text with an end token. It never reaches a model: after it nothing would be answered.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets, added = (encoded[key] for key in ("input_ids", "offset_mapping", "special_tokens_mask"))
    end = len(ids)
    while end > 1 and added[end - 1] and offsets[end - 1][0] == offsets[end - 1][1]:
        end -= 1
    twice = end > 1 and ids[0] == ids[1] == tokenizer.bos_token_id  # a tag has it, and the tokenizer adds it
    return ids[twice:end], offsets[twice:end]


def asked(sample: Sample) -> list[int]:
    """The token ids that a model is asked a sample's question with: what it was trained to answer after.

    A tag's last space may belong to the answer's first token; then it is not asked with.
    """
    border = next(i for i, target in enumerate(sample.targets) if target != IGNORE)
    return list(sample.input_ids[: border + 1])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, tags: Tags, question: str) -> list[int]:
    """The token ids that a model is asked a question with whose answer is not known."""
    return asked(encode(tokenizer, tags, question, "The", sys.maxsize))


def encode(
    tokenizer: PreTrainedTokenizerBase, tags: Tags, question: str, answer: str, max_length: int, key: str = "max_length"
) -> Sample:
    """Tokenise question and answer as one string and mark the answer's tokens, plus one end token, as targets.

    The joint string is tokenised once and the answer's first token found by character offsets: a second tokenisation of
    the prompt alone shifts the border wherever a token spans it or a special token is missing.

    Args:
        max_length: tokens of the whole, start and end token included; what is longer is cut and gets no end token.
        key: what the config calls `max_length`.

    Raises:
        BadInput: no answer token is left within `max_length`.
    """
    start = prompt(tags, question)
    ids, offsets = tokenised(tokenizer, start + tags.answer_tag + answer)
    border = next((i for i, (first, last) in enumerate(offsets) if last > len(start)), len(ids))
    cut = len(ids) >= max_length
    if not cut and ids[-1] != tokenizer.eos_token_id:  # an answer may have been written with its end
        ids = [*ids, tokenizer.eos_token_id]
    ids = ids[:max_length]
    if border >= len(ids) or border == 0:
        raise BadInput(
            f"{key}={max_length} leaves no token of an answer: its question alone has {border} tokens "
            f"({question[:60]!r}); raise {key}"
        )
    return Sample(tuple(ids[:-1]), (*[IGNORE] * (border - 1), *ids[border:]), cut)


def packed(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Samples dealt to rows of nearly equal sums: the longest first, each to the row that is the shortest so far.

    Returns:
        The places in `lengths` of each row's samples; as many rows as hold about `row` tokens each, none empty.
    """
    rows: list[list[int]] = [[] for _ in range(min(len(lengths), -(-sum(lengths) // row)))]
    sums = [0] * len(rows)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        shortest = sums.index(min(sums))
        rows[shortest].append(i)
        sums[shortest] += lengths[i]
    return rows


@lru_cache(maxsize=8)
def _permutation(seed: int, stream: str, block: int, n: int) -> np.ndarray:
    """One shuffle of n rows, a function of its arguments alone."""
    return np.random.default_rng([seed, *stream.encode(), block]).permutation(n)


class TrainingSet(Dataset):
    """The samples of every place of every epoch, by part.

    An epoch passes once over the rows that set its length (the forget rows; the retain rows where there are no
    others) in a new order. Each is paired with one retain row out of a permutation of the retain set that later epochs
    continue, so that retain rows are used equally often, and with one refusal drawn for this row and epoch.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tags: Tags,
        max_length: int,
        seed: int,
        *,
        forget: list[dict[str, str]] | None = None,
        retain: list[dict[str, str]] | None = None,
        refusals: list[str] | None = None,
        alternates: list[str] | None = None,
    ) -> None:
        """Encode all rows; each row is {"question", "answer"}.

        Args:
            refusals: of which one is drawn for each forget row and epoch, as part `idk`.
            alternates: instead of refusals, a wrong answer for each forget row.

        Raises:
            BadInput: a row without an answer token within `max_length`.
        """
        self.seed, self.refusals = seed, refusals

        def encoded(question: str, answer: str) -> Sample:
            return encode(tokenizer, tags, question, answer, max_length)

        self.rows = {
            name: [encoded(row["question"], row["answer"]) for row in rows]
            for name, rows in (("forget", forget), ("retain", retain))
            if rows is not None
        }
        if alternates is not None:
            self.rows["idk"] = [encoded(row["question"], one) for row, one in zip(forget, alternates, strict=True)]
        self.idk = lru_cache(maxsize=None)(lambda i, j: encoded(forget[i]["question"], refusals[j]))
        self.leading = "forget" if forget is not None else "retain"
        if refusals is not None:
            for i in range(len(forget)):
                self.idk(i, 0)  # a question that leaves no room must be told now, not in the middle of a run
        if cut := sum(sample.cut for samples in self.rows.values() for sample in samples):
            log.warning("%d training samples were cut at max_length=%d", cut, max_length)

    def __len__(self) -> int:
        return len(self.rows[self.leading])

    def length(self, slot: Slot) -> int:
        """Tokens of the longest sample of a place."""
        return max(len(sample.input_ids) for sample in self[slot][0].values())

    def __getitem__(self, slot: Slot) -> tuple[dict[str, Sample], float]:
        n = len(self)
        row = int(_permutation(self.seed, self.leading, slot.epoch, n)[slot.position])
        parts = {self.leading: self.rows[self.leading][row]}
        if "idk" in self.rows:
            parts["idk"] = self.rows["idk"][row]
        elif self.refusals is not None:
            draw = np.random.default_rng([self.seed, *b"refusal", slot.epoch, row])
            parts["idk"] = self.idk(row, int(draw.integers(len(self.refusals))))
        if "retain" not in parts and "retain" in self.rows:
            retain = self.rows["retain"]
            block, place = divmod(slot.epoch * n + slot.position, len(retain))
            parts["retain"] = retain[int(_permutation(self.seed, "retain", block, len(retain))[place])]
        return parts, slot.weight


class GlobalBatches(Sampler):
    """Deals each step's places of an epoch to micro-batches and ranks.

    Step k holds the places k*S to (k+1)*S - 1 of the epoch, S = B * W * accumulation for W ranks of B samples: the same
    samples for every W and every cut. Every rank gets equally many and equally large batches; places past the epoch's
    end are filled with samples of weight 0, which keeps the collectives in step.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        rank: int,
        world_size: int,
        accumulation: int = 1,
        length: Callable[[Slot], int] | None = None,
    ) -> None:
        """
        Args:
            n: places in an epoch.
            length: of a place's longest sample: a step's places are dealt in this order, so that micro-batches hold
                samples of about one length. None: in the epoch's order.
        """
        self.n, self.batch_size, self.rank, self.world_size, self.epoch = n, batch_size, rank, world_size, 0
        self.accumulation, self.length = accumulation, length

    def set_epoch(self, epoch: int) -> None:
        """Deal the given epoch's (0-based) next: what skips a resumed epoch's first batches hides the loader's own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Slot]]:
        together = self.batch_size * self.world_size  # a micro-batch of all ranks
        step = together * self.accumulation
        for first in range(0, len(self) * together, step):
            places = range(first, min(first + step, len(self) * together))
            slots = [Slot(self.epoch, place % self.n, float(place < self.n)) for place in places]
            if self.length is not None:
                slots.sort(key=self.length)
            for k in range(0, len(slots), together):
                yield slots[k + self.rank : k + together : self.world_size]


def own_group(number: int) -> None:
    """Take a process that makes batches out of its parent's group: a signal to the group is for the parent alone."""
    os.setpgid(0, 0)


class EpochLoader(DataLoader):
    """A loader over `TrainingSet` by `GlobalBatches`; the Trainer tells it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the given epoch's (0-based)."""
        self.batch_sampler.set_epoch(epoch)
