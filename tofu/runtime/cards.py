"""What is settled once for every CUDA card, and the shapes that its kernels are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROUND_TO = 16  # on a card, widths of batches and lengths of caches are multiples of it: few shapes, all well aligned


def settle() -> None:
    """Turn off cuDNN's attention, which builds a plan for every new shape: 0.4 to 1 second each.

    Measured on B200 and H20 by others (huggingface/transformers#48163, modelscope/FunASR#3704). Our shapes differ from
    step to step; torch's other kernels need no plans.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def collect() -> None:
    """Give back what is no longer used, so that the next model finds its room.

    A model, its hooks and its wrappers are cycles, and the allocator keeps what they leave.
    """
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def round_to(device: torch.device) -> int:
    """What widths are rounded up to on a device: ROUND_TO on a card, 1 elsewhere."""
    return ROUND_TO if device.type == "cuda" else 1


def up(length: int, multiple: int) -> int:
    """The least multiple that is not below `length`."""
    return -(-length // multiple) * multiple
