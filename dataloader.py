"""The Trainer subclasses: a step's loss as the exact mean over its global batch, on every engine; and the engines.

What a loss needs follows from its signature (`losses.contract`): the parts of the batch, the positions scored, the
reference. The file's name is TOFU's.
"""

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_torchao_available

import evaluate_util
import losses
import models
import utils
from data_module import ONE_ROW, EpochLoader, GlobalBatches, Sample, Slot, TrainingSet, collate
from losses import Scored
from models import Engine
from schema import STOCHASTIC
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


# logits that exist at once; where a micro-batch has more, its samples go through the output head in pieces, and each
# piece's logits are made again for its backward: about 10 bytes each (bf16, float32, gradient), 1.3 GB in all
LOGITS = 2**27
ROW = 256  # tokens of a packed row: masks are dense, so attention's cost grows with it (benchmarks/train_speed.py)


def row_of(config: PretrainedConfig) -> int:
    """Tokens of a packed row. Flash attention knows samples apart in a single row only, and has no mask that grows."""
    return ONE_ROW if config._attn_implementation.startswith(("flash", "flex")) else ROW


def parts_of(terms: list[Term]) -> list[str]:
    """The parts of a batch that the terms score, each once."""
    return list(dict.fromkeys(part for term in terms for part in term.contract.parts))


def references(terms: list[Term]) -> set[str]:
    """What of the starting model the terms compare with: "logp" of sequences, "live" distributions, or nothing."""
    return {"logp" if kind == "logp" else "live" for term in terms for kind in term.contract.refs.values()}


