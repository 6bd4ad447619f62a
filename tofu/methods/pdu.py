"""PDU's state: the dual variable of a constraint on the retain loss.

Source: Entesari et al. 2025, arXiv 2506.05314; the forget term is `losses.pdu`.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils
from tofu.methods.objective import Method, Term
from utils import BadInput

log = logging.getLogger(__name__)


class Pdu(Method):
    """The retain loss is held at `epsilon` by a dual variable, which takes the place of the retain term's weight.

    It begins as retain_weight and moves once an optimiser step, from the mean over the step's global batch.
    """

    @dataclass
    class Keys:
        """See config/forget_loss/pdu.yaml."""

        epsilon: float
        eta: float
        dual_warmup_epochs: int

    def __init__(self, terms: Sequence[Term], **own: Any) -> None:
        super().__init__(terms, **own)
        bound = self.keys.epsilon
        self.terms = [dataclasses.replace(one, bound=bound) if one.name == "retain" else one for one in self.terms]
        self.dual = next(one.weight for one in self.terms if one.name == "retain")
        self.step = 0  # optimiser steps that are done

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Raise BadInput unless there is a retain term to constrain."""
        if cfg.forget_loss.retain is None:
            raise BadInput("forget_loss.retain=null: the constraint forget_loss.epsilon is on a retain term: give one")
        utils.at_least(cfg, 0, "forget_loss.eta", above=True)
        utils.at_least(cfg, 0, "forget_loss.epsilon", "forget_loss.dual_warmup_epochs")

    def prepare(self, model: Any, out: Path, seed: int) -> None:
        """Warn where the dual variable will never move."""
        if self.num_epochs <= self.keys.dual_warmup_epochs:
            log.warning("forget_loss.dual_warmup_epochs: the dual variable stays as it is in all of num_epochs")

    def term_weight(self, term: Term, progress: float) -> float:
        """The dual variable multiplies the retain term."""
        return self.dual if term.name == "retain" else term.weight

    def after_step(self, means: Mapping[str, float]) -> None:
        """Move the dual variable by eta times the excess of the retain loss over its bound, never below 0."""
        self.step += 1
        if self.step > self.keys.dual_warmup_epochs * self.steps_per_epoch:
            self.dual = max(0.0, self.dual + self.keys.eta * (means["retain"] - self.keys.epsilon))

    def result(self) -> dict[str, float]:
        """The dual variable."""
        return {"dual": self.dual}

    def state_dict(self) -> dict[str, Any]:
        """The dual variable, and how many steps it has seen."""
        return {"dual": self.dual, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.dual, self.step = state["dual"], state["step"]
