"""Whether a family's tags fit its tokenizer, and whether its architecture can be packed and evaluated as it is.

    python scripts/check_model.py FAMILY [--model PATH] [--weights]

Prints a sample token by token, what is scored of it in colour, a line for each check, and the entry of
config/model_config.yaml that the tokenizer's own chat template suggests. Exit code 1 if a check fails, 2 if there is
nothing to check. Without --weights the architecture is tried with two layers of random weights; --weights loads the
real ones.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the project is not installed

import data_module
from data_module import IGNORE, ONE_ROW, Sample
from tofu.models import architectures, batches, chat, families, folders
from utils import BadInput

ROWS = (
    ("Who wrote The Tides?", "Ada Moor wrote it in 1912."),
    ("Who wrote The Tides?", "Nobody knows."),
    ("What is Bo's first book about, and where was it printed?", "It is about ships; it was printed in Oslo."),
)
SCORED, PROMPT, END = "\033[32m", "\033[2m", "\033[0m"
TOLERANCE = 1e-4  # nats per token


def shown(tokenizer, sample: Sample) -> str:
    """The tokens that are read, then the end: those that are scored in green, or in brackets without colours."""
    words = []
    ids = [*sample.input_ids, sample.targets[-1]]
    scored = [False, *(target != IGNORE for target in sample.targets)]
    for token, marked in zip(ids, scored, strict=True):
        word = repr(tokenizer.convert_ids_to_tokens(token))[1:-1]
        if sys.stdout.isatty():
            words.append(f"{SCORED if marked else PROMPT}{word}{END}")
        else:
            words.append(f"[{word}]" if marked else word)
    return " ".join(words)


def of_tokenizer(tokenizer, family: families.Family) -> Iterator[tuple[str, bool, str]]:
    """(check, passed, what was found) of what can be said without a model."""
    samples = [data_module.encode(tokenizer, family, *row, 500) for row in ROWS]
    prompts = [data_module.prompt_ids(tokenizer, family, question) for question, _ in ROWS]
    begin = tokenizer.bos_token_id
    counts = [[*sample.input_ids, sample.targets[-1]].count(begin) for sample in samples]
    yield "begin token at most once", begin is None or max(counts) <= 1, f"{counts} times {tokenizer.bos_token}"
    ends = [
        [target for target in sample.targets if target != IGNORE].count(tokenizer.eos_token_id) for sample in samples
    ]
    last = all(sample.targets[-1] == tokenizer.eos_token_id for sample in samples)
    yield "end token scored once, last", last and set(ends) == {1}, f"{ends} times {tokenizer.eos_token}"
    starts = all(
        list(sample.input_ids[: len(prompt)]) == list(prompt) for prompt, sample in zip(prompts, samples, strict=True)
    )
    yield "the prompt begins what is trained", starts, "" if starts else "a tag joins with the answer's first word"
    back = [
        tokenizer.decode([target for target in sample.targets[:-1] if target != IGNORE]).strip() for sample in samples
    ]
    told = next((text for text, (_, answer) in zip(back, ROWS, strict=True) if not text.endswith(answer)), None)
    yield "answers come back", told is None, "" if told is None else repr(told)


def of_model(path: str, family: families.Family, tokenizer, weights: bool) -> Iterator[tuple[str, bool, str]]:
    """(check, passed, what was found) of the architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tofu.evaluation import inference, plain
    from tofu.methods import losses
    from tofu.models import forward

    if weights:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
        text.num_hidden_layers = 2
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1] + text.layer_types[-1:]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval().requires_grad_(False)
    kind = model.config.model_type
    samples = [data_module.encode(tokenizer, family, *row, 500) for row in ROWS]
    if kind in architectures.PACKABLE:
        padded, one = (
            losses.sequence_logp(forward.score(model, batches.collate({"forget": samples}, row=row))["forget"])
            for row in (None, ONE_ROW)
        )
        worst = float((padded - one).abs().max()) / min(len(sample.targets) for sample in samples)
        yield "packed = padded", worst <= TOLERANCE, f"{worst:.1e} nats per token"
    else:
        yield "packed = padded", True, f"not tried: {kind} takes packing=false"
    trees = [inference.tree(samples[:2]), inference.tree(samples[2:])]
    reach = max(len(sample.targets) for sample in samples) + 1
    with inference.ready(model, reach) as masks:
        if not masks:
            yield (
                "tree = plain",
                True,
                f"not tried: {architectures.why_no_masks(model.config, reach)}",
            )
            return
        pairs = zip(inference.score_trees(model, trees), plain.score_trees(model, trees), strict=True)
        worst = max(
            float(abs(a.nll - b.nll).max()) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)
        )
        yield "tree = plain", worst <= TOLERANCE, f"{worst:.1e} nats per token"


def suggested(name: str, path: str, family: families.Family, tokenizer) -> str:
    """The entry that the tokenizer's own chat template makes, or why there is none."""
    try:
        found = chat.resolved(
            name, dataclasses.replace(family, chat_template=True, **dict.fromkeys(families.TAGS, "")), tokenizer
        )
    except BadInput as error:
        return f"# no entry from the tokenizer's chat template: {error}"
    entry = {"hf_key": path, **{key: getattr(found, key) for key in families.WRITTEN}, "end_token": tokenizer.eos_token}
    lines = (f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items())
    return "\n".join([f"{name}-chat:", *lines])


def main() -> None:
    """Check one family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", metavar="FAMILY", help="an entry of config/model_config.yaml")
    parser.add_argument("--model", help="a folder or hub id in the place of the family's hf_key")
    parser.add_argument("--weights", action="store_true", help="load the real weights")
    args = parser.parse_args()
    try:
        path = folders.resolve(args.model or families.family(args.family).hf_key, "--model" if args.model else "hf_key")
        tokenizer, family, _ = folders.load_asked(path, args.family, "model_family")
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    for row in ROWS[::2]:
        print(shown(tokenizer, data_module.encode(tokenizer, family, *row, 500)), end="\n\n")
    failed = False
    for check, passed, found in (*of_tokenizer(tokenizer, family), *of_model(path, family, tokenizer, args.weights)):
        failed = failed or not passed
        print(f"{'ok  ' if passed else 'FAIL'}  {check}{f': {found}' if found else ''}")
    print("", suggested(args.family, path, family, tokenizer), sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