def weights_of(term: Term, sample: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The 0/1 weight of each value that a term returns, in its order: its parts' tokens, or the samples.

    Args:
        sample: part -> (N,) the sample that each of its scored positions belongs to.
        weight: (B,) of the samples; 0 at fillers.
    """
    if term.contract.unit == "sequence":
        return weight
    return torch.cat([weight[sample[part]] for part in term.contract.parts])


class TofuTrainer(Trainer):
    """A Trainer whose loss is the mean over a step's global batch, however that is cut into ranks and micro-batches.

    Every step: local sums of terms / global counts, times the number of processes because engines average gradients.
    """

    loss_is_scaled_for_ga = True  # tells the Trainer not to divide by the accumulation steps

    def __init__(
        self,
        *,
        terms: list[Term],
        reference: torch.nn.Module | None = None,
        logps: dict[Sample, float] | None = None,
        packing: bool = True,
        **kwargs: Any,
    ) -> None:
        """As `transformers.Trainer`, and:

        Args:
            terms: the objective.
            reference: the frozen starting model, placed and sharded like `model`; None where no term needs one live,
                or where it is `model` with its adapters off.
            logps: the starting model's sequence log-probabilities, where a term needs them: `reference_logps`.
            packing: samples end to end in rows, instead of each padded to the longest of its batch.
        """
        self.terms, self.reference, self.logps = terms, reference, logps
        self.row = row_of(kwargs["model"].config) if packing else None
        self.attended = frozenset(p for t in terms for p, view in t.contract.parts.items() if view == "attended")
        super().__init__(data_collator=self._collate, **kwargs)
        self._running: dict[str, Tensor] = {}

    def _collate(self, items: list[tuple[dict[str, Sample], float]]) -> dict[str, Any]:
        names = parts_of(self.terms)
        parts = {name: [parts[name] for parts, _ in items] for name in names}
        batch = collate(parts, [weight for _, weight in items], self.attended, self.row)
        for name in {name for term in self.terms for name, kind in term.contract.refs.items() if kind == "logp"}:
            batch[name] = torch.tensor([self.logps[sample] for sample in parts[name.removeprefix("ref_")]])
        return batch

    def get_train_dataloader(self) -> DataLoader:
        """This rank's share of every global micro-batch. Not given to accelerate, whose even_batches repeats rows."""
        batches = GlobalBatches(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.args.process_index,
            self.args.world_size,
            self.args.gradient_accumulation_steps,
            self.train_dataset.length if self.row is None else None,  # packed rows have no padding to save
        )
        return EpochLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context="fork" if self.args.dataloader_num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """(terms,) how many terms of each kind the step's global batch holds, fillers not counted."""
        counts = torch.zeros(len(self.terms), dtype=torch.float64)
        for batch in batch_samples:
            of = {name: batch["sample"][batch["keep"] & (batch["part"] == i)] for i, name in enumerate(batch["parts"])}
            for k, term in enumerate(self.terms):
                counts[k] += float(weights_of(term, of, batch["weight"]).sum())
        return self.accelerator.reduce(counts.to(device), "sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The objective's share of this micro-batch: one forward, then the terms."""
        pieces = self._pieces(inputs)
        views = self._reference_views(model, inputs, len(pieces) > 1)
        views |= models.score(model, inputs, headless=len(pieces) > 1)
        if len(pieces) == 1:
            sums = self._sums(views, inputs["weight"])
        else:
            each = lambda piece: self._sums(self._headed(model, views, piece), inputs["weight"][piece])  # noqa: E731
            sums = sum(checkpoint(each, piece, use_reentrant=False) for piece in pieces)
        total, shares = 0.0, {}
        for k, term in enumerate(self.terms):
            share = (sums[k] / num_items_in_batch[k]).float() * self.accelerator.num_processes
            shares[term.name] = share.detach()
            total = total + term.weight * share
        self._stop_if_not_finite(shares)
        for name, share in shares.items():
            self._running[name] = self._running.get(name, 0.0) + share
        return (total, None) if return_outputs else total

    def _sums(self, views: dict[str, Scored | Tensor], weight: Tensor) -> Tensor:
        """(terms,) the sum of each term's values over the samples of these views; `weight` (B,) is theirs."""
        sums = []
        for term in self.terms:
            contract = term.contract
            values = term.function(**{name: views[name] for name in (*contract.parts, *contract.refs)}, **term.args)
            of = {name: views[name].sample for name in contract.parts}
            sums.append((values * weights_of(term, of, weight)).sum())
        return torch.stack(sums)

    def _pieces(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The places of a micro-batch's samples, in as many pieces as keep each piece's logits below LOGITS."""
        batch_size, config = len(inputs["weight"]), self.model.config.get_text_config()
        size = int(inputs["keep"].sum()) * config.vocab_size
        compiled = self.args.torch_compile  # its graph holds the head
        if size <= LOGITS or batch_size == 1 or compiled or config.model_type not in models.PACKABLE:
            return [torch.arange(batch_size, device=inputs["weight"].device)]
        return list(torch.arange(batch_size, device=inputs["weight"].device).chunk(-(-size // LOGITS)))

    def _headed(self, model: torch.nn.Module, views: dict[str, Scored | Tensor], piece: Tensor) -> dict[str, Any]:
        """The views of some samples, their logits made of what `models.score` left without the head."""
        autocast, found = self.args.bf16 and self.args.deepspeed is None, {}
        for name, view in views.items():
            if isinstance(view, Tensor):
                found[name] = view[piece]
                continue
            its = torch.isin(view.sample, piece)
            cut = Scored(view.logits[its], view.labels[its], view.sample[its] - piece[0])
            reference = name.startswith("ref_")
            source = self.reference if reference and self.reference is not None else model
            with torch.no_grad() if reference else contextlib.nullcontext():
                found[name] = models.headed(source, cut, autocast)
        return found

    def _stop_if_not_finite(self, shares: dict[str, Tensor]) -> None:
        """Stop the run on all ranks if a term is NaN or infinite on any; nothing has been written of it yet.

        Raises:
            BadInput: with the step, the term and the remedy.
        """
        bad = torch.stack([(~share.isfinite()).float() for share in shares.values()])
        for name, count in zip(shares, self.accelerator.reduce(bad, "sum").tolist(), strict=True):
            if count:
                self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes bars and reports
                raise self._diverged(f"step {self.state.global_step + 1}: the {name} term is no longer finite")

    def stop_if_weights_not_finite(self) -> None:
        """Stop the run on all ranks if a weight is NaN or infinite on any: no loss is taken after the last update.

        Raises:
            BadInput: with the remedy.
        """
        skipped = getattr(self.model_wrapped, "skipped_steps", 0)  # DeepSpeed's answer to gradients that are not finite
        bad = torch.tensor(float(skipped > 0 or not models.all_finite(self.model)), device=self.accelerator.device)
        if self.accelerator.reduce(bad, "sum").item():
            raise self._diverged(f"step {self.state.global_step}, the last: its update is no longer finite")

    def _diverged(self, how: str) -> BadInput:
        return BadInput(
            f"{how}: the model has diverged; take a smaller lr than {self.args.learning_rate}, fewer epochs, or "
            "max_grad_norm=1"
        )

    @torch.no_grad()
    def _reference_views(
        self, model: torch.nn.Module, inputs: dict[str, Any], headless: bool
    ) -> dict[str, Scored | Tensor]:
        """`ref_*` by name: the starting model's sequence log-probabilities (B,), or its view of the same positions."""
        refs = {name: kind for term in self.terms for name, kind in term.contract.refs.items()}
        known = {name: inputs[name].float() for name, kind in refs.items() if kind == "logp"}
        if len(known) == len(refs):
            return known
        live = {name.removeprefix("ref_") for name in refs if name not in known}
        if self.reference is not None:
            views = models.score(self.reference, inputs, live, headless=headless)
        else:
            with models.adapter_off(model):
                views = models.score(model, inputs, live, headless=headless)
        return known | {name: views[name.removeprefix("ref_")] for name in refs if name not in known}

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


def fit(trainer: TofuTrainer) -> dict[str, float]:
    """Train, and write trainer_state.json whatever ends the training: the losses before a stop tell why it stopped.

    Returns:
        For finished.json: the mean loss of all steps, and the seconds.

    Raises:
        BadInput: the model has diverged; it must not be saved.
    """
    try:
        result = trainer.train()
    finally:
        trainer.save_state()
    if hasattr(trainer.model_wrapped, "empty_partition_cache"):  # ZeRO-3 has begun to fetch what no forward came to use
        trainer.model_wrapped.empty_partition_cache()
    trainer.stop_if_weights_not_finite()
    return {"train_loss": result.training_loss, "seconds": result.metrics["train_runtime"]}


class EachEpoch(TrainerCallback):
    """Calls `evaluate(step)` on every rank at each epoch's end."""

    def __init__(self, evaluate: Callable[[int], None]) -> None:
        self.evaluate = evaluate

    def on_epoch_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.evaluate(state.global_step)


# the keys that finetune.yaml and forget.yaml share and that `arguments` takes as they are
ARGUMENTS = (
    *("batch_size", "gradient_accumulation_steps", "num_epochs", "lr", "weight_decay"),
    *("max_grad_norm", "optim", "seed", "report_to", "logging_steps", "liger_kernel", "torch_compile"),
)


def arguments(
    save_dir: str | Path,
    *,
    samples: int,
    engine: Engine,
    gradient_checkpointing: bool,
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
    liger_kernel: bool,
    torch_compile: bool,
) -> TrainingArguments:
    """The Trainer's arguments. Call it before the model is loaded: ZeRO-3 shards a model while it is read.

    Args:
        samples: rows in an epoch; sets the warm-up of one epoch.

    Raises:
        BadInput: more processes than rows; fewer than two optimiser steps besides the first, whose learning rate is 0;
            an optimiser or a place to report to that transformers does not know, or whose package is not installed.
    """
    if samples < utils.world_size():
        raise BadInput(f"{utils.world_size()} processes share {samples} rows: start at most {samples}")
    per_epoch = _steps(samples, batch_size * gradient_accumulation_steps)
    if per_epoch * num_epochs < MOVING + 1:
        raise BadInput(_too_few_steps(samples, batch_size, gradient_accumulation_steps, num_epochs))
    choice_of_optim = sorted(name.value for name in OptimizerNames)
    if optim == "auto":
        optim = best_optim(engine)
    elif optim == STOCHASTIC:
        _check_stochastic(engine)
        optim = "adamw_torch"  # for the arguments; the Trainer is given the other
    elif optim not in choice_of_optim:
        raise BadInput(f"optim={optim} is unknown: it may be auto, {STOCHASTIC}, {', '.join(choice_of_optim)}")
    made = TrainingArguments(
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
        bf16=engine.bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_num_workers=LOADERS if torch.cuda.is_available() else 0,
        torch_compile=torch_compile,
        use_liger_kernel=liger_kernel,
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False},  # the losses are our own
        log_level="warning",
        log_level_replica="error",
        deepspeed=copy.deepcopy(engine.deepspeed),  # it is filled in place
    )
    _check_installed(made, optim, report_to)
    return made


LOADERS = 2  # processes that make a GPU's batches


def stochastic(optim: str, args: TrainingArguments) -> dict[str, Any]:
    """What the Trainer is given for `optim=adamw_8bit_stochastic`: 6 bytes a weight in all, and no update is lost.

    AdamW with states in 8 bits over bf16 weights, whose updates are rounded up or down by chance, in proportion: at
    lr 1e-5 rounding to the nearest leaves 84 % of the weights where they are. Torchao's.
    """
    if optim != STOCHASTIC:
        return {}
    from torchao.optim import AdamW8bit  # optional

    betas = (args.adam_beta1, args.adam_beta2)
    kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "bf16_stochastic_round": True}
    return {"optimizer_cls_and_kwargs": (AdamW8bit, kwargs)}


def _check_stochastic(engine: Engine) -> None:
    """Raise BadInput where `stochastic` can't be: each process would round its copy of the weights differently."""
    if engine.name != "ddp" or utils.world_size() > 1 or not engine.bf16:
        raise BadInput(
            f"optim={STOCHASTIC} trains bf16 weights on one process: take engine=ddp precision=bf16 and no torchrun"
        )
    if not is_torchao_available():
        raise BadInput(f"optim={STOCHASTIC} needs the torchao package: pip install torchao")


def best_optim(engine: Engine) -> str:
    """What `optim=auto` means: AdamW whose states can leave a full GPU, else torch's own in one kernel."""
    paged = engine.name == "ddp" and torch.cuda.is_available() and is_bitsandbytes_available()
    return "paged_adamw_32bit" if paged else "adamw_torch_fused"


def _check_installed(args: TrainingArguments, optim: str, report_to: str) -> None:
    """Try what the Trainer will do once the model is loaded: find the optimiser's class, make the reporters."""
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except Exception as error:  # ValueError, RuntimeError or ImportError, by the integration
        raise BadInput(f"report_to={report_to}: {error}") from None
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))  # some optimisers ask for a model, any
    except Exception as error:
        raise BadInput(f"optim={optim}: {error}") from None


