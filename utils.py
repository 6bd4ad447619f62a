"""Run folders, versions, atomic writes, ranks: what every script needs and no method or metric knows of."""

import difflib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

import ranks

log = logging.getLogger(__name__)

REPO = Path(__file__).resolve().parent
SHIPPED = ("config", "data/mini", "data/tiny")  # what the scripts make or git holds, wherever they are started
PROBE_SECONDS = 5  # one question to the hub; the libraries' own retries take about 24 s each
CONFIG, VERSIONS, FINISHED = "config.yaml", "versions.json", "finished.json"
REFERENCE = "reference_logps.json"  # the starting model's log-probabilities: a run that replaces this one may use them
ASIDE = ".writing."  # begins the name of what is not whole yet
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


class BadInput(ValueError):
    """What the user asked for cannot be done. The message is one line: what was wrong, what is allowed, what to do."""


def find(path: str | Path) -> str:
    """A local path made findable from any working directory.

    What the user names is looked for from the working directory; what the repository ships (see SHIPPED) is found from
    the repository. A path that does not exist comes back unchanged: it may be a hub id.
    """
    path = Path(path)
    if any(path.is_relative_to(shipped) for shipped in SHIPPED) and (REPO / path).exists():
        return str(REPO / path)
    return str(path.expanduser()) if path.expanduser().exists() else str(path)


def is_local(path: str | Path) -> bool:
    """Whether `path` names something on this machine (see `find`), not a hub id."""
    return Path(find(path)).exists()


def local_splits(data_path: str) -> list[str] | None:
    """The splits that a local folder's README.md names, each a file of JSON or CSV rows that is there; None elsewhere.

    The hub's data sets name their splits (configurations) in the head of that file.
    """
    card = Path(find(data_path)) / "README.md"
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.S) if card.is_file() else None
    try:
        configs = yaml.safe_load(match[1])["configs"] if match else []
        named = {str(one["config_name"]): one["data_files"] for one in configs}
    except (yaml.YAMLError, KeyError, TypeError):
        return None
    plain = all(isinstance(file, str) and file.endswith((".json", ".jsonl", ".csv")) for file in named.values())
    return sorted(named) if named and plain else None


def no_split(data_path: str, split: str, names: Iterable[str]) -> str:
    """The line that refuses a split: those that the data has."""
    return f"split={split} is not in {data_path}: it has {', '.join(sorted(names))}"


