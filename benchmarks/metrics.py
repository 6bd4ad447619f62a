"""What every metric says of models that are known to remember or to have forgotten: python benchmarks/metrics.py

On the embedded default: the finetuned model, two retain models (oracles, of two seeds) and four methods with the rates
of benchmarks/tiny_lrs.yaml, forget10 of data/mini, each under `metrics=all`. The reference attack compares with the
second oracle; of that one itself, with the first. Runs are in --work: one that is complete is used as it is, and those
of `make demo` count. Appends to benchmarks/RESULTS.md. Checks: an attack's AUC is near 0.5 for the oracles (the
interval holds it) and clearly above for the finetuned model (its interval lies above 0.6).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf
from results import tell

from tofu.evaluation import measures
from tofu.evaluation.metrics import privacy, table
from tofu.runtime import provenance

REPO = Path(__file__).resolve().parents[1]
METHODS = ("grad_ascent", "grad_diff", "npo", "idk")
ORACLE, SECOND = "retain90", "retain90_seed43"
BASE = ("model_family=tiny", "data_path=data/mini")
LEARN = ("lr=7e-4", "num_epochs=10", "logging_steps=50")  # scripts/demo.sh's
NEAR, TOLD = 0.5, 0.6
SHOWN = (  # columns of the short table
    *(
        "Model Utility",
        "Forget Quality",
        "Extraction Strength Forget",
        "Mem",
        "MIA loss",
        "MIA",
        "Fluency (ngrams) Forget",
    ),
    "Agg (ngrams)",
)


def script(name: str, *args: str) -> None:
    """One of the suite's scripts; an error ends the benchmark."""
    print(name, *args, flush=True)
    done = subprocess.run(
        [sys.executable, name, *BASE, *args, "progress=false"], cwd=REPO, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)


def train(work: Path) -> dict[str, Path]:
    """The models of the table: name -> folder, those that are missing made."""
    models = {"finetuned": work / "full", "oracle": work / ORACLE, "oracle, other seed": work / SECOND}
    for folder, how in zip(
        models.values(), (("split=full",), (f"split={ORACLE}",), (f"split={ORACLE}", "seed=43")), strict=True
    ):
        if not (folder / provenance.FINISHED).is_file():
            script("finetune.py", *how, *LEARN, f"save_dir={folder}", "overwrite_dir=true")
    lrs = OmegaConf.load(Path(__file__).with_name("tiny_lrs.yaml"))
    for name in METHODS:
        models[name] = work / f"forget10_{name}"
        if not (models[name] / provenance.FINISHED).is_file():
            numbers = [f"{key}={value}" for key, value in lrs[name].items()]
            batch = ("batch_size=8", "gradient_accumulation_steps=1", "overwrite_dir=true")
            how = (f"model_path={work / 'full'}", "split=forget10", f"forget_loss={name}", f"save_dir={models[name]}")
            script("forget.py", *how, *numbers, *batch)
    return models


def evaluate(work: Path, models: dict[str, Path]) -> dict[str, dict]:
    """Name -> metrics.json of each model under all metrics; retain result and start result are there before others."""
    place = {name: folder / "eval_all_metrics" for name, folder in models.items()}
    oracle, start = work / ORACLE / "eval_for_retain_result", place["finetuned"]
    every = ("split=forget10", "metrics=all")
    retain = f"retain_result={oracle}/eval_log_aggregated.json"
    compared = (retain, f"start_result={start}")
    wanted = [("oracle", oracle, ()), ("finetuned", start, (retain,))]
    wanted += [(name, place[name], compared) for name in models if name != "finetuned"]
    for name, folder, more in wanted:
        if (folder / provenance.FINISHED).is_file():
            continue
        other = work / (ORACLE if name == "oracle, other seed" else SECOND)
        more = (*more, f"reference_model={other}")
        script("evaluate_util.py", *every, f"model_path={models[name]}", f"save_dir={folder}", *more)
    return {name: json.loads((folder / measures.METRICS).read_text()) for name, folder in place.items()}


def cell(one: dict, interval: bool = True) -> str:
    """A value with its interval."""
    value = one["value"]
    if value is None:
        return "-"
    shown = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
    low, high = one["interval"] or (None, None)
    return f"{shown} ({low:.3f}..{high:.3f})" if interval and low is not None else shown


def tables(found: dict[str, dict]) -> list[str]:
    """The few numbers that tell most, a model a row; then all metrics, a metric a row, with the goal's direction."""
    head = [f"| | {' | '.join(SHOWN)} |", f"| --- |{' ---: |' * len(SHOWN)}"]
    short = [f"| {name} | {' | '.join(cell(known[metric]) for metric in SHOWN)} |" for name, known in found.items()]
    names = [metric.name for metric in table.METRICS if any(metric.name in known for known in found.values())]
    absent = {"value": None, "interval": None}
    rows = [
        f"| {name} | {next(iter(found.values()))[name]['direction']} | "
        f"{' | '.join(cell(known.get(name, absent), name in privacy.ATTACKS) for known in found.values())} |"
        for name in names
    ]
    whole = [f"| metric | better | {' | '.join(found)} |", f"| --- | --- |{' ---: |' * len(found)}", *rows]
    return [*head, *short, "", *whole]


def checks(found: dict[str, dict]) -> list[str]:
    """What the attacks must say of models whose training is known; each line says whether it is so."""
    lines = []
    for attack in privacy.ATTACKS:
        for name in ("oracle", "oracle, other seed"):
            low, high = found[name][attack]["interval"]
            lines.append(f"- {name}, {attack}: {'holds' if low <= NEAR <= high else 'does NOT hold'} 0.5")
        low, _ = found["finetuned"][attack]["interval"]
        lines.append(f"- finetuned, {attack}: {'above' if low > TOLD else 'NOT above'} {TOLD}")
    return lines


def main() -> None:
    """Make what is missing, print the tables, append them to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder of the runs, from the repository")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    if not (REPO / "data" / "tiny" / "config.json").is_file():
        subprocess.run([sys.executable, "scripts/make_tiny.py"], cwd=REPO, check=True)
    found = evaluate(args.work, train(args.work))
    how = (
        "forget10 of data/mini, metrics=all, 95 % intervals by drawing rows; the goal's direction in the second column"
    )
    tell("metrics.py", how, [*tables(found), "", *checks(found)], {}, None, not args.no_results)


if __name__ == "__main__":
    main()
