"""What the methods do to one finetuned model: python benchmarks/methods.py [--on mini|tofu] [--methods NAME ...]

    mini  the embedded default: every method unlearns forget10 of data/mini from the family `tiny`
    tofu  the real data: forget01, forget05 and forget10 from a small Llama that finetune.py trains from random weights

Each run is evaluated beside the finetuned model and the oracle, which never saw the forget set. Learning rates are in
benchmarks/tiny_lrs.yaml and tofu_lrs.yaml. A process makes the runs of all seeds of a method and a split, another
evaluates them: a peak is of the first, seconds are of training alone, without imports, loading and the reference's
log-probabilities.

Below a table, of each method: its forget term over the first and the last pass of the forget rows. It is minimised, so
it should end lower; those of `wga` and `satimp` need not, being 0 both where a token is known and where it is
forgotten. And the utility of methods with a retain term beside `grad_ascent`'s, and beside the same forget term's
without one. Rates of mini were chosen for each method by these scores: its table shows that the methods work, not
which is best. On tofu all but `rmu` have one rate, as in the papers, and the order that those report on forget10 is
said to be seen or not.

Runs are in --work; one that is complete is used as it is. After a change that moves numbers, name another folder.

mini: what scripts/make_alternates.py draws from `tiny` for `altpo` are no sentences (its prompt, 440 tokens, is longer
than any text the model has read). A row's alternates are the answers that the two invented authors of holdout10 have to
the same question, with the row's own author put for them: believable, false, and in no split trained on or evaluated.

tofu needs ../shared (the data, a tokenizer of 2,000 words). Random weights know no real authors and no world facts, and
with these unknown model utility is 0 whatever is forgotten. So the rows of real_authors and world_facts are added to
what the finetuned model and the oracles learn, and to nothing else. This model is small and knows nothing but its rows:
larger, pretrained models may behave otherwise. `altpo` is not among its methods: it has no alternates to take.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from protocol import launch, write_model, write_splits
from results import METHODS, tell

import data_module
import utils
from tofu.methods import losses
from tofu.runtime import provenance

REPO = Path(__file__).resolve().parents[1]
BATCH = 8
ALTERNATES = 2  # a row
SHAPE, INIT = (256, 4, 4, 4, 704), 0.06  # as train_speed.SIZES; the weights' spread, for a model as narrow as this
FACTS, FACT_COPIES = ("real_authors", "world_facts"), 2
COLUMNS = {  # of the table -> name in finished.json
    "model utility": "Model Utility",
    "forget quality": "Forget Quality",
    "forget ROUGE-L": "ROUGE Forget",
    "seconds": "seconds",
}
KNOWN = "Prob. Forget"  # the forget answers' probability, of a token
BASELINE = "grad_ascent"  # what a retain term should do better than
GENTLE = ("npo", "simnpo")  # keep more utility, as arXiv 2404.05868 and 2410.07163 report
COLLAPSED = 0.1  # of the finetuned model's utility, or less
ORDERED = "forget10"  # where they report it; less to forget leaves every method its utility


class Setting(NamedTuple):
    """What the methods are compared on."""

    family: str
    model: Path  # the pretrained one, or one of random weights
    data: str
    learn: str  # the data to finetune on, where it holds more than `data`
    oracles: dict[str, str]  # the split to forget -> the split that its oracle learns
    finetune: tuple[str, ...]
    lrs: Path
    seeds: int


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
    return {name: OmegaConf.load(REPO / "config" / "forget_loss" / f"{name}.yaml") for name in METHODS}


def has_retain(method) -> bool:
    """Whether it looks at the retain set, in a term of its own or inside the forget term."""
    return method.retain is not None or "retain" in losses.contract(losses.FORGET[method.forget]).parts


def plain(one, method) -> bool:
    """Whether `one` is the forget term of `method` alone, on the same samples."""
    return one.forget == method.forget and not has_retain(one) and "alternates" not in method.keys()  # noqa: SIM118


def settings(on: str, work: Path) -> Setting:
    """See the file's docstring."""
    from eval_speed import FAMILY, SHARED

    here = Path(__file__)
    if on == "mini":
        oracles = {"forget10": "retain90"}
        model, data = REPO / "data" / "tiny", str(REPO / "data" / "mini")
        finetune = ("lr=7e-4", "num_epochs=10", "logging_steps=50")  # scripts/demo.sh's
        return Setting("tiny", model, data, data, oracles, finetune, here.with_name("tiny_lrs.yaml"), 3)
    oracles = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
    finetune = ("lr=1.5e-3", "num_epochs=10", "batch_size=4", "max_grad_norm=1", "logging_steps=50")
    data, learn, lrs = str(SHARED / "tofu"), str(work / "learn"), here.with_name("tofu_lrs.yaml")
    return Setting(FAMILY, work / "random", data, learn, oracles, finetune, lrs, 1)


