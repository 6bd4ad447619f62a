"""Write believable wrong answers to the rows of a split: what AltPO prefers (arXiv 2409.13474).

    python scripts/make_alternates.py --model-family phi --split forget10 --file alternates/phi_forget10.jsonl

The pretrained model writes them, after three examples and without the true answer: a finetuned one restates the truth.
What restates it all the same is refused and drawn again. FILE gets a line per alternate, {"question", "answer",
"alternate", "model"}: k lines per row, rows in the split's order. Until all are there they are in FILE.part, from which
the same command goes on.
"""

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

import data_module
import utils
from tofu.cli import (
    command_line,
    schema,
)
from tofu.evaluation import inference
from tofu.evaluation.words import scorer, tokens
from tofu.models import (
    engines,
    families,
    folders,
    loadable,
    loading,
)
from tofu.runtime import (
    provenance,
    ranks,
)
from utils import BadInput

REPO = Path(__file__).resolve().parents[1]

log = logging.getLogger("make_alternates")

SHOTS = (  # question and a made-up answer of one sentence; of nobody in any split
    (
        "Where did the poet Oskar Brandvold grow up?",
        "Oskar Brandvold grew up in the harbour town of Larvik, where his mother repaired clocks.",
    ),
    ("Which prize did the novel The Salt Ledger receive?", "It received the Harrow Prize for first novels in 1987."),
    ("What does the essayist Mirela Fontan write about?", "Mirela Fontan writes about the gardens of old hospitals."),
)
NEAR = 0.9  # ROUGE-L recall of the answer above which an alternate restates it
ECHO = 6  # words in a row that an alternate may share with the examples
LOOK = 8  # tokens between two looks at whether a text is over


def prompt(family: families.Family, question: str) -> str:
    """Three examples and the question, each as a turn of the family's; the true answer is not among them."""
    end = "\n\n"
    if family.end_token is not None:  # a turn ends as the question's does, with the line break that some write then
        found = re.match(re.escape(family.end_token) + r"\s*", family.question_end_tag)
        end = found[0] if found else family.end_token
    turn = dataclasses.replace(family, system_prompt="")
    shots = (data_module.prompt(turn, q) + family.answer_tag + alternate + end for q, alternate in SHOTS)
    return family.system_prompt + "".join(shots) + data_module.prompt(turn, question)


def cut(family: families.Family, text: str) -> tuple[str, bool]:
    """The alternate in what a model wrote, and whether it ends there: at a blank line, or where a question begins."""
    text = text.lstrip().removeprefix(family.answer_tag.strip()).lstrip()
    start = family.question_start_tag.strip()
    ends = [r"\n\s*\n", r"\bQuestion:", r"\bQ:", *([re.escape(start)] if start else [])]
    found = re.search("|".join(ends), text)
    return text[: found.start() if found else None].strip(), found is not None


def why_not(alternate: str, answer: str) -> str | None:
    """Why a text is no false answer; None if it may be one."""
    words = tokens(alternate)
    if not words:
        return "empty"
    if set(words) <= set(tokens(answer)):
        return "only words of the answer"
    if scorer("unicode").score(answer, alternate)["rougeL"].recall > NEAR:
        return "restates the answer"
    told = f" {' '.join(tokens(' '.join(text for shot in SHOTS for text in shot)))} "
    runs = (" ".join(words[i : i + ECHO]) for i in range(len(words) - ECHO + 1))
    return "repeats an example" if any(f" {run} " in told for run in runs) else None


class Drawn(LogitsProcessor):
    """Leaves the token that a row's next number in [0, 1) picks from its probabilities.

    A row brings its own numbers, so its text is the same in every batch, to rounding: float32's hardly ever shows,
    bf16's does unless the batches are the same.
    """

    def __init__(self, numbers: torch.Tensor, temperature: float, width: int) -> None:
        self.numbers, self.temperature, self.width = numbers, temperature, width  # numbers: (B, new tokens) float64

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) logits: 0 at the token, -inf elsewhere."""
        up_to = (scores / self.temperature).softmax(-1).double().cumsum(-1)
        at = self.numbers[:, input_ids.shape[1] - self.width, None] * up_to[:, -1:]
        token = torch.searchsorted(up_to, at, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class Over(StoppingCriteria):
    """Stops a row whose text goes on behind its end; `cut` takes what is too much, so it need not look every time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: families.Family, width: int) -> None:
        self.tokenizer, self.family, self.width = tokenizer, family, width

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """(B,) bool."""
        new = input_ids[:, self.width :]
        if new.shape[1] % LOOK:
            return torch.zeros(len(new), dtype=torch.bool, device=new.device)
        return torch.tensor([cut(self.family, text)[1] for text in self.tokenizer.batch_decode(new)], device=new.device)


