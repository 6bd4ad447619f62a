"""What checkpoints cost: seconds of one at the default interval, and a step's time beside a Trainer that has none.

python benchmarks/checkpoints.py [--repetitions 5] [--no-results] [--json FILE]

Saves are those of forget.py with grad_diff on one process, of the golden tiny model and of a Llama of 135M random
weights. Steps are timed in interleaved runs. Appends to benchmarks/RESULTS.md. Needs ../shared (the golden model).
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from eval_speed import GOLDEN
from results import tell
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import dataloader
import forget
from tofu.training import checkpoints

DEFAULT = 900  # seconds between two checkpoints
SMOLLM = {  # SmolLM2-135M's shape
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}


class Clock(TrainerCallback):
    """When each step ended, by the process's own clock: what else runs on the machine counts less."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note it."""
        self.ends.append(time.process_time())


class Without(dataloader.TofuTrainer):
    """A Trainer that writes no checkpoints and asks for none."""

    def __init__(self, *, plan: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def run(model: Path, folder: Path, kind: type, every: int, rows: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """Seconds of each save, and CPU seconds of each step but the first."""
    saves, clock = [], Clock()

    class Timed(kind):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.add_callback(clock)

        def _save_checkpoint(self, *args: Any) -> None:
            began = time.perf_counter()
            super()._save_checkpoint(*args)
            saves.append(time.perf_counter() - began)

    known, checkpoints.Resumable = checkpoints.Resumable, Timed
    common = ("model_family=tiny", "data_path=data/mini", f"model_path={model}", "forget_loss=grad_diff", "lr=1e-5")
    argv, sys.argv = (
        sys.argv,
        ["forget.py", *common, *rows, f"checkpoint_every={every}", "save_model=false", "progress=false"]
        + ["gradient_accumulation_steps=1", f"save_dir={folder}", "overwrite_dir=true"],
    )
    try:
        forget.main()
    finally:
        sys.argv, checkpoints.Resumable = argv, known
    return saves, [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]


def main() -> None:
    """Measure, tell, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-results", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    golden, figures = GOLDEN, {}
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as scratch:
        large = Path(scratch) / "large"
        with torch.device("meta"):
            shell = LlamaForCausalLM(LlamaConfig(**SMOLLM, bos_token_id=1, eos_token_id=2))
        shell = shell.to_empty(device="cpu").float()
        for parameter in shell.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        shell.save_pretrained(large)
        del shell
        AutoTokenizer.from_pretrained(golden).save_pretrained(large)
        for name, model, rows in (
            ("tiny_llama", golden, ("split=forget05", "batch_size=4", "num_epochs=2")),
            ("135M", large, ("split=forget01", "batch_size=1", "num_epochs=2")),
        ):
            saves, _ = run(model, Path(scratch) / name, checkpoints.Resumable, 1, rows)
            figures[f"{name}_seconds_of_a_save"] = statistics.median(saves)
            figures[f"{name}_percent_of_{DEFAULT}_s"] = 100 * statistics.median(saves) / DEFAULT
        steps: dict[str, list[float]] = {"without": [], "at 0": []}
        for _ in range(args.repetitions):
            for name, kind in (("without", Without), ("at 0", checkpoints.Resumable)):
                rows = ("split=forget10", "batch_size=4", "num_epochs=10")
                steps[name] += run(golden, Path(scratch) / "steps", kind, 0, rows)[1]
        for name, seconds in steps.items():
            figures[f"cpu_ms_of_a_step_{name.replace(' ', '_')}"] = 1000 * statistics.median(seconds)
    told = ["Medians. A step is tiny-llama's with 4 forget and 4 retain rows."]
    tell("checkpoints.py", f"{args.repetitions} repetitions", told, figures, args.json, append=not args.no_results)


if __name__ == "__main__":
    main()
