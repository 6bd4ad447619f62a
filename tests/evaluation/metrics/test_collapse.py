"""The signs of a collapse, on numbers."""

import pytest

from tofu.evaluation.metrics import collapse

LIMITS = {"utility": 0.5, "fluency": 0.5, "repeat": 0.5}
START = {"Model Utility": 0.6, "Fluency (ngrams) Forget": 0.9}
SOUND = {"Model Utility": 0.31, "Fluency (ngrams) Forget": 0.46, "Repeating Forget": 0.5}


@pytest.mark.parametrize(
    ("changed", "start", "said"),
    [
        ({}, START, []),
        ({"Model Utility": 0.29}, START, ["Model Utility is 0.29, below 0.5 times the starting model's 0.6"]),
        ({"Fluency (ngrams) Forget": 0.44}, START, ["Fluency (ngrams) Forget is 0.44, below 0.5 times"]),
        ({"Repeating Forget": 0.51}, START, ["51% of the generations for the forget set repeat 4 words in a row"]),
        ({"Model Utility": 0.0, "Repeating Forget": 1.0}, {}, ["100% of the generations"]),
        ({"Fluency Forget": 0.2}, {**START, "Fluency Forget": 0.5}, ["Fluency Forget is 0.2"]),
        ({"Fluency Forget": 0.2}, START, []),
    ],
)
def test_signs(changed, start, said):
    """Without a start only repetition is judged; the classifier's fluency is compared where both have it."""
    found = collapse.signs({**SOUND, **changed}, start, LIMITS)
    assert len(found) == len(said) and all(one.startswith(begin) for one, begin in zip(found, said, strict=True))


def test_of_texts():
    assert collapse.of_texts([]) == {}
    found = collapse.of_texts(["a b c d a b c d", "", "fine words here"])
    assert found == pytest.approx({"Fluency (ngrams) Forget": 0.6, "Repeating Forget": 1 / 3})
    assert collapse.signs({}, {}, LIMITS) == []


def test_the_warning_is_one_line():
    assert collapse.warning(["a", "b"]) == "the model has collapsed (a; b): its forget quality is no success"
