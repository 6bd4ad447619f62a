"""What the metrics beside TOFU's own cost: python benchmarks/metric_cost.py [--json FILE]

One evaluation of the golden checkpoint tiny-llama, which stops, so that generating costs least and metrics weigh most:
the four sets with up to 400 rows and the 400 rows of retain_perturbed as non-members. Each choice of metrics is a whole
`evaluate_util`, imports aside; figures are medians of interleaved repetitions, beside the default evaluation's. Seconds
are the process's on the CPU, on one thread: other work on the machine counts little in them.

Then scoring alone: one forward for all metrics, against a forward per metric and answer as codes without shared records
do it (30 rows at once, padded to the longest). Both give the same numbers per row, to 1e-5 (checked).
Appends to benchmarks/RESULTS.md. Needs ../shared.
"""

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from eval_speed import BATCH, FAMILY, GOLDEN, MAX_LENGTH, SHARED
from results import tell
from transformers import DistilBertConfig, DistilBertForSequenceClassification
from transformers.utils import logging as library_logging

import data_module
import evaluate_util
from tofu.evaluation import inference, measures, row_logs, sets
from tofu.evaluation.metrics import privacy, table
from tofu.models import batches, families, folders, loading

CHEAP = "metrics=[memorisation,privacy,fluency]"
END = folders.load_tokenizer(str(GOLDEN), None).eos_token_id
OPTIONS = {  # what costs a pass of its own, each with the cheap ones
    "verbatim completion": ("metrics=[memorisation,privacy,fluency,verbatim_completion]",),
    "reference model": (CHEAP, f"reference_model={GOLDEN}"),
    "gradient norm": ("metrics=[memorisation,privacy,fluency,mia_gradient_norm]",),
    "perplexity": (CHEAP, f"fluency.model={GOLDEN}"),
    "classifier": (CHEAP, "fluency.by=classifier"),
}


def timed(function: Callable, *args) -> tuple[float, object]:
    """CPU seconds and result."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def classifier(folder: Path) -> Path:
    """A random classifier of the size of the hub's one, DistilBERT base, with the golden tokenizer."""
    tokenizer = folders.load_tokenizer(str(GOLDEN), None)
    torch.manual_seed(0)
    DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(tokenizer), num_labels=4)).save_pretrained(
        folder
    )
    tokenizer.pad_token = tokenizer.eos_token  # as the hub's has one: texts are read in batches
    tokenizer.save_pretrained(folder)
    return folder


def evaluation(rows: int, *more: str) -> None:
    """One evaluation as the script makes it."""
    with tempfile.TemporaryDirectory() as folder:
        place = (f"data_path={SHARED / 'tofu'}", f"model_path={GOLDEN}", f"save_dir={folder}/run", "progress=false")
        what = (f"model_family={FAMILY}", "split=forget10", f"ds_size={rows}", "holdout.split=retain_perturbed")
        sys.argv = ["evaluate_util.py", *place, *what, *more]
        evaluate_util.main()


def whole(rows: int, repetitions: int) -> dict[str, float]:
    """Median seconds of an evaluation by choice of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        judge = f"fluency.classifier={classifier(Path(folder))}"
        kinds = {"default": (), "memorisation, privacy, fluency": (CHEAP,)} | OPTIONS
        kinds["classifier"] = (*OPTIONS["classifier"], judge)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        evaluation(2)  # what is done once per process
        for number in range(repetitions):
            for name, more in kinds.items():
                seconds[name].append(timed(evaluation, rows, *more)[0])
            print(number, {name: round(took[-1], 1) for name, took in seconds.items()}, flush=True)
    return {name: statistics.median(took) for name, took in seconds.items()}


def the_tasks(rows: int, tokenizer) -> dict[str, sets.Task]:
    """Forget set, retain set and non-members, by the metrics' names."""
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    found, family = {}, families.family(FAMILY)
    for of, split in (
        ("Forget", "forget10_perturbed"),
        ("Retain", "retain_perturbed"),
        ("Holdout", "retain_perturbed"),
    ):
        read = data_module.load_rows(str(SHARED / "tofu"), split, keys, rows)
        asked = keys if of != "Holdout" else (*keys[:2], "answer", None)
        found[of] = sets.prepare(sets.EvalSet(of, read, *asked), tokenizer, family, max_length=MAX_LENGTH)
    return found


def ours(model, tasks: dict[str, sets.Task]) -> dict[str, list]:
    """Every column that reads scores alone, from one scoring of each set."""
    chosen = table.chosen(("memorisation", "privacy"))
    found = {}
    for of, task in tasks.items():
        with inference.ready(model, MAX_LENGTH):
            scores = row_logs.score_rows(model, task, False)
        empty = [[] for _ in task.prompts]
        rows = measures.rows_of(task, scores, empty, [""] * len(empty), [{}] * len(empty), "default")
        wanted = [
            one for one in table.columns(chosen) if one.of == of and "ROUGE" not in one.name and one.extra is None
        ]
        found |= table.rows_of(wanted, rows)
    return found


