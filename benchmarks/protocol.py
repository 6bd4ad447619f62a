"""What the forget10 protocol costs, stage by stage: python benchmarks/protocol.py [--size 1b] [--json FILE]

The entry scripts themselves, a process a stage, as a user starts them: the oracle (finetune on `retain90`) and its
evaluation, finetune on `full`; then, for each loss, forget, evaluate and aggregate. Real rows, 5 epochs, batches of 32.

With --memory instead: the peak of a few training steps of 16 samples, a process a setting, and the cards it fits.

The model is a Llama with random weights and a tokenizer of 2,000 words. It hardly ever ends an answer, so that
generation goes to its limit. A peak is torch's allocator's on a GPU, where a paged optimiser's states are not in it
(they leave a full card), and the process's on a CPU. What did not run gets no number but the reason, in the script's
words. Appends to benchmarks/RESULTS.md. Needs ../shared (the real data, a tokenizer); for 1b and 8b a GPU, and room for
three copies of the model in TMPDIR.
"""

import argparse
import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from tofu.models import families, folders

REPO = Path(__file__).resolve().parents[1]
# heavy imports are in the functions that need them: a stage must not pay for what its script doesn't use

LARGER = {"8b": (4096, 32, 32, 8, 14336)}  # than train_speed's SIZES: Llama-3.1-8B
BIG, VOCABULARY = ("1b", "8b"), 128256  # they have Llama 3's vocabulary, and need a GPU
TIED = ("1b",)  # whose head is the embeddings, as in Llama-3.2-1B
CHECKPOINTED = ("8b",)  # whose family has gradient_checkpointing
SPLITS = ("full", "retain90", "forget10", "forget10_perturbed")
SPLITS += ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
SETTINGS = {  # of --memory -> script and what is set
    "full_paged": ("finetune.py", "optim=paged_adamw_32bit"),
    "full_8bit": ("finetune.py", "optim=adamw_bnb_8bit"),
    "full_stochastic": ("finetune.py", "optim=adamw_8bit_stochastic"),
    "lora": ("finetune.py", "LoRA.r=8"),
    "lora_4bit": ("finetune.py", "LoRA.r=8", "LoRA.quantize=4bit"),
    "lora_dpo": ("forget.py", "LoRA.r=8", "forget_loss=dpo", "save_model=false"),
    "lora_4bit_dpo": ("forget.py", "LoRA.r=8", "LoRA.quantize=4bit", "forget_loss=dpo", "save_model=false"),
}
MANAGED = ("full_paged",)  # it asks for managed memory, and a card can hang where that is more than the card has
MEMORY_ROWS = 64  # of --memory: four steps
CARDS, SPARE = (24, 40, 80), 1.0  # GB (10^9 bytes); what CUDA itself takes of a card
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
ABOUT = "PROTOCOL_STAGE"  # environment variable: what `stage` has to know


class Row(NamedTuple):
    """What came of one process."""

    name: str
    seconds: float
    peak: float  # GB; 0: no GPU memory used
    why: str | None = None  # it did not end well; None: it did
    said: str = ""  # on stdout and stderr


def stage(script: str, *args: str) -> None:
    """Be `python SCRIPT args`, with the benchmark's model as its family's, and leave the peak memory in a file."""
    import torch
    from results import status

    about = json.loads(os.environ[ABOUT])
    family = families.entries()[about["family"]]
    family.hf_key, family.gradient_checkpointing = about["model"], about["checkpointing"]
    sys.argv = [str(REPO / script), *args]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        # not ru_maxrss: it survives exec, so that a child's is at least its parent's
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM") * 1024
        Path(about["peak"]).write_text(str(peak / 1e9))


