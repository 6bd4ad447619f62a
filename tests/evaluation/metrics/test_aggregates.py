"""Aggregates: those of 152 published models from their parts, to 1e-11, and what is missing has a reason."""

import json

import numpy as np
import pytest
from helpers import SHARED, needs_shared

from tofu.evaluation.metrics import aggregates, privacy, rows, table
from tofu.evaluation.metrics.declared import Value
from tofu.evaluation.metrics.rows import Context

MEM = ("one_minus_es", "one_minus_em", "one_minus_paraprob", "one_minus_truth")
MIA = ("s_loss", "s_zlib", "s_mink", "s_minkpp")
START = {"ep5": 0.712369592133051, "ep10": 0.7117632523209635}  # the finetuned models' utility
ROWS = (  # three of the published ones
    {
        "model": "full",
        "epoch": "ep10",
        "one_minus_es": 0.3207916755605088,
        "one_minus_em": 0.03189577773213381,
        "one_minus_paraprob": 0.8951966056297533,
        "one_minus_truth": 0.3177524389214216,
        "s_loss": 0.0,
        "s_zlib": 0.0,
        "s_mink": 0.0,
        "s_minkpp": 0.0,
        "uds": 0.0,
        "model_utility": 0.6008834008121887,
        "fluency": 0.872823725938797,
        "mem": 0.10326957371765141,
        "privacy_mia": 1e-12,
        "privacy": 1.3333333333333334e-12,
        "utility": 0.7117632523209635,
        "utility_rel": 0.9999999999985951,
        "overall": 6.999999999825504e-12,
    },
    {
        "model": "altpo_lr5e5_b01_a2_ep10",
        "epoch": "ep10",
        "one_minus_es": 0.9484674401521015,
        "one_minus_em": 0.4050975303351879,
        "one_minus_paraprob": 0.9540669141616672,
        "one_minus_truth": 0.48637671810525096,
        "s_loss": 0.8099024952391852,
        "s_zlib": 0.9449807642985381,
        "s_mink": 0.8263721519616367,
        "s_minkpp": 0.8883015459809807,
        "uds": 0.8318555315930689,
        "model_utility": 0.5649707338672758,
        "fluency": 0.8538523238524794,
        "mem": 0.6035879288628643,
        "privacy_mia": 0.8641564397350118,
        "privacy": 0.8476983968377115,
        "utility": 0.6800024448393712,
        "utility_rel": 0.9553772867888586,
        "overall": 0.7725724041875857,
    },
    {
        "model": "graddiff_lr5e5_a2_ep5",
        "epoch": "ep5",
        "one_minus_es": 0.9687166052171613,
        "one_minus_em": 0.9776638051122427,
        "one_minus_paraprob": 0.9999999858679472,
        "one_minus_truth": 0.9906404612013758,
        "s_loss": 0.04089595611643504,
        "s_zlib": 0.0775006649344272,
        "s_mink": 0.03911764219713376,
        "s_minkpp": 0.01175036761296655,
        "uds": 0.9722747508292218,
        "model_utility": 0.5031843607367212,
        "fluency": 0.12215898007154465,
        "mem": 0.9841095510798691,
        "privacy_mia": 0.02702281952686163,
        "privacy": 0.052584146909847806,
        "utility": 0.19659116611533706,
        "utility_rel": 0.27596793614731285,
        "overall": 0.12681292381650128,
    },
)


def check(row: dict) -> None:
    """Every aggregate of a published row: by our functions from its parts, with the file's second part of privacy."""
    one_minus = [1 - row[name] for name in MEM]
    relative = aggregates.relative_utility(row["utility"], START[row["epoch"]])
    found = {
        "mem": aggregates.memorisation(*one_minus),
        "privacy_mia": aggregates.membership(*(row[name] for name in MIA)),
        "privacy": aggregates.privacy(row["privacy_mia"], row["uds"]),
        "utility": aggregates.utility(row["model_utility"], row["fluency"]),
        "utility_rel": relative,
        "overall": aggregates.aggregate(row["mem"], row["privacy"], row["utility_rel"]),
    }
    assert found == pytest.approx({name: row[name] for name in found}, abs=1e-11, rel=0), row["model"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_published_rows(row):
    check(row)


@needs_shared
def test_all_published_models():
    published = json.loads((SHARED / "uds_results.json").read_text())
    assert published["full_utility"] == START and len(published["models"]) == 152
    for row in published["models"]:
        check(row)


def test_a_part_of_zero_takes_the_mean_to_zero():
    assert aggregates.harmonic_mean(0.0, 1.0) == pytest.approx(2e-12, rel=1e-9)
    assert aggregates.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert aggregates.relative_utility(0.8, 0.4) == 1.0


NGRAMS = aggregates.left_out("ngrams")
FLUENT = "Fluency (ngrams) Forget"
PARTS = {
    **{"Extraction Strength Forget": 0.5, "Exact Memorisation Forget": 0.75, "Paraphrased Probability Forget": 0.25},
    **{"Truth Ratio (prob_mean) Forget": 0.5, "Model Utility": 0.6, "Fluency (ngrams) Forget": 0.9},
    **dict.fromkeys(aggregates.CLOSE, 0.8),
}


def of(parts: dict, start: dict | None) -> dict[str, Value]:
    """The aggregates of an evaluation that has these metrics, each from two equal rows."""
    columns = {name: [parts[name]] * 2 for name in aggregates.KNOWN if name in parts}
    values = {name: Value(value) for name, value in parts.items()}
    known = None if start is None else {name: {"value": value} for name, value in start.items()}
    metrics = [metric for metric in aggregates.METRICS if metric.name not in NGRAMS]
    return table.values(metrics, Context(columns=columns, values=values, start=known))


def test_an_evaluation_with_all_parts():
    """By hand: Mem 4 / (1/.5 + 1/.25 + 1/.75 + 1/.5), Util 2 / (1/.6 + 1/.9), of the start's 2 / (1/.8 + 1/.9)."""
    found = of(PARTS, {"Model Utility": 0.8, "Fluency (ngrams) Forget": 0.9})
    mem, util, relative = 4 / (2 + 4 + 4 / 3 + 2), 0.72, 0.72 / (1.44 / 1.7)
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {
            **{"Mem": mem, "MIA": 0.8, "Priv": 0.8, "Util (ngrams)": util, "Util_rel (ngrams)": relative},
            "Agg (ngrams)": 3 / (1 / mem + 1 / 0.8 + 1 / relative),
        }
    )
    assert found["Mem"].interval == pytest.approx([mem, mem]) and found["Mem"].n == 2


