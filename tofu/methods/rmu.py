"""RMU's state: the random direction, the block that is steered, the few layers that train.

Source: Li et al. 2024 (WMDP), arXiv 2403.03218; the losses are `losses.rmu` and `losses.embed_diff`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig

import utils
from tofu.methods.objective import Method, contract_of
from tofu.models import forward
from tofu.runtime import ranks
from utils import BadInput

log = logging.getLogger(__name__)

CONTROL = "control_vector.json"  # the direction and the block, kept in the run's folder


class Rmu(Method):
    """Terms on the hidden states of one block; only the MLP output projections at and below it train."""

    supplies = ("control",)
    sees_states = True

    @dataclass
    class Keys:
        """See config/forget_loss/rmu.yaml."""

        depth: float
        blocks: int

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Raise BadInput unless a term looks at hidden states and the block can be one."""
        method = cfg.forget_loss
        named = [("forget_loss.forget", method.forget), ("forget_loss.retain", method.retain)]
        if not any(contract_of(key, name).states for key, name in named if name is not None):
            raise BadInput(
                f"forget_loss.depth: it belongs to a term on hidden states, as of forget_loss=rmu, and {method.name} "
                "has none: leave it out"
            )
        utils.at_least(cfg, 0, "forget_loss.depth", above=True)
        utils.at_least(cfg, 1, "forget_loss.blocks")
        if method.depth > 1:
            raise BadInput(f"forget_loss.depth={method.depth}: it is a share of the blocks, at most 1")

    def trained_blocks(self, config: PretrainedConfig) -> range:
        """The steered block and those below it, as many as `blocks` says."""
        block = block_at(config, self.keys.depth)
        return range(max(0, block + 1 - self.keys.blocks), block + 1)

    def prepare(self, model: Any, out: Path, seed: int) -> None:
        """Freeze all but the method's layers, and draw the control vector and keep it."""
        config = model.config.get_text_config()
        self.block = block_at(config, self.keys.depth)
        train_only(model, self.block, self.keys.blocks)
        self.tensors = {"control": control_vector(config.hidden_size, seed)}
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        log.info(
            "the output of block %d of %d is steered; only these parameters train: %s",
            *(self.block + 1, config.num_hidden_layers, trained),
        )
        if ranks.rank() == 0:
            vector = self.tensors["control"].tolist()
            utils.write_json(out / CONTROL, {"block": self.block, "trained": trained, "vector": vector})

    def state_dict(self) -> dict[str, Any]:
        """The block and the direction."""
        return {"block": self.block, "control": self.tensors["control"].tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.block, self.tensors = state["block"], {"control": torch.tensor(state["control"])}


def block_at(config: PretrainedConfig, depth: float) -> int:
    """The block (from 0) at a share of the depth: 0.5 is the 8th of 16."""
    return max(1, round(depth * config.num_hidden_layers)) - 1


def train_only(model: torch.nn.Module, block: int, count: int) -> None:
    """Freeze everything but the MLP output projections of `block` and of the blocks below it, `count` in all.

    The projection is an MLP's last linear layer, whatever a family calls it; of a model with adapters, its adapter; of
    a mixture, the experts' one tensor.

    Raises:
        BadInput: nothing is left to train.
    """
    adapted = isinstance(model, PeftModel)
    trained = set()
    blocks: Any = forward.blocks_of(model)
    for one in blocks[max(0, block + 1 - count) : block + 1]:
        linear = [module for module in one.mlp.modules() if hasattr(module, "out_features")]
        outer = [module for module in linear if not adapted or hasattr(module, "lora_A")]
        experts = [parameter for name, parameter in one.mlp.named_parameters() if name.endswith("experts.down_proj")]
        found = outer[-1].parameters() if outer else experts
        trained |= {id(parameter) for parameter in found if parameter.requires_grad}
    if not trained:
        raise BadInput("forget_loss: none of the blocks that would train has an output projection with adapters")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def control_vector(hidden: int, seed: int) -> torch.Tensor:
    """(hidden,) rmu's direction: drawn uniformly from [0, 1)^hidden and of length 1; the same on every rank."""
    drawn = torch.rand(hidden, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()
