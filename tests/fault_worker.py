"""A script of the suite with a pulse: fault_worker.py SCRIPT key=value ... The environment says what happens to it.

FAULT_PULSE=FILE: how many micro-batches rank N has trained on or scored stands in FILE.N, before each.
FAULT_PAUSE=SECONDS: each takes so much longer, so that something outside can happen at one of them.
FAULT_MODEL=FOLDER: the model of the family `tiny`.
FAULT_RAISE=RANK:NUMBER:KIND: that rank fails at that one, once: oom, memory, bad or bug.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ERRORS = {
    "oom": "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    "memory": "MemoryError()",
    "bad": "utils.BadInput('a row that no other process reads')",
    "bug": "KeyError('a bug')",
}


def pulse(function: Callable) -> Callable:
    """A function that counts its calls, in a file."""
    rank = int(os.environ.get("RANK", 0))
    file, pause = Path(f"{os.environ['FAULT_PULSE']}.{rank}"), float(os.environ.get("FAULT_PAUSE", 0))
    who, at, kind = (os.environ.get("FAULT_RAISE") or "-1:0:bug").split(":")
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        file.write_text(str(count))
        time.sleep(pause)
        if (rank, count) == (int(who), int(at)):
            import torch

            import utils

            raise eval(ERRORS[kind], {"torch": torch, "utils": utils})  # noqa: S307
        return function(*args, **kwargs)

    return counted


def main() -> None:
    """Run the script."""
    import dataloader
    from tofu.evaluation import inference

    if model := os.environ.get("FAULT_MODEL"):
        from tofu.models import families

        families.entries().tiny.hf_key = model
    trainer: Any = dataloader.TofuTrainer
    compute_loss = pulse(trainer.compute_loss)
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs)
    inference.score_trees = pulse(inference.score_trees)
    script, sys.argv = sys.argv[1], sys.argv[1:]
    importlib.import_module(script.removesuffix(".py")).main()


if __name__ == "__main__":
    main()
