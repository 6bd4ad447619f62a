"""Attacks on worked numbers, areas and rates against plain counting, and what depends on the retain model."""

import json
import logging
import zlib

import numpy as np
import pytest
from helpers import GOLDEN
from scipy import stats

from tofu.evaluation.inference import TokenScores
from tofu.evaluation.metrics import privacy, rows, table
from tofu.evaluation.metrics.rows import Context, Row

MEMBERS, OTHERS = [0.2, 0.5, 0.9, 1.4], [0.6, 1.0, 1.4, 2.0]  # 0.78125
LOGP = [-0.1, -2.0, -0.5, -3.0, -0.2, -1.0, -0.05, -0.3]


def row(logp, end: float | None = -9.0, mean=None, deviation=None, truth: str = "x", **extra: float) -> Row:
    """A row whose answer has these log-probabilities of its tokens, and of its end token where there is one."""
    nll = -np.array([*logp, *([] if end is None else [end])], dtype=float)
    mean, deviation = (np.resize([1.0] if one is None else one, len(nll)) for one in (mean, deviation))
    scores = TokenScores(nll, np.zeros(len(nll), dtype=bool), mean, deviation)
    return Row({("gt", 0): scores}, {("gt", 0): end is not None}, "", [], truth, None, "", 9, extra=extra)


def test_loss_zlib_reference_keep_the_end_token():
    one = row(LOGP, end=-1.85, truth="The author's full name is Hsiao Yun-Hwa.", reference=0.75)
    assert privacy.loss(one) == pytest.approx(1.0, abs=1e-12)  # 7.15 + 1.85 over 9
    assert len(zlib.compress(one.truth.encode())) == 48
    assert privacy.zlib(one) == pytest.approx(1 / 48, abs=1e-12)
    assert privacy.reference(one) == pytest.approx(0.25, abs=1e-12)
    assert privacy.reference(row(LOGP)) is None and privacy.gradient_norm(row(LOGP)) is None
    assert privacy.gradient_norm(row(LOGP, gradient=0.5)) == 0.5


@pytest.mark.parametrize("end", [-9.0, None])
def test_min_k(end):
    assert privacy.min_k(0.4)(row(LOGP, end)) == pytest.approx(2.0, abs=1e-6)
    assert privacy.min_k(0.2)(row(LOGP, end)) == pytest.approx(3.0, abs=1e-6)
    assert privacy.min_k(0.4)(row([], -1.0)) is None and privacy.min_k_plus_plus(0.4)(row([], -1.0)) is None


def test_min_k_plus_plus():
    """ZF[0, 1:4] at tokens 3, 1, 4."""
    logits = np.array(json.loads((GOLDEN / "fixtures.json").read_text())["tensors"]["ZF"])[0, 1:4]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mean = (np.exp(logp) * logp).sum(-1)
    deviation = np.sqrt((np.exp(logp) * logp**2).sum(-1) - mean**2)
    chosen = logp[range(3), [3, 1, 4]]
    assert privacy.standardised(-chosen, mean, deviation) == pytest.approx([0.842248, 0.626330, 0.691739], abs=1e-6)
    one = row(chosen, mean=mean, deviation=deviation)
    assert privacy.min_k_plus_plus(0.4)(one) == pytest.approx(-0.626330, abs=1e-6)
    # a token of which the model is sure has no deviation: the floor is that of OpenUnlearning
    assert privacy.standardised(np.array([0.0]), np.array([-1e-3]), np.array([0.0])) == pytest.approx([1.0])


def test_auc_by_hand():
    assert privacy.auc(MEMBERS, OTHERS) == 0.78125
    assert (
        privacy.auc([0.0], [1.0]) == 1 and privacy.auc([1.0], [0.0]) == 0 and privacy.auc([1.0] * 3, [1.0] * 5) == 0.5
    )


@pytest.mark.parametrize(("m", "n", "values"), [(7, 5, 3), (40, 40, 9), (400, 300, 50), (1, 12, 4), (30, 30, 10**9)])
def test_auc_is_mann_whitney_u(m, n, values):
    draw = np.random.default_rng(m)
    members, others = draw.integers(values, size=m) / 7, draw.integers(values, size=n) / 7 + 0.1 * (values > 9)
    u = stats.mannwhitneyu(others, members).statistic
    assert privacy.auc(members, others) == pytest.approx(u / (m * n), abs=1e-12)
    assert privacy.auc(members, others) + privacy.auc(others, members) == pytest.approx(1, abs=1e-12)


def test_interval_is_the_bootstrap_by_drawing_rows():
    """Of each resample the rows themselves, one by one; always the same; as wide as DeLong's where both are known."""
    draw = np.random.default_rng(0)
    members, others = draw.normal(size=60).round(1), draw.normal(0.6, size=80).round(1)
    low, high = rows.interval(privacy.drawn_auc(members, others))
    sides = [(members, "Forget"), (others, "Holdout")]
    drawn = [side[privacy.draws(len(side), name)] for side, name in sides]
    every = [privacy.auc(one, other) for one, other in zip(*drawn, strict=True)]
    assert [low, high] == pytest.approx(np.quantile(every, [0.025, 0.975]).tolist(), abs=1e-12)
    wins = (others[:, None] > members) + 0.5 * (others[:, None] == members)
    deviation = np.sqrt(wins.mean(0).var(ddof=1) / 60 + wins.mean(1).var(ddof=1) / 80)  # DeLong et al. 1988
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert set(privacy.drawn_auc([0.0] * 4, [1.0] * 4)) == {1.0}  # it knows no other rows


