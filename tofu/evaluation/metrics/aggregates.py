"""Several metrics in one number, by harmonic means: a model is as good as what it does worst. Pure functions.

Source: OpenUnlearning's meta-evaluation, arXiv 2506.12618, and the published scores of 152 models that
tests/evaluation/metrics/test_aggregates.py recomputes (arXiv 2605.24614).
"""

from collections.abc import Callable, Sequence

import numpy as np

from tofu.evaluation.metrics import tofu
from tofu.evaluation.metrics.declared import Metric, Value
from tofu.evaluation.metrics.fluency import CLASSIFIER, NGRAMS
from tofu.evaluation.metrics.rows import Context, Missing, draws, interval

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


def harmonic_mean(*parts: float) -> float:
    """n / sum(1 / max(x, 1e-12)) of n parts in [0, 1]."""
    return len(parts) / sum(1 / max(part, LEAST) for part in parts)


def memorisation(strength: float, exact: float, paraphrased: float, truth: float) -> float:
    """Mem: how little is still known, in [0, 1].

    Args:
        strength, exact, paraphrased, truth: of the forget set, extraction strength, exact memorisation, probability of
            the paraphrased answer, and truth ratio (prob_mean).
    """
    return harmonic_mean(1 - strength, 1 - exact, 1 - paraphrased, 1 - truth)


def membership(loss: float, zlib: float, mink: float, minkpp: float) -> float:
    """MIA: how close four attacks come to what they reach on the retain model (`s_MIA` of each), in [0, 1]."""
    return harmonic_mean(loss, zlib, mink, minkpp)


def privacy(*parts: float) -> float:
    """Priv: ours has MIA as its only part; the published one has UDS, which needs activation patching, as a second."""
    return harmonic_mean(*parts)


def utility(model_utility: float, fluency: float) -> float:
    """Util: useful, and fluent on the forget set, in [0, 1]."""
    return harmonic_mean(model_utility, fluency)


def relative_utility(utility: float, of_start: float) -> float:
    """Util_rel: `utility` as a share of the starting model's, at most 1."""
    return min(1.0, utility / of_start)


def aggregate(mem: float, priv: float, relative: float) -> float:
    """Agg: the harmonic mean of Mem, Priv and Util_rel."""
    return harmonic_mean(mem, priv, relative)


def _mem(context: Context) -> Value:
    """Mem of the columns' means; the interval draws rows, the same ones of all four columns."""
    value = memorisation(*(context.value(name) for name in KNOWN))
    rows = [row for row in zip(*(context.columns[name] for name in KNOWN), strict=True) if None not in row]
    if not rows:
        raise Missing("no row has all four parts")
    known = np.asarray(rows, dtype=float)
    means = known[draws(len(known), "Mem")].mean(1)  # (resamples, 4)
    return Value(value, len(known), interval(np.array([memorisation(*one) for one in means])))


def _all(function: Callable[..., float], names: Sequence[str]) -> Callable[[Context], float]:
    """An aggregate of metrics that stand before it in the table; the first one without a value is why it has none."""
    return lambda context: function(*(context.value(name) for name in names))


def _relative(utility_name: str, fluency_name: str) -> Callable[[Context], float]:
    def value(context: Context) -> float:
        start = utility(context.start_value(tofu.UTILITY.name), context.start_value(fluency_name))
        if start < LEAST_START:
            raise Missing(f"the starting model's utility is below {LEAST_START:g}, and Util_rel is relative to it")
        return relative_utility(context.value(utility_name), start)

    return value


def _one(name: str, function: Callable[..., float | Value], needs: tuple[str, ...], label: str = "") -> Metric:
    return Metric(name, function, needs, "max", "aggregates", None, label or name, source=SOURCE)


def named(label: str, by: str) -> str:
    """An aggregate's name: what fluency is judged by stands in it unless that is the classifier, as published."""
    return label if by == CLASSIFIER else f"{label} ({by})"


def _of_fluency(by: str) -> tuple[Metric, ...]:
    """The aggregates that read fluency, as `by` judges it."""
    fluency = f"{named('Fluency', by)} Forget"
    util, relative, agg = (named(label, by) for label in FLUENT)
    return (
        _one(util, _all(utility, (tofu.UTILITY.name, fluency)), (tofu.UTILITY.name, fluency), FLUENT[0]),
        _one(relative, _relative(util, fluency), (util,), FLUENT[1]),
        _one(agg, _all(aggregate, ("Mem", "Priv", relative)), ("Mem", "Priv", relative), FLUENT[2]),
    )


FLUENT = ("Util", "Util_rel", "Agg")
METRICS = (
    _one("Mem", _mem, KNOWN),
    _one("MIA", _all(membership, CLOSE), CLOSE),
    _one("Priv", _all(privacy, ("MIA",)), ("MIA",)),
    *_of_fluency(NGRAMS),
    *_of_fluency(CLASSIFIER),
)


def left_out(by: str) -> set[str]:
    """The metrics that an evaluation does not have whose fluency is judged by `by`."""
    other = NGRAMS if by == CLASSIFIER else CLASSIFIER
    return {named(label, other) for label in FLUENT} | ({"Fluency Forget"} if by == NGRAMS else set())
