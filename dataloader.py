"""The Trainer subclasses: a step's loss as the exact mean over its global batch, on every engine; and the engines.

What a loss needs follows from its signature (`losses.contract`): the parts of the batch, the positions scored, the
reference. The file's name is TOFU's.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import losses
import models
import utils
from data_module import EpochLoader, GlobalBatches, Sample, collate
from losses import Scored
from utils import BadInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Term:
    """One summand of an objective: weight * mean of function(views..., **args) over the global batch."""

    name: str  # forget or retain; names it in the log
    function: Callable[..., Tensor]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contract(self) -> losses.Contract:
        """What the function's signature asks for."""
        return losses.contract(self.function)


def objective(method: Any) -> list[Term]:
    """The terms that a `config/forget_loss` file names: total = forget_weight * forget + retain_weight * retain."""
    terms = [Term("forget", losses.FORGET[method.forget], method.forget_weight, dict(method.forget_args))]
    if method.retain is not None:
        terms.append(Term("retain", losses.RETAIN[method.retain], method.retain_weight))
    return terms


FINETUNE = [Term("retain", losses.nll)]  # finetuning is the retain term alone


def parts_of(terms: list[Term]) -> list[str]:
    """The parts of a batch that the terms score, each once."""
    return list(dict.fromkeys(part for term in terms for part in term.contract.parts))


def needs_reference(terms: list[Term]) -> bool:
    """Whether any term compares with the starting model."""
    return any(term.contract.refs for term in terms)


