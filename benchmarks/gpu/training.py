"""Call 1: what a step of finetuning takes. benchmarks/gpu/call.sh 1 [--toy] [--only PART ...]

    shapes      the price of an attention shape that is new, with cuDNN's attention as torch chooses and off
    steps       waits for the device in a step; milliseconds and MFU of a step: ours beside rows padded to the longest
                and transformers' own way without padding, also with checkpointing and with 64 samples
    liger       the same with Liger's kernels
    optimisers  four optimisers of ours

The model is Llama-3.2-1B's shape with random weights, bf16 autocast over float32 masters, real rows. MFU: the FLOPs
that the real tokens need (`train_speed.work`) per second, of a H100's or H200's 989 * 10^12 in bf16.
"""

import collections
import contextlib
import os
import statistics
import tempfile
import traceback
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from figures import CUDA, DEVICE, VOCABULARY, Figures, begin, cudnn, in_processes, parser_of, peak_gb, start_peak, timed
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode
from train_speed import FAMILY, GOLDEN, SHARED, WARM, Clock, Plain, make_model, work
from transformers import DataCollatorWithFlattening, PrinterCallback, Trainer, TrainerCallback

import data_module
import dataloader
from tofu.cli import schema
from tofu.methods import objective
from tofu.models import architectures, engines, families, folders, varlen
from tofu.training import optimisation

PEAK = 989e12  # FLOP/s in bf16, dense: the data sheet's of a H100 or H200 (SXM)
STEPS, FEW = 24, 4  # optimiser steps; FEW at toy size
ROWS = {False: 1600, True: 256}  # --toy -> rows of `full`
FUSED, VARLEN = "adamw_torch_fused", varlen.NAME


class Setting(NamedTuple):
    """What one training is measured with."""

    kind: str  # a key of KINDS
    attention: str = "sdpa"
    checkpointing: bool = False
    liger: bool = False
    optim: str = FUSED
    batch: int = 16
    cudnn: bool = False

    @property
    def name(self) -> str:
        """As a table names it."""
        more = [self.optim] if self.optim != FUSED else []
        more += [key for key in ("checkpointing", "liger") if getattr(self, key)]
        more += ["cuDNN as torch chooses"] if self.cudnn else []
        return ", ".join([self.kind, self.attention, f"{self.batch} samples", *more])


class Flattened(dataloader.TofuTrainer):
    """transformers' own way: its collator puts a batch into one row, its loss reads the logits of every position."""

    def _collate(self, items):
        samples = [parts["retain"] for parts, _ in items]
        features = [
            {
                "input_ids": [*sample.input_ids, sample.targets[-1]],
                "labels": [data_module.IGNORE, *sample.targets],
            }
            for sample in samples
        ]
        boundaries = architectures.attention_in_use(self.model.config) == VARLEN
        return DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)(features, return_tensors="pt")

    def _get_num_items_in_batch(self, batch_samples, device):
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The library's."""
        return model(**inputs, use_cache=False).loss


KINDS = {"ours": dataloader.TofuTrainer, "padded": Plain, "flattened": Flattened}
PADDED = ("padded", "sdpa")
WAYS = (PADDED, ("ours", VARLEN), ("ours", "sdpa"), ("flattened", "sdpa"), ("flattened", VARLEN))


