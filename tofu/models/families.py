"""The model families of config/model_config.yaml, and where what belongs to a model is saved. Loads no torch."""

import functools
from dataclasses import dataclass

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import utils
from utils import BadInput, choice, one_line

CONFIG = utils.REPO / "config" / "model_config.yaml"


@dataclass
class Family:
    """An entry of model_config.yaml; the keys are explained there."""

    hf_key: str = MISSING
    question_start_tag: str = MISSING
    question_end_tag: str = MISSING
    answer_tag: str = MISSING
    flash_attention2: bool = False
    gradient_checkpointing: bool = False
    ft_model_path: str | None = None
    end_token: str | None = None


@functools.lru_cache(maxsize=1)
def entries() -> DictConfig:
    """The file's entries by family, as they are written."""
    return OmegaConf.load(CONFIG)


def family(name: str) -> Family:
    """An entry of model_config.yaml; its relative folders are the repository's.

    Raises:
        BadInput: no such entry, or one with a missing or unknown key.
    """
    choice("model_family", name, entries())
    try:
        found = OmegaConf.merge(OmegaConf.structured(Family), entries()[name])
        if missing := sorted(OmegaConf.missing_keys(found)):
            raise BadInput(f"config/model_config.yaml: {name} has no {missing[0]}")
        found = OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        raise BadInput(f"config/model_config.yaml: {name}: {one_line(error)}") from None
    for key in ("hf_key", "ft_model_path"):
        if (path := getattr(found, key)) is not None and (utils.REPO / path).exists():
            setattr(found, key, str(utils.REPO / path))
    return found


def home(model_path: str | None, model_family: str, use_pretrained: bool | None = None) -> str:
    """Where what belongs to a model is saved: in its folder, or under runs/ where it is a hub id.

    Nothing may ever be written into a local folder named like a hub id: transformers would take it for the model.

    Args:
        model_path: null means the family's finetuned model.
        use_pretrained: the evaluation's own; there null means the family's pretrained model, and so does any if true.
    """
    found = family(model_family)
    if model_path is not None:
        model_path = str(model_path)  # a folder's name may look like a number
    if use_pretrained is not None:
        path = (None if use_pretrained else model_path) or found.hf_key
    else:
        path = model_path or found.ft_model_path or found.hf_key
    if utils.is_local(path):
        return utils.find(path)
    return f"runs/{path.split('/')[-1]}" if path.count("/") == 1 else path