def test_true_positives_is_the_best_threshold():
    """Over every threshold: the largest share of members below one that lets few enough non-members through."""
    draw = np.random.default_rng(1)
    for m, n in ((5, 10), (40, 40), (50, 100), (30, 399), (200, 400)):
        members, others = draw.integers(12, size=m) / 3, draw.integers(12, size=n) / 3 + 1
        cuts = [*np.unique([*members, *others]), 99.0]
        for percent in privacy.FALSE_POSITIVES:
            allowed = [np.mean(members < cut) for cut in cuts if (others < cut).sum() * 100 <= percent * n]
            assert privacy.true_positives(members, others, percent) == max(allowed)
    assert privacy.true_positives([1.0, 1.0, 0.5], [1.0] * 400, 5) == pytest.approx(1 / 3)  # ties are not told apart
    assert privacy.true_positives([0.0, 2.0], [1.0, 3.0], 1) == 0.5


def test_privleak_and_closeness():
    assert privacy.privleak(0.78125, 0.5) == pytest.approx(-56.25, abs=1e-6)
    assert privacy.privleak(0.78125, 0.45) == pytest.approx(-60.227273, abs=1e-6)
    assert privacy.closeness(0.5, 0.5) == 1 and privacy.closeness(1.0, 0.4) == 0
    assert privacy.closeness(0.78125, 0.5) == pytest.approx(0.4375) and privacy.closeness(0.3, 0.4) == pytest.approx(
        0.75
    )


def measured(retain, attack: str = "MIA min-k 0.4") -> dict:
    """One attack's metrics and PrivLeak over MEMBERS and OTHERS."""
    columns = {f"{attack} Forget": [*MEMBERS, None], f"{attack} Holdout": OTHERS}
    context = Context(columns=columns, retain=retain, about={"Holdout": {"holdout": "holdout10", "rows": "a"}})
    metrics = [metric for metric in privacy.METRICS if metric.name.startswith((attack, "PrivLeak"))]
    return table.record(metrics, table.values(metrics, context))


def test_an_attack_and_its_retain_model(caplog):
    found = measured({"MIA min-k 0.4": {"value": 0.45, "members": 4, "non_members": 4, "rows": "a"}})
    known = found["MIA min-k 0.4"]
    assert (known["value"], known["n"], known["members"], known["non_members"]) == (0.78125, 8, 4, 4)
    assert known["holdout"] == "holdout10" and known["interval"][0] < 0.78125 < known["interval"][1]
    assert found["MIA min-k 0.4 TPR@1%FPR"]["value"] == 0.5
    assert found["MIA min-k 0.4 s"]["value"] == pytest.approx(1 - (0.78125 - 0.45) / 0.45)
    assert found["PrivLeak"]["value"] == pytest.approx(-60.227273, abs=1e-6)


@pytest.mark.parametrize(
    ("retain", "reason"),
    [
        (None, "it needs retain_result"),
        ({}, "retain_result has no MIA min-k 0.4"),
        (
            {"MIA min-k 0.4": {"value": 0.5, "members": 4, "non_members": 3}},
            "of 4 members and 3 non-members, and this one",
        ),
        ({"MIA min-k 0.4": {"value": 0.5, "members": 4, "non_members": 4, "rows": "b"}}, "of other rows"),
    ],
)
def test_what_needs_the_retain_model_says_why_it_is_null(retain, reason):
    found = measured(retain)
    assert found["MIA min-k 0.4"]["value"] == 0.78125
    for name in ("MIA min-k 0.4 s", "PrivLeak"):
        assert found[name]["value"] is None and reason in found[name]["reason"]


def test_a_retain_auc_near_zero_gives_no_s(caplog):
    with caplog.at_level(logging.WARNING):
        found = measured({"MIA min-k 0.4": {"value": 9e-4}})
    assert found["MIA min-k 0.4 s"]["value"] is None and "below 0.001" in found["MIA min-k 0.4 s"]["reason"]
    assert "MIA min-k 0.4: the retain model's AUC is 0.0009" in caplog.text
    assert found["PrivLeak"]["value"] == pytest.approx(100 * (0.21875 - 0.9991) / 0.9991)


def test_aucs_out_of_openunlearnings_file():
    side = {"value_by_index": {"0": {"score": 1.0}, "1": {"score": 2.0}}}
    raw = {
        "mia_min_k": {"forget": side, "holdout": side, "auc": 0.5, "agg_value": 0.5},
        "mia_loss": {"agg_value": 0.25},
    }
    assert privacy.from_openunlearning({**raw, "privleak": {"agg_value": 3.0}}) == {
        "MIA loss": {"value": 0.25},
        "MIA min-k 0.4": {"value": 0.5, "members": 2, "non_members": 2},
    }


def test_names_in_a_config():
    """An attack is chosen with its rates and s; PrivLeak brings what it reads; another pass needs its name or all."""
    four = ["MIA min-k++ 0.2", "MIA min-k++ 0.2 TPR@1%FPR", "MIA min-k++ 0.2 TPR@5%FPR", "MIA min-k++ 0.2 s"]
    assert [one.name for one in table.chosen(["mia_min_k_plus_plus_0_2"]) if one.group == "privacy"] == four
    assert [one.name for one in table.chosen(["privleak"]) if one.group == "privacy"] == ["MIA min-k 0.4", "PrivLeak"]
    group = {one.name for one in table.chosen(["privacy"])}
    assert {"MIA loss", "MIA zlib", "MIA min-k 0.4", "MIA min-k++ 0.2", "PrivLeak"} < group
    assert not {"MIA reference", "MIA gradient norm"} & group
    assert {"MIA reference", "MIA gradient norm"} < {one.name for one in table.chosen(["all"])}