class Waits(TrainerCallback):
    """Where one whole step waits for the device: from the end of the step before it to its own end.

    On a GPU torch says it (`torch.cuda.set_sync_debug_mode`). On a CPU, where nothing is waited for, the operations are
    counted that would: reading a number, finding the places of a mask, indexing with one.
    """

    def __init__(self, first: int) -> None:
        """
        Args:
            first: the step after which to look.
        """
        self.first, self.watching, self.found = first, contextlib.ExitStack(), collections.Counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Begin or end."""
        if state.global_step == self.first:
            self.watching.enter_context(self._told_by_torch() if CUDA else Waiting(self.found))
        if state.global_step == self.first + 1:
            self.watching.close()

    @contextlib.contextmanager
    def _told_by_torch(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        told = [one for one in caught if "synchroniz" in str(one.message)]
        self.found.update(f"{os.path.basename(one.filename)}:{one.lineno}" for one in told)


class Waiting(TorchDispatchMode):
    """Counts the operations whose result the host needs before it can go on, by the line that asks for them."""

    def __init__(self, found: collections.Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count, and compute."""
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero"):
            outside = os.path.dirname(torch.__file__)
            frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.startswith(outside)]
            self.found[f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"] += 1
        return func(*args, **(kwargs or {}))


class Bench:
    """What all trainings share: the rows, the model's size, the number of steps."""

    def __init__(self, toy: bool) -> None:
        self.size, self.steps = ("toy", FEW) if toy else ("1b", STEPS)
        self.padded: dict[Setting, float] = {}  # what a step of rows padded to the longest took, in seconds
        rows = data_module.load_rows(str(SHARED / "tofu"), "full", ("question", "answer"), ROWS[toy])
        self.tokenizer = folders.load_tokenizer(str(GOLDEN), None)
        self.data = data_module.TrainingSet(self.tokenizer, families.family(FAMILY), 500, 42, retain=rows)

    def trainer(self, setting: Setting, folder: str) -> Trainer:
        """A new model in a Trainer with the arguments that finetune.py gives it, but for the number of steps."""
        varlen.register()
        cfg = config_of(setting)
        engine = engines.engine_of("ddp", "", "bf16" if setting.optim == schema.STOCHASTIC else "auto")
        keys = {key: cfg[key] for key in optimisation.ARGUMENTS}
        checkpointing = {"gradient_checkpointing": setting.checkpointing}
        args = optimisation.arguments(folder, samples=len(self.data), engine=engine, **checkpointing, **keys)
        args.max_steps = self.steps
        if setting.kind == "flattened":
            args.liger_kernel_config = None  # Liger's own choice: its loss makes no logits
        model = make_model(
            self.size,
            VOCABULARY[self.size],
            DEVICE,
            tie_word_embeddings=True,
            attn_implementation=setting.attention,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        ).to(optimisation.weights_type(engine, cfg.LoRA, setting.optim))
        trainer = KINDS[setting.kind](
            model=model,
            args=args,
            train_dataset=self.data,
            method=objective.finetuning(),
            **optimisation.stochastic(setting.optim, args),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Seconds of a step, and what follows from them."""
        start_peak()
        cudnn(setting.cudnn)
        with tempfile.TemporaryDirectory() as folder:
            trainer, clock = self.trainer(setting, folder), Clock()
            trainer.add_callback(clock)
            trainer.train()
        took = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
        median = statistics.median(took[len(took) // 2 :])
        alike = setting._replace(kind=PADDED[0], attention=PADDED[1])
        if setting == alike:
            self.padded[setting] = median
        batches = list(data_module.GlobalBatches(len(self.data), setting.batch, 0, 1))[WARM : self.steps]
        flops, tokens = work(trainer.model, self.data, batches)
        return {
            "median_ms": 1e3 * median,
            "mean_ms": 1e3 * statistics.mean(took),
            "longest_ms": 1e3 * max(took),
            "tokens_per_step": tokens,
            "tokens_per_second": tokens / median,
            "times_padded": self.padded[alike] / median if alike in self.padded else None,
            "mfu": share_of_peak(flops, median) if CUDA else None,
            "peak_gb": peak_gb(),
            "first_loss": trainer.state.log_history[0]["loss"],
            "cudnn_may_be_chosen": torch.backends.cuda.cudnn_sdp_enabled(),
        }

    def waits(self, kind: str, attention: str) -> dict[str, Any]:
        """How often one step waits for the device, and where most."""
        cudnn(False)
        with tempfile.TemporaryDirectory() as folder:
            trainer, waits = self.trainer(Setting(kind, attention), folder), Waits(FEW - 2)
            trainer.args.max_steps = FEW
            trainer.add_callback(waits)
            trainer.train()
        where = [f"{place} {count}x" for place, count in waits.found.most_common()]
        return {"waits": waits.found.total(), "where": "; ".join(where)}

    def table(self, part: str, settings: list[Setting], figures: Figures) -> None:
        """Measure some settings."""
        for setting in settings:
            with figures.measuring(part, setting.name) as values:
                values |= self.measure(setting)


def config_of(setting: Setting) -> DictConfig:
    """finetune.py's config, not yet checked."""
    told = [f"batch_size={setting.batch}", f"optim={setting.optim}", f"liger_kernel={str(setting.liger).lower()}"]
    with initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        return compose("finetune", [*told, "progress=false"])


def share_of_peak(flops: float, seconds: float) -> float:
    """MFU: the FLOPs that a step needs, of those that the card could do meanwhile."""
    return flops / seconds / PEAK


def new_shapes(figures: Figures, toy: bool) -> None:
    """Masked attention alone, of one layer, at widths that it has not seen, and again; then whole steps."""
    heads, width, dtype = (2, 8, torch.float32) if toy else (32, 64, torch.bfloat16)
    for chosen in (True, False):
        cudnn(chosen)
        with figures.measuring("attention shape", f"cuDNN {'as torch chooses' if chosen else 'off'}") as values:
            for tokens in (233, 241, 247, 259, 263, 271):
                mask = torch.ones(tokens, tokens, device=DEVICE, dtype=torch.bool).tril().expand(5, 1, tokens, tokens)
                shape = (5, heads, tokens, width)
                query, key, value = (torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in "qkv")
                for when in ("new", "again"):
                    one, out = timed(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask))  # noqa: B023
                    two, _ = timed(out.sum().backward)
                    values.setdefault(f"{when}_forward_ms", []).append(1e3 * one)
                    values.setdefault(f"{when}_backward_ms", []).append(1e3 * two)
    Bench(toy).table("shapes", [Setting("ours", cudnn=True), Setting("padded", cudnn=True)], figures)


def steps(figures: Figures, toy: bool) -> None:
    """Waits, then the ways to train, from what matters most on."""
    bench = Bench(toy)
    for kind, attention in WAYS:
        with figures.measuring("waits", f"{kind}, {attention}") as values:
            values |= bench.waits(kind, attention)
    ways = [Setting(*way) for way in WAYS]
    large = [setting._replace(batch=64) for setting in ways]
    bench.table("steps", [*ways, *large, *(setting._replace(checkpointing=True) for setting in ways)], figures)


def liger(figures: Figures, toy: bool) -> None:
    """With Liger's kernels: they patch what later models of the process would use."""
    ways = [Setting(*way, liger=True) for way in WAYS]
    Bench(toy).table("liger", [*ways, *(setting._replace(batch=64) for setting in ways)], figures)


def optimisers(figures: Figures, toy: bool) -> None:
    """Ours by sdpa; torch's fused AdamW is in `steps`, and here again as what the others are compared with."""
    named = (FUSED, "adamw_bnb_8bit", schema.STOCHASTIC, "paged_adamw_32bit")
    settings = [Setting("ours", optim=optim) for optim in named]
    settings.insert(3, Setting("ours", optim=schema.STOCHASTIC, checkpointing=True))
    Bench(toy).table("optimisers", settings, figures)


PARTS = {"steps": steps, "liger": liger, "optimisers": optimisers, "shapes": new_shapes}


def main() -> None:
    """Measure what is asked for."""
    args = parser_of(__doc__, PARTS).parse_args()
    how = f"model {'toy' if args.toy else '1b with 128,256 words'}, {FEW if args.toy else STEPS} steps a setting"
    in_processes(PARTS, begin(1, how, args), args)


if __name__ == "__main__":
    main()
