"""The texts of many runs for a page: the questions once for each set of rows, each run's generations as one block."""

import base64
import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import utils
from tofu.evaluation import log_formats, logs
from tofu.reporting import grouping
from tofu.reporting.records import FINETUNED
from tofu.reporting.results import BROKEN
from tofu.reporting.runs import Collected, Run

TAGGED = 8  # rows from which on what all prompts begin and end with is taken for the prompt's tags
AROUND = 150  # bytes of a block's element, or of why a run has none
NAMES = {task: name for name, task in logs.TASKS.items()}
Row = tuple[str, str]  # the set's name, the row's number


class Text(NamedTuple):
    """A row's texts."""

    prompt: str
    generation: str
    truth: str


@dataclass
class Shown:
    """What the page holds of all runs' texts; a block is JSON, gzip, base64, by its id."""

    sets: list[dict[str, Any]] = field(default_factory=list)  # rows, and the ids of the questions and the truths
    of_run: dict[str, dict[str, Any]] = field(default_factory=dict)  # run -> its set, its blocks, or why it has none
    blocks: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # runs without room


def collect(found: Collected, room: int) -> Shown:
    """The texts of all runs, final ones first, as far as there is room.

    Args:
        room: bytes of all blocks together, and of what says which run has which.

    Returns:
        The sets, blocks and which run has which. A run without generations, or without room, has `why` alone.
    """
    shown, reader = Shown(), _Reader(found)
    final = {run.name for run in found.final()}
    room -= sum(AROUND + _size(run.name) for run in found.runs)
    for run in sorted(found.runs, key=lambda run: run.name not in final):
        texts = reader.texts(run.log)
        if isinstance(texts, str):
            shown.of_run[run.name] = {"why": texts}
            continue
        known, new = reader.blocks(run, texts, shown)
        size = _size(known) + sum(AROUND + len(block) for id, block in new.items() if id not in shown.blocks)
        size += _size(list(texts)) if shown.sets[known["set"]]["question"] not in shown.blocks else 0
        if size > room:
            shown.left_out.append(run.name)
            shown.of_run[run.name] = {"why": "its generations are left out, the page would be too large"}
            continue
        room -= size
        shown.blocks |= new
        shown.of_run[run.name] = known
    return shown


def _size(value: Any) -> int:
    return len(json.dumps(value))


def pack(value: Any) -> str:
    """JSON, gzip without a date, base64: a page's block."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), 9, mtime=0)).decode()


class _Reader:
    """Logs to blocks; what is shared by runs is read and packed once."""

    def __init__(self, found: Collected) -> None:
        self.names = {run.log.resolve(): run.name for run in reversed(found.runs) if run.log is not None}
        self.finetuned = [run for run in found.final() if run.keys.get("method") == FINETUNED]
        self.references: dict[Path, dict[Row, Text] | str] = {}
        self.aligned: dict[tuple[int, Path], list[str | None] | None] = {}
        self.sets: dict[str, int] = {}
        self.packed: dict[str, tuple[str, str]] = {}  # texts -> their block's id and the block

    def texts(self, log: Path | None) -> dict[Row, Text] | str:
        """The texts of a log, or why it has none."""
        if log is None:
            return "there is no log of its rows"
        try:
            read = _texts(log_formats.read(str(log), "results"))
        except BROKEN as error:
            return utils.one_line(error)
        return read or "its log holds no generations"

    def blocks(self, run: Run, texts: dict[Row, Text], shown: Shown) -> tuple[dict[str, Any], dict[str, str]]:
        """What the page says of a run's texts, and the blocks that this needs."""
        new: dict[str, str] = {}
        questions, tags = without_tags([text.prompt for text in texts.values()])
        rows, truths = list(texts), [text.truth for text in texts.values()]
        content = json.dumps([rows, questions, truths])
        if content not in self.sets:
            self.sets[content] = len(shown.sets)
            shown.sets.append({"rows": rows})
        i = self.sets[content]
        shown.sets[i] |= {"question": self._put(questions, new), "truth": self._put(truths, new)}
        known: dict[str, Any] = {"set": i, "tags": tags}
        known["after"] = self._put([text.generation for text in texts.values()], new)
        for role, log in (("before", self._start(run)), ("retain", run.retain)):
            if log is not None and (given := self._of_other(i, questions, rows, log)):
                known[role] = self._put(given, new)
                known[f"{role}_of"] = self.names.get(log.resolve(), str(log))
        return known, new

    def _start(self, run: Run) -> Path | None:
        """The starting model's log; where the run's record names none, the one finetuned model's of its problem."""
        if run.start is not None or run.keys.get("method") in grouping.REFERENCES:
            return run.start
        keys = ("split", "family", "ds_size")
        same = [one for one in self.finetuned if all(one.keys.get(key) == run.keys.get(key) for key in keys)]
        return same[0].log if len(same) == 1 else None

    def _put(self, texts: Sequence[str | None], new: dict[str, str]) -> str:
        """A block's id; the same texts have one block."""
        content = json.dumps(texts)
        if content not in self.packed:
            self.packed[content] = f"block-{len(self.packed)}", pack(texts)
        id, block = self.packed[content]
        new[id] = block
        return id

    def _of_other(self, i: int, questions: list[str], rows: list[Row], log: Path) -> list[str | None] | None:
        """Another model's generations for the rows of set `i`, None where it has not the same question."""
        if (i, log) not in self.aligned:
            if log not in self.references:
                self.references[log] = self.texts(log)
            texts = self.references[log]
            self.aligned[i, log] = None
            if not isinstance(texts, str):
                theirs, _ = without_tags([text.prompt for text in texts.values()])
                asked = dict(zip(texts, theirs, strict=True))
                given = [
                    texts[row].generation if row in asked and _alike(asked[row], question) else None
                    for row, question in zip(rows, questions, strict=True)
                ]
                self.aligned[i, log] = given if any(one is not None for one in given) else None
        return self.aligned[i, log]


def _texts(log: Mapping[str, Any]) -> dict[Row, Text]:
    """The rows of a log that have a generation: set and row -> texts."""
    found: dict[Row, Text] = {}
    for file, one in sorted(log.items(), key=lambda item: item[0] != f"{logs.FORGET}.json"):  # what matters most first
        task = file.removesuffix(".json")
        if isinstance(one, Mapping) and one.get("generated_text"):
            for key, row in logs.rows(log, task, "generated_text").items():
                prompt, generation, *_, truth = row
                found[NAMES.get(task, task), key] = Text(str(prompt), str(generation), str(truth))
    return found


def without_tags(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The questions, and what every prompt begins and ends with: the tags of a chat, whole words only."""
    if len(prompts) < TAGGED:
        return list(prompts), ["", ""]
    common = os.path.commonprefix(list(prompts))
    first = common[: len(common) - len(re.split(r"\s", common)[-1])]
    rest = [prompt[len(first) :] for prompt in prompts]
    common = os.path.commonprefix([one[::-1] for one in rest])[::-1]
    last = common[found.start() :] if (found := re.search(r"\s", common)) else ""
    return [one[: len(one) - len(last)] for one in rest], [first.strip(), last.strip()]


def _alike(one: str, other: str) -> bool:
    """Whether two logs' questions are the same but for a tokenizer's round trip; the original cuts some."""
    first, second = ("".join(filter(str.isalnum, text)).lower() for text in (one, other))
    return first.startswith(second) or second.startswith(first)
