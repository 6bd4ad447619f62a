"""What a report knows of a run: one evaluation of one model, and where its numbers came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import utils
from tofu.evaluation import log_formats
from tofu.evaluation.metrics import table
from tofu.runtime import provenance

OURS, BENCHMARK, OPENUNLEARNING = "ours", "benchmark", "openunlearning"  # who made a result
DIRECTIONS = {metric.name: metric.direction for metric in table.METRICS}


@dataclass(frozen=True)
class Number:
    """What a metric came to."""

    value: float | None  # None: `reason` says why
    direction: str  # what a good unlearned model has: max, min, zero, retain (the retain model's value), none
    file: Path  # where the number is, or the log that it was worked out from
    n: int | None = None  # rows that it is made of
    interval: Sequence[float] | None = None  # [low, high], 95 %
    reason: str | None = None


@dataclass
class Run:
    """One evaluation of a model: a row of `runs.csv`. Those of one training run share `of`, its trajectory."""

    name: str  # unique in a report: the folder below what all runs have in common
    folder: Path
    kind: str  # OURS, BENCHMARK or OPENUNLEARNING
    keys: dict[str, Any]  # what made it, by config key: method, split, family, lr, seed, num_epochs, ds_size, ...
    metrics: dict[str, Number]
    of: str  # the folder of the training run whose model was evaluated; of a foreign result its own
    log: Path | None = None  # of all rows with their generations; `rows` reads it
    retain: Path | None = None  # the retain model's log that it was, or is here, compared with
    start: Path | None = None  # the starting model's evaluation
    step: int | None = None  # optimiser steps that the model has taken; None where that is not known
    checkpoint: bool = False  # whether it was evaluated while the run trained
    collapsed: list[str] = field(default_factory=list)  # the signs, a sentence each
    files: dict[str, str] = field(default_factory=dict)  # file -> sha256, as the run's own record has them
    said: list[str] = field(default_factory=list)  # what was left out, and why

    def value(self, metric: str) -> float | None:
        """A metric's value; None where it has none."""
        return self.metrics[metric].value if metric in self.metrics else None

    def rows(self) -> Mapping[str, Any]:
        """The aggregated log with its generations, in our form; {} where the run has none."""
        return {} if self.log is None else log_formats.read(str(self.log), "results")

    @cached_property
    def digest(self) -> str | None:
        """The sha256 of the log."""
        return None if self.log is None else self.files.get(self.log.name) or provenance.file_digest(self.log)


@dataclass(frozen=True)
class Refused:
    """A result that could not be taken."""

    place: Path
    why: str  # one line


@dataclass
class Collected:
    """What was found in result folders."""

    runs: list[Run]
    refused: list[Refused]

    def final(self) -> list[Run]:
        """One evaluation of each trained model and set of rows: the last one, not those on the way.

        Of several with the same settings, the one with most metrics counts.
        """
        chosen: dict[tuple, Run] = {}
        alone = {run.of for run in self.runs if not run.checkpoint}
        for run in self.runs:
            if run.checkpoint and run.of in alone:
                continue
            key = (run.of, *(str(run.keys.get(name)) for name in SETTINGS))
            if key not in chosen or _rank(run) > _rank(chosen[key]):
                chosen[key] = run
        return list(chosen.values())

    def trajectories(self) -> dict[str, list[Run]]:
        """Training run -> its evaluations by step, of those with more than one step."""
        found: dict[str, dict[int, Run]] = {}
        for run in self.runs:
            if run.step is not None:
                steps = found.setdefault(run.of, {})
                if run.step not in steps or _rank(run) > _rank(steps[run.step]):
                    steps[run.step] = run
        return {of: [steps[step] for step in sorted(steps)] for of, steps in found.items() if len(steps) > 1}


SETTINGS = ("split", "ds_size", "truth_ratio", "eval.question_key", "eval.generation.max_length", "eval.data_path")


def _rank(run: Run) -> tuple:
    known = sum(number.value is not None for number in run.metrics.values())
    return (not run.checkpoint, -1 if run.step is None else run.step, known)


def numbers(found: Mapping[str, Mapping[str, Any]], file: Path) -> dict[str, Number]:
    """Metrics as metrics.json holds them.

    Raises:
        ValueError: another content.
    """
    read = {}
    for name, one in found.items():
        if not isinstance(one, Mapping) or "value" not in one or not isinstance(one["value"], int | float | None):
            raise ValueError(f"{file.name} holds no metrics: {name} has no value")
        interval = one.get("interval")
        if interval is not None and (not isinstance(interval, list) or len(interval) != 2):
            raise ValueError(f"{file.name} holds no metrics: the interval of {name} has no two ends")
        direction = one.get("direction") or DIRECTIONS.get(name, "none")
        value = None if one["value"] is None else float(one["value"])
        read[name] = Number(value, direction, file, one.get("n"), one.get("interval"), one.get("reason"))
    return read


def read_json(file: Path) -> Any:
    """A JSON file's value.

    Raises:
        ValueError: it is not whole; the line names the file alone, whose folder the report names.
    """
    try:
        return utils.read_json(file, file.name)
    except utils.BadInput as error:
        raise ValueError(str(error).replace(f"{file.name}={file}", file.name)) from None
