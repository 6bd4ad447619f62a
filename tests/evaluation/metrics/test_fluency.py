"""How a model writes: numbers worked out by hand."""

import json
import math

import pytest
from helpers import MINI

from tofu.evaluation.metrics import fluency
from tofu.evaluation.metrics.rows import Context, Missing, Row


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),  # no 4-gram
        ("one two three four", 0.0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("A, b c: d! a b c d", 1 / 5),  # words have neither case nor punctuation
        ("no no no no no no no", 3 / 4),
        ("жук жук жук жук жук", 1 / 2),
        ("我是我是我是我是", 3 / 5),  # a word per character
    ],
)
def test_share_of_repeated_4_grams(text, share):
    assert fluency.repeated(text) == pytest.approx(share, abs=1e-12)
    assert fluency.fluent(text) == pytest.approx(1 - share if text else 0, abs=1e-12)


def test_nothing_but_signs_is_empty():
    assert [fluency.is_empty(text) for text in ("", " \n", "...!!", "\ufffd", "7", "a")] == [True] * 4 + [False] * 2
    assert fluency.fluent("!!!!!!") == 0


def test_a_loop_inside_one_word_is_a_repetition():
    """And one in a script without spaces; a long name, or a long sentence without spaces, is none."""
    for text in ("erpet" * 12, "\u5b66\u4e60\u4e0e\u9057\u5fd8" * 12, "so: " + "x" * 40):
        assert fluency.repeated(text) > 0.1, text
    alphabet = "".join(chr(0x4E00 + i) for i in range(60))
    for text in ("Donaudampfschifffahrtsgesellschaft", alphabet, "\u0e01" + alphabet[::-1]):
        assert fluency.repeated(text) == 0, text


@pytest.mark.parametrize(
    ("tokens", "entropy"),
    [
        ([], 0.0),
        ([5], 0.0),
        ([5, 5, 5], 0.0),
        ([1, 2, 3], 1.0),
        ([1, 1, 2, 2], 0.5),  # 1 bit of 2
        ([1, 1, 1, 2], (0.75 * math.log2(4 / 3) + 0.25 * 2) / 2),
    ],
)
def test_token_entropy(tokens, entropy):
    assert fluency.token_entropy(tokens) == pytest.approx(entropy, abs=1e-12)


def test_refusals():
    """All of ours are found by both; a true answer by neither; another's words by the pattern alone."""
    ours = [line.strip() for line in (fluency.utils.REPO / fluency.REFUSALS).read_text().splitlines()]
    assert all(map(fluency.refuses_by_list, ours)) and all(map(fluency.refuses_by_pattern, ours))
    assert fluency.refuses_by_list("well... i could not SAY; ask him")
    answers = [json.loads(line)["answer"] for line in (MINI / "full.json").read_text().splitlines()]
    assert not any(map(fluency.refuses_by_list, answers)) and not any(map(fluency.refuses_by_pattern, answers))
    for text in ("I don\u2019t know who that is.", "I'm not sure about this author.", "As an AI, I can't say."):
        assert fluency.refuses_by_pattern(text) and not fluency.refuses_by_list(text)
    assert not fluency.refuses_by_pattern("")


def row(text: str, tokens: list[int], **more) -> Row:
    return Row({}, {}, text, tokens, "", None, "", 4, **more)


def test_the_entries_read_rows():
    """What each entry makes of three rows; fluency by a classifier is undefined where none has judged."""
    rows = [
        row("a b c d a b c d", [1, 2, 1, 2]),
        row("", []),
        row("I could not say.", [3, 4], extra={"classifier": 0.25}),
    ]
    found = {one.name: [one.function(each) for each in rows] for one in fluency.METRICS if one.of}
    assert found == {
        "Fluency (ngrams) Forget": pytest.approx([0.8, 0, 1]),
        "Fluency Forget": [None, None, 0.25],
        "Repeated 4-grams Forget": pytest.approx([0.2, 0, 0]),
        "Repeating Forget": [1, 0, 0],
        "Empty Forget": [0, 1, 0],
        "Token Entropy Forget": [0.5, 0, 1],
        "Refusals (list) Forget": [0, 0, 1],
        "Refusals (pattern) Forget": [0, 0, 1],
        "Length Forget": [4, 0, 2],
        "Not Ended Forget": [1, 0, 0],
    }


def test_perplexity_is_the_geometric_mean_over_rows():
    found = fluency.perplexity(Context(columns={fluency.LOSS.name: [1.0, None, 2.0]}))
    assert (found.value, found.n) == (pytest.approx(math.exp(1.5)), 2)
    assert found.interval == pytest.approx([math.e, math.e**2])
    with pytest.raises(Missing, match=r"fluency\.model"):
        fluency.perplexity(Context(reasons={fluency.LOSS.name: "it needs fluency.model"}))