class TofuTrainer(Trainer):
    """A Trainer whose loss is the mean over a step's global batch, however that is cut into ranks and micro-batches.

    Every step: local sums of terms / global counts, times the number of processes because engines average gradients.
    """

    loss_is_scaled_for_ga = True  # tells the Trainer not to divide by the accumulation steps

    def __init__(self, *, terms: list[Term], reference: PreTrainedModel | None = None, **kwargs: Any) -> None:
        """As `transformers.Trainer`, and:

        Args:
            terms: the objective.
            reference: the frozen starting model, placed and sharded like `model`; None where no term needs one, or
                where it is `model` with its adapters off.
        """
        self.terms, self.reference = terms, reference
        self.attended = frozenset(p for t in terms for p, view in t.contract.parts.items() if view == "attended")
        super().__init__(data_collator=self._collate, **kwargs)
        self._running: dict[str, Tensor] = {}

    def _collate(self, items: list[tuple[dict[str, Sample], float]]) -> dict[str, Any]:
        names = items[0][0]
        parts = {name: [parts[name] for parts, _ in items] for name in names}
        return collate(parts, [weight for _, weight in items], self.attended)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's share of every global micro-batch. Not given to accelerate, whose even_batches repeats rows."""
        batches = GlobalBatches(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        return EpochLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=torch.cuda.is_available(),
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """(terms,) how many terms of each kind the step's global batch holds, fillers not counted."""
        counts = torch.zeros(len(self.terms), dtype=torch.float64)
        for batch in batch_samples:
            for k, term in enumerate(self.terms):
                counts[k] += sum(float(weights.sum()) for weights in self._weights(term, batch))
        return self.accelerator.reduce(counts.to(device), "sum")

    def _weights(self, term: Term, batch: dict[str, Any]) -> list[Tensor]:
        """The 0/1 weight of each value that a term returns, in its order: its parts' tokens, or the samples."""
        if term.contract.unit == "sequence":
            return [batch["weight"]]
        weights = []
        for part in term.contract.parts:
            first, last = batch["parts"][part]
            scored = batch["keep"][first:last].sum(1)
            weights.append(batch["weight"].repeat_interleave(scored))
        return weights

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The objective's share of this micro-batch: one forward, then the terms."""
        views = {**self._reference_views(model, inputs), **models.score(model, inputs)}
        total = 0.0
        for k, term in enumerate(self.terms):
            contract = term.contract
            values = term.function(**{name: views[name] for name in (*contract.parts, *contract.refs)}, **term.args)
            share = (values * torch.cat(self._weights(term, inputs))).sum() / num_items_in_batch[k]
            share = share.float() * self.accelerator.num_processes
            self._running[term.name] = self._running.get(term.name, 0.0) + share.detach()
            total = total + term.weight * share
        return (total, None) if return_outputs else total

    @torch.no_grad()
    def _reference_views(self, model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Scored | Tensor]:
        """`ref_*` by name: the starting model's sequence log-probabilities (B,), or its view of the same positions."""
        refs = {name: kind for term in self.terms for name, kind in term.contract.refs.items()}
        if not refs:
            return {}
        if self.reference is not None:
            views = models.score(self.reference, inputs)
        else:
            with models.adapter_off(model):
                views = models.score(model, inputs)
        views = {f"ref_{part}": view for part, view in views.items()}
        return {
            name: losses.sequence_logp(views[name]) if kind == "logp" else views[name] for name, kind in refs.items()
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, each a mean over the steps since the last line, to the Trainer's own numbers."""
        if "loss" in logs and len(self.terms) > 1:
            steps = max(1, self.state.global_step - self._last_logged)
            for name, running in self._running.items():
                logs[f"{name}_loss"] = float(self.accelerator.gather(running.reshape(1)).mean()) / steps
        if "loss" in logs:
            self._running, self._last_logged = {}, self.state.global_step
        super().log(logs, start_time)

    _last_logged = 0


class EachEpoch(TrainerCallback):
    """Calls `evaluate(step)` on every rank at each epoch's end."""

    def __init__(self, evaluate: Callable[[int], None]) -> None:
        self.evaluate = evaluate

    def on_epoch_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.evaluate(state.global_step)


def resolve_engine(name: str) -> str:
    """`auto` made definite: ZeRO-3 where several GPUs share the work, as the published runs did; else DDP."""
    if name == "auto":
        name = "zero3" if torch.cuda.is_available() and utils.world_size() > 1 else "ddp"
    if name == "fsdp" and utils.world_size() < 2:
        raise BadInput(
            "engine=fsdp shards a model over processes and there is 1: start it with torchrun, or engine=ddp"
        )
    return name


# the keys that finetune.yaml and forget.yaml share and that `arguments` takes as they are
ARGUMENTS = (
    *("ds_config", "precision", "batch_size", "gradient_accumulation_steps", "num_epochs", "lr", "weight_decay"),
    *("max_grad_norm", "optim", "seed", "report_to", "logging_steps"),
)


def arguments(
    save_dir: str | Path,
    *,
    samples: int,
    engine: str,
    gradient_checkpointing: bool,
    ds_config: str | None,
    precision: str,
    batch_size: int,
    gradient_accumulation_steps: int,
    num_epochs: int,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
    optim: str,
    seed: int,
    report_to: str,
    logging_steps: int,
) -> TrainingArguments:
    """The Trainer's arguments. Call it before the model is loaded: ZeRO-3 shards a model while it is read.

    Args:
        samples: rows in an epoch; sets the warm-up of one epoch.
        engine: ddp, zero2, zero3 or fsdp, as `resolve_engine` gave it.
        ds_config: a DeepSpeed json; None for the repository's.

    Raises:
        BadInput: more processes than rows; fewer than two optimiser steps, of which the first has learning rate 0.
    """
    if samples < utils.world_size():
        raise BadInput(f"{utils.world_size()} processes share {samples} rows: start at most {samples}")
    step = batch_size * gradient_accumulation_steps * utils.world_size()
    per_epoch = -(-samples // step)
    if per_epoch * num_epochs < 2:
        raise BadInput(
            f"{samples} rows in batches of {step} (batch_size * gradient_accumulation_steps * processes) make 1 step "
            f"in num_epochs={num_epochs}, and its learning rate is 0: take smaller batches or num_epochs=2 or more"
        )
    deepspeed = None
    if engine in ("zero2", "zero3"):
        path = Path(utils.find(ds_config)) if ds_config else utils.REPO / "config" / "ds_config.json"
        deepspeed = json.loads(path.read_text())
        deepspeed["zero_optimization"]["stage"] = int(engine[-1])
        _stand_alone()
    return TrainingArguments(
        output_dir=str(save_dir),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=num_epochs,
        learning_rate=lr,
        lr_scheduler_type="linear",
        warmup_steps=per_epoch,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optim=optim,
        seed=seed,
        report_to=report_to,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,  # on by default, it hides a loss that has become NaN
        save_strategy="no",
        bf16=models.wants_bf16(precision),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        log_level="warning",
        log_level_replica="error",
        deepspeed=deepspeed,
    )


def _stand_alone() -> None:
    """Tell DeepSpeed, which asks MPI otherwise, that a process without a launcher is alone."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))


def load_model(path: str, engine: str, precision: str, lora: Any, attention: str | None) -> PreTrainedModel:
    """The model to train: float32 weights, or adapters in float32 on a base in the precision of the computation."""
    bf16 = models.wants_bf16(precision)
    dtype = torch.bfloat16 if bf16 and lora.r else torch.float32
    model = models.load(path, attention=attention, dtype=dtype, shard=engine == "fsdp", bf16_compute=bf16)
    return models.add_lora(model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout) if lora.r else model


def load_reference(path: str, engine: str, args: TrainingArguments, attention: str | None) -> PreTrainedModel:
    """A frozen copy of the starting model, sharded where the engine shards."""
    dtype = torch.bfloat16 if args.bf16 and engine != "fsdp" else torch.float32
    model = models.load(path, attention=attention, dtype=dtype, shard=engine == "fsdp", bf16_compute=args.bf16)
    model.requires_grad_(False)
    model.eval()
    if engine == "zero3":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
            "zero_optimization": {**args.hf_deepspeed_config.config["zero_optimization"]},
            "bf16": {"enabled": args.bf16},
        }
        reference = deepspeed.initialize(model=model, config=config)[0]
        reference.eval()
        return reference
    return model if engine == "fsdp" else model.to(args.device)


def is_sharded(engine: str) -> bool:
    """Whether the ranks share one model, so that all must run every forward together."""
    return engine in ("zero3", "fsdp")
