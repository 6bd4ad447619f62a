"""How fast an evaluation is beside two plain ones, in one run: python benchmarks/eval_speed.py [--json FILE]

What the metrics beside TOFU's own add to it is in benchmarks/metric_cost.py.

    A  scores every completion padded to 200 tokens in its own forward, generates in file order with batch 30
    B  pads scoring to its batch's longest, generates like A
    ours  `evaluate_util` as a run calls it

Two models: the benchmark's (Llama, hidden 384, 6 layers, random weights: it never stops) and the golden checkpoint
tiny-llama (it stops). The same rows, the same numbers to 1e-5 (checked). Figures are medians of interleaved
repetitions. Appends to benchmarks/RESULTS.md. Needs ../shared (the real data, the tokenizer and the golden checkpoint).
"""

import argparse
import contextlib
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from results import status, tell
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as library_logging

import data_module
from tofu.evaluation import evaluator, inference, row_logs, sets
from tofu.models import batches, families, folders, loading

REPO = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TOFU_SHARED", REPO.parent / "shared"))
GOLDEN = SHARED / "golden" / "models" / "tiny-llama"
SETS = {  # log -> split, right answer in the truth ratio
    "eval_log": ("retain_perturbed", "paraphrased_answer"),
    "eval_real_author_wo_options": ("real_authors_perturbed", "answer"),
    "eval_real_world_wo_options": ("world_facts_perturbed", "answer"),
    "eval_log_forget": ("forget10_perturbed", "paraphrased_answer"),
}
FAMILY, MAX_LENGTH, BATCH = "llama2-7b", 200, 30
AT_ONCE = 44  # ours: `batch_size` is a cap on memory, and 44 prompts in work need no more than B does
Scores = dict[tuple[str, int, int], float]  # set, row, completion -> sum of token losses


def the_model(name: str, tokenizer) -> LlamaForCausalLM:
    """`random`, the benchmark's, or `golden`."""
    if name == "golden":
        return loading.load(str(GOLDEN)).eval().requires_grad_(False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def the_sets(rows: int) -> list[sets.EvalSet]:
    """The four chosen, their first rows."""
    chosen = []
    for task, (split, base) in SETS.items():
        keys = ("question", "answer", base, "perturbed_answer")
        chosen.append(sets.EvalSet(task, data_module.load_rows(str(SHARED / "tofu"), split, keys, rows), *keys))
    return chosen


def completions(data: sets.EvalSet, row: dict) -> list[str]:
    """What is scored of a row: answer, paraphrase where there is one, wrong answers."""
    base = [row[data.base_answer_key]] if data.base_answer_key != data.answer_key else []
    return [row[data.answer_key], *base, *row[data.perturbed_answer_key]]


@torch.no_grad()
def plain_scoring(model, tokenizer, chosen, width: int | None) -> Scores:
    """The baselines': one forward a batch of 30 rows and kind of completion, full logits."""
    found = {}
    for data in chosen:
        for first in range(0, len(data.rows), BATCH):
            rows = data.rows[first : first + BATCH]
            for j in range(len(completions(data, rows[0]))):
                samples = [
                    data_module.encode(
                        tokenizer, families.family(FAMILY), row["question"], completions(data, row)[j], MAX_LENGTH
                    )
                    for row in rows
                ]
                batch = batches.collate({"x": samples})
                batch["targets"] = batches.targets_of(batch)
                short = 0 if width is None else width - batch["input_ids"].shape[1]
                ids, mask, targets = (
                    F.pad(batch[key], (0, short), value=value)
                    for key, value in (("input_ids", 0), ("attention_mask", 0), ("targets", data_module.IGNORE))
                )
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
                nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                nll = nll.view(targets.shape).double().sum(1).tolist()
                found.update({(data.task, first + i, j): value for i, value in enumerate(nll)})
    return found


def plain_generation(model, tokenizer, chosen) -> list[list[int]]:
    """The baselines': the library's generate, in file order, until every row of the batch has ended or max_length."""
    end = tokenizer.eos_token_id
    config = GenerationConfig(do_sample=False, max_length=MAX_LENGTH, eos_token_id=end, pad_token_id=end)
    found = []
    for data in chosen:
        prompts = [
            tokenizer(data_module.prompt(families.family(FAMILY), row["question"]))["input_ids"] for row in data.rows
        ]
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            width = max(map(len, batch))
            out = model.generate(
                input_ids=torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch]),
                attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]),
                generation_config=config,
            )[:, width:].tolist()
            found += [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in out]
    return found


def prepared(tokenizer, chosen) -> list[sets.Task]:
    """What ours does before the model: counted in its scoring time."""
    family = families.family(FAMILY)
    return [sets.prepare(data, tokenizer, family, max_length=MAX_LENGTH) for data in chosen]


def our_scoring(model, tokenizer, chosen) -> Scores:
    """Tokenising and scoring as `evaluator.evaluate` does them."""
    found = {}
    for task in prepared(tokenizer, chosen):
        with inference.ready(model, MAX_LENGTH):
            for i, scores in enumerate(row_logs.score_rows(model, task, False)):
                found.update({(task.data.task, i, j): tokens.nll.sum() for j, tokens in enumerate(scores.values())})
    return found


