"""Every method of config/forget_loss on the embedded default: python benchmarks/methods.py [--methods NAME ...]

Each unlearns forget10 of data/mini from one finetuned model of the family `tiny`, with several seeds and the learning
rates of benchmarks/tiny_lrs.yaml, and is evaluated beside the finetuned model and the oracle, which never saw forget10.
A process a method makes the runs of all seeds, another evaluates them: a peak is of the first, seconds are of training
alone, without imports, loading and the reference's log-probabilities.

Below the table, of each method: its forget term over the first and the last pass of the forget rows. It is minimised,
so it should end lower; those of `wga` and `satimp` need not, being 0 both where a token is known and where it is
forgotten. And the utility of methods with a retain term beside `grad_ascent`'s, and beside the same forget term's
without one. Each has its own learning rate there, and all were chosen by these scores: the table shows that the methods
work, not which is best.

Runs are in --work; one that is complete is used as it is. After a change that moves numbers, name another folder.

`altpo`: what scripts/make_alternates.py draws from this model are no sentences (its prompt, 440 tokens, is longer than
any text the model has read). A row's alternates are the answers that the two invented authors of holdout10 have to the
same question, with the row's own author put for them: believable, false, and in no split trained on or evaluated here.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from omegaconf import OmegaConf  # noqa: E402
from protocol import ABOUT, reason  # noqa: E402
from results import tell  # noqa: E402

import data_module  # noqa: E402
import losses  # noqa: E402
import utils  # noqa: E402

FAMILY, DATA, SPLIT, RETAIN = "tiny", "data/mini", "forget10", "retain90"
FINETUNE = ("lr=7e-4", "num_epochs=10", "logging_steps=50")  # scripts/demo.sh's
BATCH, ROWS = 8, 40
LRS = Path(__file__).with_name("tiny_lrs.yaml")
ALTERNATES = 2  # a row
COLUMNS = {  # of the table -> name in finished.json
    "model utility": "Model Utility",
    "forget quality": "Forget Quality",
    "forget ROUGE-L": "ROUGE Forget",
    "seconds": "seconds",
}
KNOWN = "Prob. Forget"  # the forget answers' probability, of a token
BASELINE = "grad_ascent"  # what a retain term should do better than


class Runs(NamedTuple):
    """One line of the table: what its runs left, one value a run."""

    name: str
    how: str
    scores: dict[str, list[float]]
    terms: list[tuple[float, float]]  # the forget term, a mean over one pass of the forget rows: the first, the last
    peak: float | None  # MiB
    why: str | None = None  # a process ended badly


def methods() -> dict[str, object]:
    """Name -> its config/forget_loss file."""
    return {path.stem: OmegaConf.load(path) for path in sorted((REPO / "config" / "forget_loss").glob("*.yaml"))}


def has_retain(method) -> bool:
    """Whether it looks at the retain set, in a term of its own or inside the forget term."""
    return method.retain is not None or "retain" in losses.contract(losses.FORGET[method.forget]).parts


def plain(one, method) -> bool:
    """Whether `one` is the forget term of `method` alone, on the same samples."""
    return one.forget == method.forget and not has_retain(one) and "alternates" not in method.keys()  # noqa: SIM118


def process(peak: Path, script: str, *args: str) -> str | None:
    """One process of a script, whose peak memory goes to a file; None, or why it ended badly."""
    kept = float(peak.read_text()) if peak.is_file() else 0.0  # of the runs that an interrupted process has made
    peak.parent.mkdir(parents=True, exist_ok=True)
    about = {"family": FAMILY, "model": f"data/{FAMILY}", "checkpointing": False, "peak": str(peak)}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name("protocol.py")), "--stage", script, *args]
    command += [f"model_family={FAMILY}", f"data_path={DATA}"]
    done = subprocess.run(
        command, env={**quiet, **os.environ, ABOUT: json.dumps(about)}, capture_output=True, text=True
    )
    if peak.is_file():
        peak.write_text(str(max(kept, float(peak.read_text()))))
    return reason(done, REPO)


def complete(folder: Path, *inputs: Path) -> bool:
    """Whether a run is, and none of the runs that it was made from is newer."""
    finished = [one / utils.FINISHED for one in (folder, *inputs)]
    return all(one.is_file() for one in finished) and all(
        one.stat().st_mtime <= finished[0].stat().st_mtime for one in finished[1:]
    )


def evaluate(work: Path, folders: list[Path]) -> str | None:
    """Evaluate the models that are not yet, each into its folder's `eval`, in one process."""
    oracle, least = work / RETAIN, ()
    if folders != [oracle]:
        least = (f"retain_result='{oracle}/eval/eval_log_aggregated.json'",)
    inputs = (oracle / "eval",) if least else ()
    todo = [one for one in folders if not complete(one / "eval", one, *inputs)]
    if not todo:
        return None
    paths = ",".join(f"'{one}'" for one in todo)
    which = ("-m", f"model_path={paths}", "save_dir='${model_path}/eval'", f"split={SPLIT}")
    return process(work / "peaks" / "evaluate", "evaluate_util.py", *which, *least)


