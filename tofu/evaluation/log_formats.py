"""Evaluation logs of other suites as ours, and ours as theirs.

Ours is the original benchmark's `eval_log_aggregated.json`. The other one in use is OpenUnlearning's `TOFU_EVAL.json`.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import utils
from tofu.evaluation import logs
from tofu.evaluation.logs import RIGHT, TASKS, WRONG
from tofu.evaluation.metrics import privacy
from tofu.evaluation.metrics.declared import Statistics, Value
from tofu.runtime import manifest
from utils import BadInput

log = logging.getLogger(__name__)

METRICS, EVAL = "metrics.json", "TOFU_EVAL.json"  # ours beside a log, and OpenUnlearning's, which is a log too
PREFIXES = {"forget": "Forget", "retain": "Retain", "ra": "Real Authors", "wf": "Real World"}  # theirs -> ours
OF_ROWS = {  # OpenUnlearning's metrics of the forget set's rows that the benchmark's log has not -> ours
    "extraction_strength": "Extraction Strength Forget",
    "exact_memorization": "Exact Memorisation Forget",
}
LEAK = "privleak"  # PrivLeak
EPSILON = 1e-10  # OpenUnlearning adds it to every denominator


def read(path: str, key: str) -> Mapping[str, Any]:
    """The aggregated log in a file that the user named, whichever suite wrote it.

    Raises:
        BadInput: no such file, not whole JSON, no evaluation log, or not as its run left it; `key` is the config key to
            name.
    """
    path = log_in(path)
    manifest.check_file(utils.find(path), key)
    raw = utils.read_json(path, key)
    try:
        return as_aggregated(raw)
    except ValueError as error:
        raise BadInput(f"{key}={path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{key}={path} is not whole: a row without {error}; make it again") from None


def log_in(path: str) -> str:
    """The log in an evaluation's folder, whichever suite's; any other path as it is."""
    place = Path(utils.find(path))
    found = (place / name for name in (logs.AGGREGATED, EVAL)) if place.is_dir() else ()
    return next((str(file) for file in found if file.is_file()), path)


def as_aggregated(raw: Any) -> Mapping[str, Any]:
    """An aggregated log from whatever a suite's evaluation left.

    Args:
        raw: the JSON of our or the original's `eval_log_aggregated.json`, of a bare `eval_log_forget.json`, or of
            OpenUnlearning's `TOFU_EVAL.json`.

    Returns:
        The log; of OpenUnlearning's only the sets that are whole in it.

    Raises:
        ValueError: none of these; the message names what was found.
    """
    if not isinstance(raw, Mapping):
        raise ValueError("not an aggregated log: its top level must be the names of the sets' logs")
    if not raw:
        raise ValueError(logs.EMPTY)
    if any(name.endswith(".json") for name in raw):
        return raw
    if RIGHT in raw:
        return {f"{logs.FORGET}.json": raw}
    sets = {f"{TASKS[ours]}.json": _from_openunlearning(raw, prefix) for prefix, ours in PREFIXES.items()}
    found = {file: one for file, one in sets.items() if one}
    if not found:
        raise ValueError(
            "no evaluation log: it holds neither eval_log_forget.json (eval_log_aggregated.json), nor "
            f"{RIGHT} (eval_log_forget.json), nor forget_Q_A_PARA_Prob or forget_truth_ratio (TOFU_EVAL.json), but "
            f"{', '.join(list(raw)[:6])}"
        )
    return found


def _from_openunlearning(raw: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """One set's log; {} where OpenUnlearning's holds too little of it for any statistic."""

    def by_row(name: str) -> dict[str, Any]:
        found = raw.get(name)
        rows = found.get("value_by_index") if isinstance(found, Mapping) else None
        return {str(key): row for key, row in rows.items()} if isinstance(rows, Mapping) else {}

    probability, paraphrased = by_row(f"{prefix}_Q_A_Prob"), by_row(f"{prefix}_Q_A_PARA_Prob")
    perturbed, rouge = by_row(f"{prefix}_Q_A_PERT_Prob"), by_row(f"{prefix}_Q_A_ROUGE")
    ratio = by_row(f"{prefix}_truth_ratio")
    right = probability if PREFIXES[prefix] in logs.REAL else paraphrased
    one: dict[str, dict[str, Any]] = {}
    if right and perturbed:  # exact; the stored ratio has OpenUnlearning's epsilon in it
        one[RIGHT] = {key: row["avg_loss"] for key, row in right.items()}
        one[WRONG] = {key: row["avg_loss"] for key, row in perturbed.items()}
    elif ratio:
        scores = {key: row["score"] for key, row in ratio.items()}
        if all(0 < score < 1 for score in scores.values()):
            log.warning(
                "%s_truth_ratio has no losses beside it and lies within (0, 1): it may be OpenUnlearning's prob_mean "
                "form, of which forget quality would be another number",
                prefix,
            )
        one[RIGHT] = {key: math.log(score) if score > 0 else math.nan for key, score in scores.items()}
        one[WRONG] = {key: [0.0] for key in scores}
    if probability:
        one["avg_gt_loss"] = {key: row["avg_loss"] for key, row in probability.items()}
    if rouge:
        for name in ("rouge1_recall", "rougeL_recall"):
            one[name] = {key: row[name] for key, row in rouge.items()}
        if all("input" in row for row in rouge.values()):
            one["generated_text"] = {
                key: [row["input"], row["generation"], row["ground_truth"]] for key, row in rouge.items()
            }
    return one if RIGHT in one else {}


def metrics_beside(path: str | None, key: str) -> dict[str, Any] | None:
    """The metrics of the evaluation whose log is in a file: of the metrics.json and the TOFU_EVAL.json beside it.

    Args:
        path: the log; it may be OpenUnlearning's under any name. None: there is none.
        key: the config key that named it.

    Returns:
        Name -> at least `value`, as metrics.json holds them; None without a log.

    Raises:
        BadInput: a file there is not whole JSON.
    """
    if path is None:
        return None
    log_file = Path(utils.find(log_in(path)))
    found: dict[str, Any] = {}
    for file in dict.fromkeys((log_file, log_file.with_name(EVAL), log_file.with_name(METRICS))):
        manifest.check_file(file, key)
        raw = utils.read_json(file, key) if file.is_file() else None
        if isinstance(raw, Mapping):
            found |= raw if file.name == METRICS else metrics_of(raw)
    return found


def are_metrics(raw: Any) -> bool:
    """Whether a JSON value is what a metrics.json holds."""
    return isinstance(raw, dict) and bool(raw) and all(isinstance(one, dict) and "value" in one for one in raw.values())


def metrics_of(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics in OpenUnlearning's TOFU_EVAL.json that are no statistics of a log, by our names."""
    found = privacy.from_openunlearning(raw)
    for theirs, ours in (*OF_ROWS.items(), (LEAK, "PrivLeak")):
        value = raw[theirs].get("agg_value") if isinstance(raw.get(theirs), Mapping) else None
        if isinstance(value, int | float):
            found[ours] = {"value": float(value)}
    return found


