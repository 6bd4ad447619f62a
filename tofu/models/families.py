"""The model families of config/model_config.yaml: which one a model belongs to, with which tags it was trained.

Loads no torch.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import utils
from utils import BadInput, choice, no_key, one_line

log = logging.getLogger(__name__)

CONFIG = utils.REPO / "config" / "model_config.yaml"
RECORD = "tofu_family.json"  # beside a model's config.json: the family that it was trained as
WRITTEN = ("question_start_tag", "question_end_tag", "answer_tag")  # the tags that every entry has, or its template
TAGS = ("system_prompt", *WRITTEN)
PATHS = ("ft_model_path", "hf_key")


@dataclass
class Family:
    """An entry of model_config.yaml; the keys are explained there."""

    hf_key: str = MISSING
    system_prompt: str = ""
    question_start_tag: str = MISSING
    question_end_tag: str = MISSING
    answer_tag: str = MISSING
    chat_template: bool = False
    template_system: str | None = None
    template_date: str | None = None
    flash_attention2: bool = False
    gradient_checkpointing: bool = False
    ft_model_path: str | None = None
    end_token: str | None = None
    unverified: bool = False


@functools.lru_cache(maxsize=1)
def entries() -> DictConfig:
    """The file's entries by family, as they are written."""
    return OmegaConf.load(CONFIG)


def family(name: str) -> Family:
    """An entry of model_config.yaml; its relative folders are the repository's.

    Tags that a `chat_template: true` entry leaves to the template are "" (`chat.resolved` fills them).

    Raises:
        BadInput: no such entry, or one with a missing or unknown key.
    """
    choice("model_family", name, entries())
    known = [field.name for field in dataclasses.fields(Family)]
    if unknown := [key for key in entries()[name] if key not in known]:
        raise BadInput(f"config/model_config.yaml, {name}: {no_key(str(unknown[0]), known, ' of a family')}")
    try:
        found = OmegaConf.merge(OmegaConf.structured(Family), entries()[name])
        if found.chat_template and all(OmegaConf.is_missing(found, key) for key in WRITTEN):
            found.update(dict.fromkeys(WRITTEN, ""))
        if missing := sorted(OmegaConf.missing_keys(found)):
            raise BadInput(f"config/model_config.yaml: {name} has no {missing[0]}")
        found = OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        raise BadInput(f"config/model_config.yaml: {name}: {one_line(error)}") from None
    for key in PATHS:
        if (path := getattr(found, key)) is not None and (utils.REPO / path).exists():
            setattr(found, key, str(utils.REPO / path))
    return found


def home(model_path: str | None, model_family: str | None, use_pretrained: bool | None = None) -> str:
    """Where what belongs to a model is saved: in its folder, or under runs/ where it is a hub id.

    Nothing may ever be written into a local folder named like a hub id: transformers would take it for the model.

    Args:
        model_path: null means the family's finetuned model.
        model_family: null where `model_path` tells the family.
        use_pretrained: the evaluation's own; there null means the family's pretrained model, and so does any if true.

    Raises:
        BadInput: neither says which model it is.
    """
    path = None if use_pretrained or model_path is None else str(model_path)  # a folder's name may look like a number
    if model_family is not None or path is None:
        found = family(model_family or of_model(None))
        path = path or (found.ft_model_path if use_pretrained is None else None) or found.hf_key
    if utils.is_local(path):
        return utils.find(path)
    return f"runs/{path.split('/')[-1]}" if path.count("/") == 1 else path


def record(name: str, found: Family, end_token: str) -> dict[str, str]:
    """What RECORD and finished.json say of a family.

    Args:
        found: its entry, the tags of a chat template in their place.
        end_token: the tokenizer's, where the entry names none.
    """
    return {"model_family": name, **{key: getattr(found, key) for key in TAGS}, "end_token": end_token}


