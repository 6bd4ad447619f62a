"""What a run's own record says of it: the config of the evaluation, that of the training, and the logs they read."""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import utils
from tofu.evaluation import logs
from tofu.reporting import runs
from tofu.runtime import provenance
from tofu.runtime.provenance import CONFIG, NOT_SETTINGS, VERSIONS

FINETUNED, RETAIN, PRETRAINED, RANDOM = (
    "finetuned",
    "retain model",
    "pretrained",
    "random weights",
)  # methods of no loss
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster
NO_KEYS = {  # keys that say where things are, or what is kept: no settings of a run
    *(*NOT_SETTINGS, *provenance.INPUTS, "eval", "split", "split_list", "model_family", "forget_loss.name"),
    *("forget_loss.lr", "forget_loss.num_epochs", "save_format", "save_generated_text", "save_model", "metrics"),
    *("eval_task", "engine", "ds_config", "batch_size", "eval_while_train", "eval_only", "use_pretrained"),
    *("reinitialize_weights", "answer_key", "base_answer_key", "perturbed_answer_key", "ds_size", "truth_ratio"),
}


@functools.cache
def config(folder: Path) -> Mapping[str, Any]:
    """The config of the run in a folder; {} where there is none.

    Raises:
        ValueError: it is not whole.
    """
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG} is not whole ({utils.one_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} holds no keys")
    return found


def evaluates(cfg: Mapping[str, Any]) -> bool:
    """Whether a config is evaluate_util.py's."""
    return "eval_task" in cfg


def trains(cfg: Mapping[str, Any]) -> bool:
    """Whether a config is finetune.py's or forget.py's."""
    return "num_epochs" in cfg and "lr" in cfg


def keys(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation and of the training of its model, flat.

    `split` is the forget set that was evaluated, `train_split` what was trained on or forgotten. The other keys of the
    evaluation have `eval.` before them, as in forget.py, but for `ds_size` and `truth_ratio`.
    """
    split = str(evaluation.get("split", "")).removesuffix("_perturbed")
    found: dict[str, Any] = {
        "method": _method(evaluation, training, split),
        "split": split,
        "family": evaluation.get("model_family") or training.get("model_family"),
    }
    first = {key: training[key] for key in ("lr", "num_epochs", "seed", "batch_size") if key in training}
    flat = {key: value for key, value in flattened(training) if key not in (*NO_KEYS, *first)}
    found |= {**first, **({"train_split": training["split"]} if "split" in training else {}), **flat}
    found |= {key: evaluation.get(key) for key in ("ds_size", "truth_ratio")}
    for key, value in flattened(evaluation):
        if key not in NO_KEYS and not key.startswith("collapse."):
            found[f"eval.{key}"] = value
    return found


def _method(evaluation: Mapping[str, Any], training: Mapping[str, Any], split: str) -> str:
    """The method as tables name it: the loss, or what else the model is."""
    if evaluation.get("reinitialize_weights"):
        return RANDOM
    if "forget_loss" in training:
        return str(training["forget_loss"]["name"])
    if not training:
        return PRETRAINED if evaluation.get("use_pretrained") else Path(str(evaluation.get("model_path"))).name
    if training.get("split") in ("full", None):
        return FINETUNED
    return RETAIN if training["split"] == utils.complement(split) else f"finetuned on {training['split']}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys joined by dots; a list is its different entries, joined by commas. Groups of NO_KEYS are left out."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in NO_KEYS:
            yield from flattened(value, f"{name}.")
        elif not isinstance(value, dict):
            yield name, ",".join(dict.fromkeys(map(str, value))) if isinstance(value, list) else value


def located(folder: Path, named: str | None, made: str | None = None) -> Path | None:
    """Where the path is that a run recorded, perhaps from another working directory, or before it was moved.

    Args:
        folder: the run's.
        named: the path as recorded.
        made: the digest of the file, where it was recorded: a file of another content is not it.

    Returns:
        The path; None where it is nowhere.
    """
    if not named:
        return None
    parts = Path(named).parts
    fewest = 3 if made is None else 1  # parts of it that stayed: a digest tells which file it is
    ends = [Path(*parts[i:]) for i in range(max(1, len(parts) - fewest + 1))]  # as named, or the runs moved together
    above = folder.resolve().parents
    places = [Path(named), *(parent / end for end in ends if not end.is_absolute() for parent in above)]
    for place in dict.fromkeys(places):
        if place.exists() and (made is None or digest(place) == made):
            return place
    return None


@functools.cache
def digest(place: Path) -> str | None:
    """The digest that a run's record has of what it read (`provenance.inputs`); None where there is no such file."""
    file = place / provenance.FINISHED if place.is_dir() else place
    return provenance.file_digest(file) if file.is_file() else None


def model_of(folder: Path, evaluation: Mapping[str, Any]) -> Path | None:
    """The folder of the training run whose model an evaluation in `folder` read; None where it is none that is here."""
    named = evaluation.get("model_path")
    if not named or evaluation.get("use_pretrained") or evaluation.get("reinitialize_weights"):
        return None
    parents, made = folder.resolve().parents, _inputs(folder).get("model_path")
    above = [one for one in parents if f"{one}".endswith(f"/{Path(named)}")]  # where it lies if nothing else was said
    nearest = [one for one in parents[:1] if one.name == Path(named).name or (made and digest(one) == made)]
    above += nearest  # the folders above it, or its own, may have other names by now
    found = [*above, *filter(None, (located(folder, named), located(folder, named, made) if made else None))]
    trained = [place.resolve() for place in found if trains(config(place))]
    return next((place for place in trained if made is not None and digest(place) == made), (*trained, None)[0])


def _inputs(folder: Path) -> Mapping[str, Any]:
    """The digests of what the run in a folder read, by key; {} where it has no record of them.

    Raises:
        ValueError: the record has another form.
    """
    file = folder / VERSIONS
    if not file.is_file():
        return {}
    found = runs.read_json(file)
    known = found.get("inputs", {}) if isinstance(found, dict) else None
    if not isinstance(known, dict):
        raise ValueError(f"{VERSIONS} holds no record of a run: put back the file that the run wrote, or run it again")
    return known


def compared(folder: Path, cfg: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Path], list[str]]:
    """The retain and the start result that a run's record names, and what can't be found of them.

    Args:
        folder: that of the config.
        cfg: the evaluation's keys.
        prefix: `eval.` where these are a training's.
    """
    known = _inputs(folder)
    found, said = {}, []
    for key in ("retain_result", "start_result"):
        if named := cfg.get(key):
            place = located(folder, named, known.get(f"{prefix}{key}"))
            if place is not None and place.is_dir() and (place / logs.AGGREGATED).is_file():
                place = place / logs.AGGREGATED
            if place is None:
                said.append(f"{key}={named}, which it was compared with, is not there any more, or is another file")
            else:
                found[key] = place
    return found, said


@functools.cache
def steps_of(folder: Path) -> int | None:
    """The optimiser steps of the run in a folder; None where it does not say."""
    file = folder / "trainer_state.json"
    found = runs.read_json(file) if file.is_file() else {}
    return found.get("global_step") if isinstance(found, dict) else None


def step_in(name: str) -> int | None:
    """The step in the name of a folder checkpoint-STEP; None of another folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None
