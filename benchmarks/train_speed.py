"""How fast a training step is beside two plain ones, in one run: python benchmarks/train_speed.py [--json FILE]

    A  pads every sample to 500 tokens: full logits, separate forwards of forget and retain samples, a second model
    B  pads to the longest of its batch, else the same
    ours  `dataloader.TofuTrainer` as a run calls it

The benchmark's model (Llama, hidden 384, 6 layers, 2,000 words; also 32,000), real rows, the same samples, the same
first loss to 1e-4 (checked in float32), the same optimiser. Figures are medians of interleaved repetitions of two steps
each. Appends to benchmarks/RESULTS.md. Needs ../shared (the real data, a tokenizer). On a GPU: bf16, and --size 1b.
"""

import argparse
import contextlib
import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from eval_speed import FAMILY, GOLDEN, SHARED
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from results import METHODS, status, tell
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.utils import is_liger_kernel_available
from transformers.utils import logging as library_logging

import data_module
import dataloader
from tofu.cli import schema
from tofu.methods import objective, references
from tofu.models import batches, families, folders
from tofu.runtime import ranks

SIZES = {  # hidden, layers, heads, key-value heads, intermediate
    "toy": (32, 2, 2, 2, 64),
    "bench": (384, 6, 6, 6, 1024),
    "1b": (2048, 16, 32, 8, 8192),  # Llama-3.2-1B
}
JOBS = {  # job -> (method, batch size, vocabulary; None: the tokenizer's)
    "finetune": ("finetune", 16, None),
    "grad_ascent": ("grad_ascent", 8, None),
    "grad_diff": ("grad_diff", 8, None),
    "KL": ("KL", 8, None),
    "idk": ("idk", 8, None),
    "dpo": ("dpo", 8, None),
    "finetune32k": ("finetune", 16, 32000),
}
WIDTHS = {"A": 500, "B": None}  # of a baseline's rows
WARM, STEPS, LONG = 1, 2, 24
ROWS = (80, 160, 320)  # of the epochs that show how the cost grows
CUDA = torch.cuda.is_available()


class Plain(dataloader.TofuTrainer):
    """Both baselines: a rectangle a part, a forward a part, logits of every position, a second model."""

    width: int | None = None

    def _collate(self, items):
        batch = {}
        for name in objective.parts_of(self.terms):
            one = batches.collate({name: [parts[name] for parts, _ in items]})
            one["targets"] = batches.targets_of(one)
            short = 0 if self.width is None else self.width - one["input_ids"].shape[1]
            batch[name] = {
                key: F.pad(one[key], (0, short), value=value)
                for key, value in (("input_ids", 0), ("attention_mask", 0), ("targets", data_module.IGNORE))
            }
        return batch

    def _get_num_items_in_batch(self, batch_samples, device):
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Of the methods measured here, written out."""
        name = self.terms[0].function.__name__
        logits = {part: self._logits(model, one) for part, one in inputs.items()}
        if name == "dpo":
            with torch.no_grad():
                reference = {part: self._logits(self.reference, one) for part, one in inputs.items()}
            win, lose = (
                self._nll(reference[part], inputs[part]).sum(1) - self._nll(logits[part], inputs[part]).sum(1)
                for part in ("idk", "forget")
            )
            beta = self.terms[0].args["beta"]
            return -(2 / beta) * F.logsigmoid(beta * (win - lose)).mean()
        if name == "idk":
            nll = sum(self._nll(logits[part], one).sum() for part, one in inputs.items())
            return nll / sum((one["targets"] != data_module.IGNORE).sum() for one in inputs.values())
        total = 0.0
        if name == "grad_ascent":
            total = -self._mean(logits["forget"], inputs["forget"])
        if "retain" not in inputs:
            return total
        if self.terms[-1].function.__name__ == "kl":
            with torch.no_grad():
                reference = self._logits(self.reference, inputs["retain"])
            each = F.kl_div(
                *(F.log_softmax(z, -1) for z in (logits["retain"], reference)), reduction="none", log_target=True
            ).sum(-1)
            read = inputs["retain"]["attention_mask"]
            return total + (each * read).sum() / read.sum()
        return total + self._mean(logits["retain"], inputs["retain"])

    def _logits(self, model, one):
        return model(input_ids=one["input_ids"], attention_mask=one["attention_mask"], use_cache=False).logits.float()

    def _nll(self, logits, one):
        nll = F.cross_entropy(logits.flatten(0, 1), one["targets"].flatten(), reduction="none")
        return nll.view(one["targets"].shape)

    def _mean(self, logits, one):
        return self._nll(logits, one).sum() / (one["targets"] != data_module.IGNORE).sum()


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note it."""
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def llama(shape: tuple[int, int, int, int, int], vocabulary: int, **more: Any) -> LlamaConfig:
    """A Llama of a shape of SIZES."""
    hidden, layers, heads, kv_heads, intermediate = shape
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        **more,
    )


