"""The Trainer subclass: a step's loss as the exact mean over its global batch, on every engine.

What a loss needs follows from its signature (`losses.contract`): the parts of the batch, the positions scored, the
reference. The file's name is TOFU's.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, Trainer, TrainerCallback

from data_module import ONE_ROW, EpochLoader, GlobalBatches, Sample, own_group
from tofu.methods import objective
from tofu.methods.objective import Method, Term
from tofu.models import architectures, batches, forward, saving
from tofu.models.views import Scored, States
from tofu.runtime import cards, ranks, run_folder, signals
from utils import BadInput

# logits that exist at once; where a micro-batch has more, its samples go through the output head in pieces, and each
# piece's logits are made again for its backward: about 10 bytes each (bf16, float32, gradient), 1.3 GB in all
LOGITS = 2**27
ROW = 256  # tokens of a packed row: masks are dense, so attention's cost grows with it (benchmarks/train_speed.py)


def row_of(config: PretrainedConfig) -> int:
    """Tokens of a packed row. Flash attention knows samples apart in a single row only, and has no mask that grows."""
    return ONE_ROW if architectures.one_row_only(config) else ROW


def chosen(view: Scored, at: Tensor, lengths: tuple[int, ...]) -> Scored:
    """Some positions of a view, so many of each sample."""
    return Scored(view.logits[at], view.labels[at], view.sample[at], lengths)


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
        if self.accelerator.ddp_handler is not None:  # else DDP holds a second copy of the gradients
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.method.tensors = {name: tensor.to(self.args.device) for name, tensor in self.method.tensors.items()}
        self._running: dict[str, Tensor] = {}  # since the last line of the log
        self._step: dict[str, Tensor] = {}  # since the last optimiser step
        self._gradients: dict[str, list[Tensor]] = {}
        self._norms: dict[str, float] = {}
        self._last_logged, self.tokens = 0, 0.0
        self._micro_batches = 1  # of the optimiser step at hand
        self._sound = True  # whether the weights that the run starts from are finite
        self.agreed: list[float] = []  # the ranks' `wishes` of the step at hand, summed
        self.add_callback(EachStep(self))

    @property
    def terms(self) -> list[Term]:
        """The summands of the objective."""
        return self.method.terms

    def _collate(self, items: list[tuple[dict[str, Sample], float]]) -> dict[str, Any]:
        names = objective.parts_of(self.terms)
        parts = {name: [parts[name] for parts, _ in items] for name in names}
        weights, to = [weight for _, weight in items], cards.round_to(self.args.device)
        batch = batches.collate(parts, weights, self.attended, self.row, self.states, to)
        for name in {name for term in self.terms for name, kind in term.contract.refs.items() if kind == "logp"}:
            batch[name] = torch.tensor([self.logps[sample] for sample in parts[name.removeprefix("ref_")]])
        # how many terms of each kind it holds, fillers not counted; here, where a loader's process may do it
        batch["terms"] = [
            float(objective.weights_of(term, self._samples(term, batch), batch["weight"]).sum()) for term in self.terms
        ]
        return batch

    def _samples(self, term: Term, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Part -> the sample of each position that a term scores."""
        found = {}
        for name, kind in term.contract.parts.items():
            block = batch["blocks"][name]
            found[name] = batch["sample"][slice(*block.scored)]
            if kind == "completion" and name in self.attended:
                found[name] = found[name][batch["answers"][slice(*block.answers)]]
        return found

    def get_train_dataloader(self) -> DataLoader:
        """This rank's share of every global micro-batch. Not given to accelerate, whose even_batches repeats rows."""
        args, length = self.args, self.train_dataset.length if self.row is None else None  # packed rows have no padding
        shared = (args.per_device_train_batch_size, args.process_index, args.world_size)
        batches = GlobalBatches(len(self.train_dataset), *shared, args.gradient_accumulation_steps, length)
        return EpochLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=own_group,
            multiprocessing_context="fork" if self.args.dataloader_num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """No batches where the run is stopped before a step: the Trainer itself asks for that after a step alone."""
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device, in the types that it has: under DeepSpeed the Trainer's own would make it bf16.

        So rounded, reference log-probabilities of some hundred nats would be off by one.
        """
        return ranks.to_device(inputs, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> list[float]:
        """(terms,) how many terms of each kind the step's global batch holds, fillers not counted; at least 1.

        On the host, as all that is known of a batch before its forward: what a rank reads for it, and in which pieces.
        """
        self._micro_batches = len(batch_samples)
        counts = [sum(of) for of in zip(*(batch["terms"] for batch in batch_samples), strict=True)]
        tokens, largest = sum(batch["tokens"] for batch in batch_samples), max(len(b["at"]) for b in batch_samples)
        if self.accelerator.num_processes > 1:
            own = torch.tensor([*counts, tokens, largest], dtype=torch.float64, device=device)
            every = self.accelerator.gather(own[None]).tolist()
            *counts, tokens = (sum(of) for of in list(zip(*every, strict=True))[:-1])
            largest = int(max(of[-1] for of in every))
        self.tokens += tokens
        for batch in batch_samples:
            batch["pieces"] = self._pieces(batch, largest)
        return [max(count, 1.0) for count in counts]  # a term may skip all tokens of a step; its sum is 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: list[float] | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The objective's share of this micro-batch: one forward, then the terms."""
        pieces = inputs["pieces"]
        views = self._reference_views(model, inputs, bool(pieces))
        views |= self._score(model, inputs, headless=bool(pieces))
        if not pieces:
            blocks = {name: inputs["blocks"][name] for name in self.attended}
            answers = {
                name: (inputs["answers"][slice(*one.answers)], one.answer_lengths) for name, one in blocks.items()
            }
            sums = self._sums(views, inputs["weight"], answers)
        else:
            sums = sum(checkpoint(self._piece_sums, model, views, inputs, at, use_reentrant=False) for at in pieces)
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        total, shares, weighted = 0.0, {}, {}
        for k, term in enumerate(self.terms):
            share = (sums[k].double() / num_items_in_batch[k]).float() * self.accelerator.num_processes
            shares[term.name] = share.detach()
            weight = self.method.term_weight(term, progress)
            weighted[term.name] = weight * share
            # each micro-batch of the step takes its part of the constant
            bound = weight * term.bound / self._micro_batches if term.bound else 0.0
            total = total + weighted[term.name] - bound
        for kept in (self._running, self._step):
            for name, share in shares.items():
                kept[name] = kept.get(name, 0.0) + share
        if self.gradient_norms:
            self._note_gradients(model, weighted)
        return (total, None) if return_outputs else total

    def _score(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        compiled = self.args.torch_compile and model is not self.reference
        return forward.score(model, inputs, *args, block=self.method.block, compiled=compiled, **kwargs)

    def _note_gradients(self, model: torch.nn.Module, weighted: dict[str, Tensor]) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, share in weighted.items():
            found = torch.autograd.grad(share, parameters, retain_graph=True, materialize_grads=True)
            kept = self._gradients.setdefault(name, [torch.zeros_like(gradient) for gradient in found])
            for total, gradient in zip(kept, found, strict=True):
                total.add_(gradient)

    def before_training(self) -> None:
        """On every rank, before the first step."""
        self._sound = saving.all_finite(self.model)

    def wishes(self) -> list[float]:
        """What this rank wants of the step at hand beside the update; every rank gets the sums as `agreed`."""
        return []

    def before_update(self) -> None:
        """After a step's last backward pass, on every rank: stop the run if a term is not finite on any of them.

        Raises:
            BadInput: with the step, the term and the remedy; nothing has been written of it yet.
        """
        if not self._step:  # a subclass has a loss of its own
            return
        bad = torch.stack([(~share.isfinite()).float() for share in self._step.values()])
        wishes = torch.tensor(self.wishes()).to(bad.device, non_blocking=True)  # in the same call: they cost nothing
        found = self.accelerator.reduce(torch.cat([bad.flatten(), wishes]), "sum").tolist()
        self.agreed = found[len(bad) :]
        for name, count in zip(self._step, found, strict=False):
            if count:
                self.callback_handler.on_train_end(self.args, self.state, self.control)  # closes bars and reports
                raise self._diverged(f"step {self.state.global_step + 1}: the {name} term is no longer finite")

    def after_step(self) -> None:
        """After each optimiser step, on every rank."""
        if objective.overrides(self.method, "after_step"):
            means = self.accelerator.reduce(torch.stack([share.reshape(()) for share in self._step.values()]), "mean")
            self.method.after_step(dict(zip(self._step, means.tolist(), strict=True)))
        self._norms = {}
        for name, gradients in self._gradients.items():
            whole = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            self._norms[f"{name}_grad_norm"] = float(whole.norm())
        self._step, self._gradients = {}, {}

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """None where gradients are not clipped: their norm alone is a pass over all of them in every step."""
        return super()._get_grad_norm(model, grad_norm) if self.args.max_grad_norm > 0 else None

    def _sums(self, views: dict[str, Scored | Tensor], weight: Tensor, answers: dict[str, tuple]) -> Tensor:
        """(terms,) the sum of each term's values over the samples of these views.

        Args:
            weight: (B,) of the samples.
            answers: of each attended part what `chosen` takes.
        """
        sums = []
        for term in self.terms:
            contract, given = term.contract, {}
            for name, kind in {**contract.parts, **contract.refs}.items():
                part = name.removeprefix("ref_")
                more = kind == "completion" and part in self.attended
                given[name] = chosen(views[name], *answers[part]) if more else views[name]
            given |= {name: self.method.tensors[name] for name in contract.supplied}
            values = term.function(**given, **term.args)
            of, lengths = (
                {name: getattr(given[name], key) for name in contract.parts} for key in ("sample", "lengths")
            )
            sums.append((values * objective.weights_of(term, of, weight, lengths)).sum())
        return torch.stack(sums)

    def _pieces(self, batch: dict[str, Any], largest: int) -> list[dict[str, Any]]:
        """A batch's samples in as many pieces as keep each piece's logits at about LOGITS; none: they need no cutting.

        As many on every rank: where the output head is sharded, ranks call it together.

        Args:
            largest: scored positions in any rank's largest micro-batch of the step.
        """
        config = self.model.config
        size = largest * config.get_text_config().vocab_size if set(batch["parts"]) - self.states else 0
        compiled = self.args.torch_compile  # its graph holds the head
        if size <= LOGITS or len(batch["weight"]) == 1 or compiled or config.model_type not in architectures.PACKABLE:
            return []
        return batches.pieces(batch, -(-size // LOGITS), self.attended)

    def _piece_sums(self, model: Any, views: dict[str, Any], inputs: dict[str, Any], piece: dict[str, Any]) -> Tensor:
        """`_sums` of some samples, their logits made of what `forward.score` left without the head."""
        autocast, found = self.args.bf16 and self.args.deepspeed is None, {}
        first, last = piece["samples"]
        for name, view in views.items():
            if isinstance(view, Tensor):
                found[name] = view[first:last]
                continue
            at = piece["at"][name.removeprefix("ref_")]
            about = view.sample[at] - first, view.lengths[first:last]
            if isinstance(view, States):
                found[name] = States(view.states[at], *about)
                continue
            cut = Scored(view.logits[at], view.labels[at], *about)
            reference = name.startswith("ref_")
            source = self.reference if reference and self.reference is not None else model
            with torch.no_grad() if reference else contextlib.nullcontext():
                found[name] = forward.headed(source, cut, autocast)
        lengths = {name: inputs["blocks"][name].answer_lengths[first:last] for name in self.attended}
        answers = {name: (piece["answers"][name], lengths[name]) for name in self.attended}
        return self._sums(found, inputs["weight"][first:last], answers)

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
        if not self._sound:
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
            views = self._score(self.reference, inputs, live, headless=headless)
        else:
            with forward.adapter_off(model):
                views = self._score(model, inputs, live, headless=headless)
        return known | {name: views[name.removeprefix("ref_")] for name in refs if name not in known}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms, each a mean over the steps since the last line, to the Trainer's own numbers."""
        if "loss" in logs and self._running and len(self.terms) > 1:
            steps = max(1, self.state.global_step - self._last_logged)
            running = torch.stack([one.reshape(()) for one in self._running.values()])
            means = self.accelerator.gather(running[None]).mean(0).tolist()
            logs |= {f"{name}_loss": mean / steps for name, mean in zip(self._running, means, strict=True)}
        if "loss" in logs:
            self._running, self._last_logged = {}, self.state.global_step
            logs["tokens"] = int(self.tokens)
            logs |= self._norms | self.method.result()
        super().log(logs, start_time)


def fit(trainer: TofuTrainer) -> dict[str, float]:
    """Train, and write trainer_state.json whatever ends the training: the losses before a stop tell why it stopped.

    Returns: for finished.json, the mean loss of all steps, and the seconds.

    Raises:
        BadInput: the model has diverged; it must not be saved.
    """
    try:
        with signals.handled():
            result = trainer.train()
    finally:
        run_folder.write_curve(trainer.args.output_dir, trainer.state)
    settle(trainer)
    trainer.stop_if_weights_not_finite()
    return {"train_loss": result.training_loss, "seconds": result.metrics["train_runtime"]}


def settle(trainer: TofuTrainer) -> None:
    """Before weights are gathered: give back what ZeRO-3 has begun to fetch and no forward came to use."""
    if hasattr(trainer.model_wrapped, "empty_partition_cache"):
        trainer.model_wrapped.empty_partition_cache()


class EachStep(TrainerCallback):
    """Calls a `TofuTrainer`'s own hooks, on every rank."""

    def __init__(self, trainer: TofuTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.trainer.before_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.trainer.before_update()

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.trainer.after_step()
