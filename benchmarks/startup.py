"""How long a script takes to start: --help, a refused command line, the imports of a whole small run.

    python benchmarks/startup.py [--trees DIR ...] [--repetitions N] [--no-results] [--json FILE]

Each command is started anew, every tree in turn, and the median is told, beside `python -c "import torch"` in the same
run. `--trees` names checkouts to compare (before and after a change, say); without it, this one. The imports are what
`python -X importtime` adds up over a run of a few seconds with random weights, from its first line to its last.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results

REPO = Path(__file__).resolve().parents[1]
SMALL = ("model_family=tiny", "data_path=data/mini", "engine=ddp", "model_path=MODEL")
COMMANDS = {  # name -> script and arguments, and the exit code; MODEL and LOG stand for files made here
    "import torch": (("-c", "import torch"), 0),
    "--help": (("forget.py", "--help"), 0),
    "refused key": (("forget.py", "lrr=3"), 2),
    "refused family": (("finetune.py", "model_family=phy"), 2),
    "refused method": (("forget.py", "forget_loss=npoo"), 2),
    "refused split": (("finetune.py", "model_family=tiny", "data_path=data/mini", "split=retain42"), 2),
    "refused loss": (("forget.py", *SMALL, "split=forget10", "forget_loss.forget=npoo"), 2),
    "aggregate": (
        ("aggregate_eval_stat.py", "retain_result=LOG", "ckpt_result=LOG", "method_name=m", "submitted_by=me")
        + ("save_file=OUT/row.csv",),
        0,
    ),
}
RUNS = {
    "forget.py": ("split=forget10", "forget_loss=npo", "num_epochs=1", "save_dir=OUT/run", "batch_size=8")
    + ("gradient_accumulation_steps=1",),
    "evaluate_util.py": ("split=forget10", "ds_size=2", "save_dir=OUT/evaluation"),
}


def seconds(tree: Path, words: tuple[str, ...], code: int, stand_for: dict[str, str]) -> tuple[float, str]:
    """Run one command of a checkout: the seconds it took, and what it wrote to stderr."""
    for short, whole in stand_for.items():
        words = tuple(word.replace(short, whole) for word in words)
    if words[0].endswith(".py"):
        words = (str(tree / words[0]), *words[1:])
    elif len(words) > 2 and words[2].endswith(".py"):
        words = (*words[:2], str(tree / words[2]), *words[3:])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=stand_for["OUT"], env=environment
    )
    took = time.perf_counter() - start
    if done.returncode != code:
        raise SystemExit(f"{words} ended with {done.returncode}, not {code}:\n{done.stderr[-2000:]}")
    return took, done.stderr


def imports(text: str) -> float:
    """Seconds that a run spent in imports, from what -X importtime wrote: the sum of all modules' own times."""
    lines = [line.split("|")[0].removeprefix("import time:") for line in text.splitlines() if "import time:" in line]
    return sum(int(own) for own in lines if own.strip().isdigit()) / 1e6


def make_model(folder: Path) -> None:
    """A small Llama with random weights, as scripts/make_tiny.py makes it before its pretraining."""
    spec = importlib.util.spec_from_file_location("make_tiny", REPO / "scripts" / "make_tiny.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    rows = [json.loads(line) for line in (REPO / "data" / "mini" / "full.json").read_text().splitlines()]
    tokenizer = made.make_tokenizer([f"{row['question']}\n{row['answer']}" for row in rows])
    tokenizer.save_pretrained(folder)
    made.make_model(len(tokenizer)).save_pretrained(folder)


def measured(trees: list[Path], repetitions: int) -> dict[tuple[str, Path], float]:
    """(what, tree) -> the median of its seconds."""
    found: dict[tuple[str, Path], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        stand_for = {"MODEL": f"{folder}/model", "LOG": f"{folder}/evaluation/eval_log_aggregated.json", "OUT": folder}
        for number in range(repetitions + 1):  # the first pass fills the file system's cache and makes the log
            for tree in trees:
                for script, more in reversed(RUNS.items()):
                    again = "overwrite_dir=true" if script == "forget.py" else "overwrite=true"
                    words = ("-X", "importtime", script, *SMALL, *more, again)
                    text = seconds(tree, words, 0, stand_for)[1]
                    found.setdefault((f"imports of {script}", tree), []).append(imports(text))
            for name, (words, code) in COMMANDS.items():
                for tree in trees:
                    found.setdefault((name, tree), []).append(seconds(tree, words, code, stand_for)[0])
            print(f"pass {number} of {repetitions}", flush=True)
    return {key: statistics.median(values[1:]) for key, values in found.items()}


def main() -> None:
    """Measure, print, append to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=Path, nargs="+", default=[REPO], help="checkouts, the older one first")
    parser.add_argument("--repetitions", type=int, default=5, help="starts of each command (%(default)s)")
    parser.add_argument("--no-results", action="store_true", help="leave RESULTS.md alone")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    trees = [tree.resolve() for tree in args.trees]
    found = measured(trees, args.repetitions)
    names = list(dict.fromkeys(name for name, _ in found))
    heads = ["this"] if len(trees) == 1 else ["before", *["after"] * (len(trees) - 1)]
    lines = [f"| seconds | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(trees)]
    lines += [f"| {name} | {' | '.join(f'{found[name, tree]:.2f}' for tree in trees)} |" for name in names]
    figures = {f"{name} / import torch": found[name, trees[-1]] / found["import torch", trees[-1]] for name in names}
    if len(trees) > 1:
        figures |= {f"{name}, after / before": found[name, trees[-1]] / found[name, trees[0]] for name in names}
    results.tell(
        "startup.py", f"medians of {args.repetitions} starts", lines, figures, args.json, append=not args.no_results
    )


if __name__ == "__main__":
    main()