def make_model(size: str, vocabulary: int, device: str = "cpu", **config: Any) -> LlamaForCausalLM:
    """Random weights, always the same on one kind of device; `config` is LlamaConfig's, besides."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(llama(SIZES[size], vocabulary, **config))


def work(
    model: LlamaForCausalLM, data: data_module.TrainingSet, batches: list[list[data_module.Slot]]
) -> tuple[float, float]:
    """Multiply-adds' FLOPs that steps of these batches need, real tokens only, and those tokens, per step.

    6 a weight and token; the head's weights at scored positions alone; attention's own not counted.
    """
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tables = {id(table): table.numel() for table in (head, embeddings)}  # one, where they are tied
    body = sum(p.numel() for p in model.parameters()) - sum(tables.values())
    samples = [sample for batch in batches for slot in batch for sample in data[slot][0].values()]
    tokens = sum(len(sample.input_ids) for sample in samples)
    scored = sum(target != data_module.IGNORE for sample in samples for target in sample.targets)
    return 6 * (body * tokens + head.numel() * scored) / len(batches), tokens / len(batches)


class Job:
    """One of JOBS, set up once; `run` trains a few steps of it."""

    def __init__(self, name: str, size: str, rows: int | None = None) -> None:
        method, self.batch_size, vocabulary = JOBS.get(name, (name, 8, None))
        tokenizer = folders.load_tokenizer(str(GOLDEN), None)
        load = lambda split: data_module.load_rows(str(SHARED / "tofu"), split, ("question", "answer"), rows)  # noqa: E731
        self.method = objective.finetuning()
        sets = {"retain": load("full")}
        if method != "finetune":
            with initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
                found = compose("forget", [f"forget_loss={method}", "split=forget10"]).forget_loss
            self.method = objective.method_of(OmegaConf.create(OmegaConf.to_container(found, resolve=True)))
            parts = objective.parts_of(self.method.terms)
            sets = {"forget": load("forget10")}
            sets |= {"retain": load("retain90")} if "retain" in parts else {}
            sets |= {"refusals": data_module.load_refusals()} if "idk" in parts else {}
        self.data = data_module.TrainingSet(tokenizer, families.family(FAMILY), 500, 42, **sets)
        self.model = make_model(size, vocabulary or len(tokenizer))
        self.start = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.second, self.logps, self.size = None, None, size
        self.needs = objective.needs_of(self.method.terms)
        with tempfile.TemporaryDirectory() as folder:
            self.method.prepare(self.model, Path(folder), 0)

    def reference(self) -> LlamaForCausalLM:
        """The second model."""
        if self.second is None:
            self.second = make_model(self.size, self.model.config.vocab_size).requires_grad_(False).eval()
            self.second = self.second.to("cuda", torch.bfloat16) if CUDA else self.second
        return self.second

    def kept(self) -> dict:
        """Ours computes these once before a run; the run's own time has them in it once, not in every step."""
        if self.logps is None and "logp" in self.needs:
            samples = references.compared(self.data, self.method.terms, 1)
            self.logps = references.reference_logps(self.reference(), samples, self.batch_size, False)
        return self.logps

    def run(self, kind: str, steps: int | None = WARM + STEPS) -> tuple[float, float]:
        """Train from the start with `kind` (A, B, ours; compiled, liger: ours with that).

        Args:
            steps: optimiser steps; None: one epoch.

        Returns:
            Seconds a step after the first, and the first step's loss.
        """
        self.model.load_state_dict(self.start)
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder,
                max_steps=steps or -1,
                num_train_epochs=1,
                per_device_train_batch_size=self.batch_size // ranks.world_size(),
                learning_rate=1e-5,
                optim="adamw_torch_fused",
                max_grad_norm=0,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                ddp_find_unused_parameters=False,
                use_cpu=not CUDA,
                bf16=CUDA,
                torch_compile=kind == "compiled",
                use_liger_kernel=kind == "liger",
                liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False},
            )
            common = {"model": self.model, "args": args, "train_dataset": self.data, "method": self.method}
            if kind in ("ours", "compiled", "liger"):
                live = self.reference() if "live" in self.needs else None
                trainer = dataloader.TofuTrainer(**common, reference=live, logps=self.kept())
            else:
                trainer = Plain(**common, reference=self.reference() if self.needs else None)
                trainer.width = WIDTHS[kind]
            clock = Clock()
            trainer.add_callback(clock)
            with contextlib.redirect_stdout(open(os.devnull, "w")):
                trainer.train()
        took = (clock.ends[-1] - clock.ends[WARM - 1]) / (len(clock.ends) - WARM)
        self.took = [b - a for a, b in itertools.pairwise(clock.ends)]
        return took, trainer.state.log_history[0]["loss"]

    def work(self) -> tuple[float, float]:
        """`work` of the measured steps of one run."""
        batches = list(data_module.GlobalBatches(len(self.data), self.batch_size, 0, 1))
        return work(self.model, self.data, batches[WARM : WARM + STEPS])


