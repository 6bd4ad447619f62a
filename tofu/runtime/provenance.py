"""What a result was made from: fingerprints, digests, and the one comparison that says what differs."""

import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.runtime import machine, ranks

log = logging.getLogger(__name__)

CONFIG, VERSIONS, FINISHED = "config.yaml", "versions.json", "finished.json"
RECORDED = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "tokenizers",
    "numpy",
    "rouge-score",
)
NOT_SETTINGS = (
    "save_dir",
    "overwrite",
    "overwrite_dir",
    "dry_run",
    "verify",
    "allow_pickle",
    "progress",
    "logging_steps",
    "report_to",
    "objective",
    "oracle",
    "eval.batch_size",
    "checkpoint_every",
    "resume",
    "save_total_limit",
)  # keys that change no number
ABSENT = "not given"
INPUTS = (
    "model_path",
    "retain_result",
    "start_result",
    "eval.retain_result",
    "eval.start_result",
    "reference_model",
    "eval.reference_model",
)  # keys that name what another run made


def digest(content: bytes | str) -> str:
    """The sha256 of some bytes, or of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_digest(path: str | Path) -> str:
    """The sha256 of a file's bytes, read piece by piece."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(**parts: Any) -> dict[str, Any]:
    """What a result is a function of, by name: a result with the same fingerprint need not be made again.

    The parts are JSON values; they are kept as a JSON file gives them back, so that two fingerprints can be compared.
    """
    return json.loads(json.dumps(parts))


