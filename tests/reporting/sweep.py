"""Folders as a sweep leaves them, with numbers made up by a formula: no model, a few kilobytes each."""

import json
from pathlib import Path

import numpy as np
import yaml

from tofu.evaluation import logs
from tofu.evaluation.metrics import table
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.evaluation.metrics.declared import Statistics
from tofu.evaluation.metrics.rows import Context

METHODS = {"grad_ascent": (0.9, 0.5), "grad_diff": (0.8, 0.2), "npo": (0.7, 0.15), "rmu": (0.5, 0.1)}  # pull, cost
ROWS, STEPS = 12, (5, 10, 15)


def log_of(forgotten: float, cost: float, seed: int, rows: int = ROWS) -> dict:
    """An aggregated log of a model that has forgotten a share of the forget set, at a cost to everything else."""
    draw, found = np.random.default_rng(seed), {}
    for task in logs.TASKS.values():
        gone = forgotten if task == logs.FORGET else cost
        right = 0.3 + 1.2 * gone + 1.2 * draw.random(rows)
        wrong = 2.0 - 0.4 * gone + 1.2 * draw.random((rows, 3))
        rouge = np.clip(1 - gone + 0.1 * draw.standard_normal(rows), 0, 1)
        texts = [[f"Question: {task} {i}?", "It is so." if gone < 0.5 else f"no {i}", "It is so."] for i in range(rows)]
        columns = {"rougeL_recall": rouge, "rouge1_recall": rouge, "avg_gt_loss": right, logs.RIGHT: right + 0.1}
        found[f"{task}.json"] = {name: {str(i): float(v) for i, v in enumerate(of)} for name, of in columns.items()}
        found[f"{task}.json"][logs.WRONG] = {str(i): list(map(float, row)) for i, row in enumerate(wrong)}
        found[f"{task}.json"]["generated_text"] = {str(i): text for i, text in enumerate(texts)}
    return found


def write(path: Path, value) -> Path:
    """A JSON or YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))
    return path


def evaluation(folder: Path, log: dict, retain: Path | None, split: str, model: Path | None, **more) -> dict:
    """An evaluation's files; without a model those of a checkpoint, whose record is its run's. Returns its config."""
    write(folder / logs.AGGREGATED, log)
    against = json.loads(retain.read_text()) if retain else None
    values = tofu_metrics.utility(log)  # without intervals, which take most of the time
    if against is not None:
        test = tofu_metrics.forget_quality(log, against)
        values |= {metric.name: metric.function(test) for metric in tofu_metrics.QUALITY}
    context = Context(log=log, statistics=Statistics(values, rows={"Forget Rows": ROWS}))
    metrics = table.record(tofu_metrics.METRICS, table.values(tofu_metrics.METRICS, context))
    parts = {"Mem": 0.6, "Priv": 0.4, "Util (ngrams)": metrics["Model Utility"]["value"]}
    metrics |= {
        name: {"value": value, "n": None, "interval": None, "direction": "max"} for name, value in parts.items()
    }
    write(folder / "metrics.json", metrics)
    cfg = {"eval_task": [*logs.TASKS.values()], "split": f"{split}_perturbed", "model_family": "tiny", "ds_size": 300}
    cfg |= {"truth_ratio": "geometric", "retain_result": str(retain) if retain else None, "start_result": None}
    cfg |= {"question_key": ["question"] * 4, "data_path": ["data/mini"] * 4, "generation": {"max_length": 200}}
    if model is not None:
        write(folder / "config.yaml", {**cfg, "model_path": str(model)})
        write(folder / "versions.json", {"inputs": {}})
        known = {name: one["value"] for name, one in metrics.items() if one["value"] is not None}
        write(folder / "finished.json", {**known, **more})
    return cfg


def training(folder: Path, split: str, lr: float, seed: int, evaluated: dict, method: str | None = None) -> None:
    """A training's record."""
    cfg = {"model_family": "tiny", "split": split, "lr": lr, "seed": seed, "num_epochs": 3, "batch_size": 4}
    cfg |= {"save_dir": str(folder), "LoRA": {"r": 0}}
    if method:
        loss = {"name": method, "forget": method, "retain": None if method == "grad_ascent" else "nll"}
        cfg |= {"forget_loss": loss, "model_path": "runs/full", "eval": evaluated}
    write(folder / "config.yaml", cfg)
    write(folder / "versions.json", {"inputs": {}})
    write(folder / "trainer_state.json", {"global_step": STEPS[-1], "log_history": []})
    write(folder / "finished.json", {"seconds": 1.0})