def to_openunlearning(
    ours: Mapping[str, Any],
    scores: Statistics,
    f1: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, Sequence[float | None]] | None = None,
    found: Mapping[str, Value] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An aggregated log as OpenUnlearning's TOFU_EVAL.json and TOFU_SUMMARY.json, with its definitions.

    Args:
        ours: the aggregated log; sets outside the four are left out.
        scores: its `tofu_metrics.statistics`.
        f1: log name -> row -> ROUGE-L F1, where the texts are known.
        columns, found: the numbers per row of the other metrics, and what these came to, by our names.

    Returns:
        Both files' content, keys sorted; a metric that the log does not allow is not there.
    """
    written: dict[str, Any] = _measured(columns or {}, found or {})
    short = ["forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality", "forget_truth_ratio", "model_utility", *written]
    for prefix, name in PREFIXES.items():
        file = f"{TASKS[name]}.json"
        if file in ours and logs.compared(ours, TASKS[name]):
            written |= _to_openunlearning(ours, prefix, name, f1.get(file, {}))
    if "Model Utility" in scores.values:
        written["model_utility"] = {"agg_value": scores.values["Model Utility"]}
    written["forget_quality"] = {"agg_value": scores.values.get("Forget Quality")}
    known = [name for name in sorted(short) if name in written]
    summary = {name: written[name]["agg_value"] for name in known if written[name]["agg_value"] is not None}
    return dict(sorted(written.items())), summary


def _measured(columns: Mapping[str, Sequence[float | None]], found: Mapping[str, Value]) -> dict[str, Any]:
    """Extraction strength, exact memorisation, the attacks and PrivLeak, as far as they were computed and have a value.

    Their numbers per row are in the form that `compat` asked for.
    """

    def rows(name: str) -> dict[str, Any]:
        known = [value for value in columns[name] if value is not None]
        by_index = {str(i): {"score": value} for i, value in enumerate(columns[name])}
        return {"agg_value": float(np.mean(known)), "value_by_index": by_index}

    valued = {name for name, one in found.items() if one.value is not None}
    written: dict[str, Any] = {theirs: rows(ours) for theirs, ours in OF_ROWS.items() if ours in valued}
    for theirs, ours in privacy.THEIRS.items():
        if ours in valued:
            sides = {side.lower(): rows(f"{ours} {side}") for side in (privacy.FORGET, privacy.HOLDOUT)}
            written[theirs] = {**sides, "auc": found[ours].value, "agg_value": found[ours].value}
    if "PrivLeak" in valued:
        written[LEAK] = {"agg_value": found["PrivLeak"].value}
    return written


def _to_openunlearning(ours: Mapping[str, Any], prefix: str, name: str, f1: Mapping[str, float]) -> dict[str, Any]:
    """One set's metrics."""
    task, real = TASKS[name], name in logs.REAL
    loss = {key: logs.rows(ours, task, key) for key in ("avg_gt_loss", RIGHT, WRONG)}

    def metric(rows: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
        return {"agg_value": float(np.mean([row[key] for row in rows.values()])), "value_by_index": rows}

    def probabilities(losses: dict[str, Any]) -> dict[str, Any]:
        rows = {i: {"prob": np.exp(-np.asarray(one)).tolist(), "avg_loss": one} for i, one in losses.items()}
        flat = np.concatenate([np.ravel(row["prob"]) for row in rows.values()])
        return {"agg_value": float(flat.mean()), "value_by_index": rows}

    found = {
        f"{prefix}_Q_A_Prob": probabilities(loss["avg_gt_loss"]),
        f"{prefix}_Q_A_PERT_Prob": probabilities(loss[WRONG]),
    }
    if real:
        shares = {}
        for i, right in loss["avg_gt_loss"].items():
            p = math.exp(-right)
            shares[i] = {"prob": p / (p + float(np.exp(-np.asarray(loss[WRONG][i])).sum()) + EPSILON)}
        found[f"{prefix}_Q_A_Prob_normalised"] = metric(shares, "prob")
    else:
        found[f"{prefix}_Q_A_PARA_Prob"] = probabilities(loss[RIGHT])
    ratio = {
        i: {"score": math.exp(-float(np.mean(loss[WRONG][i]))) / (math.exp(-right) + EPSILON)}
        for i, right in loss[RIGHT].items()
    }
    values = np.array([row["score"] for row in ratio.values()])
    forget = name == "Forget"
    mean = np.minimum(values, 1 / (values + EPSILON)).mean() if forget else np.maximum(0, 1 - values).mean()
    found[f"{prefix}_truth_ratio" if forget else f"{prefix}_Truth_Ratio"] = {
        "agg_value": float(mean),
        "value_by_index": ratio,
    }
    rouge = {}
    texts = logs.rows(ours, task, "generated_text") if ours[f"{task}.json"].get("generated_text") else {}
    for i, recall in logs.rows(ours, task, "rougeL_recall").items():
        rouge[i] = {"rouge1_recall": ours[f"{task}.json"]["rouge1_recall"][i], "rougeL_recall": recall}
        rouge[i] |= {"rougeL_f1": f1[i]} if i in f1 else {}
        if i in texts:
            prompt, generation, truth = texts[i]
            rouge[i] |= {"input": prompt, "ground_truth": truth, "generation": generation}
    found[f"{prefix}_Q_A_ROUGE"] = metric(rouge, "rougeL_recall")
    return found