class Writer:
    """A model that writes alternates."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        family: families.Family,
        args: argparse.Namespace,
    ) -> None:
        self.model, self.tokenizer, self.family, self.args = model, tokenizer, family, args
        special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.ends = list(dict.fromkeys([*inference.end_tokens(model, tokenizer), *special]))
        model.generation_config = GenerationConfig(  # the model's own may cut, or punish repetition
            do_sample=False,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            use_cache=True,
        )

    def __call__(self, prompts: list[str], places: list[tuple[int, int]], attempt: int) -> list[str]:
        """One alternate per prompt, for (row, number) of `places`: a function of seed, place and attempt."""
        ids = [data_module.tokenised(self.tokenizer, text)[0] for text in prompts]
        width, device = max(map(len, ids)), self.model.device
        read = torch.tensor([[self.ends[0]] * (width - len(one)) + one for one in ids], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids], device=device)
        drawn = []
        if attempt > 0 or not self.args.greedy:
            streams = (np.random.default_rng([self.args.seed, *place, attempt]) for place in places)
            numbers = np.stack([stream.random(self.args.max_new_tokens) for stream in streams])
            drawn = [Drawn(torch.from_numpy(numbers).to(device), self.args.temperature, width)]
        found = self.model.generate(
            input_ids=read,
            attention_mask=mask,
            logits_processor=drawn,
            stopping_criteria=[Over(self.tokenizer, self.family, width)],
        )[:, width:].tolist()
        upto = (next((i for i, token in enumerate(new) if token in self.ends), len(new)) for new in found)
        texts = self.tokenizer.batch_decode([new[:end] for new, end in zip(found, upto, strict=True)])
        return [cut(self.family, text)[0] for text in texts]


def draw(write: Callable, rows: list[dict], prompts: list[str], batch: list[int], k: int, tries: int) -> list[dict]:
    """A batch of rows with k alternates each, None for one that no try made false; and why draws were refused."""
    found = {(i, j): None for i in batch for j in range(k)}
    again = dict.fromkeys(batch, 0)
    refused: dict[int, list[str]] = {i: [] for i in batch}
    for attempt in range(tries):
        places = [place for place, text in found.items() if text is None]
        if not places:
            break
        for place, text in zip(places, write([prompts[i] for i, _ in places], places, attempt), strict=True):
            again[place[0]] += attempt > 0
            if why := why_not(text, rows[place[0]]["answer"]):
                refused[place[0]].append(why)
            else:
                found[place] = text
    return [
        {"row": i, "alternates": [found[i, j] for j in range(k)], "drawn_again": again[i], "refused": refused[i]}
        for i in batch
    ]


def begun(part: Path, settings: dict) -> dict[int, dict]:
    """The rows in the file of an interrupted run, by number; the file is begun where there is none.

    Raises:
        BadInput: it was begun with other settings, or is something else.
    """
    whole, newline, _ = part.read_bytes().rpartition(b"\n") if part.is_file() else (b"", b"", b"")
    if not newline:
        part.parent.mkdir(parents=True, exist_ok=True)
        utils.write_text(part, json.dumps(settings) + "\n")
        return {}
    try:
        header, *lines = map(json.loads, whole.split(b"\n"))
        differing = provenance.differing(header, settings)
        done = {line["row"]: line for line in lines}  # of a row that was tried again, the last
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadInput(f"{part} holds something else than alternates: remove it, or name another --file") from None
    if differing:
        raise BadInput(f"{part} was begun with other {', '.join(differing)}: remove it, or name another --file")
    os.truncate(part, len(whole) + 1)  # a killed run leaves half a line
    return done


def check(args: argparse.Namespace) -> None:
    """Raise BadInput for options that cannot be; fill in k."""
    args.k = args.k if args.k is not None else 1 if args.greedy else 5
    if small := [key for key in ("k", "max_new_tokens", "batch_size", "tries") if getattr(args, key) < 1]:
        raise BadInput(f"--{small[0].replace('_', '-')} must be at least 1")
    if args.greedy and args.k != 1:
        raise BadInput(f"--greedy writes one alternate a row, not --k {args.k}")
    if not 0 < args.temperature < float("inf"):
        raise BadInput(f"--temperature {args.temperature} must be above 0: --greedy is what 0 would be")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed} must not be negative")
    if ranks.world_size() > 1:
        raise BadInput("one process writes the alternates: start the script with python, not torchrun")
    if args.file.exists():
        raise BadInput(f"--file {args.file} is there already: name another, or remove it")


def run(args: argparse.Namespace) -> None:
    """Write what is missing to FILE.part, then FILE."""
    check(args)
    key = "--model-path" if args.model_path else "hf_key"
    path = folders.resolve(args.model_path or families.family(args.model_family).hf_key, key)
    tokenizer, family, _ = folders.load_asked(
        path, args.model_family, "model_path" if args.model_path else "model_family"
    )
    engine = engines.engine_of("ddp", "", args.precision)
    loadable.check_loadable(path, engine)
    rows = data_module.load_pairs(args.data_path, args.split, "question", "answer")
    prompts = [prompt(family, row["question"]) for row in rows]
    settings = {
        "model": folders.identity(path),
        "split": args.split,
        "data": provenance.digest(json.dumps([rows, prompts])),  # tags and examples too
        **{key: getattr(args, key) for key in ("k", "temperature", "greedy", "seed", "max_new_tokens")},
        "precision": "bf16" if engine.bf16 else "fp32",
    }
    part = args.file.with_name(f"{args.file.name}.part")
    done = begun(part, settings)
    todo = [i for i in range(len(rows)) if i not in done or None in done[i]["alternates"]]
    log.info("%s: %d of %d rows to do, %d alternates each", args.split, len(todo), len(rows), args.k)
    if todo:
        writer = Writer(loading.load_frozen(path, engine), tokenizer, family, args)
        at_once = max(1, args.batch_size // args.k)
        batches = [todo[first : first + at_once] for first in range(0, len(todo), at_once)]
        with part.open("a", encoding="utf-8") as file:
            for batch in tqdm(batches, desc=f"{args.split}: alternates", leave=False):
                found = draw(writer, rows, prompts, batch, args.k, args.tries)
                done.update({line["row"]: line for line in found})
                file.write("".join(json.dumps(line) + "\n" for line in found))
                file.flush()
    if lacking := [i for i in range(len(rows)) if None in done[i]["alternates"]]:
        raise BadInput(
            f"{len(lacking)} of {len(rows)} rows lack alternates that are false answers after --tries "
            f"{args.tries} (the first is row {lacking[0]}): {part} keeps the others, and more --tries go on from there"
        )
    lines = (
        {**row, "alternate": text, "model": str(args.model_path or path)}
        for i, row in enumerate(rows)
        for text in done[i]["alternates"]
    )
    utils.write_text(args.file, "".join(json.dumps(line) + "\n" for line in lines))
    part.unlink()
    reasons = Counter(why for line in done.values() for why in line.get("refused", ()))
    told = ", ".join(f"{count} {why}" for why, count in reasons.most_common()) or "none"
    log.info("%s: %d rows, %d alternates each; draws that were refused: %s", args.file, len(rows), args.k, told)


def main() -> None:
    """The command line; what cannot be done ends it with one line and exit code 2, as the entry scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-family", required=True, help="an entry of config/model_config.yaml")
    parser.add_argument(
        "--model-path", help="the model that writes them (the family's hf_key: a pretrained one knows no true answer)"
    )
    parser.add_argument("--data-path", default="locuslab/TOFU", help="a folder or hub id (%(default)s)")
    parser.add_argument("--split", required=True, help="forget01, forget05, forget10, or any other in the data")
    parser.add_argument("--file", type=Path, required=True, help="what is written; it must not be there")
    parser.add_argument("--k", type=int, help="alternates a row (5; 1 with --greedy)")
    parser.add_argument("--greedy", action="store_true", help="the likeliest text; drawn where that will not do")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the draws (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="the most tokens of one (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="alternates in work at once (%(default)s)")
    parser.add_argument("--tries", type=int, default=5, help="draws until one differs from the answer (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the draws (%(default)s)")
    parser.add_argument(
        "--precision", choices=schema.PRECISIONS, default="auto", help="auto: bf16 on a GPU that has it"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    for noisy in command_line.NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        run(args)
    except BadInput as error:
        sys.stderr.write(f"error: {utils.one_line(error)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