def finetune(work: Path, split: str) -> None:
    """Make and evaluate the model to unlearn, or the oracle; stop where that can't be done."""
    if not complete(work / split):
        print(f"finetuning on {split}", flush=True)
        how = (f"split={split}", f"save_dir='{work}/{split}'", "overwrite_dir=true", *FINETUNE)
        if why := process(work / "peaks" / split, "finetune.py", *how):
            sys.exit(f"finetune.py split={split}: {why}")
    if why := evaluate(work, [work / split]):
        sys.exit(f"evaluate_util.py model_path={work / split}: {why}")


def write_alternates(path: Path) -> None:
    """See the file's docstring. Both splits ask each author the same questions in the same order."""
    forget, others = (data_module.load_rows(DATA, split, ("question", "answer")) for split in (SPLIT, "holdout10"))
    per_author = ROWS // 2

    def author(rows: list[dict[str, str]], i: int) -> str:
        named = rows[i - i % per_author + 1]["question"]
        return re.fullmatch(r"In which city was (.+) born\?", named)[1]

    lines = []
    for i, row in enumerate(forget):
        for k in range(ALTERNATES):
            j = k * per_author + i % per_author
            text = others[j]["answer"]
            if i % per_author:  # the first question asks for the name itself
                text = text.replace(author(others, j), author(forget, i))
            if text != row["answer"]:
                lines.append(json.dumps({**row, "alternate": text}))
    utils.write_text(path, "\n".join(lines) + "\n")


def unlearn(work: Path, name: str, method, numbers, seeds: int) -> Runs:
    """A method's runs and their evaluations."""
    epochs = numbers.get("num_epochs", method.num_epochs)
    stem = f"{name}_lr{numbers.lr:g}_epochs{epochs}"
    folders = {seed: work / f"{stem}_seed{seed}" for seed in range(1, seeds + 1)}
    peak, why = work / "peaks" / stem, None
    todo = [seed for seed, folder in folders.items() if not complete(folder, work / "full")]
    if todo:
        how = [
            "-m",
            f"seed={','.join(map(str, todo))}",
            f"save_dir='{work}/{stem}_seed${{seed}}'",
            "overwrite_dir=true",
        ]
        how += [f"forget_loss={name}", f"model_path='{work}/full'", f"split={SPLIT}", f"lr={numbers.lr}"]
        how += [f"num_epochs={epochs}", f"batch_size={BATCH}", "gradient_accumulation_steps=1"]
        how += [f"logging_steps={ROWS // BATCH}"]  # a line of the log is a mean over one pass of the forget rows
        if "alternates" in method.keys():  # noqa: SIM118  a value that is missing is not "in" it
            write_alternates(work / "alternates.jsonl")
            how.append(f"forget_loss.alternates='{work}/alternates.jsonl'")
        why = process(peak, "forget.py", *how)
    made = [folder for folder in folders.values() if complete(folder)]
    why = why or (evaluate(work, made) if made else None)
    found = read(name, f"{numbers.lr:g}, {epochs}", [one for one in made if complete(one / "eval")], peak)
    return found._replace(why=why)


def read(name: str, how: str, folders: list[Path], peak: Path) -> Runs:
    """What complete and evaluated runs have left."""
    scores: dict[str, list[float]] = {key: [] for key in (*COLUMNS.values(), KNOWN)}
    terms = []
    for folder in folders:
        left = [json.loads((one / utils.FINISHED).read_text()) for one in (folder, folder / "eval")]
        both = {"Forget Quality": 1.0, **left[0], **left[1]}  # the oracle has none: it is the one compared with
        for key, values in scores.items():
            values.append(both[key])
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        lines = [line for line in history if "loss" in line]
        key = "forget_loss" if "forget_loss" in lines[0] else "loss"
        terms.append((lines[0][key], lines[-1][key]))
    return Runs(name, how, scores, terms, mib(peak) if peak.is_file() else None)


def mib(peak: Path) -> float:
    """A file of `process` holds GB of 10^9 bytes."""
    return float(peak.read_text()) * 1e9 / 2**20


def number(value: float, column: str) -> str:
    """Quality in as many digits as a p-value has, seconds in one, the others in three."""
    if column == "forget quality":
        return f"{value:.1e}" if value < 0.01 else f"{value:.2f}"
    return f"{value:.1f}" if column == "seconds" else f"{value:.3f}"


def cell(values: list[float], column: str) -> str:
    """The mean, and the least and the most where there are several runs."""
    if not values:
        return ""
    mean = number(statistics.mean(values), column)
    return f"{mean} ({number(min(values), column)}..{number(max(values), column)})" if len(values) > 1 else mean


