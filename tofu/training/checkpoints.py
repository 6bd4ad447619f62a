"""A training that goes on: what a checkpoint holds, when one is written, and how it is taken back.

The Trainer's own resuming finds the place in the data and the generators' states. The rest is here: weights and
optimiser by engine, the schedule, the method's state, and what the log sums up between two lines.
"""

import json
import logging
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import TrainerCallback

import utils
from data_module import TrainingSet
from dataloader import TofuTrainer
from tofu.models.engines import Engine
from tofu.runtime import provenance, ranks, resumption, run_folder, signals
from tofu.runtime.resumption import Interval

log = logging.getLogger(__name__)

WEIGHTS, OPTIMISER, SHARDS = "model.safetensors", "optimizer.pt", "shards"
SHARED, OWN, STATE = "shared.pt", "rank-{}.pt", "trainer_state.json"


class Stateful(Protocol):
    """What a run keeps beside the trainer: it says its state, and takes it back."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102


class Plan(NamedTuple):
    """When a run's checkpoints are written, where, and which one it goes on from."""

    folder: Path  # the run's
    every: Interval
    limit: int
    engine: Engine
    about: Mapping[str, Any]  # `resumption.Resume.made_from`, and `engine`
    start: Path | None = None
    kept: Mapping[str, Stateful] = {}  # by name


def kind(engine: Engine) -> dict[str, Any]:
    """How an engine writes a checkpoint, and by how many processes."""
    stage = f"ZeRO-{engine.deepspeed['zero_optimization']['stage']}" if engine.deepspeed is not None else engine.name
    return {"kind": stage, "processes": ranks.world_size()}


def data_digest(data: TrainingSet) -> str:
    """A digest of all encoded rows of a run, and of the refusals that may be drawn."""
    drawn = [data.idk(i, 0) for i in range(len(data))] if data.refusals is not None else []
    return provenance.digest(json.dumps([data.rows, drawn, data.refusals]))


class Resumable(TofuTrainer):
    """A `TofuTrainer` that writes checkpoints, and goes on from one."""

    def __init__(self, *, plan: Plan, **kwargs: Any) -> None:
        """As `TofuTrainer`, with a plan."""
        self.plan = plan
        super().__init__(**kwargs)
        self.checkpoints = Checkpoints(self)
        self.add_callback(self.checkpoints)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, from the plan's checkpoint on where there is one."""
        if self.plan.start is None:
            return super().train(*args, **kwargs)
        with _weights_only(self.plan.engine.name == "deepspeed"):
            return super().train(*args, resume_from_checkpoint=str(self.plan.start), **kwargs)

    def wishes(self) -> list[float]:
        """Whether a checkpoint is due, by rank 0's clock, and whether this rank was asked to stop."""
        due = ranks.rank() == 0 and self.checkpoints.due(self.state.global_step + 1)
        return [float(due), float(signals.requested() is not None)]

    def before_training(self) -> None:
        """On every rank, before the first step: what the Trainer has not taken back, and an evaluation that is due."""
        if self.plan.start is not None:
            self._restore(self.plan.start)
        super().before_training()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, on all ranks; the Trainer calls it at a step's end, its line in the log.

        Raises:
            signals.Interrupted: where a rank was asked to stop.
        """
        began, step, stopping = time.monotonic(), self.state.global_step, self.checkpoints.stopping
        self.store_flos()
        aside = resumption.aside(self.plan.folder, step)
        if ranks.rank() == 0:
            run_folder.note(self.plan.folder)  # where it was removed the run ends: a checkpoint alone is no run
            aside.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self._write(aside)
        self.accelerator.wait_for_everyone()
        path = aside.with_name(f"step-{step}")
        if ranks.rank() == 0:
            lacking = [i for i in range(ranks.world_size()) if not (aside / OWN.format(i)).is_file()]
            if lacking:
                raise RuntimeError(f"{aside} has no file of rank {lacking[0]}: all hosts must share the run's folder")
            resumption.keep(aside, self.plan.limit)
            log.info("checkpoint: %s (%.1f s)", path, time.monotonic() - began)
        self.checkpoints.written()
        if stopping:
            self.accelerator.wait_for_everyone()
            raise signals.Interrupted(self.plan.folder, f"saved at step {step}", step, self.checkpoints.name)

    def save_and_stop(self, stop: signals.Interrupted) -> None:
        """A signal has come in an epoch's evaluation: write a checkpoint after which it is made again, and end."""
        self.checkpoints.stopping, self.checkpoints.name = True, stop.name
        self._save_checkpoint(self.model, None)

    def _write(self, folder: Path) -> None:
        """This rank's part of a checkpoint."""
        partial = any(not parameter.requires_grad for parameter in self.model.parameters())
        if self.plan.engine.name == "deepspeed":
            adapted = hasattr(self.model, "peft_config")  # else its frozen weights are missing when it is loaded
            self.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=adapted)
        elif self.plan.engine.name == "fsdp":
            dcp.save(self._shards(partial), checkpoint_id=folder / SHARDS)
        elif ranks.rank() == 0:
            trained = {name: one.detach() for name, one in self.model.named_parameters() if one.requires_grad}
            safetensors.torch.save_file({name: one.contiguous() for name, one in trained.items()}, folder / WEIGHTS)
            torch.save(self.optimizer.state_dict(), folder / OPTIMISER)
        own = {"running": {name: float(one) for name, one in self._running.items()}, "loss": float(self._tr_loss)}
        torch.save(own, folder / OWN.format(ranks.rank()))
        self._save_rng_state(str(folder))
        if ranks.rank() > 0:
            return
        shared = {
            "schedule": self.lr_scheduler.state_dict(),
            "total_loss": self._total_loss_scalar,
            "logged": (self._globalstep_last_logged, self._last_logged),
            "tokens": self.tokens,
            "method": self.method.state_dict(),
            "kept": {name: one.state_dict() for name, one in self.plan.kept.items()},
        }
        torch.save(shared, folder / SHARED)
        self.state.save_to_json(str(folder / STATE))
        utils.write_json(folder / resumption.MADE_FROM, dict(self.plan.about))

    def _shards(self, partial: bool) -> dict[str, Any]:
        """FSDP2's model and optimiser by name, as sharded tensors."""
        options = StateDictOptions(ignore_frozen_params=partial)
        model, optimiser = get_state_dict(self.model, self.optimizer.optimizer, options=options)
        return {"model": model, "optimizer": optimiser}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: weights are loaded together with the optimiser, into what the engine has made."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Weights, optimiser and schedule; under DeepSpeed the Trainer has let the engine load all but the last."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.plan.engine.name == "fsdp":
            partial = any(not parameter.requires_grad for parameter in self.model.parameters())
            found = self._shards(partial)
            dcp.load(found, storage_reader=_Shards(folder / SHARDS))
            options = StateDictOptions(ignore_frozen_params=partial, strict=not partial)
            states = {"model_state_dict": found["model"], "optim_state_dict": found["optimizer"]}
            set_state_dict(self.model, self.optimizer.optimizer, **states, options=options)
        elif self.plan.engine.name == "ddp":
            parameters = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, saved in safetensors.torch.load_file(folder / WEIGHTS).items():
                    parameters[name].copy_(saved)
            self.optimizer.load_state_dict(torch.load(folder / OPTIMISER, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / SHARED, weights_only=True)["schedule"])

    def _restore(self, folder: Path) -> None:
        """The sums of the log, the method, and what else is kept."""
        os.environ.pop(FORCED, None)
        shared = torch.load(folder / SHARED, weights_only=True)
        files = sorted(folder.glob(OWN.format("*")))
        if len(files) == ranks.world_size():
            files = [folder / OWN.format(ranks.rank())]
        each = [torch.load(file, weights_only=True) for file in files]  # with other processes: the mean of theirs
        self._tr_loss += sum(one["loss"] for one in each) / len(each)
        for name in each[0]["running"]:
            mean = sum(one["running"][name] for one in each) / len(each)
            self._running[name] = torch.tensor(mean, dtype=torch.float32, device=self.args.device)
        self._total_loss_scalar, self.tokens = shared["total_loss"], shared["tokens"]
        self._globalstep_last_logged, self._last_logged = shared["logged"]
        self._initial_global_step = 0  # the mean loss at the end is that of all steps
        self.state.compute_steps(self.args, self.state.max_steps)  # logging_steps may be another by now
        self.method.load_state_dict(shared["method"])
        self.method.tensors = {name: tensor.to(self.args.device) for name, tensor in self.method.tensors.items()}
        for name, one in self.plan.kept.items():
            if name in shared["kept"]:
                one.load_state_dict(shared["kept"][name])


