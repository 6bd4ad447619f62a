"""Membership inference: whether what a model makes of the forget set tells that it was trained on it. No model, no I/O.

An attack is a number per row, oriented like a loss: the lower, the likelier the row was trained on. Members are the
rows of the forget set, non-members those of a set that no model has seen (`holdout`).
"""

from __future__ import annotations

import logging
import zlib as compression
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tofu.evaluation.metrics.declared import Column, Metric, Value
from tofu.evaluation.metrics.rows import GT, RESAMPLES, Context, Missing, Row, draws, resampled

log = logging.getLogger(__name__)

FORGET, HOLDOUT = "Forget", "Holdout"  # the sets of members and of non-members
FALSE_POSITIVES = (1, 5)  # per cent of the non-members
LEAST_AUC = 1e-3  # of the retain model: below it a relative distance says nothing
SMALLEST = 1e-3  # deviation of a token's log-probability in min-k++, as OpenUnlearning's floor of the variance, 1e-6
EPSILON = 1e-10  # OpenUnlearning adds it to PrivLeak's denominator


def least(values: np.ndarray, k: float) -> float:
    """Minus the mean of the smallest of some numbers per token, the share `k` of them, at least one.

    Args:
        values: (n,), n >= 1.
    """
    values = np.asarray(values, dtype=float)
    return -float(np.sort(values)[: max(1, int(len(values) * k))].mean())


def loss(row: Row) -> float | None:
    """The mean loss per token of the answer, end token included, nats."""
    return row.loss(GT)


def zlib(row: Row) -> float | None:
    """`loss` per byte of the answer's text, compressed by zlib at its default level."""
    mean = row.loss(GT)
    return None if mean is None else mean / len(compression.compress(row.truth.encode()))


def reference(row: Row) -> float | None:
    """`loss` minus that of the reference model (`passes`), end token included."""
    mean, theirs = row.loss(GT), row.extra.get("reference")
    return None if mean is None or theirs is None else mean - theirs


def gradient_norm(row: Row) -> float | None:
    """Mean over the parameter tensors of their gradient's L2 norm, of the answer's mean loss without its end token."""
    return row.extra.get("gradient")


def min_k(k: float) -> Callable[[Row], float | None]:
    """Minus the mean of the smallest log-probabilities of tokens, a share k of the answer's, without its end token."""

    def score(row: Row) -> float | None:
        scores = row.content()
        return None if scores is None else least(-scores.nll, k)

    return score


def min_k_plus_plus(k: float) -> Callable[[Row], float | None]:
    """`min_k` of log-probabilities less their mean and over their deviation, under the model's own distribution."""

    def score(row: Row) -> float | None:
        scores = row.content()
        return None if scores is None else least(standardised(scores.nll, scores.mean, scores.deviation), k)

    return score


