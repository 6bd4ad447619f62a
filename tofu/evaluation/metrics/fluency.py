"""How a model writes about the forget set: fluent, repetitive, empty, refusing. Pure functions of texts and rows.

Words are those of `words.tokens`: runs of letters and digits, in any script. What a model has to judge (the classifier
and the perplexity) is found by the passes of `judges`; here it is read out of `Row.extra`.
"""

import functools
import re
from collections.abc import Hashable, Sequence

import numpy as np

import utils
from tofu.evaluation import words
from tofu.evaluation.metrics.declared import Column, Metric, Value
from tofu.evaluation.metrics.rows import Context, Row, mean_of, resampled

N = 4  # words of the n-grams that count as repeated
LONG, PIECE = 32, 4  # letters: a longer word is read in pieces, for a loop inside it, or a script without spaces
REFUSALS = "data/idontknow.jsonl"  # what idk and dpo teach
NGRAMS, CLASSIFIER = "ngrams", "classifier"  # what fluency may be judged by
BY = (NGRAMS, CLASSIFIER)
REFUSAL = re.compile(  # of a text in lower case
    r"\bi(?: am|'m| have|'ve)? (?:do not|don't|did not|didn't|cannot|can't|could not|couldn't|would only|lack|no|not"
    r"|never|unable|in the dark|know nothing|draw a blank)\b"
    r"|^(?:i am |i'm )?(?:so |very )?sorry\b|^unfortunately, (?:i|the|this|my)\b"
    r"|^to be honest\b|\bi (?:fear|must admit)\b"
    r"|\b(?:unable|not able) to (?:answer|say|help|provide|confirm|recall|tell)\b"
    r"|\b(?:beyond|outside)\b.{0,20}\b(?:knowledge|know|taught)\b|\bmy (?:knowledge|memory|training)\b"
    r"|\b(?:unknown|known) to me\b|\bno (?:answer|information|knowledge|idea)\b"
    r"|\bas an ai\b|\bnothing (?:that )?i (?:know|can)\b|\bask somebody else\b"
)

_words = functools.lru_cache(maxsize=8192)(words.tokens)  # several metrics ask for those of one text


def pieces(text: str) -> list[str]:
    """A text's words, those of more than LONG letters cut into pieces of PIECE letters."""
    found = []
    for word in _words(text):
        found += [word[i : i + PIECE] for i in range(0, len(word), PIECE)] if len(word) > LONG else [word]
    return found


def repetition(found: Sequence[Hashable], n: int = N) -> float:
    """The share of n-grams that are there a second time: 1 - different ones / all; 0 where there is none.

    Source: Welleck et al. 2020, arXiv 1908.04319 (seq-rep-n).
    """
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeated(text: str) -> float:
    """`repetition` of a text's `pieces`, in [0, 1)."""
    return repetition(pieces(text))


def is_empty(text: str) -> bool:
    """Whether a text has no word: nothing, or signs alone."""
    return not _words(text)


def fluent(text: str) -> float:
    """1 - `repeated`, in (0, 1]; 0 for an empty text."""
    return 0.0 if is_empty(text) else 1 - repeated(text)


def token_entropy(found: Sequence[Hashable]) -> float:
    """Entropy of a text's distribution of tokens, divided by log n for its n tokens, in [0, 1]; 0 for fewer than 2.

    1: no token is there twice.
    """
    if len(found) < 2:
        return 0.0
    counts: dict[Hashable, int] = {}
    for token in found:
        counts[token] = counts.get(token, 0) + 1
    shares = np.array(list(counts.values())) / len(found)
    return max(0.0, float(-(shares * np.log(shares)).sum() / np.log(len(found))))


@functools.cache
def refusals() -> tuple[str, ...]:
    """The refusals that the suite teaches, as words with a space around each."""
    lines = (utils.REPO / REFUSALS).read_text(encoding="utf-8").splitlines()
    return tuple(f" {' '.join(words.tokens(line))} " for line in lines if line.strip())


def refuses_by_list(text: str) -> bool:
    """Whether one of our refusals is in a text, whatever its case and punctuation."""
    spaced = f" {' '.join(_words(text))} "
    return any(line in spaced for line in refusals())


def refuses_by_pattern(text: str) -> bool:
    """Whether a text says, in the words of `REFUSAL`, that it has no answer. English alone."""
    return REFUSAL.search(text.lower().replace("\u2019", "'")) is not None


def _clean(row: Row) -> float | None:
    return row.extra.get(CLASSIFIER)


def _loss(row: Row) -> float | None:
    return row.extra.get("perplexity")


def perplexity(context: Context) -> Value:
    """exp of the mean over the rows of a text's mean loss per token: the geometric mean of the rows' perplexities."""
    losses = mean_of(context.column(LOSS.name), LOSS.of)
    return resampled(float(np.exp(np.asarray(losses.value))), np.exp(np.asarray(losses.drawn)), losses.n)


LOSS = Column("Generation Loss Forget", _loss, "Forget", extra="perplexity")
OURS = "this suite"


def _of(label: str, function, direction: str, source: str = OURS, name: str = "", **more) -> Metric:
    return Metric(
        f"{name or label} Forget", function, ("text",), direction, "fluency", "Forget", label, "share", source, **more
    )


METRICS = (
    _of(f"Fluency ({NGRAMS})", lambda row: fluent(row.text), "max"),
    _of(
        *(f"Fluency ({CLASSIFIER})", _clean, "max", "OpenUnlearning, arXiv 2506.12618"),
        **{"name": "Fluency", "extra": CLASSIFIER},
    )._replace(unit="probability"),
    _of("Repeated 4-grams", lambda row: repeated(row.text), "min", "Welleck et al. 2020, arXiv 1908.04319"),
    _of("Repeating", lambda row: float(repeated(row.text) > 0), "min"),
    _of("Empty", lambda row: float(is_empty(row.text)), "min"),
    _of("Token Entropy", lambda row: token_entropy(row.tokens), "max", "Yuan et al. 2025, arXiv 2410.08109"),
    _of("Refusals (list)", lambda row: float(refuses_by_list(row.text)), "none"),
    _of("Refusals (pattern)", lambda row: float(refuses_by_pattern(row.text)), "none"),
    _of("Length", lambda row: float(len(row.tokens)), "none")._replace(unit="tokens"),
    _of("Not Ended", lambda row: float(len(row.tokens) >= row.budget), "min"),
    Metric(
        *("Perplexity Forget", perplexity, (LOSS.name,), "min", "fluency", None, "Perplexity", "perplexity", OURS),
        extra="perplexity",
    ),
)
COLUMNS = (LOSS,)