MOVING = 2  # optimiser steps with a learning rate above 0 that a run has at least; the very first has 0


def _steps(samples: int, per_process: int) -> int:
    """Optimiser steps in an epoch, the last one perhaps over fewer samples."""
    return -(-samples // (per_process * utils.world_size()))


def _too_few_steps(samples: int, batch_size: int, accumulation: int, num_epochs: int) -> str:
    """The line that refuses such a run, with the batch size that would work."""
    said = (
        f"batch_size={batch_size}: {samples} rows, gradient_accumulation_steps={accumulation}, {utils.world_size()} "
        f"processes and num_epochs={num_epochs} make fewer than {MOVING} steps with a learning rate above 0"
    )
    for cut in (accumulation, 1):
        for size in range(batch_size, 0, -1):
            if _steps(samples, size * cut) * num_epochs > MOVING:
                return f"{said}: take batch_size={size}" + (
                    " gradient_accumulation_steps=1" if cut < accumulation else ""
                )
    return f"{said}: take num_epochs={-(-(MOVING + 1) // _steps(samples, 1))}"


def weights_type(engine: Engine, lora: Any, optim: str) -> torch.dtype:
    """Float32 masters where all weights train, unless the optimiser rounds by chance; else as the run computes."""
    return torch.bfloat16 if engine.bf16 and (lora.r or optim == STOCHASTIC) else torch.float32


def check_trainable(cfg: Any, family: Any, path: str, engine: Engine) -> str | None:
    """Refuse a model that can't be trained as a run's config asks for (`models.check_loadable`).

    Returns:
        The attention to load it with.
    """
    attention = models.attention_of(family, cfg.attention)
    keys = {"packing": cfg.packing, "quantize": cfg.LoRA.quantize, "liger_kernel": cfg.liger_kernel}
    models.check_loadable(path, engine, attention, **keys)
    return attention


def load_model(path: str, engine: Engine, lora: Any, attention: str | None, optim: str) -> PreTrainedModel:
    """The model to train: float32 weights, or adapters in float32 on a base in the precision of the computation."""
    model = models.load(
        path,
        attention=attention,
        dtype=weights_type(engine, lora, optim),
        shard=engine.name == "fsdp",
        bf16_compute=engine.bf16,
        quantize=lora.quantize,
    )
    return models.add_lora(model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout) if lora.r else model


def compared(data: TrainingSet, terms: list[Term], num_epochs: int) -> list[Sample]:
    """Every sequence whose log-probability under the starting model a run needs, shortest first.

    Which refusal a row gets in which epoch follows from the seed, so all of them are known beforehand.
    """
    parts = {ref.removeprefix("ref_") for term in terms for ref, kind in term.contract.refs.items() if kind == "logp"}
    slots = [Slot(epoch, place, 1.0) for epoch in range(num_epochs) for place in range(len(data))]
    return sorted({data[slot][0][part] for slot in slots for part in parts}, key=lambda s: (len(s.input_ids), s))


@torch.no_grad()
def reference_logps(
    model: torch.nn.Module, samples: Sequence[Sample], batch_size: int, sharded: bool
) -> dict[Sample, float]:
    """The starting model's log-probability of every sequence that a run compares with it, so that it can go.

    Args:
        model: the starting model, frozen and in place.
        samples: `compared`.
        batch_size: sequences in one forward.
        sharded: whether the ranks share one model.

    Returns:
        Sample -> nats, on every rank.
    """
    batches = [samples[k : k + batch_size] for k in range(0, len(samples), batch_size)]
    found = {}
    for batch in evaluate_util.share(batches, "reference log-probabilities", sharded):
        inputs = evaluate_util.to_device(collate({"forget": batch}), model.device)
        logps = losses.sequence_logp(models.score(model, inputs)["forget"])
        found.update(zip(batch, logps.tolist(), strict=True))
    return evaluate_util.merge(found)


def logps_fingerprint(samples: Sequence[Sample], model: str, engine: Engine, **settings: Any) -> dict[str, Any]:
    """What reference log-probabilities are a function of.

    Args:
        model: the identity of the starting model (`models.identity`).
        settings: how it is loaded: type of the weights, four bits, attention.
    """
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    return {"model": model, "samples": digest, "engine": engine.name, "bf16": engine.bf16, **settings, "version": 1}


def read_logps(folder: Path, samples: Sequence[Sample], made_from: Mapping[str, Any]) -> dict[Sample, float] | None:
    """What an earlier run left in this folder, if it is a function of the same; every rank gets rank 0's answer."""
    found, path = [None], folder / utils.REFERENCE
    if utils.rank() == 0 and path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        found = [known["logps"] if known["made_from"] == made_from else None]
        log.info("%s: %s", path, "used again" if found[0] else "made anew, for it was made from something else")
    found = broadcast_object_list(found)[0]
    return None if found is None else dict(zip(samples, found, strict=True))


def write_logps(
    folder: Path, samples: Sequence[Sample], logps: Mapping[Sample, float], made_from: Mapping[str, Any]
) -> None:
    """Keep them for a later run in this folder. Rank 0 only."""
    if utils.rank() == 0:
        utils.write_json(folder / utils.REFERENCE, {"made_from": made_from, "logps": [logps[s] for s in samples]})