def our_generation(model, tokenizer, tasks, at_once: int = AT_ONCE) -> list[str]:
    """Generating as `evaluator.evaluate` does it with `batch_size=at_once`."""
    found = []
    for task in tasks:
        with inference.ready(model, MAX_LENGTH):
            tokens = row_logs.generate_rows(model, tokenizer, task, at_once, False)
            found += row_logs.decoded(tokenizer, tokens)
    return found


def timed(function, *args) -> tuple[float, object]:
    """Seconds and result."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def same(plain: Scores, ours: Scores, texts: list[str], tokens: list[list[int]], tokenizer) -> float:
    """The largest relative difference of a score; the generations begin alike (the baseline's room differs a little).

    Raises:
        AssertionError: other numbers than the baseline's.
    """
    worst = max(abs(plain[key] - ours[key]) / max(1.0, abs(plain[key])) for key in plain)
    assert plain.keys() == ours.keys() and worst < 1e-5, worst
    pairs = [
        (text, tokenizer.decode(row, skip_special_tokens=True).strip()) for text, row in zip(texts, tokens, strict=True)
    ]
    assert all(a.startswith(b) or b.startswith(a) or a[:40] == b[:40] for a, b in pairs)
    return worst


def measure(name: str, repetitions: int, rows: int) -> dict[str, list[float]]:
    """Seconds of every part, a list a part over the repetitions, for one model."""
    tokenizer, chosen = folders.load_tokenizer(str(GOLDEN), None), the_sets(rows)
    model, seconds = the_model(name, tokenizer), {}
    for number in range(repetitions):
        done = {
            "A scoring": timed(plain_scoring, model, tokenizer, chosen, MAX_LENGTH),
            "ours scoring": timed(our_scoring, model, tokenizer, chosen),
            "B scoring": timed(plain_scoring, model, tokenizer, chosen, None),
            "A and B generation": timed(plain_generation, model, tokenizer, chosen),
            "ours generation": timed(our_generation, model, tokenizer, prepared(tokenizer, chosen)),
        }
        for part, (took, _) in done.items():
            seconds.setdefault(part, []).append(took)
        results = {part: result for part, (_, result) in done.items()}
        for baseline in ("A scoring", "B scoring"):
            texts, tokens = results["ours generation"], results["A and B generation"]
            same(results[baseline], results["ours scoring"], texts, tokens, tokenizer)
        print(name, number + 1, {part: round(took, 2) for part, (took, _) in done.items()}, flush=True)
    return seconds


def peak(what: str, rows: int) -> float:
    """Peak memory of one evaluation above the idle process with its model, MiB; in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", what, "--rows", str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory_of(what: str, rows: int) -> None:
    """Print the peak, for `peak`."""
    tokenizer, chosen = folders.load_tokenizer(str(GOLDEN), None), the_sets(rows)
    model = the_model("random", tokenizer)
    with torch.no_grad():
        model(input_ids=torch.ones((1, 8), dtype=torch.long))  # the libraries' own buffers belong to the idle process
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (Linux)
    idle = status("VmRSS")
    if what == "ours":
        with tempfile.TemporaryDirectory() as folder:
            evaluator.evaluate(model, tokenizer, prepared(tokenizer, chosen), folder, batch_size=AT_ONCE)
    else:
        plain_scoring(model, tokenizer, chosen, MAX_LENGTH if what == "A" else None)
        plain_generation(model, tokenizer, chosen)
    print((status("VmHWM") - idle) / 1024)


def main() -> None:
    """Measure, print the table, append it to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--rows", type=int, default=60, help="rows of each set (60)")
    parser.add_argument("--repetitions", type=int, default=5, help="of every part, interleaved (5)")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    parser.add_argument("--memory-of", choices=("A", "B", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # progress bars
        if args.memory_of:
            return memory_of(args.memory_of, args.rows)
        seconds = {name: measure(name, args.repetitions, args.rows) for name in ("random", "golden")}
    medians = {name: {part: statistics.median(took) for part, took in parts.items()} for name, parts in seconds.items()}
    memory = {what: peak(what, args.rows) for what in ("A", "B", "ours")}
    one, stops = medians["random"], medians["golden"]
    figures = {
        "scoring_vs_200": one["A scoring"] / one["ours scoring"],
        "scoring_vs_longest": one["B scoring"] / one["ours scoring"],
        "generation_vs_baseline": one["A and B generation"] / one["ours generation"],
        "generation_stopping_vs_baseline": stops["A and B generation"] / stops["ours generation"],
        "whole_vs_200": (one["A scoring"] + one["A and B generation"]) / (one["ours scoring"] + one["ours generation"]),
        "memory_vs_longest": memory["ours"] / memory["B"],
    }
    lines = ["| model | part | A, s | B, s | ours, s |", "| --- | --- | ---: | ---: | ---: |"]
    for name, parts in medians.items():
        lines.append(
            f"| {name} | scoring | {parts['A scoring']:.2f} | {parts['B scoring']:.2f} | {parts['ours scoring']:.2f} |"
        )
        shared, ours = parts["A and B generation"], parts["ours generation"]
        lines.append(f"| {name} | generation | {shared:.2f} | {shared:.2f} | {ours:.2f} |")
    lines.append(f"| random | peak memory, MiB | {memory['A']:.0f} | {memory['B']:.0f} | {memory['ours']:.0f} |")
    how = f"{args.rows} rows a set, median of {args.repetitions} repetitions; ours generates {AT_ONCE} prompts at once"
    tell("eval_speed.py", how, lines, figures, args.json, not args.no_results)


if __name__ == "__main__":
    main()