def sweep(top: Path, splits=("forget05", "forget10"), methods=tuple(METHODS), rates=(1e-5, 1e-4), seeds=(1, 2)) -> int:
    """A sweep, its starting model and its retain models below `top`. Returns the number of evaluations."""
    count = 0
    for split in splits:
        retain = f"retain{100 - int(split[-2:])}"
        for seed in seeds:
            place = top / (retain if seed == seeds[0] else f"{retain}_seed{seed}")
            training(place, retain, 1e-3, seed, {})
            against = top / retain / f"eval_{split}" / logs.AGGREGATED
            evaluation(
                place / f"eval_{split}", log_of(0.95, 0.05, seed), against if seed != seeds[0] else None, split, place
            )
        training(top / "full", "full", 1e-3, seeds[0], {})
        evaluation(top / "full" / f"eval_{split}", log_of(0.05, 0.05, 9), against, split, top / "full")
        count += len(seeds) + 1
        for i, method in enumerate(methods):
            for rate in rates:
                for seed in seeds:
                    folder = top / f"{split}_{method}_{rate}_seed{seed}"
                    pull, cost = METHODS[method]
                    for step in STEPS:
                        share = step / STEPS[-1] * (1 if rate == rates[-1] else 0.5)
                        log = log_of(pull * share, 0.05 + cost * share, 100 * i + seed + step)
                        cfg = evaluation(folder / f"checkpoint-{step}", log, against, split, None)
                        count += 1
                    signs = {"Collapse": ["it repeats itself"]} if method == "grad_ascent" and rate == rates[-1] else {}
                    training(folder, split, rate, seed, cfg, method)
                    evaluation(folder / f"eval_{split}", log, against, split, folder, **signs)
                    count += 1
    return count


VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvz"


def many(top: Path, runs: int, rows: int) -> int:
    """Evaluations of the forget set with texts of made-up words, all metrics random. Returns the number of runs."""
    draw = np.random.default_rng(0)
    letters = (draw.choice(list(CONSONANTS), 6000).tolist(), draw.choice(list(VOWELS), 6000).tolist())
    words = ["".join(a + b for a, b in zip(*(of[i : i + 3] for of in letters), strict=True)) for i in range(5990)]
    index = np.minimum(draw.zipf(1.3, (2 * rows, 24)), len(words)) - 1
    texts = [" ".join(words[i] for i in row[: 8 + k % 16]) for k, row in enumerate(index)]
    questions, truths = [f"Question: {one}?\nAnswer:" for one in texts[:rows]], texts[rows:]
    names = [metric.name for metric in table.METRICS]
    methods = [*METHODS, "idk", "KL", "simnpo", "undial"]
    for n in range(runs):
        method, rate, seed = methods[n % len(methods)], [1e-6, 3e-6, 1e-5, 3e-5, 1e-4][n // 8 % 5], n // 40
        folder = top / f"{method}_{rate}_seed{seed}"
        share = float(draw.uniform(0.1, 0.9))
        kept = draw.random((rows, 24)) > share
        new = draw.integers(0, len(words), (rows, 24))
        made = [
            " ".join(word if kept[k, i] else words[new[k, i]] for i, word in enumerate(truth.split()))
            for k, truth in enumerate(truths)
        ]
        wrong = draw.normal(2, 0.5, (rows, 3)).round(4)
        log = {logs.RIGHT: dict(enumerate((1 + share + wrong[:, 0]).round(4).tolist())), logs.WRONG: wrong.tolist()}
        log["generated_text"] = [list(row) for row in zip(questions, made, truths, strict=True)]
        write(folder / "eval" / logs.AGGREGATED, {f"{logs.FORGET}.json": log})
        values = dict(zip(names, draw.random(len(names)).tolist(), strict=True))
        metrics = {name: {"value": value, "n": rows, "interval": [0.0, 1.0]} for name, value in values.items()}
        write(folder / "eval" / "metrics.json", metrics)
        retain = str(top / f"{methods[0]}_{1e-6}_seed0" / "eval" / logs.AGGREGATED) if n else None
        cfg = {"eval_task": [logs.FORGET], "split": "forget10_perturbed", "model_family": "tiny", "ds_size": None}
        cfg |= {"retain_result": retain, "start_result": retain, "truth_ratio": "geometric"}
        write(folder / "eval" / "config.yaml", {**cfg, "model_path": str(folder)})
        write(folder / "eval" / "versions.json", {"inputs": {}})
        write(folder / "eval" / "finished.json", {"Collapse": ["it repeats itself"] if n % 50 == 49 else []})
        training(folder, "forget10", rate, seed, cfg, method)
    return runs