def ended(command: list[str], timeout: float | None = None, **how: object) -> subprocess.CompletedProcess:
    """A process that has ended, and what it said; after `timeout` seconds it and all that it started are killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, **how) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            started = psutil.Process(process.pid).children(recursive=True)  # torchrun's are in sessions of their own
            for one in (psutil.Process(process.pid), *started):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            out, err = process.communicate()
            err += f"\nerror: stopped after {timeout:.0f} s\n"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def reason(done: subprocess.CompletedProcess, folder: Path) -> str | None:
    """Why a process ended badly, in its own words, without the path of `folder`; None: it did not."""
    if done.returncode == 0:
        return None
    if done.returncode != 2:  # no refusal: somebody will want the traceback
        print(done.stderr[-3000:], file=sys.stderr)
    told = re.findall(r"^(?:error: |(?=[\w.]*(?:Error|Exception)\b))(.+)", done.stderr, re.MULTILINE)
    return told[-1].replace(str(folder), ".").replace("|", "/") if told else f"exit code {done.returncode}"


def start(
    script: str,
    *args: str,
    family: str,
    model: Path,
    peak: Path,
    checkpointing: bool = False,
    cwd: Path | None = None,
    launcher: Sequence[str] = (),
    timeout: float | None = None,
) -> subprocess.CompletedProcess:
    """One process of an entry script, with `model` as the family's; its peak memory goes to a file.

    Args:
        launcher: what stands between python and the script, as TORCHRUN.
        timeout: seconds after which it is killed.
    """
    about = {"family": family, "model": str(model), "checkpointing": checkpointing, "peak": str(peak)}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    one_card = {"CUDA_VISIBLE_DEVICES": "0"}  # however many there are
    env = {**quiet, **one_card, **os.environ, ABOUT: json.dumps(about)}
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--stage", script, *args]
    return ended(command, timeout, cwd=cwd, env=env)


def launch(script: str, *args: str, cwd: Path | None = None, **how: object) -> str | None:
    """As `start`.

    Returns:
        None, or why it ended badly.
    """
    return reason(start(script, *args, cwd=cwd, **how), cwd or REPO)


def run(name: str, size: str, folder: Path, script: str, *args: str, **how: object) -> Row:
    """One process: `script` in `folder`, where `model` is the family's; `how` is of `start`."""
    from eval_speed import FAMILY

    peak = folder / "peak"
    peak.unlink(missing_ok=True)
    if script != "aggregate_eval_stat.py":
        args = (f"model_family={FAMILY}", *args)
    began = time.perf_counter()
    about = {"family": FAMILY, "model": folder / "model", "checkpointing": size in CHECKPOINTED, "peak": peak}
    done = start(script, *args, cwd=folder, **about, **how)
    seconds, why = time.perf_counter() - began, reason(done, folder)
    print(f"{name}: {f'not run: {why}' if why else f'{seconds:.1f} s'}", flush=True)
    return Row(name, seconds, float(peak.read_text()) if why is None else 0.0, why, done.stdout + done.stderr)


