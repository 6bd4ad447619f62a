"""What the four calls share: figures that are on disk as soon as they are measured, and the time that a call has.

A call has parts. What is measured in one is a setting, and what can't be measured is a line with the reason.
"""

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from protocol import REPO, ended, reason
from results import heading
from transformers.utils import logging as library_logging

import utils

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
VOCABULARY = {"1b": 128256, "toy": 2500}  # of the models; the tokenizer has 2,000 words
MINUTES = 9.0  # of a call, whose command may take ten


class Figures:
    """The figures of one call: a JSON line for each in `callN.jsonl`, tables for RESULTS.md in `callN.md`."""

    def __init__(self, call: int, how: str, folder: Path, minutes: float = MINUTES) -> None:
        """
        Args:
            how: the settings that all the call's numbers depend on.
            minutes: what is left of the call.
        """
        self.call, self.how, self.folder, self.end = call, how, folder, time.monotonic() + 60 * minutes
        self.lines = folder / f"call{call}.jsonl"

    def left(self, most: float | None = None) -> float:
        """Seconds that the next setting may take: what is left of the call, `most` at most, and a little at least."""
        return max(1.0, min(self.end - time.monotonic(), most or float("inf")))

    def add(self, part: str, name: str, why: str | None = None, **values: Any) -> None:
        """Write one figure, and the tables of all so far.

        Args:
            why: the reason why it was not measured.
            values: numbers, texts, lists of numbers; None: there is none here.
        """
        line = {"part": part, "name": name, **({"why": why} if why else values)}
        print(json.dumps(line), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "device": device_name()}) + "\n")
        head = heading(f"gpu/call.sh {self.call}", self.how)
        utils.write_text(self.folder / f"call{self.call}.md", head + "\n".join(tables(self.read())) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All figures so far, as `add` wrote them."""
        return [json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines()]

    @contextlib.contextmanager
    def measuring(self, part: str, name: str) -> Iterator[dict[str, Any]]:
        """Add what the block puts into the dict that it is given, or, where it fails, why it did."""
        values: dict[str, Any] = {}
        try:
            yield values
        except Exception as error:  # whatever it was: the settings after it must be measured
            told = " ".join(str(error).split()).replace("|", "/").replace(f"{REPO}/", "")[:300]
            values["why"] = f"{type(error).__name__}: {told}"
        self.add(part, name, **values)
        gc.collect()
        torch.cuda.empty_cache()


@functools.cache
def device_name() -> str:
    """The card's name, or CPU."""
    return torch.cuda.get_device_name() if CUDA else "CPU"


def tables(figures: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown for each part: a row for each figure, a column for each value."""
    lines: list[str] = []
    for part in dict.fromkeys(figure["part"] for figure in figures):
        its = [figure for figure in figures if figure["part"] == part]
        keys = list(dict.fromkeys(key for figure in its for key in figure))
        keys = [key for key in keys if key not in ("part", "name", "why", "device")] or ["value"]
        lines += ["", f"| {part} | {' | '.join(keys)} |", f"| --- |{' ---: |' * len(keys)}"]
        for figure in its:
            cells = [cell(figure.get(key)) for key in keys]
            if "why" in figure:
                cells[0] = f"not run: {figure['why']}"
            lines.append(f"| {figure['name']} | {' | '.join(cells)} |")
    return lines[1:]


def cell(value: Any) -> str:
    """A value as a table shows it: four digits of a number that is no count."""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize() -> None:
    """Wait for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds, the GPU's work included, and the result."""
    synchronize()
    start = time.perf_counter()
    result = function(*args)
    synchronize()
    return time.perf_counter() - start, result


def start_peak() -> None:
    """Begin to watch the GPU's memory."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """Peak of torch's allocator since `start_peak`, 10^9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else None


def cudnn(on: bool) -> None:
    """Let torch choose cuDNN's attention, or not."""
    torch.backends.cuda.enable_cudnn_sdp(on)


def parser_of(doc: str, parts: Collection[str]) -> argparse.ArgumentParser:
    """The command line of a call."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny models and few rows, also on a CPU")
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="parts of the call (all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"that the call may take ({MINUTES:g})")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="folder of the files")
    parser.add_argument("--part", choices=list(parts), help=argparse.SUPPRESS)  # this process measures this one
    return parser


def begin(call: int, how: str, args: argparse.Namespace) -> Figures:
    """The figures of a call that starts now, in the place of those of an earlier one.

    Raises:
        SystemExit: no GPU, and not the toy size.
    """
    if not (CUDA or args.toy):
        sys.exit("error: no CUDA GPU here: take --toy")
    figures = Figures(call, f"{'toy size, ' if args.toy else ''}{how}", args.out.resolve(), args.minutes)
    if args.part is None:
        figures.lines.unlink(missing_ok=True)
    return figures


def in_processes(parts: dict[str, Callable[[Figures, bool], None]], figures: Figures, args: argparse.Namespace) -> None:
    """Measure each part in a process of its own: what ends or patches one leaves the others as they are."""
    if args.part:
        logging.disable(logging.WARNING)
        library_logging.set_verbosity_error()
        library_logging.disable_progress_bar()
        return parts[args.part](figures, args.toy)
    for name in args.only:
        toy = ["--toy"] if args.toy else []
        command = [sys.executable, sys.argv[0], "--part", name, *toy, "--out", str(figures.folder)]
        left = figures.left()
        done = ended([*command, "--minutes", str(left / 60)], left)
        print(done.stdout, end="", flush=True)
        if why := reason(done, figures.folder):
            figures.add(name, "the rest of the part", why)