def standardised(nll: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """(n,) how many deviations each token's log-probability lies above the mean, under the model's own distribution."""
    return (-nll - mean) / np.maximum(deviation, SMALLEST)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which the non-member has the higher score; a tie counts half.

    Exact: the Mann-Whitney U over the number of pairs. 1: members are told without error; 0.5: not at all; below: they
    look stranger than what was never seen.

    Args:
        members, others: scores, oriented like a loss; at least one each.
    """
    ordered = np.sort(np.asarray(others, dtype=float))
    low, high = (np.searchsorted(ordered, members, side) for side in ("left", "right"))
    return float((2 * len(ordered) - low - high).sum() / (2 * len(low) * len(ordered)))  # of whole numbers


def drawn_auc(members: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """(RESAMPLES,) `auc` of other rows: those of both sides are drawn anew, each side from its own."""
    order = np.argsort(others, kind="stable")
    times, against = _times(len(members), FORGET), _times(len(others), HOLDOUT)[:, order]
    below = np.concatenate([np.zeros((RESAMPLES, 1), dtype=int), against.cumsum(1)], axis=1)  # in each resample
    low, high = (below[:, np.searchsorted(np.asarray(others)[order], members, side)] for side in ("left", "right"))
    won = (times * (2 * len(others) - low - high)).sum(1)
    return won / (2 * len(members) * len(others))


def _times(n: int, of: str) -> np.ndarray:
    """(RESAMPLES, n) how often each row of a set is drawn in a resample."""
    flat = draws(n, of) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n)


def true_positives(members: Sequence[float], others: Sequence[float], percent: int) -> float:
    """The largest share of members below a threshold that at most `percent` per cent of the non-members are below.

    The threshold is one of the non-members' scores, and nothing is interpolated: rows with that score, on either side,
    lie above it, so that equal scores are never told apart. With fewer than 100 / percent non-members none of them may
    lie below.
    """
    ordered = np.sort(np.asarray(others, dtype=float))
    return float((np.asarray(members, dtype=float) < ordered[len(ordered) * percent // 100]).mean())


def privleak(auc: Any, retain: float) -> Any:
    """100 * (A - A_retain) / A_retain with A = 1 - auc of min-k 0.4, in per cent.

    0: as the retain model; negative: members are still told (-100: without error); positive: they look stranger than to
    a model that never saw them. Not symmetric, and not bounded above.

    Args:
        auc: a number, or an array of them; so is what comes back.
    """
    return 100 * ((1 - auc) - (1 - retain)) / (1 - retain + EPSILON)


def closeness(auc: Any, retain: float) -> Any:
    """s = 1 - |auc - retain| / retain, in [0, 1]: 1 is the retain model's AUC.

    Args:
        auc: a number, or an array of them; so is what comes back.
        retain: the retain model's, at least LEAST_AUC.
    """
    return np.clip(1 - abs(auc - retain) / retain, 0, 1)


ATTACKS: dict[str, tuple[Callable[[Row], float | None], str, str | None]] = {  # name -> of a row, source, its pass
    "MIA loss": (loss, "Yeom et al. 2018, arXiv 1709.01604", None),
    "MIA zlib": (zlib, "Carlini et al. 2021, arXiv 2012.07805", None),
    "MIA reference": (reference, "Carlini et al. 2021, arXiv 2012.07805", "reference"),
    "MIA min-k 0.4": (min_k(0.4), "Shi et al. 2024, arXiv 2310.16789", None),
    "MIA min-k 0.2": (min_k(0.2), "Shi et al. 2024, arXiv 2310.16789", None),
    "MIA min-k++ 0.4": (min_k_plus_plus(0.4), "Zhang et al. 2024, arXiv 2404.02936", None),
    "MIA min-k++ 0.2": (min_k_plus_plus(0.2), "Zhang et al. 2024, arXiv 2404.02936", None),
    "MIA gradient norm": (gradient_norm, "OpenUnlearning, arXiv 2506.12618", "gradient"),
}
LEAKS = "MIA min-k 0.4"  # the attack that PrivLeak reads
THEIRS = {  # OpenUnlearning's names, in its TOFU_EVAL.json
    "mia_loss": "MIA loss",
    "mia_zlib": "MIA zlib",
    "mia_reference": "MIA reference",
    "mia_min_k": "MIA min-k 0.4",
    "mia_min_k_plus_plus": "MIA min-k++ 0.4",
    "mia_gradnorm": "MIA gradient norm",
}


def from_openunlearning(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The attacks' AUCs in OpenUnlearning's TOFU_EVAL.json, by our names, as metrics.json holds them."""
    found = {}
    for theirs, ours in THEIRS.items():
        one = raw.get(theirs)
        if isinstance(one, Mapping) and isinstance(one.get("agg_value"), int | float):
            sides = [one.get(side, {}).get("value_by_index", {}) for side in ("forget", "holdout")]
            counted = dict(zip(("members", "non_members"), map(len, sides), strict=True)) if all(sides) else {}
            found[ours] = {"value": float(one["agg_value"]), **counted}
    return found


def _sides(attack: str, context: Context) -> tuple[list[float], list[float]]:
    """The scores of members and of non-members."""
    return context.column(f"{attack} {FORGET}"), context.column(f"{attack} {HOLDOUT}")


def _area(attack: str) -> Callable[[Context], Value]:
    """The attack's AUC."""

    def value(context: Context) -> Value:
        members, others = _sides(attack, context)
        about = {"members": len(members), "non_members": len(others), **context.about.get(HOLDOUT, {})}
        return resampled(auc(members, others), drawn_auc(members, others), len(members) + len(others), about)

    return value


def _positives(attack: str, percent: int) -> Callable[[Context], Value]:
    """The attack's true positives where so many false ones are allowed."""

    def value(context: Context) -> Value:
        members, others = _sides(attack, context)
        return Value(true_positives(members, others, percent), len(members) + len(others))

    return value


def retain_auc(attack: str, context: Context) -> float:
    """The retain model's AUC of an attack.

    Raises:
        Missing: its evaluation has none, or one of other members or non-members.
    """
    retain = context.retain_value(attack)
    theirs, ours = (context.retain or {})[attack], context.values[attack].about or {}
    if any(key in theirs and theirs[key] != ours.get(key) for key in ("members", "non_members", "rows")):
        sizes = [f"{one.get('members')} members and {one.get('non_members')} non-members" for one in (theirs, ours)]
        which = "other rows" if sizes[0] == sizes[1] else f"{sizes[0]}, and this one of {sizes[1]}"
        raise Missing(
            f"retain_result's {attack} is of {which}: evaluate both models with the same split, holdout and ds_size"
        )
    return retain


def _of_auc(function: Callable[[Any, float], Any], attack: str, retain: float, context: Context) -> Value:
    """What a function makes of an attack's AUC; in the interval the retain model's is taken as it is."""
    value, drawn = context.value(attack), context.drawn(attack)
    found = float(function(value, retain))
    return Value(found) if drawn is None else resampled(found, function(drawn, retain))


def _close(attack: str) -> Callable[[Context], Value]:
    """s of the attack."""

    def value(context: Context) -> Value:
        context.value(attack)
        retain = retain_auc(attack, context)
        if retain < LEAST_AUC:
            log.warning("%s: the retain model's AUC is %.2g, so s, a distance relative to it, is null", attack, retain)
            raise Missing(f"the retain model's AUC is below {LEAST_AUC:g}, and s is relative to it")
        return _of_auc(closeness, attack, retain, context)

    return value


def _leak(context: Context) -> Value:
    """PrivLeak."""
    context.value(LEAKS)
    return _of_auc(privleak, LEAKS, retain_auc(LEAKS, context), context)


def _of(attack: str) -> tuple[Metric, ...]:
    """The entries of one attack, which `metrics` in a config chooses together."""
    source, extra = ATTACKS[attack][1:]
    columns = (f"{attack} {FORGET}", f"{attack} {HOLDOUT}")
    more: dict[str, Any] = {"label": attack, "source": source, "extra": extra}
    return (
        Metric(attack, _area(attack), columns, "retain", "privacy", unit="AUC", **more),
        *(
            Metric(f"{attack} TPR@{percent}%FPR", _positives(attack, percent), columns, "retain", "privacy", **more)
            for percent in FALSE_POSITIVES
        ),
        Metric(f"{attack} s", _close(attack), (attack,), "max", "privacy", **more),
    )


METRICS = (
    *(metric for attack in ATTACKS for metric in _of(attack)),
    Metric("PrivLeak", _leak, (LEAKS,), "zero", "privacy", unit="per cent", source="Shi et al. 2024, arXiv 2407.06460"),
)
COLUMNS = tuple(
    Column(f"{attack} {of}", function, of, extra)
    for attack, (function, _, extra) in ATTACKS.items()
    for of in (FORGET, HOLDOUT)
)