def differing(made: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> list[str]:
    """The parts of `asked` that `made` has not, or has otherwise; all of them where there is no `made`."""
    known = made or {}
    return [name for name in asked if name not in known or known[name] != asked[name]]


def inputs(named: Mapping[str, str | None]) -> dict[str, str]:
    """Digests of what other runs made and a run reads: of a model's folder its finished.json, of a log the file.

    Args:
        named: config key of INPUTS -> path; what is no run's and no file has no digest here.
    """
    found = {}
    for key, path in named.items():
        file = Path(utils.find(path)) if path else Path()
        file = file / FINISHED if file.is_dir() else file
        if path and file.is_file():
            found[key] = file_digest(file)
    return found


def other_settings(made: Sequence[str], asked: Sequence[str]) -> list[str]:
    """What differs between two command lines, key=value each; one text for each setting, with both values."""
    made, asked = ([arg for arg in args if "=" in arg] for args in (made, asked))  # flags are no settings
    then, now = ({key: value for key, _, value in (arg.partition("=") for arg in args)} for args in (made, asked))
    pairs = {key: (then.get(key, ABSENT), now.get(key, ABSENT)) for key in {**then, **now} if key not in NOT_SETTINGS}
    return [f"{key}={old} (now {new})" for key, (old, new) in pairs.items() if not _same(old, new)]


def other_config(folder: Path, cfg: DictConfig, but: Sequence[str] = ()) -> list[str]:
    """What differs between the recorded config and inputs of a run and those of one to be made, by key.

    Keys that change no number do not count, nor do keys that only one of the two versions of the suite has.

    Args:
        but: keys that do not count either, nor what lies below them.
    """
    made, asked = (flat(OmegaConf.to_container(one)) for one in (OmegaConf.load(folder / CONFIG), cfg))
    pairs = {key: (made[key], asked[key]) for key in made.keys() & asked.keys()}
    found = [
        f"{key}={old} (now {new})"
        for key, (old, new) in sorted(pairs.items())
        if not ({key, key.rpartition(".")[2]} & {*NOT_SETTINGS} or _below(key, but) or _same(str(old), str(new)))
    ]
    known = json.loads((folder / VERSIONS).read_text(encoding="utf-8")).get("inputs", {})
    now = inputs({key: OmegaConf.select(cfg, key) for key in INPUTS})
    other = [key for key in differing(known, now) if key in known and not _below(key, but)]
    return [*found, *(f"{key}, which is another by now" for key in other)]


def _below(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of these, or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; an empty group is a leaf."""
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values}
    return {key: one for name, value in values.items() for key, one in flat(value, f"{prefix}{name}.").items()}


def _same(one: str, other: str) -> bool:
    """Whether two texts say one value: equal numbers, or one file named relatively and absolutely."""
    one, other = utils.masked(one), utils.masked(other)  # as a record has them
    if one.lower() == other.lower():
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        pass
    if "/" not in one + other or ABSENT in (one, other):
        return False
    one, other = sorted((one, other), key=len)  # the recorded one may be relative to another working directory
    return Path(one).resolve() == Path(other).resolve() or other.endswith(f"/{one.removeprefix('./')}")


def state(folder: str | Path, asked: Sequence[str]) -> str:
    """Whether the run in a folder is complete, and the one that a command line asks for, as its record says.

    Args:
        asked: key=value, as on the command line. A record of an older version has no digests of what was read: its
            settings alone are compared.

    Returns:
        One of `complete`, `not complete`, `made with other settings: ...` and `made from another KEY=PATH`.
    """
    folder = Path(folder)
    if not (folder / FINISHED).is_file():
        return "not complete"
    made = json.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    if found := other_settings(made["command"][1:], asked):
        return f"made with other settings: {', '.join(found)}"
    named = {key: path for key, _, path in (arg.partition("=") for arg in asked) if key in INPUTS}
    known = made.get("inputs", {})
    changed = [key for key in differing(known, inputs(named)) if key in known]
    return f"made from another {changed[0]}={named[changed[0]]}" if changed else "complete"


RECIPE = ("lr", "num_epochs", "batch_size", "gradient_accumulation_steps")  # what a comparable run has in common


def finetuning(path: str | None) -> tuple[Path, Any] | None:
    """The run that finetuned a model, or the one that it was unlearned from: its folder and its config."""
    while path is not None and (Path(utils.find(path)) / CONFIG).is_file():
        folder = Path(utils.find(path))
        cfg: Any = OmegaConf.load(folder / CONFIG)
        if "forget_loss" not in cfg:
            return folder, cfg
        path = cfg.get("model_path")
    return None


def recipe(path: str | None) -> str:
    """The overrides with which a model was finetuned, out of its run's folder or of the one it was unlearned from."""
    found = finetuning(path)
    return " ".join(f"{key}={found[1][key]}" for key in RECIPE if key in found[1]) if found else ""


def started_from(folder: str | Path) -> str | None:
    """The model that the run in a folder unlearned from; None where the folder holds no such run.

    It was recorded relative to a working directory. Where that was another one, the model is looked for above the run.
    """
    file = Path(folder) / CONFIG
    cfg: Any = OmegaConf.load(file) if file.is_file() else {}
    if "forget_loss" not in cfg or cfg.get("model_path") is None:
        return None
    named = Path(cfg.model_path)
    above = (one for one in Path(folder).resolve().parents if f"{one}".endswith(f"/{named}"))
    return str(named if named.exists() else next(above, named))


def versions(cfg: DictConfig | None = None, read: Sequence[str] = ()) -> dict[str, Any]:
    """The versions, commit, command, machine and, with a run's config, inputs that its numbers came from.

    Args:
        read: local paths that the run reads besides those that its config names: the model that it starts from.
    """
    known = {} if cfg is None else inputs({key: OmegaConf.select(cfg, key) for key in INPUTS})
    paths = (*read, *([cfg.model_path] if cfg is not None and cfg.get("model_path") else []))
    return {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in RECORDED},
        "commit": (machine.git("rev-parse", "HEAD") or "").strip() or None,
        "uncommitted_changes": bool(machine.git("status", "--porcelain", "--untracked-files=no")),
        "world_size": ranks.world_size(),
        "command": [utils.masked(arg) for arg in sys.argv],
        "directory": os.getcwd(),
        "hardware": machine.hardware(),
        "inputs": known,
        "models": {utils.masked(str(path)): found for path in paths if (found := model_digest(path))},
        "data": {} if cfg is None else data_digests(cfg),
    }


OF_A_MODEL = ("*.safetensors", "*.bin", "*.json", "tokenizer*", "vocab*", "merges*")


def model_digest(path: str) -> str | None:
    """What tells a model's folder from another one: of a run's, its finished.json, whose manifest covers the weights.

    Of a plain folder the names and sizes of a model's files and the content of its config.json: 14 GB are not hashed.
    None: no folder.
    """
    folder = Path(utils.find(path))
    if not folder.is_dir():
        return None
    if (folder / FINISHED).is_file():
        return file_digest(folder / FINISHED)
    files = sorted({file for pattern in OF_A_MODEL for file in folder.glob(pattern)})
    listing = [f"{file.name} {file.stat().st_size}" for file in files]
    config = folder / "config.json"
    return digest("\n".join([*listing, file_digest(config) if config.is_file() else ""]))


def data_digests(cfg: DictConfig) -> dict[str, str | None]:
    """Of each split that a config names, "DATA_PATH SPLIT", the sha256 of its file, or the hub's commit.

    None where neither can be told.
    """
    named = [(cfg.data_path, cfg.get(key)) for key in ("split", "retain_split")] if "LoRA" in cfg else []
    watched = cfg if "split_list" in cfg else cfg.get("eval")
    if watched is not None and (watched is cfg or cfg.get("eval_only") or cfg.get("eval_while_train")):
        named += list(zip(watched.data_path, watched.split_list, strict=True))
    return {utils.masked(f"{path} {split}"): _data_digest(path, split) for path, split in named if split}


def _data_digest(path: str, split: str) -> str | None:
    if not utils.is_local(path):
        place = utils.snapshot(path)
        return Path(place).name if place else None
    file = (utils.split_files(path) or {}).get(split)
    if file is None:
        return None
    files = [file] if file.is_file() else sorted(one for one in file.rglob("*") if one.is_file())
    return file_digest(file) if file.is_file() else digest("".join(map(file_digest, files)))


REPEATS = "from"  # of a command line, from=RUN: the run that this one repeats (tofu/cli/repeat.py)


def repeated() -> Path | None:
    """The run that this command line repeats; None where it repeats none."""
    found = [arg.partition("=")[2] for arg in sys.argv[1:] if arg.startswith(f"{REPEATS}=")]
    return Path(utils.find(found[-1])) if found else None


NO_NUMBER = ("command", "directory", "uncommitted_changes")  # of versions.json: they say nothing of the numbers


def changed_since(run: Path, now: Mapping[str, Any]) -> list[str]:
    """What of a run's versions.json is otherwise now: versions, commit, machine, digests of models and data."""
    file = run / VERSIONS
    then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = []
    for key in then.keys() & now.keys() - {*NO_NUMBER}:
        old, new = then[key], now[key]
        if isinstance(old, dict) and key in ("inputs", "models", "data"):
            found += [f"{key}: {name}" for name in differing(old, new) if name in old]
        elif old != new:
            found.append(key if isinstance(old, dict) else f"{key} ({old}, now {new})")
    return sorted(found)


def kept(path: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run kept in a JSON file, `made_from` in it, if it is a function of the same; it is logged."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    other = differing(known["made_from"], made_from)
    log.info("%s: %s", path, f"made again, with another {', '.join(other)}" if other else "used again")
    return None if other else known
