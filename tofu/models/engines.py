"""How processes share the work, and the precision they compute in."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import utils
from tofu.models import folders, sizes
from tofu.runtime import ranks
from utils import BadInput

log = logging.getLogger(__name__)


class Engine(NamedTuple):
    """How processes share the work, and the precision they compute in."""

    name: str  # ddp, deepspeed or fsdp
    bf16: bool
    deepspeed: dict[str, Any] | None = None  # DeepSpeed's own config, "auto" values not filled

    @property
    def sharded(self) -> bool:
        """Whether the processes share one model, so that all of them must run every forward together."""
        return self.name == "fsdp" or (self.deepspeed is not None and self.deepspeed["zero_optimization"]["stage"] == 3)


def engine_of(name: str, ds_config: str, precision: str) -> Engine:
    """What the keys `engine`, `ds_config` and `precision` ask for, made definite.

    `auto` is DeepSpeed where several GPUs share the work, as in the published runs, else DDP; and bf16 on GPUs that
    have it, else float32.

    Raises:
        BadInput: `ds_config` is no DeepSpeed config of ZeRO-2 or ZeRO-3.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "deepspeed" if cuda and ranks.world_size() > 1 else "ddp"
    bf16 = precision == "bf16" or (
        precision == "auto" and cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if bf16 and not cuda and not fast_bf16(torch.cpu.get_capabilities()):
        log.warning("precision=bf16 on a CPU without AMX is slower than fp32, often many times: take precision=fp32")
    if name != "deepspeed":
        return Engine(name, bf16)
    found = utils.read_json(ds_config, "ds_config")
    if not isinstance(found, dict) or found.get("zero_optimization", {}).get("stage") not in (2, 3):
        raise BadInput(f"ds_config={ds_config}: its zero_optimization.stage must be 2 or 3")
    _stand_alone()
    return Engine(name, bf16, found)


HELD = 0.6  # of a card's memory that the weights of a copy may take: the rest is for caches and logits


def engine_of_evaluation(name: str, ds_config: str, precision: str, path: str) -> Engine:
    """`engine_of` for a model that only predicts: on several GPUs auto is ddp where each of them holds a copy.

    A model that the processes share is gathered anew for every token that it generates.

    Args:
        path: of the model, as `folders.resolve` gave it.
    """
    if name == "auto" and torch.cuda.is_available() and ranks.world_size() > 1:
        model = sizes.shell(folders.config_of(path))
        alone = engine_of("ddp", ds_config, precision)
        card = torch.cuda.get_device_properties(0).total_memory
        if holds_a_copy(sum(one.numel() for one in model.parameters()), alone.bf16, card):
            return alone
    return engine_of(name, ds_config, precision)


def holds_a_copy(weights: int, bf16: bool, card: int) -> bool:
    """Whether a card of so many bytes holds a model to predict with."""
    return weights * (2 if bf16 else 4) <= HELD * card


def warn_of_coarse_sums(engine: Engine, ds_config: str) -> None:
    """Say so where DeepSpeed would sum a training's gradients in bf16, over processes and over micro-batches."""
    if engine.deepspeed is None or not engine.bf16:
        return
    kinds = {
        '"communication_data_type": "fp32"': engine.deepspeed.get("communication_data_type"),
        '"data_types": {"grad_accum_dtype": "fp32"}': engine.deepspeed.get("data_types", {}).get("grad_accum_dtype"),
    }
    if lacking := [said for said, kind in kinds.items() if kind not in ("fp32", "float32")]:
        log.warning(
            "ds_config=%s lacks %s: without it DeepSpeed sums gradients in bf16, and the other engines in float32",
            ds_config,
            " and ".join(lacking),
        )


def fast_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU multiplies matrices in bf16 faster than in float32: x86 by AMX, ARM by its own instructions.

    Args:
        capabilities: of `torch.cpu.get_capabilities`.
    """
    return any(capabilities.get(name, False) for name in ("amx_bf16", "bf16", "sve_bf16"))


def _stand_alone() -> None:
    """Tell DeepSpeed, which asks MPI otherwise, that a process without a launcher is alone."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