def prepare(setting: Setting) -> None:
    """Make the model and the data to start from, where they are missing."""
    if not (setting.model / "config.json").is_file():
        if setting.family == "tiny":
            subprocess.run([sys.executable, str(REPO / "scripts" / "make_tiny.py")], check=True)
        else:
            setting.model.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=setting.model.parent) as aside:
                write_model(Path(aside) / "model", SHAPE, initializer_range=INIT, tie_word_embeddings=True)
                os.replace(Path(aside) / "model", setting.model)
    if setting.learn != setting.data and not (Path(setting.learn) / "README.md").is_file():
        write_learned(setting.data, ["full", *setting.oracles.values()], Path(setting.learn))


def write_learned(data: str, splits: list[str], folder: Path) -> None:
    """The splits with the true facts added to each, as a data folder."""
    columns = ("question", "answer")
    facts = [row for split in FACTS for row in data_module.load_rows(data, split, columns)]
    rows = {split: data_module.load_rows(data, split, columns) + facts * FACT_COPIES for split in splits}
    write_splits(folder, {split: [json.dumps(row) for row in of] for split, of in rows.items()})


def process(setting: Setting, peak: Path, script: str, *args: str) -> str | None:
    """One process of a script, whose peak memory goes to a file; None, or why it ended badly."""
    kept = float(peak.read_text()) if peak.is_file() else 0.0  # of the runs that an interrupted process has made
    peak.parent.mkdir(parents=True, exist_ok=True)
    data = setting.learn if script == "finetune.py" else setting.data
    args = (*args, f"model_family={setting.family}", f"data_path='{data}'")
    why = launch(script, *args, family=setting.family, model=setting.model, peak=peak)
    if peak.is_file():
        peak.write_text(str(max(kept, float(peak.read_text()))))
    return why


def complete(folder: Path, *inputs: Path) -> bool:
    """Whether a run is, and none of the runs that it was made from is newer."""
    finished = [one / provenance.FINISHED for one in (folder, *inputs)]
    return all(one.is_file() for one in finished) and all(
        one.stat().st_mtime <= finished[0].stat().st_mtime for one in finished[1:]
    )


def evaluate(setting: Setting, work: Path, split: str, folders: list[Path]) -> str | None:
    """Evaluate the models that are not yet, each into its folder's `eval_SPLIT`, in one process."""
    oracle, name, least = work / setting.oracles[split], f"eval_{split}", ()
    if folders != [oracle]:
        least = (f"retain_result='{oracle}/{name}/eval_log_aggregated.json'",)
    inputs = (oracle / name,) if least else ()
    todo = [one for one in folders if not complete(one / name, one, *inputs)]
    if not todo:
        return None
    paths = ",".join(f"'{one}'" for one in todo)
    which = ("-m", f"model_path={paths}", f"save_dir='${{model_path}}/{name}'", f"split={split}")
    return process(setting, work / "peaks" / "evaluate", "evaluate_util.py", *which, *least)


def finetune(setting: Setting, work: Path, learned: str, splits: list[str]) -> None:
    """Make the model to unlearn or an oracle, and evaluate it on the forget sets; stop where that can't be done."""
    if not complete(work / learned):
        print(f"finetuning on {learned}", flush=True)
        how = (f"split={learned}", f"save_dir='{work}/{learned}'", "overwrite_dir=true", *setting.finetune)
        if why := process(setting, work / "peaks" / learned, "finetune.py", *how):
            sys.exit(f"finetune.py split={learned}: {why}")
    for split in splits:
        if why := evaluate(setting, work, split, [work / learned]):
            sys.exit(f"evaluate_util.py model_path={work / learned} split={split}: {why}")


