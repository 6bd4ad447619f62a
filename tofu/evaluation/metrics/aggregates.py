"""Several metrics in one number, by harmonic means: a model is as good as what it does worst. Pure functions,
of numbers or of arrays of one shape.

Source: OpenUnlearning's meta-evaluation, arXiv 2506.12618, and the published scores of 152 models that
tests/evaluation/metrics/test_aggregates.py recomputes (arXiv 2605.24614).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tofu.evaluation.metrics import tofu
from tofu.evaluation.metrics.declared import Metric, Value
from tofu.evaluation.metrics.fluency import CLASSIFIER, NGRAMS
from tofu.evaluation.metrics.rows import Context, Missing, draws, resampled

LEAST = 1e-12  # a part counts as this much at least: one that is 0 takes the mean to 0, and the others don't matter
LEAST_START = 1e-3  # of the starting model's utility: a share of nothing says nothing
SOURCE = "OpenUnlearning, arXiv 2506.12618"
KNOWN = tuple(  # what Mem reads, per row of the forget set: each says how much is still known
    f"{label} Forget"
    for label in (
        "Extraction Strength",
        "Exact Memorisation",
        "Paraphrased Probability",
        "Truth Ratio (prob_mean)",
    )
)
CLOSE = ("MIA loss s", "MIA zlib s", "MIA min-k 0.4 s", "MIA min-k++ 0.4 s")  # what MIA reads


def harmonic_mean(*parts: Any) -> Any:
    """n / sum(1 / max(x, 1e-12)) of n parts in [0, 1]: numbers, or arrays of one shape, and so is what comes back."""
    return len(parts) / sum(1 / np.maximum(part, LEAST) for part in parts)


def memorisation(strength: Any, exact: Any, paraphrased: Any, truth: Any) -> Any:
    """Mem: how little is still known, in [0, 1].

    Args:
        strength, exact, paraphrased, truth: of the forget set, extraction strength, exact memorisation, probability of
            the paraphrased answer, and truth ratio (prob_mean).
    """
    return harmonic_mean(1 - strength, 1 - exact, 1 - paraphrased, 1 - truth)


def membership(loss: Any, zlib: Any, mink: Any, minkpp: Any) -> Any:
    """MIA: how close four attacks come to what they reach on the retain model (`s_MIA` of each), in [0, 1]."""
    return harmonic_mean(loss, zlib, mink, minkpp)


def privacy(*parts: Any) -> Any:
    """Priv: ours has MIA as its only part; the published one has UDS, which needs activation patching, as a second."""
    return harmonic_mean(*parts)


def utility(model_utility: Any, fluency: Any) -> Any:
    """Util: useful, and fluent on the forget set, in [0, 1]."""
    return harmonic_mean(model_utility, fluency)


def relative_utility(utility: Any, of_start: float) -> Any:
    """Util_rel: `utility` as a share of the starting model's, at most 1."""
    return np.minimum(1.0, utility / of_start)


def aggregate(mem: Any, priv: Any, relative: Any) -> Any:
    """Agg: the harmonic mean of Mem, Priv and Util_rel."""
    return harmonic_mean(mem, priv, relative)


def _mem(context: Context) -> Value:
    """Mem of the columns' means; the interval draws rows that have all four."""
    value = memorisation(*(context.value(name) for name in KNOWN))
    rows = [row for row in zip(*(context.columns[name] for name in KNOWN), strict=True) if None not in row]
    if not rows:
        raise Missing("no row has all four parts")
    known = np.asarray(rows, dtype=float)
    means = known[draws(len(known), "Forget")].mean(1)  # (resamples, 4)
    return resampled(value, memorisation(*means.T), len(known))


def _of_parts(function: Callable[..., Any], names: Sequence[str]) -> Callable[[Context], Value]:
    """An aggregate of metrics that stand before it in the table; the first one without a value is why it has none.

    Its interval is there where all parts' are. Parts of one set are drawn together.
    """

    def value(context: Context) -> Value:
        found = float(function(*(context.value(name) for name in names)))
        drawn = [context.drawn(name) for name in names]
        return Value(found) if any(one is None for one in drawn) else resampled(found, function(*drawn))

    return value


def _relative(utility_name: str, fluency_name: str) -> Callable[[Context], Value]:
    def value(context: Context) -> Value:
        start = utility(context.start_value(tofu.UTILITY.name), context.start_value(fluency_name))
        if start < LEAST_START:
            raise Missing(f"the starting model's utility is below {LEAST_START:g}, and Util_rel is relative to it")
        return _of_parts(lambda utility: relative_utility(utility, start), (utility_name,))(context)

    return value


def _one(name: str, function: Callable[..., Value], needs: tuple[str, ...], label: str = "") -> Metric:
    return Metric(name, function, needs, "max", "aggregates", None, label or name, source=SOURCE)


def named(label: str, by: str) -> str:
    """An aggregate's name: what fluency is judged by stands in it unless that is the classifier, as published."""
    return label if by == CLASSIFIER else f"{label} ({by})"


def _of_fluency(by: str) -> tuple[Metric, ...]:
    """The aggregates that read fluency, as `by` judges it."""
    fluency = f"{named('Fluency', by)} Forget"
    util, relative, agg = (named(label, by) for label in FLUENT)
    return (
        _one(util, _of_parts(utility, (tofu.UTILITY.name, fluency)), (tofu.UTILITY.name, fluency), FLUENT[0]),
        _one(relative, _relative(util, fluency), (util,), FLUENT[1]),
        _one(agg, _of_parts(aggregate, ("Mem", "Priv", relative)), ("Mem", "Priv", relative), FLUENT[2]),
    )


FLUENT = ("Util", "Util_rel", "Agg")
METRICS = (
    _one("Mem", _mem, KNOWN),
    _one("MIA", _of_parts(membership, CLOSE), CLOSE),
    _one("Priv", _of_parts(privacy, ("MIA",)), ("MIA",)),
    *_of_fluency(NGRAMS),
    *_of_fluency(CLASSIFIER),
)


def left_out(by: str) -> set[str]:
    """The metrics that an evaluation does not have whose fluency is judged by `by`."""
    other = NGRAMS if by == CLASSIFIER else CLASSIFIER
    return {named(label, other) for label in FLUENT} | ({"Fluency Forget"} if by == NGRAMS else set())