@torch.no_grad()
def forwards(model, samples: list, function: Callable[[torch.Tensor, torch.Tensor], float]) -> list[float]:
    """One number per sample, from forwards of its own: (n, vocabulary) log-probabilities and (n,) labels are read."""
    found = []
    for first in range(0, len(samples), BATCH):
        batch = batches.collate({"x": samples[first : first + BATCH]})
        batch["targets"] = batches.targets_of(batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        for row, targets in zip(logits.float(), batch["targets"], strict=True):
            at = targets != data_module.IGNORE
            found.append(function(row[at].log_softmax(-1), targets[at]))
    return found


def nll(logp: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n,) in double."""
    return -logp.gather(1, labels[:, None])[:, 0].double()


def mean_loss(logp: torch.Tensor, labels: torch.Tensor) -> float:
    """Per token, end token included."""
    return float(nll(logp, labels).mean())


def content(labels: torch.Tensor) -> int:
    """An answer's tokens without its end token, which one that was cut has not."""
    return len(labels) - int(labels[-1] == END)


def right(logp: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """(n,) whether each token but the end token is the likeliest one."""
    return (logp.argmax(-1) == labels)[: content(labels)].numpy()


def strength(logp: torch.Tensor, labels: torch.Tensor) -> float:
    """Extraction strength."""
    wrong, n = np.flatnonzero(~right(logp, labels)), content(labels)
    return (n - (wrong[-1] + 1 if len(wrong) else 0)) / n


def least(k: float, standardised: bool) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Min-k, and min-k++ of standardised log-probabilities."""

    def score(logp: torch.Tensor, labels: torch.Tensor) -> float:
        values, logp = -nll(logp, labels)[: content(labels)].numpy(), logp[: content(labels)]
        if standardised:
            logp = logp.double()
            mean = (logp.exp() * logp).sum(-1)
            deviation = ((logp.exp() * logp**2).sum(-1) - mean**2).clamp(min=0).sqrt()
            values = privacy.standardised(-values, mean.numpy(), deviation.numpy())
        return privacy.least(values, k)

    return score


def separate(model, tokenizer, tasks: dict[str, sets.Task]) -> dict[str, list[float]]:
    """The same columns, each metric by forwards of its own; the three truth ratios share theirs."""
    family, found = families.family(FAMILY), {}

    def samples(task: sets.Task, answers: Callable[[dict], str]) -> list:
        asked = [(row[task.data.question_key], answers(row)) for row in task.data.rows]
        return [data_module.encode(tokenizer, family, question, answer, MAX_LENGTH) for question, answer in asked]

    attacks = {"MIA loss": mean_loss, "MIA zlib": mean_loss}
    attacks |= {f"MIA min-k{'++' * plus} {k}": least(k, plus) for plus in (False, True) for k in (0.4, 0.2)}
    for of, task in tasks.items():
        answer = samples(task, lambda row: row["answer"])
        if of != "Holdout":
            found[f"Extraction Strength {of}"] = forwards(model, answer, strength)
            found[f"Exact Memorisation {of}"] = forwards(model, answer, lambda *a: float(right(*a).mean()))
            found[f"Probability {of}"] = np.exp(-np.array(forwards(model, answer, mean_loss))).tolist()
            other = samples(task, lambda row: row["paraphrased_answer"])
            found[f"Paraphrased Probability {of}"] = np.exp(-np.array(forwards(model, other, mean_loss))).tolist()
            a = np.array(forwards(model, other, mean_loss))
            count = len(task.data.rows[0]["perturbed_answer"])
            wrong = [samples(task, lambda row, j=j: row["perturbed_answer"][j]) for j in range(count)]
            w = np.array([forwards(model, one, mean_loss) for one in wrong])
            found[f"Truth Ratio (prob_mean) {of}"] = (1 / (1 + np.exp(a - w.mean(0)))).tolist()
        if of != "Retain":
            found |= {f"{name} {of}": forwards(model, answer, function) for name, function in attacks.items()}
            sizes = [len(zlib.compress(row["answer"].encode())) for row in task.data.rows]
            found[f"MIA zlib {of}"] = [v / n for v, n in zip(found[f"MIA zlib {of}"], sizes, strict=True)]
    return found


def scoring(rows: int, repetitions: int) -> tuple[dict[str, float], float]:
    """Median seconds of both ways, and the largest difference of a number per row."""
    tokenizer, model = folders.load_tokenizer(str(GOLDEN), None), loading.load(str(GOLDEN)).eval().requires_grad_(False)
    tasks, seconds, worst = the_tasks(rows, tokenizer), {"one forward": [], "a forward per metric": []}, 0.0
    for _ in range(repetitions):
        took, one = timed(ours, model, tasks)
        seconds["one forward"].append(took)
        took, many = timed(separate, model, tokenizer, tasks)
        seconds["a forward per metric"].append(took)
        worst = max(worst, *(float(np.abs(np.subtract(one[name], many[name])).max()) for name in many))
        assert worst < 1e-5, {name: float(np.abs(np.subtract(one[name], many[name])).max()) for name in many}
    return {name: statistics.median(took) for name, took in seconds.items()}, worst


def main() -> None:
    """Measure, print the tables, append them to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--rows", type=int, default=400, help="rows of each set (400)")
    parser.add_argument("--repetitions", type=int, default=3, help="of every part, interleaved (3)")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        alone, worst = scoring(args.rows, args.repetitions)
        seconds = whole(args.rows, args.repetitions)
    default = seconds["default"]
    lines = ["| evaluation | s | of the default's |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {took:.2f} | {took / default:.2f} |" for name, took in seconds.items()]
    lines += ["", "| scoring | s |", "| --- | ---: |", *(f"| {name} | {took:.2f} |" for name, took in alone.items())]
    lines += ["", f"The largest difference of a number per row: {worst:.1e}."]
    figures = {
        "metrics_vs_default": seconds["memorisation, privacy, fluency"] / default,
        "separate_vs_one_forward": alone["a forward per metric"] / alone["one forward"],
    }
    how = f"tiny-llama, {args.rows} rows a set, median of {args.repetitions} repetitions; "
    how += "each line below the second has its metrics and one more"
    tell("metric_cost.py", how, lines, figures, args.json, not args.no_results)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