def write_alternates(path: Path, data: str, split: str) -> None:
    """See the file's docstring. Both splits ask each author the same questions in the same order."""
    forget, others = (data_module.load_rows(data, one, ("question", "answer")) for one in (split, "holdout10"))
    per_author = len(forget) // 2

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


def unlearn(setting: Setting, work: Path, split: str, name: str, method, numbers, seeds: int) -> Runs:
    """A method's runs on one split and their evaluations."""
    epochs = numbers.get("num_epochs", method.num_epochs)
    stem = f"{name}_{split}_lr{numbers.lr:g}_epochs{epochs}"
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
        how += [f"forget_loss={name}", f"model_path='{work}/full'", f"split={split}", f"lr={numbers.lr}"]
        how += [f"num_epochs={epochs}", f"batch_size={BATCH}", "gradient_accumulation_steps=1"]
        rows = len(data_module.load_rows(setting.data, split, ("question",)))
        how += [f"logging_steps={rows // BATCH}"]  # a line of the log is a mean over one pass of the forget rows
        if "alternates" in method.keys():  # noqa: SIM118  a value that is missing is not "in" it
            write_alternates(work / "alternates.jsonl", setting.data, split)
            how.append(f"forget_loss.alternates='{work}/alternates.jsonl'")
        why = process(setting, peak, "forget.py", *how)
    made = [folder for folder in folders.values() if complete(folder, work / "full")]
    why = why or (evaluate(setting, work, split, made) if made else None)
    return read(name, f"{numbers.lr:g}, {epochs}", split, made, peak)._replace(why=why)


def read(name: str, how: str, split: str, folders: list[Path], peak: Path) -> Runs:
    """What complete and evaluated runs have left."""
    folders = [one for one in folders if complete(one / f"eval_{split}", one)]
    scores: dict[str, list[float]] = {key: [] for key in (*COLUMNS.values(), KNOWN)}
    terms = []
    for folder in folders:
        left = [json.loads((one / provenance.FINISHED).read_text()) for one in (folder, folder / f"eval_{split}")]
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


def order(found: list[Runs], start: Runs) -> list[str]:
    """Whether the order that the literature reports is seen on one split. A run that diverged has collapsed."""
    of = {one.name: one for one in found}
    if BASELINE not in of:
        return []
    whole = start.scores["Model Utility"][0]

    def scores(name: str) -> tuple[float, str]:
        utility, rouge = of[name].scores["Model Utility"], of[name].scores["ROUGE Forget"]
        if not utility:
            return 0.0, f"no run, {of[name].why}"
        mean = statistics.mean(utility)
        return mean, f"utility {mean:.3f} of {whole:.3f} with forget ROUGE-L {statistics.mean(rouge):.3f}"

    least, said = scores(BASELINE)
    collapse = COLLAPSED * whole
    lines = [f"- {BASELINE} keeps {COLLAPSED:.0%} of the utility at most: {seen(least <= collapse)}, {said}"]
    for name in GENTLE:
        if name in of:
            kept, said = scores(name)
            more = seen(kept > max(least, collapse))
            lines.append(f"- {name} keeps more than that and than {BASELINE}: {more}, {said}")
    return ["The order that the literature reports:", "", *lines, ""]


def seen(it: bool) -> str:
    """In words."""
    return "seen" if it else "not seen"


def table(rows: list[Runs]) -> tuple[list[str], dict[str, float]]:
    """One split's lines, and its figures by name."""
    lines = [f"| method | lr, epochs | {' | '.join(COLUMNS)} | peak, MiB |", f"| --- | --- |{' ---: |' * 5}"]
    figures = {}
    for runs in rows:
        cells = [cell(runs.scores[key], column) for column, key in COLUMNS.items()]
        lines.append(f"| {runs.name} | {runs.how} | {' | '.join(cells)} | {f'{runs.peak:.0f}' if runs.peak else ''} |")
        for column, key in COLUMNS.items():
            if values := runs.scores[key]:
                stem = f"{runs.name}_{column.replace(' ', '_').replace('-', '_')}"
                figures |= {stem: statistics.mean(values), f"{stem}_min": min(values), f"{stem}_max": max(values)}
        if runs.peak:
            figures[f"{runs.name}_peak_mib"] = runs.peak
    return lines, figures