def check_hub(name: str, key: str, repo_type: str, filename: str | None) -> None:
    """Ask once, shortly, whether the hub (or its local cache) has `name`.

    Raises:
        BadInput: it has not, or cannot be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadInput(f"{key}={name}: no such folder, and no hub id (owner/name) either")
    cached = Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{name.replace('/', '--')}"
    if (filename and isinstance(try_to_load_from_cache(name, filename), str)) or (not filename and cached.is_dir()):
        return
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=PROBE_SECONDS)
    except Exception as error:  # whatever the transport raises, the answer to the user is the same line
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise BadInput(
            f"{key}={name}: no such folder, not in the local cache, and the hub does not give it ({why})"
        ) from None


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{ASIDE}{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would hide the result from a group that shares the folder
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` whole or not at all."""
    with atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all.

    Raises:
        ValueError: a NaN or an infinity, which JSON cannot hold and a later reader would choke on.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path, key: str) -> Any:
    """The value in a JSON file that the user named.

    Raises:
        BadInput: no such file, or not whole JSON; `key` is the config key to name.
    """
    if not Path(find(path)).is_file():
        raise BadInput(f"{key}={path}: no such file")
    try:
        return json.loads(Path(find(path)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{key}={path} is not whole JSON ({error}): make it again") from None


def start_run(
    cfg: DictConfig, save_dir: str | Path, *, overwrite: bool, inputs: tuple[str, ...], keep: tuple[str, ...] = ()
) -> Path:
    """Make a training run's folder and put into it what explains it: the resolved config and the versions.

    Rank 0 alone looks at the disk and writes, so that no rank can mistake the folder just made for an older run.

    Args:
        cfg: the checked config.
        save_dir: the folder, relative to the working directory.
        overwrite: whether an earlier run's files there may be removed; runs in sub-folders of their own stay.
        inputs: local paths that this run reads; none of them may be removed by the overwriting.
        keep: files of an earlier run that stay.

    Raises:
        BadInput: the folder holds something and `overwrite` is false, or it is (or holds) one of `inputs`.
    """
    folder = Path(save_dir)
    for path in inputs:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise BadInput(
                f"save_dir={save_dir} is, or lies above, {path}, which this run reads: name another save_dir"
            )
    if ranks.rank() > 0:
        return folder
    held = _held(folder)
    if held and held != {CONFIG, VERSIONS}:  # a run that was refused after its start leaves these two
        if not overwrite:
            raise BadInput(f"save_dir={save_dir} exists: name another, or overwrite_dir=true to replace that run")
        if VERSIONS not in held:  # save_dir=. must never empty somebody's home
            raise BadInput(f"save_dir={save_dir} is not a run of this suite (no {VERSIONS}): name another save_dir")
        _remove_run(folder, keep)
    return _explain(cfg, folder)


RECIPE = ("lr", "num_epochs", "batch_size", "gradient_accumulation_steps")  # what a comparable run has in common


def recipe(path: str | None) -> str:
    """The overrides with which a model was finetuned, out of its run's folder or of the one it was unlearned from."""
    while path is not None and (Path(path) / CONFIG).is_file():
        cfg = cast(DictConfig, OmegaConf.load(Path(path) / CONFIG))
        if "forget_loss" not in cfg:
            return " ".join(f"{key}={cfg[key]}" for key in RECIPE if key in cfg)
        path = cfg.get("model_path")
    return ""


def start_evaluation(cfg: DictConfig, save_dir: str | Path, *, overwrite: bool, own: tuple[str, ...]) -> Path:
    """Make an evaluation's folder, as `start_run` does a training's; only an evaluation's own files are removed.

    Args:
        overwrite: whether an earlier evaluation's files are removed first; else they stay, for the new one to use.
        own: patterns of the files that an evaluation writes.

    Raises:
        BadInput: the folder holds something that is no evaluation of this suite.
    """
    folder = Path(save_dir)
    if ranks.rank() > 0:
        return folder
    held = _held(folder)
    strange = [name for name in sorted(held - {CONFIG, VERSIONS, FINISHED}) if not any(map(Path(name).match, own))]
    if strange or (held and VERSIONS not in held):
        raise BadInput(
            f"save_dir={save_dir} holds something else than an evaluation ({(strange or sorted(held))[0]}): name "
            "another save_dir"
        )
    (folder / FINISHED).unlink(missing_ok=True)  # until this one is complete, nothing here is
    if overwrite and held - {CONFIG, VERSIONS}:
        log.warning("replacing the evaluation in %s", folder)
        for name in held - {CONFIG, VERSIONS, FINISHED}:
            (folder / name).unlink()
    return _explain(cfg, folder)


def _held(folder: Path) -> set[str]:
    """The names in a folder, without what a killed write left aside, which is removed.

    Raises:
        BadInput: a file stands where the folder or one above it should be.
    """
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not above.is_dir():
        raise BadInput(f"save_dir={folder}: {above} is a file, not a folder: name another save_dir")
    if not folder.exists():
        return set()
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {path.name for path in folder.iterdir()}


def _explain(cfg: DictConfig, folder: Path) -> Path:
    """Put versions and config into the folder: a folder with the former is known as this suite's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / VERSIONS, versions())
    write_text(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
    return folder


def _remove_run(folder: Path, keep: tuple[str, ...]) -> None:
    """Remove an earlier run's own files, its mark of completion first, and the evaluations of its model."""
    log.warning("replacing the run in %s", folder)
    (folder / FINISHED).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and (path.name.startswith(("checkpoint-", "eval_results")) or _is_evaluation(path)):
            shutil.rmtree(path)
        elif not path.is_dir() and path.name not in (VERSIONS, *keep):  # with VERSIONS it stays known as this suite's
            path.unlink()


def _is_evaluation(folder: Path) -> bool:
    return (folder / VERSIONS).is_file() and any(folder.glob("eval_log*.json"))


def finish_run(save_dir: str | Path, scores: dict[str, Any]) -> None:
    """Write `finished.json`, the last file of a run: that it is there is what "complete" means. Rank 0 only."""
    if ranks.rank() == 0:
        write_json(Path(save_dir) / FINISHED, scores)
        log.info("finished: %s", save_dir)


def versions() -> dict[str, Any]:
    """The versions, commit and command that a run's numbers came from."""
    return {
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in RECORDED},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "world_size": ranks.world_size(),
        "command": sys.argv,
    }


def _git(*args: str) -> str | None:
    """Git's answer about the repository; None where it was installed without git."""
    try:
        done = subprocess.run(["git", "-C", str(REPO), *args], capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def one_line(error: object) -> str:
    """An error's text without its line breaks."""
    return " ".join(str(error).split())


def unknown(key: str, value: Any, allowed: Iterable[str]) -> str:
    """The line that refuses a value: the nearest of those allowed, and all of them."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(value), allowed, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key}={value} is unknown{hint}: it may be {', '.join(allowed)}"


def choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise BadInput unless `value` is one of `allowed`; name the nearest."""
    allowed = list(allowed)
    if value not in allowed:
        raise BadInput(unknown(key, value, allowed))


def no_key(key: str, keys: list[str], of: str = "") -> str:
    """The line that refuses an unknown key: the nearest ones, and those on its level."""
    near = difflib.get_close_matches(key, keys, 2, 0.6)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    level = key
    while level and not any(name.startswith(level) for name in keys):
        level = level[: level.rstrip(".").rfind(".") + 1]
    beside = dict.fromkeys(level + name.removeprefix(level).split(".")[0] for name in keys if name.startswith(level))
    return f"{key} is no key{of}{hint}: there are {', '.join(beside)}"


def at_least(cfg: DictConfig, least: float, *keys: str, above: bool = False, prefix: str = "") -> None:
    """Raise BadInput unless the numbers at these keys, where they are not null, are at least (or above) `least`."""
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is not None and not (math.isfinite(value) and (value > least if above else value >= least)):
            raise BadInput(f"{prefix}{key}={value}: it must be {'above' if above else 'at least'} {least}")