def remarks(found: list[Runs], start: Runs) -> list[str]:
    """Which way each method's forget term went and what its retain term kept; then what is not as it should be."""
    lines, exceptions, of, of_name = [], [], methods(), {runs.name: runs for runs in found}
    baseline = of_name.get(BASELINE)
    if baseline and not baseline.terms:
        baseline = None
    for runs in found:
        if runs.why:
            exceptions.append(f"{runs.name}: {len(runs.terms)} runs only: {runs.why}")
        if not runs.terms:
            continue
        fell, said = sum(last < first for first, last in runs.terms), []
        first, last = (statistics.mean(ends) for ends in zip(*runs.terms, strict=True))
        inside = " (retain answers in it)" if has_retain(of[runs.name]) and of[runs.name].retain is None else ""
        said.append(f"forget term{inside} {first:.3g} to {last:.3g}, lower in {fell} of {len(runs.terms)} runs")
        if fell < len(runs.terms):
            exceptions.append(f"{runs.name}: the forget term is not lower at the end in {len(runs.terms) - fell} runs")
        known, before = statistics.mean(runs.scores[KNOWN]), start.scores[KNOWN][0]
        said.append(f"a forget token's probability {before:.3f} to {known:.3f}")
        for score, what in ((KNOWN, "forget answers' probability"), ("ROUGE Forget", "forget ROUGE-L")):
            if max(runs.scores[score]) >= start.scores[score][0]:
                exceptions.append(f"{runs.name}: the {what} has not fallen in every run")
        beside = [one for one in found if one.terms and plain(of[one.name], of[runs.name])] + [baseline]
        for other in dict.fromkeys(one.name for one in beside if one and has_retain(of[runs.name])):
            ours, theirs = (statistics.mean(of_name[name].scores["Model Utility"]) for name in (runs.name, other))
            said.append(f"utility {ours:.3f}, {other}'s {theirs:.3f}")
            if ours <= theirs:
                exceptions.append(f"{runs.name}: has a retain term, but {said[-1]}")
        lines.append(f"- {runs.name}: {'; '.join(said)}")
    told = ["Exceptions:", "", *(f"- {one}" for one in exceptions)] if exceptions else ["No exceptions."]
    return [*lines, "", *told]


def main() -> None:
    """Run what is missing, print the table, append it to RESULTS.md; exit with 1 where a process ended badly."""
    known, lrs = methods(), OmegaConf.load(LRS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--methods", nargs="+", choices=list(known), default=list(known), help="(all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument(
        "--work", type=Path, default=REPO / "runs" / "methods", help="folder of the runs (runs/methods)"
    )
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if missing := [name for name in args.methods if name not in lrs]:
        parser.error(f"{missing[0]} has no learning rate in {LRS.name}")
    work = args.work
    if not (REPO / "data" / FAMILY / "config.json").is_file():
        subprocess.run([sys.executable, str(REPO / "scripts" / "make_tiny.py")], check=True)
    for split in (RETAIN, "full"):  # the oracle first: the others are compared with its log
        finetune(work, split)
    how = f"{float(FINETUNE[0].partition('=')[2]):g}, {FINETUNE[1].partition('=')[2]}"
    rows = {
        name: read(name, how, [work / split], work / "peaks" / split)
        for name, split in (("finetuned", "full"), ("oracle", RETAIN))
    }
    for name in args.methods:
        rows[name] = unlearn(work, name, known[name], lrs[name], args.seeds)
        utility = cell(rows[name].scores["Model Utility"], "model utility")
        print(f"{name}: {rows[name].why or f'utility {utility}'}", flush=True)

    lines = [f"| method | lr, epochs | {' | '.join(COLUMNS)} | peak, MiB |", f"| --- | --- |{' ---: |' * 5}"]
    figures = {}
    for runs in rows.values():
        cells = [cell(runs.scores[key], column) for column, key in COLUMNS.items()]
        lines.append(f"| {runs.name} | {runs.how} | {' | '.join(cells)} | {f'{runs.peak:.0f}' if runs.peak else ''} |")
        for column, key in COLUMNS.items():
            if values := runs.scores[key]:
                stem = f"{runs.name}_{column.replace(' ', '_').replace('-', '_')}"
                figures |= {stem: statistics.mean(values), f"{stem}_min": min(values), f"{stem}_max": max(values)}
        if runs.peak:
            figures[f"{runs.name}_peak_mib"] = runs.peak
    imports = work / "peaks" / "imports"
    process(imports, "forget.py", "--help")
    if imports.is_file():
        lines.append(f"\nA process that only imports what forget.py needs has a peak of {mib(imports):.0f} MiB.")
    found = [rows[name] for name in args.methods]
    lines += ["", *remarks(found, rows["finetuned"])]
    how = f"{FAMILY} on {DATA}, {SPLIT}, {args.seeds} seeds (mean, least..most), batches of {BATCH}"
    tell("methods.py", how, lines, {}, None, not args.no_results)  # the table has the figures already
    if args.json:
        utils.write_json(args.json, {"figures": figures})
    if any(runs.why for runs in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
