"""The README's figure says what the README's table says."""

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import REPO

SVG = "{http://www.w3.org/2000/svg}"


def centre(group: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the markers of a collection stand in the file: those that are used, or the middle of one that is drawn."""
    used = [(float(one.get("x")), float(one.get("y"))) for one in group.iter(f"{SVG}use")]
    if used:
        return used
    path = next(group.iter(f"{SVG}path")).get("d")
    corners = np.array([float(one) for one in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)
    return [tuple((corners.min(0) + corners.max(0)) / 2)]


def scale(groups: dict[str, ElementTree.Element], axis: str) -> Callable[[float], float]:
    """From a place in the file to a value, by an axis's ticks, whose texts stand in comments."""
    places, texts = [], []
    for name, group in groups.items():
        if name.startswith(f"{axis}tick_"):
            places.append(float(next(group.iter(f"{SVG}use")).get(axis)))
            comment = next(one for one in group.iter() if one.tag is ElementTree.Comment)
            texts.append(float(comment.text.replace("\N{MINUS SIGN}", "-")))
    slope, start = np.polyfit(places, texts, 1)
    return lambda place: slope * place + start


def test_the_figure_has_the_tables_numbers():
    rows = re.findall(r"^(\S.*?) {2,}(\d\.\d+) +(\d[\d.e-]+) ", (REPO / "README.md").read_text(), re.M)
    expected = {name: (float(utility), math.log10(float(quality))) for name, utility, quality in rows}
    assert len(expected) == 6 and {"finetuned", "oracle", "KL"} <= expected.keys()
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(REPO / "docs" / "demo.svg", parser)
    axes = next(one for one in tree.iter(f"{SVG}g") if one.get("id") == "axes_1")  # the legend is beside it
    groups = {one.get("id"): one for one in axes.iter(f"{SVG}g") if one.get("id")}
    across, up = scale(groups, "x"), scale(groups, "y")
    places = [place for name, group in groups.items() if name.startswith("PathCollection") for place in centre(group)]
    found = [(across(x), up(y)) for x, y in places]
    assert len(found) == len(expected)
    for name, (utility, quality) in expected.items():
        nearest = min(found, key=lambda one: abs(one[0] - utility) + abs(one[1] - quality))
        assert nearest == (pytest.approx(utility, abs=2e-3), pytest.approx(quality, abs=2e-2)), name
