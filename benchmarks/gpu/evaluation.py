"""Call 4: what an evaluation takes. benchmarks/gpu/call.sh 4 [--toy] [--only PART ...]

    ours     scoring; generation with batch_size=30 and 256 (toy: 1 and 3) beside transformers' `generate`, which gets
             the same prompts and budgets
    cudnn    the same of a few rows, with cuDNN's attention off and then as torch chooses

Two models: 1B's shape with 128,256 words and random weights, in bf16 (it never stops), and the golden checkpoint
tiny-llama (it stops). Texts that differ from transformers' are counted: in bf16 near ties fall either way.
"""

from collections.abc import Sequence

import torch
from eval_speed import GOLDEN, MAX_LENGTH, our_generation, our_scoring, prepared, the_sets
from figures import CUDA, DEVICE, VOCABULARY, Figures, begin, cudnn, in_processes, parser_of, peak_gb, start_peak, timed
from train_speed import make_model
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tofu.evaluation import inference, sets
from tofu.models import folders, loading

BATCHES = {False: (256, 30), True: (3, 1)}  # --toy -> batch sizes
ROWS, FEW = {False: 300, True: 3}, {False: 30, True: 3}  # --toy -> rows of each set; of the one set of `cudnn`


def model_of(name: str, toy: bool, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """`random` or `golden`, as an evaluation has it: in place, in bf16 on a GPU."""
    if name == "golden":
        model = loading.load(str(GOLDEN)).to(DEVICE)
    else:
        size = "toy" if toy else "1b"
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = make_model(size, VOCABULARY[size], DEVICE, tie_word_embeddings=True, **ends)
    return model.to(torch.bfloat16 if CUDA else torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def library_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[sets.Task], batch_size: int
) -> list[str]:
    """transformers' own, in the sets' order: a batch goes on until its last row has ended or used its budget."""
    ends, texts = sorted(inference.end_tokens(model, tokenizer)), []
    for task in tasks:
        for first in range(0, len(task.prompts), batch_size):
            prompts = task.prompts[first : first + batch_size]
            budgets = task.budgets[first : first + batch_size]
            width = max(map(len, prompts))
            ids = [[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts]
            mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            how = {"eos_token_id": ends, "pad_token_id": ends[0], "max_new_tokens": max(budgets), "do_sample": False}
            found = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=GenerationConfig(**how),
            )[:, width:].tolist()
            for tokens, budget in zip(found, budgets, strict=True):
                end = next((i for i, token in enumerate(tokens) if token in ends), budget)
                texts.append(tokenizer.decode(tokens[: min(end, budget)], skip_special_tokens=True).strip())
    return texts


class Bench:
    """A model and its sets, all four or the forget set alone."""

    def __init__(self, name: str, toy: bool, rows: int, figures: Figures, part: str, one: bool = False) -> None:
        self.figures, self.part, self.name = figures, part, name
        self.tokenizer, self.chosen = folders.load_tokenizer(str(GOLDEN), None), the_sets(rows)[-1 if one else 0 :]
        self.model, self.tasks = model_of(name, toy, self.tokenizer), prepared(self.tokenizer, self.chosen)
        few = [task._replace(prompts=task.prompts[:2], budgets=[4, 4]) for task in self.tasks[:1]]
        for generate in (our_generation, library_generation):
            generate(self.model, self.tokenizer, few, 2)  # what comes with a process's first calls is nobody's

    def scoring(self, how: str) -> None:
        """Tokenising and scoring."""
        with self.figures.measuring(self.part, f"{self.name}, scoring, {how}") as values:
            start_peak()
            values["seconds"], found = timed(our_scoring, self.model, self.tokenizer, self.chosen)
            values |= {"texts": len(found), "peak_gb": peak_gb()}

    def generation(self, batch_size: int, how: str) -> None:
        """Ours, then transformers'."""
        ways = {"ours": our_generation, "transformers": library_generation}
        texts: dict[str, list[str]] = {}
        for name, generate in ways.items():
            told = f"{self.name}, generation, {name}, batch {batch_size}, {how}"
            with self.figures.measuring(self.part, told) as values:
                start_peak()
                values["seconds"], texts[name] = timed(generate, self.model, self.tokenizer, self.tasks, batch_size)
                values |= {"texts": len(texts[name]), "peak_gb": peak_gb()}
                if name != "ours" and "ours" in texts:
                    pairs = zip(texts["ours"], texts[name], strict=True)
                    values["differing_from_ours"] = sum(a != b for a, b in pairs)
                values["cudnn_may_be_chosen"] = torch.backends.cuda.cudnn_sdp_enabled()


def ours(figures: Figures, toy: bool) -> None:
    """Whole sets, without cuDNN's attention."""
    cudnn(False)
    for name in ("random", "golden"):
        bench = Bench(name, toy, ROWS[toy], figures, "evaluation", one=toy)
        bench.scoring("cuDNN off")
        for batch_size in BATCHES[toy]:
            bench.generation(batch_size, "cuDNN off")


def with_cudnn(figures: Figures, toy: bool) -> None:
    """A few rows: where each new shape has its price, whole sets would not end in time."""
    bench = Bench("random", toy, FEW[toy], figures, "cuDNN's attention", one=True)
    for on in (False, True):
        cudnn(on)
        how = "cuDNN as torch chooses" if on else "cuDNN off"
        bench.scoring(how)
        bench.generation(BATCHES[toy][-1], how)


PARTS = {"ours": ours, "cudnn": with_cudnn}


def main() -> None:
    """Measure what is asked for."""
    args = parser_of(__doc__, PARTS).parse_args()
    how = f"prompt and answer of {MAX_LENGTH} tokens at most, {ROWS[args.toy]} rows a set, {FEW[args.toy]} of cuDNN's"
    in_processes(PARTS, begin(4, how, args), args)


if __name__ == "__main__":
    main()
