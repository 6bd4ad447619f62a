"""A task vector's negation: finetune on the forget set, then go as far the other way.

Source: Ilharco et al. 2022, arXiv 2212.04089; what trains is `losses.learn`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import utils
from tofu.methods.objective import Method
from tofu.models import loading
from utils import BadInput


class TaskVector(Method):
    """What is saved is the starting model minus `negate` times what the training moved it by."""

    @dataclass
    class Keys:
        """See config/forget_loss/task_vector.yaml."""

        negate: float

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Raise BadInput where something else than the saved model would be evaluated or measured."""
        utils.at_least(cfg, -math.inf, "forget_loss.negate")
        measured = cfg.eval_while_train or cfg.evaluate or cfg.stop_on.budget is not None
        if measured or not cfg.save_model:
            raise BadInput(
                f"forget_loss={cfg.forget_loss.name} is what is saved, not what trains: take eval_while_train=false "
                "evaluate=null stop_on.budget=null save_model=true, and evaluate the saved model with evaluate_util.py"
            )

    @torch.no_grad()
    def before_saving(self, model: torch.nn.Module) -> None:
        """Put each weight as far from the start on its other side, `negate` times; tied weights once."""
        unset_hf_deepspeed_config()  # while the training's is alive, loading shards, and the other ranks are not here
        start = dict(loading.load(self.start).named_parameters())
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if (theirs := {name: parameter.shape for name, parameter in start.items()}) != shapes:
            raise RuntimeError(f"other parameters than the starting model's: {sorted(set(shapes) ^ set(theirs))[:5]}")
        for name, parameter in model.named_parameters():
            parameter.data = negated(start[name].float(), parameter.float(), self.keys.negate)


def negated(start: torch.Tensor, finetuned: torch.Tensor, alpha: float) -> torch.Tensor:
    """start - alpha * (finetuned - start)."""
    return start - alpha * (finetuned - start)