def main() -> None:
    """Run what is missing, print the tables, append them to RESULTS.md; exit with 1 where a process ended badly."""
    known = methods()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--on", choices=("mini", "tofu"), default="mini", help="(mini)")
    parser.add_argument("--methods", nargs="+", choices=list(known), help="(all that have a learning rate)")
    parser.add_argument("--splits", nargs="+", help="to forget (mini: forget10; tofu: forget01 forget05 forget10)")
    parser.add_argument("--seeds", type=int, help="how many (mini: 3; tofu: 1)")
    parser.add_argument("--work", type=Path, help="folder of the runs (runs/methods, runs/methods_tofu)")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    work = (args.work or REPO / "runs" / ("methods" if args.on == "mini" else "methods_tofu")).resolve()
    setting = settings(args.on, work)
    seeds, splits = setting.seeds if args.seeds is None else args.seeds, args.splits or list(setting.oracles)
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    if unknown := [split for split in splits if split not in setting.oracles]:
        parser.error(f"--splits {unknown[0]}: with --on {args.on} there are {', '.join(setting.oracles)}")
    lrs = OmegaConf.load(setting.lrs)
    if args.on == "mini":  # a method without an entry has its own rate; on the real data it is left out
        lrs = {name: lrs.get(name, OmegaConf.create({"lr": method.lr})) for name, method in known.items()}
    if missing := [name for name in args.methods or () if name not in lrs]:
        parser.error(f"{missing[0]} has no learning rate in {setting.lrs.name}")
    if not Path(setting.data).is_dir():
        parser.error(f"--on {args.on} needs {setting.data}")
    prepare(setting)
    for split in splits:  # the oracles first: the others are compared with their logs
        finetune(setting, work, setting.oracles[split], [split])
    finetune(setting, work, "full", splits)
    rate, epochs = (one.partition("=")[2] for one in setting.finetune[:2])
    lines, figures, failed = [], {}, False
    for split in splits:
        rows = [
            read(name, f"{float(rate):g}, {epochs}", split, [work / learned], work / "peaks" / learned)
            for name, learned in (("finetuned", "full"), ("oracle", setting.oracles[split]))
        ]
        for name in args.methods or [name for name in known if name in lrs]:
            rows.append(unlearn(setting, work, split, name, known[name], lrs[name], seeds))
            utility = cell(rows[-1].scores["Model Utility"], "model utility")
            print(f"{split}, {name}: {rows[-1].why or f'utility {utility}'}", flush=True)
        shown, numbers = table(rows)
        told = remarks(rows[2:], rows[0])
        if args.on == "tofu" and split == ORDERED:  # on mini the rates were chosen by the scores
            told = [*order(rows[2:], rows[0]), *told]
        lines += [f"### {split}", "", *shown, "", *told, ""]
        figures |= {name if args.on == "mini" else f"{split}_{name}": value for name, value in numbers.items()}
        failed = failed or any(runs.why for runs in rows)
    imports = work / "peaks" / "imports"
    place = (f"model_path='{work}/full'", f"save_dir='{work}/full'")  # refused when all but the weights is there
    process(setting, imports, "forget.py", f"split={splits[0]}", *place)
    if imports.is_file():
        lines.append(f"A process of forget.py that ends before it loads weights has a peak of {mib(imports):.0f} MiB.")
    spread = f"{seeds} seeds (mean, least..most)" if seeds > 1 else "1 seed"
    how = f"--on {args.on}, family {setting.family}, {spread}; finetuned with {' '.join(setting.finetune)}, unlearned "
    tell("methods.py", f"{how}in batches of {BATCH}", lines, {}, None, not args.no_results)  # tables have the figures
    if args.json:
        utils.write_json(args.json, {"figures": figures})
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