def test_intervals_are_of_rows_drawn_together():
    """Each aggregate, worked out anew on every resample: the attacks on the same rows of members and of non-members."""
    draw, n = np.random.default_rng(1), 12
    attacks = [name.removesuffix(" s") for name in aggregates.CLOSE]
    columns = {f"{attack} {of}": draw.normal(size=n) for attack in attacks for of in ("Forget", "Holdout")}
    columns |= {name: draw.uniform(size=n) for name in aggregates.KNOWN} | {FLUENT: draw.uniform(size=n)}
    useful = draw.uniform(0.4, 0.6, size=rows.RESAMPLES)
    context = Context(
        columns=columns,
        retain={attack: {"value": 0.5} for attack in attacks},
        start={"Model Utility": {"value": 0.9}, FLUENT: {"value": 0.8}},
        values={"Model Utility": Value(0.5, drawn=useful)},
    )
    names = {
        *attacks,
        *aggregates.CLOSE,
        *aggregates.KNOWN,
        FLUENT,
        "Mem",
        "MIA",
        "Priv",
        *aggregates.left_out("classifier"),
    }
    found = table.values([metric for metric in table.METRICS if metric.name in names], context)
    every = {"MIA": [], "Agg (ngrams)": []}
    picks = {of: rows.draws(n, of) for of in ("Forget", "Holdout")}
    for k in range(rows.RESAMPLES):
        sides = [[columns[f"{name} {of}"][at[k]] for of, at in picks.items()] for name in attacks]
        areas = [privacy.auc(*both) for both in sides]
        mia = aggregates.harmonic_mean(*(privacy.closeness(area, 0.5) for area in areas))
        mem = aggregates.harmonic_mean(*(1 - columns[name][picks["Forget"][k]].mean() for name in aggregates.KNOWN))
        util = aggregates.harmonic_mean(useful[k], columns[FLUENT][picks["Forget"][k]].mean())
        relative = min(1, util / aggregates.harmonic_mean(0.9, 0.8))
        every["MIA"].append(mia)
        every["Agg (ngrams)"].append(aggregates.harmonic_mean(mem, mia, relative))
    for name, values in every.items():
        assert found[name].interval == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist(), abs=1e-9), name


@pytest.mark.parametrize(
    ("lost", "start", "null", "reason"),
    [
        ("MIA loss s", {"Model Utility": 0.8, "Fluency (ngrams) Forget": 0.9}, {"MIA", "Priv"}, "no MIA loss s"),
        ("", None, {"Util_rel (ngrams)"}, "it needs start_result"),
        (
            *("", {"Model Utility": 0.0, "Fluency (ngrams) Forget": 1.0}, {"Util_rel (ngrams)"}),
            "the starting model's utility is below 0.001",
        ),
        ("", {"Model Utility": 0.8}, {"Util_rel (ngrams)"}, "start_result has no Fluency (ngrams) Forget"),
        ("Model Utility", {}, {"Util (ngrams)", "Util_rel (ngrams)"}, "no Model Utility"),
        ("Exact Memorisation Forget", {"Model Utility": 0.8, "Fluency (ngrams) Forget": 0.9}, {"Mem"}, "no Exact"),
    ],
)
def test_what_is_missing_is_null_with_its_reason(lost, start, null, reason):
    found = of({name: value for name, value in PARTS.items() if name != lost}, start)
    assert {name for name, one in found.items() if one.value is None} == {*null, "Agg (ngrams)"}
    assert any(reason in found[name].reason for name in null) and found["Agg (ngrams)"].reason


def test_the_name_says_what_fluency_is():
    """The published names belong to the classifier; asking for a group gives one of the two."""
    names = {
        by: {m.name for m in table.chosen(["aggregates"], aggregates.left_out(by), {by})}
        for by in ("ngrams", "classifier")
    }
    assert {"Agg (ngrams)", "Fluency (ngrams) Forget"} <= names["ngrams"] and "Fluency Forget" not in names["ngrams"]
    assert {"Agg", "Util", "Fluency Forget"} <= names["classifier"] and "Agg (ngrams)" not in names["classifier"]