def costs(size: str, repetitions: int) -> list[str]:
    """A step of every method beside one of grad_diff with the same forget samples, interleaved: lines of a table."""
    jobs, took = {name: Job(name, size) for name in METHODS}, {name: [] for name in METHODS}
    for number in range(repetitions):
        for name, job in jobs.items():
            took[name].append(job.run("ours")[0])
        print(number + 1, {name: round(seconds[-1], 3) for name, seconds in took.items()}, flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in took.items()}
    rows = [f"| {name} | {seconds:.3f} | {seconds / medians['grad_diff']:.2f} |" for name, seconds in medians.items()]
    return ["| method | seconds a step | relative to grad_diff |", "| --- | ---: | ---: |", *rows]


def with_option(kind: str, size: str) -> tuple[float, float, float]:
    """Finetuning as it is and with `kind`, over LONG steps of real lengths.

    Returns:
        The median second of a step in the second half of either, and the ratio of both wholes.
    """
    halves, wholes = [], []
    for one in ("ours", kind):
        job = Job("finetune", size)  # what compiles or patches a model does so for good
        start = time.perf_counter()
        job.run(one, LONG)
        wholes.append(time.perf_counter() - start)
        halves.append(statistics.median(job.took[LONG // 2 :]))
    return *halves, wholes[1] / wholes[0]


def matmul_peak() -> tuple[float, float]:
    """FLOP/s of large square products: sustained for about as long as a step on two cores, and the best single one."""
    size, count = (8192, 100) if CUDA else (2048, 8)
    a = torch.randn(size, size)
    a = a.to("cuda", torch.bfloat16) if CUDA else a
    took = []
    for _ in range(count + 1):
        start = time.perf_counter()
        a @ a
        if CUDA:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return 2 * size**3 * count / sum(took[1:]), 2 * size**3 / min(took[1:])


def peak(what: str, size: str) -> float:
    """Peak memory of three finetuning steps above the idle process with its model and data, MiB."""
    command = [sys.executable, __file__, "--memory-of", what, "--size", size]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory_of(what: str, size: str) -> None:
    """Print the peak, for `peak`."""
    job = Job("finetune", size)
    with torch.no_grad():
        job.model(input_ids=torch.ones((1, 8), dtype=torch.long))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        job.run(what)
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (Linux)
    idle = status("VmRSS")
    job.run(what)
    print((status("VmHWM") - idle) / 1024)


def epoch(rows: int, processes: int, size: str) -> float:
    """Seconds of an epoch of finetuning over so many rows (its first step counted like the mean of the others)."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, __file__, "--epoch-of", str(rows), "--size", size]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def epoch_of(rows: int, size: str) -> None:
    """Print the seconds, for `epoch`."""
    job = Job("finetune", size, rows)
    took, _ = job.run("ours", None)
    if ranks.rank() == 0:
        print(took * (len(job.data) / job.batch_size))


def measure(size: str, repetitions: int, jobs: list[str]) -> tuple[dict, dict, list[tuple[float, float]]]:
    """Seconds a step (job -> kind -> a list over the repetitions), each job's work, and `matmul_peak` each time."""
    made, seconds, peaks = {name: Job(name, size) for name in jobs}, {}, []
    for number in range(repetitions):
        peaks.append(matmul_peak())
        for name, job in made.items():
            kinds = ("B", "ours") if name in ("dpo", "finetune32k") else ("A", "B", "ours")
            found = {kind: job.run(kind) for kind in kinds}
            first = [loss for _, loss in found.values()]
            assert max(first) - min(first) < 1e-4 or CUDA, (name, found)
            for kind, (took, _) in found.items():
                seconds.setdefault(name, {}).setdefault(kind, []).append(took)
            print(number + 1, name, {kind: round(took, 3) for kind, (took, _) in found.items()}, flush=True)
    return seconds, {name: job.work() for name, job in made.items()}, peaks


def main() -> None:
    """Measure, print the tables, append them to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--size", choices=list(SIZES), default="bench", help="of the model (bench)")
    parser.add_argument("--repetitions", type=int, default=5, help="of every part, interleaved (5)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="what to measure (all)")
    parser.add_argument("--beside", nargs="+", choices=("compiled", "liger"), default=[], help="and with these options")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    parser.add_argument("--steps-only", action="store_true", help="no memory, no epochs of 80, 160 and 320 rows")
    parser.add_argument("--methods", action="store_true", help="only: the cost of each method relative to grad_diff")
    parser.add_argument("--memory-of", choices=("A", "B", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--epoch-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "liger" in args.beside and not (CUDA and is_liger_kernel_available()):
        parser.error("--beside liger needs a GPU and the liger-kernel package")
    logging.disable(logging.WARNING)
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    if args.memory_of:
        return memory_of(args.memory_of, args.size)
    if args.epoch_of:
        return epoch_of(args.epoch_of, args.size)
    if args.methods:
        how = f"model {args.size}, 8 forget samples; median of {args.repetitions} repetitions of {STEPS} steps"
        return tell("train_speed.py --methods", how, costs(args.size, args.repetitions), {}, None, not args.no_results)
    seconds, work, peaks = measure(args.size, args.repetitions, args.jobs)
    medians = {job: {kind: statistics.median(took) for kind, took in kinds.items()} for job, kinds in seconds.items()}
    memory, growth = {}, {}
    if not args.steps_only:
        memory = {what: peak(what, args.size) for what in ("A", "B", "ours")}
        growth = {(rows, processes): epoch(rows, processes, args.size) for rows in ROWS for processes in (1, 2)}
    top, best = (statistics.median(values) for values in zip(*peaks, strict=True))
    figures = {
        f"{job}_vs_{other}": kinds[kind] / kinds["ours"]
        for job, kinds in medians.items()
        for kind, other in (("A", "500"), ("B", "longest"))
        if kind in kinds
    }
    if "finetune" in medians:
        figures["matmul_share"] = work["finetune"][0] / medians["finetune"]["ours"] / top
    if memory:
        figures |= {"memory_vs_500": memory["ours"] / memory["A"], "memory_vs_longest": memory["ours"] / memory["B"]}
    beside = {kind: with_option(kind, args.size) for kind in args.beside}
    figures |= {f"{kind}_vs_plain": plain / took for kind, (plain, took, _) in beside.items()}
    lines = [
        "| job, batch | A, samples/s | B, samples/s | ours, samples/s | ours, real tokens/s | share of matmul peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for job, kinds in medians.items():
        size = JOBS[job][1]
        speeds = [f"{size / kinds[kind]:.2f}" if kind in kinds else "" for kind in ("A", "B", "ours")]
        flops, tokens = work[job]
        share = f"{flops / kinds['ours'] / top:.2f}" if job.startswith("finetune") else ""
        lines.append(f"| {job}, {size} | {' | '.join(speeds)} | {tokens / kinds['ours']:.0f} | {share} |")
    lines.append(f"\nMatmul peak {top / 1e9:.0f} GFLOP/s sustained ({best / 1e9:.0f} in the best single product).")
    if memory:
        used = ", ".join(f"{what} {value:.0f}" for what, value in memory.items())
        lines += [f"Peak memory of finetune, MiB: {used}. An epoch of finetuning, the same global batch:", ""]
        lines += ["| rows | 1 process, s | 2 processes, s |", "| ---: | ---: | ---: |"]
        lines += [f"| {rows} | {growth[rows, 1]:.1f} | {growth[rows, 2]:.1f} |" for rows in ROWS]
    for kind, (plain, took, whole) in beside.items():
        lines.append(
            f"\nFinetune, {kind}: {took:.3f} s a step once it is warm, plain {plain:.3f} s; {LONG} steps, the first "
            f"too, took {whole:.1f} times as long."
        )
    how = f"model {args.size}; median of {args.repetitions} repetitions of {STEPS} steps"
    tell("train_speed.py", how, lines, figures, args.json, not args.no_results)


if __name__ == "__main__":
    main()