def write_model(
    folder: Path, shape: tuple[int, ...], vocabulary: int | None = None, bf16: bool = False, **config: object
) -> None:
    """A Llama of random weights, always the same, and a tokenizer of 2,000 words.

    Args:
        shape: as train_speed.SIZES.
        vocabulary: the model's, where larger than the tokenizer's.
        bf16: the weights' type where they are large, which every precision can be loaded from; a GPU draws them.
        config: of LlamaConfig, besides.
    """
    import torch
    from eval_speed import GOLDEN
    from train_speed import llama
    from transformers import AutoModelForCausalLM

    tokenizer = folders.load_tokenizer(str(GOLDEN), None)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    made = llama(shape, vocabulary or len(tokenizer), **ends, **config)
    with torch.device("cuda" if bf16 and torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16 if bf16 else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the card is the stages'


def the_model(size: str, folder: Path) -> None:
    """`write_model` of one of the sizes."""
    from train_speed import SIZES

    vocabulary = VOCABULARY if size in BIG else None
    write_model(folder, (SIZES | LARGER)[size], vocabulary, size in BIG, tie_word_embeddings=size in TIED)


def write_splits(folder: Path, splits: dict[str, list[str]]) -> Path:
    """Lines of JSON by split, as a data folder."""
    import utils

    header = ["---", "configs:"]
    for split, lines in splits.items():
        utils.write_text(folder / f"{split}.json", "\n".join(lines) + "\n")
        header += [f"- config_name: {split}", f"  data_files: {split}.json"]
    utils.write_text(folder / "README.md", "\n".join([*header, "---", ""]))
    return folder


def first_rows(rows: int, folder: Path) -> Path:
    """The first rows of each split, as a data folder."""
    from eval_speed import SHARED

    found = {split: (SHARED / "tofu" / f"{split}.json").read_text(encoding="utf-8").splitlines() for split in SPLITS}
    return write_splits(folder, {split: lines[:rows] for split, lines in found.items()})


def protocol(size: str, rows: int | None, losses: list[str]) -> list[Row]:
    """Every stage. One that misses what an earlier one should have made refuses by itself."""
    from eval_speed import SHARED

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        the_model(size, folder / "model")
        data = f"data_path={first_rows(rows, folder / 'data') if rows else SHARED / 'tofu'}"
        training = (data, "num_epochs=5", "batch_size=16", "gradient_accumulation_steps=2")
        evaluation, oracle = (data, "split=forget10_perturbed"), "retain_result=eval_oracle/eval_log_aggregated.json"
        stages = {
            "oracle": ("finetune.py", "split=retain90", "save_dir=oracle", *training),
            "evaluate_oracle": ("evaluate_util.py", "model_path=oracle", "save_dir=eval_oracle", *evaluation),
            "finetune": ("finetune.py", "split=full", "save_dir=full", *training),
        }
        for loss in losses:
            how = ("split=forget10", f"forget_loss={loss}", "model_path=full", f"save_dir={loss}")
            stages[f"forget_{loss}"] = ("forget.py", *how, *training)
            how = (f"model_path={loss}", f"save_dir=eval_{loss}", oracle)
            stages[f"evaluate_{loss}"] = ("evaluate_util.py", *how, *evaluation)
            how = (f"ckpt_result=eval_{loss}/eval_log_aggregated.json", f"save_file={loss}.csv", f"method_name={loss}")
            stages[f"aggregate_{loss}"] = ("aggregate_eval_stat.py", oracle, *how, "submitted_by=benchmark")
        found = []
        for name, command in stages.items():
            found.append(run(name, size, folder, *command))
            if name.startswith("evaluate"):  # the disk need not hold all models at once
                shutil.rmtree(folder / name.removeprefix("evaluate_"), ignore_errors=True)
    return found


def settings_of(sizes: list[str]) -> list[str]:
    """Of --memory, those that are measured where none are named."""
    return [name for name in SETTINGS if name not in MANAGED or not set(sizes) & set(BIG)]


def memory(
    size: str, rows: int, settings: list[str], batch: int = 16, left: Callable[[], float | None] = lambda: None
) -> Iterator[Row]:
    """A few steps in every setting, one after the other.

    Args:
        left: seconds that the next process may take; None: as many as it needs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        the_model(size, folder / "model")
        data = first_rows(rows, folder / "data")
        common = (f"data_path={data}", "num_epochs=1", f"batch_size={batch}", "gradient_accumulation_steps=1")
        begin = {"finetune.py": ("split=full",), "forget.py": ("split=forget10", "model_path=model")}
        for name in settings:
            script, *keys = SETTINGS[name]
            told = (*begin[script], *common, "save_dir=run", *keys)
            yield run(f"{size}_{name}", size, folder, script, *told, timeout=left())
            shutil.rmtree(folder / "run", ignore_errors=True)


def main() -> None:
    """Measure, print the table, append it to RESULTS.md; exit with 1 if a stage of the protocol did not run."""
    if sys.argv[1:2] == ["--stage"]:
        return stage(*sys.argv[2:])
    from results import METHODS, tell
    from train_speed import CUDA, SIZES

    sizes = [*SIZES, *LARGER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--size", choices=sizes, default="1b", help="of the model (1b)")
    parser.add_argument("--rows", type=int, help=f"of each split, the first (all; with --memory {MEMORY_ROWS})")
    parser.add_argument("--losses", nargs="+", choices=METHODS, default=["grad_diff"], help="to forget by (grad_diff)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory of training steps instead")
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["8b"], help="with --memory (8b)")
    parser.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), help=f"likewise (all, but at 1b and 8b {', '.join(MANAGED)})"
    )
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    for size in args.sizes if args.memory else [args.size]:
        if size in BIG and not CUDA:
            parser.error(f"{size} needs a CUDA GPU: take {'--sizes' if args.memory else '--size'} toy or bench")
    if args.memory:
        rows = args.rows or MEMORY_ROWS
        settings = args.settings or settings_of(args.sizes)
        found = [row for size in args.sizes for row in memory(size, rows, settings)]
        figures = {f"{row.name}_gb": row.peak for row in found if row.why is None}
        lines = ["| setting | peak, GB | 24 GB | 40 GB | 80 GB |", "| --- | ---: | --- | --- | --- |"]
        for row in found:
            # a process's memory on a CPU says nothing about a card
            fits = ["yes" if row.peak + SPARE <= card else "no" for card in CARDS] if CUDA else [""] * len(CARDS)
            cells = [f"{row.peak:.1f}", *fits] if row.why is None else [f"not run: {row.why}", *[""] * len(CARDS)]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        how = f"--memory, {rows} rows, batches of 16"
    else:
        found = protocol(args.size, args.rows, args.losses)
        figures = {f"{row.name}_s": row.seconds for row in found if row.why is None}
        if all(row.why is None for row in found):
            figures["whole_s"] = sum(row.seconds for row in found)
        lines = ["| stage | seconds | minutes | peak, GB |", "| --- | ---: | ---: | ---: |"]
        for row in found:
            cells = f"{row.seconds:.1f} | {row.seconds / 60:.1f} | {f'{row.peak:.1f}' if row.peak else ''}"
            lines.append(f"| {row.name} | {f'not run: {row.why} | | ' if row.why else cells} |")
        how = f"model {args.size}, {args.rows or 'all'} rows a split"
    lines.append(f"\nPeaks are {'of torch on the GPU' if CUDA else 'of the process'}; GB are 10^9 bytes.")
    tell("protocol.py", how, lines, figures, args.json, not args.no_results)
    if not args.memory and any(row.why for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