def recorded(path: str) -> dict[str, str] | None:
    """The record in a model's folder (of an adapter without one, in its base's) or hub repository; None without one.

    Raises:
        BadInput: one that is no whole record.
    """
    folder = Path(utils.find(path))
    if not folder.exists():
        file = utils.hub_file(path, RECORD)
        return _read(Path(file)) if file else None
    if (folder / RECORD).is_file():
        return _read(folder / RECORD)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = utils.read_json(adapter, "adapter").get("base_model_name_or_path")
        return recorded(base) if base and utils.is_local(base) else None
    return None


def _read(file: Path) -> dict[str, str]:
    made = utils.read_json(file, "model_family")
    keys = ("model_family", *TAGS, "end_token")
    if not isinstance(made, dict) or not all(isinstance(made.get(key), str) for key in keys):
        raise BadInput(f"{file} is no record of a family, which has {', '.join(keys)}: remove it, or copy it again")
    return made


def recorded_beside(log_file: str | Path) -> dict[str, str] | None:
    """The family that an evaluation's log was made with, from the finished.json beside it or of the run above it."""
    folder = Path(utils.find(log_file)).resolve().parent
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / "finished.json").is_file():
            made = json.loads((place / "finished.json").read_text(encoding="utf-8"))
            return made.get("family") if isinstance(made, dict) else None
    return None


def of_model(path: str | None, key: str = "model_path") -> str:
    """The family of a model that is named without one: the recorded one, else the one that has the model as its own.

    Raises:
        BadInput: nothing tells the family, or families with other tags share the model.
    """
    if path is None:
        raise BadInput(f"model_family is missing: give model_family=..., one of {', '.join(entries())}")
    path = str(path)
    if not utils.is_local(path):
        utils.check_place(path, key)
    if made := recorded(path):
        if made["model_family"] in entries():
            return made["model_family"]
        raise BadInput(
            f"{key}={path} was trained as model_family={made['model_family']}, which is no entry of "
            "config/model_config.yaml: add it, or name an entry with the same tags, model_family=..."
        )
    for place in PATHS:
        names = [name for name, entry in entries().items() if place in entry and _same(path, entry[place])]
        if len({_asks(family(name)) for name in names}) > 1:
            raise BadInput(
                f"model_family is missing: {path} is the {place} of {' and '.join(names)}, whose tags differ: "
                "give model_family=..."
            )
        if names:
            return names[0]
    there = "" if utils.is_local(path) else " (there is no such folder; it is taken as a hub id)"
    raise BadInput(
        f"model_family is missing, and {key}={path}{there} does not tell it (it has no {RECORD}): "
        f"give model_family=..., one of {', '.join(entries())}"
    )


def _asks(found: Family) -> tuple[Any, ...]:
    """How a family asks a model: two that agree in it are one for any result."""
    keys = (*TAGS, "chat_template", "template_system", "template_date", "end_token")
    return tuple(getattr(found, key) for key in keys)


def _same(path: str, other: str | None) -> bool:
    """Whether two paths or hub ids name one model."""
    if other is None or path == other:
        return path == other
    ours = utils.REPO / other
    return ours.exists() and utils.is_local(path) and Path(utils.find(path)).resolve() == ours.resolve()


def check_agrees(path: str, ours: Mapping[str, str], own: bool) -> None:
    """Refuse a family with other tags than those that the model was trained with; warn where that is not known.

    Args:
        path: the model, as the config names it.
        ours: the `record` of the family in use.
        own: whether the model is the family's own, by its entry: then nobody has to be warned.

    Raises:
        BadInput: other tags or another end token; it names both.
    """
    made = recorded(path)
    if made is None:
        if not own:
            log.warning(
                "%s does not say with which tags it was trained (no %s): those of %s are taken",
                *(path, RECORD, ours["model_family"]),
            )
        return
    if differ := differing(made, ours):
        raise BadInput(
            f"model_family={ours['model_family']}: {path} was trained as {made['model_family']}, with another "
            f"{differ}: leave out model_family, or name one with the same tags"
        )


def differing(made: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first of the tags and the end token that two records have otherwise, with both values; "" if none."""
    keys = [key for key in (*TAGS, "end_token") if made.get(key, "") != ours.get(key, "")]
    return f"{keys[0]}, {made.get(keys[0], '')!r} instead of {ours.get(keys[0], '')!r}" if keys else ""