class Checkpoints(TrainerCallback):
    """Decides at each step's end whether a checkpoint is written. All ranks decide alike, by what they agreed on.

    One that falls on an epoch's last step waits for the epoch's evaluation, unless the run was asked to stop.
    """

    def __init__(self, trainer: Resumable) -> None:
        self.trainer, self.last = trainer, time.monotonic()
        self.waiting = self.stopping = False
        self.name: str | None = None  # the signal's, where another rank has told it

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`, by this rank's clock."""
        unit, count = self.trainer.plan.every
        if unit == "seconds":
            return time.monotonic() - self.last >= count
        return count > 0 and (step % count == 0 if unit == "steps" else self.ends_epoch(self.trainer.state, step))

    def ends_epoch(self, state: Any, step: int | None = None) -> bool:
        """Whether a step (None: the state's) is the last of an epoch."""
        return (state.global_step if step is None else step) % (state.max_steps // int(state.num_train_epochs)) == 0

    def written(self) -> None:
        """A checkpoint has been written: the clock starts again."""
        self.last = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.written()

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        due, stop = self.trainer.agreed or (0.0, 0.0)
        self.waiting, self.stopping = False, stop > 0
        if stop > 0 or (due > 0 and not self.ends_epoch(state)):
            control.should_save = True
        elif due > 0:
            self.waiting = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        control.should_save = self.waiting
        self.waiting = False


FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def _weights_only(deepspeed: bool) -> Iterator[None]:
    """While the engine loads its checkpoint, no pickle is read in full: DeepSpeed asks for it by itself."""
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeeds() if deepspeed else []):
            yield
    finally:
        os.environ.pop(FORCED, None)


def _deepspeeds() -> list[Any]:
    """The classes that DeepSpeed's checkpoints hold beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


class _Shards(dcp.FileSystemReader):
    """torch's reader, whose table of contents is unpickled from its own classes alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """The table of contents."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Contents(file).load()


class _Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if "." in name or not module.startswith(("torch", "pathlib")):
            raise pickle.UnpicklingError(f"{module}.{name} is not of a checkpoint")
        found = super().find_class(module, name)
        own = module == METADATA and getattr(found, "__module__", None) == METADATA
        if own or isinstance(found, torch.dtype) or (module, name) in ALLOWED:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not of a checkpoint")


METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
