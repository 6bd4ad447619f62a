"""The Trainer subclass: a step's loss as the exact mean over its global batch, on every engine.

What a loss needs follows from its signature (`losses.contract`): the parts of the batch, the positions scored, the
reference. The file's name is TOFU's.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, Trainer, TrainerCallback

from data_module import IGNORE, ONE_ROW, EpochLoader, GlobalBatches, Sample, collate
from tofu.methods import objective
from tofu.methods.objective import Method, Term
from tofu.models import architectures, forward, saving
from tofu.models.views import Scored, States
from tofu.runtime import run_folder
from utils import BadInput

log = logging.getLogger(__name__)


# logits that exist at once; where a micro-batch has more, its samples go through the output head in pieces, and each
# piece's logits are made again for its backward: about 10 bytes each (bf16, float32, gradient), 1.3 GB in all
LOGITS = 2**27
ROW = 256  # tokens of a packed row: masks are dense, so attention's cost grows with it (benchmarks/train_speed.py)


def row_of(config: PretrainedConfig) -> int:
    """Tokens of a packed row. Flash attention knows samples apart in a single row only, and has no mask that grows."""
    return ONE_ROW if architectures.one_row_only(config) else ROW


def answered(view: Scored) -> Scored:
    """The completion positions of a view that holds all attended ones, because another term reads them."""
    scored = view.labels != IGNORE
    return Scored(view.logits[scored], view.labels[scored], view.sample[scored])


class TofuTrainer(Trainer):
    """A Trainer whose loss is the mean over a step's global batch, however that is cut into ranks and micro-batches.

    Every step: local sums of terms / global counts, times the number of processes because engines average gradients.
    """

    loss_is_scaled_for_ga = True  # tells the Trainer not to divide by the accumulation steps

    def __init__(
        self,
        *,
        method: Method,
        reference: torch.nn.Module | None = None,
        logps: dict[Sample, float] | None = None,
        packing: bool = True,
        gradient_norms: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `transformers.Trainer`, and:

        Args:
            method: the objective's terms, and what the method does besides; `prepare` has run.
            reference: the frozen reference model, placed and sharded like `model`; None where no term needs one live,
                or where it is `model` with its adapters off.
            logps: the reference model's sequence log-probabilities, where a term needs them: `reference_logps`.
            packing: samples end to end in rows, instead of each padded to the longest of its batch.
            gradient_norms: log the norm of each weighted term's gradient, of the last step of each line.
        """
        self.method, self.reference, self.logps = method, reference, logps
        self.row = row_of(kwargs["model"].config) if packing else None
        kinds = {(part, kind) for term in self.terms for part, kind in term.contract.parts.items()}
        self.attended, self.states = (
            frozenset(part for part, kind in kinds if kind == wanted) for wanted in ("attended", "states")
        )
        self.gradient_norms = gradient_norms
        super().__init__(data_collator=self._collate, **kwargs)
        self.method.tensors = {name: tensor.to(self.args.device) for name, tensor in self.method.tensors.items()}
        self._running: dict[str, Tensor] = {}  # since the last line of the log
        self._step: dict[str, Tensor] = {}  # since the last optimiser step
        self._gradients: dict[str, list[Tensor]] = {}
        self._norms: dict[str, float] = {}
        self._last_logged = 0
        self._micro_batches = 1  # of the optimiser step at hand
        self._largest = 0  # scored positions in any rank's largest micro-batch of that step
        self.tokens = 0.0
        self.add_callback(EachStep(self._after_step))

    @property
    def terms(self) -> list[Term]:
        """The summands of the objective."""
        return self.method.terms

    def _collate(self, items: list[tuple[dict[str, Sample], float]]) -> dict[str, Any]:
        names = objective.parts_of(self.terms)
        parts = {name: [parts[name] for parts, _ in items] for name in names}
        batch = collate(parts, [weight for _, weight in items], self.attended, self.row, self.states)
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
        """(terms,) how many terms of each kind the step's global batch holds, fillers not counted; at least 1."""
        counts = torch.zeros(len(self.terms) + 2, dtype=torch.float64)
        self._micro_batches = len(batch_samples)
        for batch in batch_samples:
            number = {name: i for i, name in enumerate(batch["parts"])}
            for k, term in enumerate(self.terms):
                of = {}
                for name, kind in term.contract.parts.items():
                    scored = batch["keep"] & (batch["part"] == number[name])
                    if kind == "completion":
                        scored &= batch["targets"] != IGNORE
                    of[name] = batch["sample"][scored]
                counts[k] += float(objective.weights_of(term, of, batch["weight"]).sum())
            read = batch["sample"][batch["sample"] >= 0]
            counts[-2] += float(batch["weight"][read].sum())
            counts[-1] = max(float(counts[-1]), float(batch["keep"].sum()))
        every = self.accelerator.gather(counts[None].to(device))
        self.tokens += float(every[:, -2].sum())
        self._largest = int(every[:, -1].max())
        return every[:, :-2].sum(0).clamp(min=1)  # a term may skip all tokens of a step; its sum is 0

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
        views |= forward.score(model, inputs, headless=len(pieces) > 1, block=self.method.block)
        if len(pieces) == 1:
            sums = self._sums(views, inputs["weight"])
        else:
            each = lambda piece: self._sums(self._headed(model, views, piece), inputs["weight"][piece])  # noqa: E731
            sums = sum(checkpoint(each, piece, use_reentrant=False) for piece in pieces)
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        total, shares, weighted = 0.0, {}, {}
        for k, term in enumerate(self.terms):
            share = (sums[k] / num_items_in_batch[k]).float() * self.accelerator.num_processes
            shares[term.name] = share.detach()
            weight = self.method.term_weight(term, progress)
            weighted[term.name] = weight * share
            # each micro-batch of the step takes its part of the constant
            bound = weight * term.bound / self._micro_batches if term.bound else 0.0
            total = total + weighted[term.name] - bound
        self._stop_if_not_finite(shares)
        for kept in (self._running, self._step):
            for name, share in shares.items():
                kept[name] = kept.get(name, 0.0) + share
        if self.gradient_norms:
            self._note_gradients(model, weighted)
        return (total, None) if return_outputs else total

    def _note_gradients(self, model: torch.nn.Module, weighted: dict[str, Tensor]) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, share in weighted.items():
            found = torch.autograd.grad(share, parameters, retain_graph=True, materialize_grads=True)
            kept = self._gradients.setdefault(name, [torch.zeros_like(gradient) for gradient in found])
            for total, gradient in zip(kept, found, strict=True):
                total.add_(gradient)

    def _after_step(self) -> None:
        """After each optimiser step, on every rank."""
        if objective.overrides(self.method, "after_step"):
            means = self.accelerator.reduce(torch.stack([share.reshape(()) for share in self._step.values()]), "mean")
            self.method.after_step(dict(zip(self._step, means.tolist(), strict=True)))
        self._norms = {}
        for name, gradients in self._gradients.items():
            whole = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            self._norms[f"{name}_grad_norm"] = float(whole.norm())
        self._step, self._gradients = {}, {}

    def _sums(self, views: dict[str, Scored | Tensor], weight: Tensor) -> Tensor:
        """(terms,) the sum of each term's values over the samples of these views; `weight` (B,) is theirs."""
        sums = []
        for term in self.terms:
            contract = term.contract
            given = {}
            for name, kind in {**contract.parts, **contract.refs}.items():
                more = kind == "completion" and name.removeprefix("ref_") in self.attended
                given[name] = answered(views[name]) if more else views[name]
            given |= {name: self.method.tensors[name] for name in contract.supplied}
            values = term.function(**given, **term.args)
            of = {name: given[name].sample for name in contract.parts}
            sums.append((values * objective.weights_of(term, of, weight)).sum())
        return torch.stack(sums)

    def _pieces(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The places of a micro-batch's samples, in as many pieces as keep each piece's logits at about LOGITS.

        As many on every rank: where the output head is sharded, ranks call it together.
        """
        batch_size, config = len(inputs["weight"]), self.model.config
        size = self._largest * config.get_text_config().vocab_size if set(inputs["parts"]) - self.states else 0
        compiled = self.args.torch_compile  # its graph holds the head
        if size <= LOGITS or batch_size == 1 or compiled or config.model_type not in architectures.PACKABLE:
            return [torch.arange(batch_size, device=inputs["weight"].device)]
        return list(torch.arange(batch_size, device=inputs["weight"].device).chunk(-(-size // LOGITS)))

    def _headed(self, model: torch.nn.Module, views: dict[str, Scored | Tensor], piece: Tensor) -> dict[str, Any]:
        """The views of some samples, their logits made of what `forward.score` left without the head."""
        autocast, found = self.args.bf16 and self.args.deepspeed is None, {}
        for name, view in views.items():
            if isinstance(view, Tensor):
                found[name] = view[piece]
                continue
            its = torch.isin(view.sample, piece)
            if isinstance(view, States):
                found[name] = States(view.states[its], view.sample[its] - piece[0])
                continue
            cut = Scored(view.logits[its], view.labels[its], view.sample[its] - piece[0])
            reference = name.startswith("ref_")
            source = self.reference if reference and self.reference is not None else model
            with torch.no_grad() if reference else contextlib.nullcontext():
                found[name] = forward.headed(source, cut, autocast)
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
        bad = torch.tensor(float(skipped > 0 or not saving.all_finite(self.model)), device=self.accelerator.device)
        if self.accelerator.reduce(bad, "sum").item():
            raise self._diverged(f"step {self.state.global_step}, the last: its update is no longer finite")

    def _diverged(self, how: str) -> BadInput:
        if self.state.global_step == 0 and not saving.all_finite(self.model):
            return BadInput(f"{how}: the weights that the run starts from hold NaN or infinite numbers")
        return BadInput(
            f"{how}: the model has diverged; take a smaller lr than {self.args.learning_rate}, fewer epochs, or "
            "max_grad_norm=1"
        )

    @torch.no_grad()
    def _reference_views(
        self, model: torch.nn.Module, inputs: dict[str, Any], headless: bool
    ) -> dict[str, Scored | Tensor]:
        """`ref_*` by name: the reference model's sequence log-probabilities (B,), or its view of the same positions."""
        refs = {name: kind for term in self.terms for name, kind in term.contract.refs.items()}
        known = {name: inputs[name].float() for name, kind in refs.items() if kind == "logp"}
        if len(known) == len(refs):
            return known
        live = {name.removeprefix("ref_") for name in refs if name not in known}
        if self.reference is not None:
            views = forward.score(self.reference, inputs, live, headless=headless, block=self.method.block)
        else:
            with forward.adapter_off(model):
                views = forward.score(model, inputs, live, headless=headless, block=self.method.block)
        return known | {name: views[name.removeprefix("ref_")] for name in refs if name not in known}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, each a mean over the steps since the last line, to the Trainer's own numbers."""
        if "loss" in logs and len(self.terms) > 1:
            steps = max(1, self.state.global_step - self._last_logged)
            for name, running in self._running.items():
                logs[f"{name}_loss"] = float(self.accelerator.gather(running.reshape(1)).mean()) / steps
        if "loss" in logs:
            self._running, self._last_logged = {}, self.state.global_step
            logs["tokens"] = int(self.tokens)
            logs |= self._norms | self.method.result()
        super().log(logs, start_time)


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
        if trainer.state.log_history:
            run_folder.note(trainer.args.output_dir, "trainer_state.json")
            trainer.save_state()
    if hasattr(trainer.model_wrapped, "empty_partition_cache"):  # ZeRO-3 has begun to fetch what no forward came to use
        trainer.model_wrapped.empty_partition_cache()
    trainer.stop_if_weights_not_finite()
    return {"train_loss": result.training_loss, "seconds": result.metrics["train_runtime"]}


class EachStep(TrainerCallback):
    """Calls `act()` on every rank after each optimiser step."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.act()


class EachEpoch(TrainerCallback):
    """Calls `evaluate(step)` on every rank at each epoch's end."""

    def __init__(self, evaluate: Callable[[int], None]) -> None:
        self.evaluate = evaluate

    def on_epoch_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.evaluate(state.global_step)
