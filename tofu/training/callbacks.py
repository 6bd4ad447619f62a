"""What happens beside the steps of a training: its log on disk, and what a run does at an epoch's end."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

import dataloader
from tofu.evaluation.metrics import table
from tofu.runtime import ranks, run_folder
from tofu.training.best import KeepBest
from tofu.training.disruption import KL, Disruption

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two writes of the training log


class LossCurve(TrainerCallback):
    """Writes trainer_state.json as the training goes, at most every EVERY seconds: a kill loses no more of it."""

    def __init__(self, every: float = EVERY) -> None:
        self.every, self.last = every, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: D102
        self.last = time.monotonic()

    def on_log(self, args, state, control, **kwargs) -> None:  # noqa: D102
        if time.monotonic() - self.last >= self.every or control.should_save:  # a checkpoint may take long
            run_folder.write_curve(args.output_dir, state)
            self.last = time.monotonic()


def add(
    cfg: Any,
    trainer: dataloader.TofuTrainer,
    evaluate: Callable[[int], Mapping[str, Any]] | None,
    best: KeepBest | None,
    disruption: Disruption | None,
    sharded: bool,
) -> "EachEpoch | None":
    """Give a run's Trainer its callbacks.

    Args:
        cfg: the run's checked config; the others are of `EachEpoch`.

    Returns:
        What is done at each epoch's end; None where nothing is.
    """
    trainer.add_callback(LossCurve())
    if evaluate is None and disruption is None:
        return None
    told = {"always": cfg.eval_while_train, "collapse": cfg.stop_on.collapse, "budget": cfg.stop_on.budget}
    each = EachEpoch(trainer, evaluate, best=best, disruption=disruption, sharded=sharded, **told)
    trainer.add_callback(each)
    return each


class EachEpoch(TrainerCallback):
    """At each epoch's end, on every rank: measures, evaluates, keeps the best weights and stops where it is asked to.

    Attributes:
        done: the step of the last epoch's end that is complete; a run that resumes there does not do it again.
        scores: what was found there, the evaluation's first; the same on all ranks.
        stopped: the rule that stops the run, its step and why; empty where none does.
    """

    def __init__(
        self,
        trainer: dataloader.TofuTrainer,
        evaluate: Callable[[int], Mapping[str, Any]] | None = None,
        *,
        always: bool = True,
        best: KeepBest | None = None,
        collapse: bool = False,
        disruption: Disruption | None = None,
        budget: float | None = None,
        sharded: bool = False,
    ) -> None:
        """
        Args:
            evaluate: of a step, the scores of the model in memory on rank 0; called on every rank.
            always: whether every epoch is evaluated, or the last one alone.
            best: keeps the weights of the best evaluation.
            collapse: stop where an evaluation shows signs of a collapse.
            disruption, budget: stop where this measure of the model is above the budget, in nats per token.
            sharded: whether the ranks share one model.
        """
        self.trainer, self.evaluate, self.always, self.best = trainer, evaluate, always, best
        self.collapse, self.disruption, self.budget, self.sharded = collapse, disruption, budget, sharded
        self.done, self.scores, self.stopped = 0, {}, {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Do what a run that was interrupted at an epoch's end had left to do; one that was stopped trains no more."""
        self.on_epoch_end(args, state, control)
        control.should_training_stop = control.should_training_stop or bool(self.stopped)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        step = state.global_step
        if step == self.done or step % self.trainer.method.steps_per_epoch:  # done, or something else stops the run
            return
        run_folder.write_curve(args.output_dir, state)  # what follows may take long
        found: dict[str, Any] = {}
        if self.disruption is not None:
            found[KL] = self.disruption(self.trainer.model, self.trainer.reference, self.sharded)
            if self.budget is not None and found[KL] > self.budget:
                self._stop("budget", state, f"{KL} is {found[KL]:.4g} nats per token, above {self.budget:g}")
        if self.evaluate is not None and (self.always or self.stopped or step >= state.max_steps):
            found = {**ranks.from_rank_0(dict(self.evaluate(step))), **found}
        if found:
            self.trainer.log(logged(found))
        if self.best is not None:
            self.best.look(step, found)
        if self.collapse and not self.stopped and found.get("Collapse"):
            self._stop("collapse", state, "; ".join(found["Collapse"]))
        control.should_training_stop = control.should_training_stop or bool(self.stopped)
        self.done, self.scores = step, found

    def _stop(self, rule: str, state: Any, why: str) -> None:
        if state.global_step < state.max_steps:
            self.stopped = {"rule": rule, "step": state.global_step, "why": why}
            log.warning("stop_on.%s ends the run at step %d of %d: %s", rule, state.global_step, state.max_steps, why)

    def record(self) -> dict[str, Any]:
        """For finished.json: the scores of the weights that are saved, which they are, and what stopped the run."""
        best = self.best.record() if self.best is not None else {}
        stopped = {"stopped": self.stopped} if self.stopped else {}
        return {**(self.best.scores if best else self.scores), **best, **stopped}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON's types alone."""
        best = self.best.state_dict() if self.best is not None else None
        state = {"done": self.done, "scores": self.scores, "stopped": self.stopped, "best": best}
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.done, self.scores, self.stopped = state["done"], dict(state["scores"]), dict(state["stopped"])
        if self.best is not None and state["best"] is not None:
            self.best.load_state_dict(state["best"])


def logged(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as a line of the training log, by the names that trackers group: eval_model_utility."""
    numbers = {name: value for name, value in scores.items() if isinstance(value, float) and math.isfinite(value)}
    return {f"eval_{table.slug(name)}": float(value) for name, value in numbers.items()}
