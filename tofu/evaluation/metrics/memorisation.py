"""How much of an answer a model still knows: extraction, memorisation, probability, ROUGE, truth ratios. No I/O.

Each function takes one row and gives a number, or None where it is undefined. Counts of tokens leave out the end token,
losses keep it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tofu.evaluation import words
from tofu.evaluation.metrics import tofu
from tofu.evaluation.metrics.declared import TOFU, Metric
from tofu.evaluation.metrics.rows import GT, PARAPHRASED, Row

EPSILON = 1e-10  # OpenUnlearning adds it to the denominators of truth ratios
META = "OpenUnlearning, arXiv 2506.12618"


def strength(right: np.ndarray) -> float:
    """1 - k / n, k the fewest tokens of an answer after which greedy decoding writes the rest of it.

    Args:
        right: (n,) bool, whether each token is the likeliest one after the true tokens before it; n >= 1.
    """
    wrong = np.flatnonzero(~np.asarray(right, dtype=bool))
    return (len(right) - (wrong[-1] + 1 if len(wrong) else 0)) / len(right)


def extraction_strength(row: Row) -> float | None:
    """`strength` of the answer, in [0, 1]: 0 where even its last token is not the likeliest one."""
    scores = row.content()
    return None if scores is None else float(strength(scores.right))


def extraction_strength_theirs(row: Row) -> float | None:
    """The same, but 1 / n where nothing can be extracted: OpenUnlearning's loop ends one token early."""
    scores = row.content()
    return None if scores is None else float(max(strength(scores.right), 1 / len(scores.right)))


def exact_memorisation(row: Row) -> float | None:
    """The share of the answer's tokens that are the likeliest ones after the true tokens before them."""
    scores = row.content()
    return None if scores is None else float(np.mean(scores.right))


def probability(row: Row) -> float | None:
    """exp(-mean token loss) of the answer."""
    return _exp(row.loss(GT))


def paraphrased_probability(row: Row) -> float | None:
    """exp(-mean token loss) of the paraphrased answer to the original question."""
    return _exp(row.loss(PARAPHRASED))


def _exp(loss: float | None) -> float | None:
    return None if loss is None else math.exp(-loss)


def _rouge(kind: str, measure: str) -> Callable[[Row], float]:
    """A ROUGE of the generation against the answer."""
    return lambda row: float(getattr(words.rouge(row.truth, row.text, row.rouge)[kind], measure))


def paraphrased_rouge(row: Row) -> float | None:
    """ROUGE-L recall of the generation, the same one, against the paraphrased answer."""
    return None if row.paraphrase is None else float(words.rouge(row.paraphrase, row.text, row.rouge)["rougeL"].recall)


def _losses(row: Row) -> tuple[float, np.ndarray] | None:
    """The mean losses of the right answer, the paraphrase where there is one, and of the wrong ones."""
    wrong = row.wrong()
    right = row.loss(PARAPHRASED) if PARAPHRASED in row.answers else row.loss(GT)
    return None if right is None or not len(wrong) else (right, wrong)


def log_ratio(row: Row, form: str = "geometric") -> float | None:
    """Log of the truth ratio R (`tofu.log_ratio`); None for a row without wrong answers."""
    found = _losses(row)
    return None if found is None else float(tofu.log_ratio([np.asarray(found[0])], [found[1]], form)[0])


def _indifferent(form: str) -> Callable[[Row], float | None]:
    """min(R, 1 / R), the forget set's form."""
    return lambda row: None if (ratio := log_ratio(row, form)) is None else math.exp(-abs(ratio))


def _knows(form: str) -> Callable[[Row], float | None]:
    """max(0, 1 - R), the retain set's form."""
    return lambda row: None if (ratio := log_ratio(row, form)) is None else -math.expm1(min(0.0, ratio))


def prob_mean(row: Row) -> float | None:
    """P_c / (P_c + P_w) = 1 / (1 + R): P_c = exp(-a), P_w = exp(-mean of the w_j), from the losses' difference."""
    ratio = log_ratio(row)
    return None if ratio is None else float(np.exp(-np.logaddexp(0.0, ratio)))


def prob_mean_theirs(row: Row) -> float | None:
    """The same with OpenUnlearning's epsilon, which decides the value of a collapsed model."""
    found = _losses(row)
    if found is None:
        return None
    right, wrong = math.exp(-found[0]), float(np.exp(-found[1].mean()))
    return right / (right + wrong + EPSILON)


def verbatim_completion(row: Row) -> float | None:
    """ROUGE-L recall of the answer's second half in what is written after the first half (`passes.completion`)."""
    if row.extra.get("generation") is None:
        return None
    rest, text = row.extra["generation"]
    return float(words.rouge(rest, text, row.rouge)["rougeL"].recall)


def _of(of: str, label: str, function: Any, needs: tuple[str, ...], source: str, **more: Any) -> Metric:
    """An entry of one set: a good unlearned model has little of the forget set and much of the retain set."""
    direction = "min" if of == "Forget" else "max"
    return Metric(f"{label} {of}", function, needs, direction, "memorisation", of, label, source=source, **more)


ROUGE = "Lin 2004; the benchmark reports ROUGE-L recall"
SCORED, TEXTS = ("answers",), ("text", "truth")


def _both(of: str) -> tuple[Metric, ...]:
    """The entries of one set, the forget or the retain set."""
    truth = _indifferent if of == "Forget" else _knows
    return (
        _of(
            *(of, "Extraction Strength", extraction_strength, SCORED, "Carlini et al. 2021, arXiv 2012.07805"),
            theirs=extraction_strength_theirs,
        ),
        _of(of, "Exact Memorisation", exact_memorisation, SCORED, "Tirumala et al. 2022, arXiv 2205.10770"),
        _of(of, "Probability", probability, SCORED, TOFU, unit="probability"),
        _of(of, "Paraphrased Probability", paraphrased_probability, SCORED, META, unit="probability"),
        _of(of, "ROUGE-1 Recall", _rouge("rouge1", "recall"), TEXTS, ROUGE),
        _of(of, "ROUGE-1 F1", _rouge("rouge1", "fmeasure"), TEXTS, ROUGE),
        _of(of, "ROUGE-L Recall", _rouge("rougeL", "recall"), TEXTS, ROUGE),
        _of(of, "ROUGE-L F1", _rouge("rougeL", "fmeasure"), TEXTS, ROUGE),
        _of(of, "Paraphrased ROUGE", paraphrased_rouge, ("text", "paraphrase"), META),
        _of(of, "Truth Ratio (geometric)", truth("geometric"), SCORED, TOFU)._replace(direction="max"),
        _of(of, "Truth Ratio (arithmetic)", truth("arithmetic"), SCORED, TOFU)._replace(direction="max"),
        _of(of, "Truth Ratio (prob_mean)", prob_mean, SCORED, META, theirs=prob_mean_theirs),
    )


METRICS = (
    *_both("Forget"),
    *_both("Retain"),
    _of("Forget", "Verbatim Completion", verbatim_completion, ("extra",), "Carlini et al. 2021", extra="generation"),
)
