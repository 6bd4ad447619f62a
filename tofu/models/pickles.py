"""Weights in files of other formats than safetensors: torch's pickles, which may run code when they are read.

transformers reads them by `torch.load(weights_only=True)`: tensors and nothing else. With `allow_pickle=true` they are
read whole here, and it gets the tensors.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

import utils
from tofu.runtime import trust
from utils import BadInput

log = logging.getLogger(__name__)


def from_folder(path: str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The causal language model in a folder or hub repository, and transformers' report on loading it.

    No code that lies in the folder is run. The arguments are those of `from_pretrained`.

    Raises:
        BadInput: with `allow_pickle=true`, a pickle without tensors.
    """
    weights = tensors(path) if trust.now.allow_pickle else None
    if weights is None:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **kwargs)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, found = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **kwargs)
    model.name_or_path = model.config.name_or_path = path
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, found


def tensors(path: str) -> dict[str, torch.Tensor] | None:
    """The tensors in a local folder's pickles, in host memory; None where it holds safetensors or nothing of its own.

    It reads them whole: whatever code is in them runs.
    """
    folder = Path(path)
    files = [folder / WEIGHTS_NAME] if (folder / WEIGHTS_NAME).is_file() else []
    if not files and (folder / WEIGHTS_INDEX_NAME).is_file():
        files = [folder / name for name in _parts(folder / WEIGHTS_INDEX_NAME)]
    if not files or any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None
    log.warning("%s: its weights are read as pickles, which may run any code (allow_pickle=true)", path)
    read: dict[Any, Any] = {}
    for file in files:
        found = torch.load(file, map_location="cpu", weights_only=False)
        read |= found if isinstance(found, dict) else {}
    if lost := [str(name) for name, value in read.items() if not isinstance(value, torch.Tensor)]:
        log.warning("%s: left out, since it is no tensor: %s", path, ", ".join(lost[:5]))
    kept = {name: value for name, value in read.items() if isinstance(value, torch.Tensor)}
    if not kept:
        raise BadInput(
            f"{files[0]} holds no tensors by name (a state dict): save the model's state dict as safetensors"
        )
    return kept


def check_indexes(folder: Path) -> None:
    """Raise BadInput for an index of weights that names a file outside of its folder."""
    for file in folder.glob("*.index.json"):
        for name in _parts(file):
            if not utils.inside(name):
                raise BadInput(f"{file} names {name}, which is outside of the folder: copy the whole model into one")


def _parts(index: Path) -> list[str]:
    """The files that an index of weights names."""
    found = utils.read_json(index, "weights")
    found = found.get("weight_map") if isinstance(found, dict) else None
    return sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
