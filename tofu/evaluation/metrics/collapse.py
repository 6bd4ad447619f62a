"""Whether a model has collapsed: then its forget quality says nothing. Pure: numbers in, sentences out."""

from collections.abc import Mapping, Sequence

from tofu.evaluation.metrics import fluency, tofu
from tofu.evaluation.metrics.declared import Column

UTILITY, REPEATING = tofu.UTILITY.name, "Repeating Forget"
FLUENCY = ("Fluency Forget", f"Fluency ({fluency.NGRAMS}) Forget")  # the first one that both models have is compared

COLUMNS = tuple(  # what is judged of each row whatever metrics are chosen: it costs nothing
    Column(metric.name, metric.function, "Forget")
    for metric in fluency.METRICS
    if metric.name in (FLUENCY[1], REPEATING)
)


def of_texts(texts: Sequence[str]) -> dict[str, float]:
    """What generations for the forget set tell: fluency by n-grams, and the share that repeats itself."""
    if not texts:
        return {}
    repeat = [fluency.repeated(text) > 0 for text in texts]
    fluent = [fluency.fluent(text) for text in texts]
    return {FLUENCY[1]: sum(fluent) / len(texts), REPEATING: sum(repeat) / len(texts)}


def signs(found: Mapping[str, float], start: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """The signs of a collapse, a sentence each; none for a sound model.

    Args:
        found: the model's metrics by name; what is not there is not judged.
        start: the starting model's.
        limits: `utility` and `fluency`, shares of the starting model's below which a model counts as collapsed, and
            `repeat`, the share of generations with a repeated 4-gram above which it does.
    """
    by = next((name for name in FLUENCY if name in found and name in start), "")
    said = [
        f"{name} is {found[name]:.3g}, below {limits[key]:g} times the starting model's {start[name]:.3g}"
        for key, name in (("utility", UTILITY), ("fluency", by))
        if name in found and name in start and found[name] < limits[key] * start[name]
    ]
    if found.get(REPEATING, 0.0) > limits["repeat"]:
        share = f"{found[REPEATING]:.0%} of the generations for the forget set"
        said.append(f"{share} repeat {fluency.N} words in a row, above {limits['repeat']:.0%}")
    return said


def warning(said: Sequence[str]) -> str:
    """One line for the log and the report."""
    return f"the model has collapsed ({'; '.join(said)}): its forget quality is no success"
