"""A run's folder: what may be written where, what may be removed, and what says that a run is complete."""

import logging
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.runtime import provenance, ranks
from tofu.runtime.provenance import CONFIG, FINISHED, VERSIONS
from utils import ASIDE, BadInput

log = logging.getLogger(__name__)

REFERENCE = "reference_logps.json"  # the reference model's log-probabilities: a run that replaces this one may use them


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
    utils.write_json(folder / VERSIONS, provenance.versions(cfg))
    utils.write_text(folder / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
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
        utils.write_json(Path(save_dir) / FINISHED, scores)
        log.info("finished: %s", save_dir)
