"""The files of tests/golden are the shared ones, or whole values out of them."""

import json
from typing import Any

import pytest
from helpers import GOLDEN, SHARED, needs_shared


def part_of(some: Any, whole: Any) -> bool:
    """Whether a tree of dicts is in another one: each key of it, with an equal value or one that is a part."""
    if isinstance(some, dict) and isinstance(whole, dict):
        return all(key in whole and part_of(value, whole[key]) for key, value in some.items())
    return some == whole


@needs_shared
@pytest.mark.parametrize(
    ("name", "path", "keys"),
    [
        ("llama2-7b_full.json", "golden/real_logs/llama2-7b_full.json", ()),
        ("llama2-7b_retain90_forget.json", "golden/real_logs/llama2-7b_retain90.json", ()),
        (
            "llama2-7b_full_expected.json",
            "golden/real_logs/expected.json",
            ("llama2-7b_full vs llama2-7b_retain90",),
        ),
        ("tiny-llama_TOFU_EVAL.json", "golden/logs/tiny-llama/openunlearning/TOFU_EVAL.json", ()),
        ("tiny-llama-retain90_TOFU_EVAL.json", "golden/logs/tiny-llama-retain90/openunlearning/TOFU_EVAL.json", ()),
    ],
)
def test_reduced_files_are_parts_of_the_shared_ones(name, path, keys):
    whole = json.loads((SHARED / path).read_text())
    for key in keys:
        whole = whole[key]
    some = json.loads((GOLDEN / name).read_text())
    assert some and part_of(some, whole)


@needs_shared
def test_fixtures_are_the_shared_ones():
    assert (GOLDEN / "fixtures.json").read_bytes() == (SHARED / "fixtures.json").read_bytes()


def test_part_of_sees_a_changed_number():
    whole = {"a": {"0": 1.0, "1": [2.0, 3.0]}, "b": 4}
    assert part_of({"a": {"1": [2.0, 3.0]}}, whole)
    assert not part_of({"a": {"1": [2.0]}}, whole) and not part_of({"a": {"2": 1.0}}, whole)
