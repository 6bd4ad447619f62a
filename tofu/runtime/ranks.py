"""The processes of one launch: who this one is, which share of the work is its own, and what all of them know.

Importing it loads no torch: the command line asks for the rank before anything heavy is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tofu.runtime import cards, signals

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


TIMEOUT = 3 * 3600  # seconds that processes wait for each other: one of them may be hashing 140 GB on a slow disk


def rank() -> int:
    """This process's number among all processes of the launch; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def share(batches: Sequence[list], what: str, sharded: bool = False) -> Iterator[list]:
    """This rank's batches, with a progress bar on rank 0; `merge` must follow.

    They end early where the run is asked to stop: a rank that works for itself leaves, and `merge` tells the others.

    Args:
        sharded: whether a rank that runs out repeats a batch, so that ranks which share one model run equally many.

    Raises:
        Interrupted: ranks that share one model stop together, before the same batch.
    """
    from tqdm import tqdm

    mine = list(batches[rank() :: world_size()])
    if sharded and batches:
        mine += [batches[0]] * (-(-len(batches) // world_size()) - len(mine))
    silent = rank() > 0 or bool(os.environ.get("TQDM_DISABLE"))  # tqdm reads it once, when imported
    for batch in tqdm(mine, desc=what, disable=silent, leave=False):
        if sharded:
            stop_together()
        elif signals.requested():
            return
        yield batch


def merge(found: dict) -> dict:
    """All ranks' results on every rank.

    Raises:
        Interrupted: on all ranks, if one of them is asked to stop: then its results are not whole.
    """
    from accelerate.utils import gather_object

    merged: dict = {}
    for part, asked in gather_object([(found, signals.requested())]):
        if asked:
            raise signals.Interrupted(None, "", name=asked)
        merged.update(part)
    return merged


def asked_to_stop() -> str | None:
    """The name of the signal that any of the ranks has got; all ranks call it together, and get the same answer."""
    from accelerate.utils import gather_object

    names = [signals.requested()] if world_size() == 1 else gather_object([signals.requested()])
    return next((name for name in names if name), None)


def stop_together() -> None:
    """Raise Interrupted on all ranks if one of them is asked to stop; all of them call it together."""
    if name := asked_to_stop():
        raise signals.Interrupted(None, "", name=name)


def state() -> Any:
    """Accelerate's state of this process; the first call makes the group of all processes."""
    import accelerate
    import torch

    return accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=TIMEOUT))


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank."""
    from accelerate.utils import broadcast_object_list

    state()
    return broadcast_object_list([value])[0]


def all_arrive(where: str, patience: float) -> bool:
    """Whether every process of the launch comes here within `patience` seconds.

    They meet in the launcher's store, not in a collective: one that does not come may be in a collective of its own.

    Args:
        where: a name that no earlier meeting had.
    """
    from torch import distributed

    address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 0))
    try:
        kind = distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage] - torch documents it
        store = kind(address, port, is_master=False, timeout=timedelta(seconds=patience))
        store.set(f"tofu/{where}/{rank()}", "here")
        store.wait([f"tofu/{where}/{one}" for one in range(world_size())], timedelta(seconds=patience))
    except RuntimeError:  # torch.distributed's errors are
        return False
    return True


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A collated batch with its tensors on `device`, those in dicts and lists too; the host does not wait for them."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(one) for key, one in value.items()}
        if isinstance(value, list):
            return [moved(one) for one in value]
        return value.to(device, non_blocking=True) if hasattr(value, "to") else value

    return moved(batch)


def release() -> None:
    """End a job: wait for all ranks, forget what the libraries keep of it; nothing of it is alive in the next one."""
    import accelerate
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    state().wait_for_everyone()
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()  # else the next job of a sweep would log into this one's run
    accelerate.state.GradientState._reset_state()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    cards.collect()


class Together:
    """Keeps ranks that share one model in step: each forward is all ranks', though some have more to do than others."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def work(self) -> None:
        """Call before every forward of this rank's own; it raises Interrupted on all ranks as `stop_together` does."""
        self._anyone(True)

    def wait(self) -> None:
        """Run idle forwards until no rank has work left."""
        import torch

        idle = torch.zeros((1, 1), dtype=torch.long, device=self.model.device)
        while self._anyone(False):
            self.model(input_ids=idle, use_cache=False)

    def _anyone(self, busy: bool) -> bool:
        import torch

        asked = signals.requested()
        counts = torch.tensor([float(busy), float(asked is not None)], device=self.model.device)
        torch.distributed.all_reduce(counts)
        working, stopping = counts.tolist()
        if stopping:
            raise signals.Interrupted(None, "", name=asked)
        return working > 0
