"""What the metrics of a row read, what the metrics of a whole evaluation read, and the mean of a value per row."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tofu.evaluation.metrics.declared import Statistics, Value

if TYPE_CHECKING:
    from tofu.evaluation.inference import TokenScores  # its module loads torch

RESAMPLES, LEVEL = 1000, 0.95  # of the bootstrap
GT, PARAPHRASED = ("gt", 0), ("paraphrased", 0)
Answer = tuple[str, int]  # gt, paraphrased or perturb, and its number


class Row(NamedTuple):
    """One row of a set as an evaluation has seen it."""

    answers: Mapping[Answer, TokenScores]  # what the model makes of each answer's tokens
    ended: Mapping[Answer, bool]  # whether the answer's last token is the end token
    text: str  # the generation
    tokens: Sequence[int]  # its ids, without the end token
    truth: str
    paraphrase: str | None  # the right answer in other words, where the set has one
    question: str  # as the model was asked, tags included
    budget: int  # the most tokens that could be generated
    rouge: str = "default"  # the tokenizer of `words.scorer`
    extra: Mapping[str, Any] = {}  # what the passes beside found, by `Metric.extra`

    def content(self, answer: Answer = GT) -> TokenScores | None:
        """The scores of an answer's n tokens without its end token; None without such an answer, or where n is 0."""
        scores = self.answers.get(answer)
        if scores is None:
            return None
        n = len(scores.nll) - self.ended[answer]
        return type(scores)(*(column[:n] for column in scores)) if n else None

    def loss(self, answer: Answer = GT) -> float | None:
        """The mean loss per token of an answer, end token included, nats; None without such an answer."""
        scores = self.answers.get(answer)
        return None if scores is None else float(scores.nll.sum()) / len(scores.nll)

    def wrong(self) -> np.ndarray:
        """(answers,) the mean losses of the wrong answers; there may be none."""
        return np.array([self.loss(answer) for answer in self.answers if answer[0] == "perturb"], dtype=float)


class Missing(Exception):
    """Why a metric has no value: it is null, and this its reason."""


@dataclass
class Context:
    """What the metrics of a whole evaluation read. On rank 0 only.

    Attributes:
        columns: name, with the set -> a number per row, None where it is undefined: the columns of the chosen metrics
            and what these need.
        values: the metrics before this one in the table, TOFU's own first.
        log, statistics: the aggregated log, and TOFU's statistics of it.
        retain, start: metrics of the retain model and of the starting model, as `metrics.json` holds them; None where
            they are not known.
        settings: keys of the config that metrics read.
        reasons: why a set has no rows, or another thing is not there, by name.
        about: what results say of a set whose rows they compare, by the set's name.
    """

    columns: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    log: Mapping[str, Any] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=lambda: Statistics({}))
    retain: Mapping[str, Mapping[str, Any]] | None = None
    start: Mapping[str, Mapping[str, Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """The defined numbers of a column.

        Raises:
            Missing: no such set, or no row where it is defined.
        """
        if name not in self.columns:
            raise Missing(self.reasons.get(name) or f"no {name}")
        found = [value for value in self.columns[name] if value is not None]
        if not found:
            raise Missing(self.reasons.get(name) or f"no row has {name}")
        return found

    def value(self, name: str) -> float:
        """The value of a metric that stands before in the table.

        Raises:
            Missing: it has none.
        """
        found = self.values.get(name, Value(None, reason="not computed"))
        if found.value is None:
            reason = str(found.reason)  # of a chain of metrics the first one that is lacking is told
            raise Missing(reason if reason.startswith("no ") else f"no {name}: {reason}")
        return found.value

    def drawn(self, name: str) -> np.ndarray | None:
        """(RESAMPLES,) what a metric with a value would be of other rows; None where that is not known."""
        return self.values[name].drawn

    def retain_value(self, name: str) -> float:
        """A metric of the retain model. Raises Missing where its evaluation has none."""
        return _of(self.retain, name, "retain_result")

    def start_value(self, name: str) -> float:
        """A metric of the starting model. Raises Missing where its evaluation has none."""
        return _of(self.start, name, "start_result")


def _of(known: Mapping[str, Mapping[str, Any]] | None, name: str, key: str) -> float:
    if known is None:
        raise Missing(f"it needs {key}")
    value = known.get(name, {}).get("value")
    if value is None:
        raise Missing(f"{key} has no {name}: evaluate that model with the same metrics")
    return float(value)


def mean_of(values: Sequence[float], of: str) -> Value:
    """The mean of a number per row, with its percentile bootstrap interval.

    Args:
        of: the set that the rows are of.
    """
    rows = np.asarray(values, dtype=float)
    return resampled(float(rows.mean()), rows[draws(len(rows), of)].mean(1), len(rows))


def resampled(value: float, drawn: np.ndarray, n: int | None = None, about: Mapping[str, Any] | None = None) -> Value:
    """A value with its interval, out of what it is of other rows, (RESAMPLES,)."""
    return Value(value, n, interval(drawn), about=about, drawn=drawn)


def draws(n: int, of: str) -> np.ndarray:
    """(RESAMPLES, n) rows drawn with replacement: the same ones for all metrics of a set that have n rows.

    So a metric that is made of others of the same set has the interval that drawing its own rows would give.
    """
    return np.random.default_rng([0, zlib.crc32(of.encode())]).integers(n, size=(RESAMPLES, n))


def interval(drawn: np.ndarray) -> list[float]:
    """[low, high]: what LEVEL of the resampled values lie between."""
    tail = (1 - LEVEL) / 2
    return np.quantile(drawn, [tail, 1 - tail]).tolist()
