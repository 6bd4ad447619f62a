"""From samples to one batch of rows for one forward, and where in it each scored token stands.

All of it is made on the host: a training step on a GPU then never has to wait to learn how many tokens are scored.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_module import IGNORE, ONE_ROW, Sample, packed
from tofu.runtime import cards

Span = tuple[int, int]  # first, and one past the last


@dataclass(frozen=True)
class Block:
    """Where one part of a batch stands. Parts stand one after the other: in rows of their own, or in the one row."""

    tokens: Span  # of the rows laid end to end; the last part has what fills up a single row
    scored: Span  # of `at`, `labels` and `sample`
    answers: Span  # of `answers`; empty unless the part is an attended one
    samples: Span  # of those that `cu_seqlens` bounds; empty unless there is one row
    lengths: tuple[int, ...]  # (B,) scored positions of each of its samples
    answer_lengths: tuple[int, ...]  # (B,) of an attended part, those of them that are an answer's


def collate(
    parts: dict[str, list[Sample]],
    weights: Sequence[float] | None = None,
    attended: frozenset[str] = frozenset(),
    row: int | None = None,
    states: frozenset[str] = frozenset(),
    round_to: int = 1,
) -> dict[str, Any]:
    """Put all parts' samples into one batch of rows, part after part, for one forward.

    Args:
        parts: name -> B samples each, the same order of pairs in every part.
        weights: (B,) 1, or 0 for the fillers of an uneven batch.
        attended: the parts whose losses score every position read, not only the answer's.
        row: pack samples end to end into rows of about so many tokens, ONE_ROW into one; None pads each into a row of
            its own.
        states: the parts whose losses look at hidden states where their answers' tokens are read, end token too.
        round_to: the rows' width is a multiple of it.

    Returns:
        input_ids (R, T) int64; R rows, T the longest. Either attention_mask (R, T) int64, padded; or position_ids
        (R, T) int64, packed: they begin anew with each sample, and a row's rest is a sample of its own, which is how
        transformers' masks know samples apart. Of the N scored positions, part after part and row after row: at (N,)
        int64, the place in the rows laid end to end; labels (N,) int64, what is predicted there, IGNORE where an
        attended part reads its prompt; sample (N,) int64, the place in its part. answers (M,) int64: of an attended
        part's scored positions, those of the answers. weight (B,) float32; tokens: how many are read, fillers' not;
        parts, states: the names; blocks: part -> `Block`. And with one row cu_seqlens (S + 1,) int32, where its
        samples begin and end, and longest, the tokens of the longest one.
    """
    weight = np.ones(len(next(iter(parts.values())))) if weights is None else np.asarray(weights)
    parts = {name: [_ended(s) for s in samples] if name in states else samples for name, samples in parts.items()}
    rows = _dealt(parts, row)
    width = cards.up(max(sum(len(sample.input_ids) for *_, sample in places) for places in rows), round_to)
    ids, positions, read = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    scored: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in parts}
    for r, places in enumerate(rows):
        start = 0
        for name, i, sample in places:
            size = len(sample.input_ids)
            here = slice(start, start + size)
            ids[r, here], positions[r, here], read[r, here] = sample.input_ids, np.arange(size), 1
            scored[name].append(_scored(sample, r * width + start, i, name in attended, name in states))
            start += size
        positions[r, start:] = np.arange(width - start)
    batch: dict[str, Any] = {"input_ids": ids, **({"position_ids": positions} if row else {"attention_mask": read})}
    every = [one for found in scored.values() for one in found]
    batch["at"], batch["labels"], batch["sample"] = (np.concatenate(of) for of in zip(*every, strict=True))
    blocks, batch["answers"] = _blocks(rows, width, scored, attended, row == ONE_ROW)
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    if row == ONE_ROW:
        batch |= _bounds(rows[0], width)
    lengths = sum(np.array([len(sample.input_ids) for sample in samples]) for samples in parts.values())
    return {
        **batch,
        "weight": torch.tensor(weight, dtype=torch.float32),
        "tokens": float((weight * lengths).sum()),
        "parts": tuple(parts),
        "states": tuple(name for name in parts if name in states),
        "blocks": blocks,
    }


def targets_of(batch: dict[str, Any]) -> torch.Tensor:
    """(R, T) int64 what each position of the rows predicts, IGNORE where it is not scored."""
    targets = torch.full_like(batch["input_ids"], IGNORE)
    targets.view(-1)[batch["at"]] = batch["labels"]
    return targets


def pieces(batch: dict[str, Any], number: int, attended: Collection[str]) -> list[dict[str, Any]]:
    """A batch's samples in at most `number` pieces, of nearly equally many samples; none is empty.

    Returns:
        Of each piece: samples, the first and one past the last; at, which of each part's scored positions; answers,
        of each attended part, the positions of `at` that are an answer's.
    """
    found, count, sample, answers = [], len(batch["weight"]), batch["sample"].numpy(), batch["answers"].numpy()
    for its in np.array_split(np.arange(count), min(number, count)):
        piece: dict[str, Any] = {"samples": (int(its[0]), int(its[-1]) + 1), "at": {}, "answers": {}}
        for name, block in batch["blocks"].items():
            where = np.isin(sample[slice(*block.scored)], its)
            piece["at"][name] = _pinned(np.flatnonzero(where))
            if name in attended:
                answered = np.isin(np.arange(len(where)), answers[slice(*block.answers)])
                piece["answers"][name] = _pinned(np.flatnonzero(answered[where]))
        found.append(piece)
    return found


def _pinned(array: np.ndarray) -> torch.Tensor:
    """A tensor that a card can fetch while the host goes on, as the loader makes the rest of a batch."""
    made = torch.from_numpy(array)
    return made.pin_memory() if torch.cuda.is_available() else made


def _ended(sample: Sample) -> Sample:
    """The sample with its last target read too, after which nothing is predicted."""
    return Sample((*sample.input_ids, sample.targets[-1]), (*sample.targets, IGNORE), sample.cut)


def _dealt(parts: dict[str, list[Sample]], row: int | None) -> list[list[tuple[str, int, Sample]]]:
    """The samples of each row: the part, the place in it, the sample."""
    rows: list[list[tuple[str, int, Sample]]] = []
    for name, samples in parts.items():
        lengths = [len(sample.input_ids) for sample in samples]
        dealt = packed(lengths, row) if row else [[i] for i in range(len(samples))]
        rows += [[(name, i, samples[i]) for i in places] for places in dealt]
    return [[one for places in rows for one in places]] if row == ONE_ROW else rows


def _scored(sample: Sample, start: int, place: int, attended: bool, states: bool) -> tuple[np.ndarray, ...]:
    """Of a sample's scored positions: where they stand, their labels, and the sample's place in its part."""
    targets = np.array(sample.targets)
    keep = np.arange(len(targets)) if attended else np.flatnonzero(targets != IGNORE)
    if states:  # a target is the token that the next position reads
        keep = keep + 1
    return start + keep, targets[keep], np.full(len(keep), place)


def _blocks(
    rows: list[list[tuple[str, int, Sample]]],
    width: int,
    scored: dict[str, list[tuple[np.ndarray, ...]]],
    attended: frozenset[str],
    one_row: bool,
) -> tuple[dict[str, Block], np.ndarray]:
    """Each part's place in the batch, and the answers' positions among those that attended parts score."""
    blocks, answers, ends = {}, [], np.zeros(4, dtype=np.int64)
    for name, found in scored.items():
        labels = np.concatenate([label for _, label, _ in found])
        answered = np.flatnonzero(labels != IGNORE) if name in attended else np.zeros(0, dtype=np.int64)
        its = sum(places[0][0] == name for places in rows) * width
        if one_row:
            last = name == list(scored)[-1]
            its = width - ends[0] if last else sum(len(s.input_ids) for one, _, s in rows[0] if one == name)
        samples = len(found) if one_row else 0
        starts, ends = ends, ends + (its, len(labels), len(answered), samples)
        spans = ((int(a), int(b)) for a, b in zip(starts, ends, strict=True))
        blocks[name] = Block(*spans, *(_lengths(found, every) for every in (True, False)))
        answers.append(answered)
    return blocks, np.concatenate(answers)


def _lengths(found: list[tuple[np.ndarray, ...]], every: bool) -> tuple[int, ...]:
    """Scored positions of each sample, in the order of their places in the part; without `every` those of answers."""
    lengths = [0] * len(found)
    for _, labels, place in found:
        lengths[place[0]] = len(labels) if every else int((labels != IGNORE).sum())
    return tuple(lengths)


def _bounds(places: list[tuple[str, int, Sample]], width: int) -> dict[str, Any]:
    """Where the samples of a single row begin and end; what fills it up belongs to no sample that is scored."""
    lengths = [len(sample.input_ids) for *_, sample in places]
    ends = np.cumsum([0, *lengths])
    ends = np.append(ends, width) if ends[-1] < width else ends
    return {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "longest": int(np.diff(ends).max())}
