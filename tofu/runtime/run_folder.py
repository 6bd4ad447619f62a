"""A run's folder: what may be written where, what may be removed, and what says that a run is complete."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.runtime import claim, machine, manifest, provenance, ranks, stages
from tofu.runtime.provenance import CONFIG, FINISHED, VERSIONS
from utils import ASIDE, BadInput

log = logging.getLogger(__name__)

EXPLAINS = (CONFIG, VERSIONS, machine.PATCH)  # what a run writes first
WRITTEN = "written.txt"  # the files that the run in a folder wrote, by name
KNOWN = (  # what runs of older versions, which kept no such list, may have written
    *("config.yaml", "versions.json", "finished.json", "config.json", "generation_config.json", "*.safetensors"),
    *("*.safetensors.index.json", "pytorch_model*", "adapter_*", "tokenizer*", "special_tokens_map.json", "vocab*"),
    *("added_tokens.json", "merges.txt", "chat_template*", "trainer_state.json", "training_args.bin", "eval_*"),
    *(
        "aggregate_stat.csv",
        "fingerprints.json",
        "reference_logps.json",
        "TOFU_EVAL.json",
        "TOFU_SUMMARY.json",
        "trained_on.json",
    ),
)
ALTERABLE = "aggregate_stat.csv"  # aggregate_eval_stat.py may append to it: no part of the manifest
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
    if not overwrite and in_a_sweep():
        _check_complete(cfg, folder)  # on every rank: they all go on to the next job
    if ranks.rank() > 0:
        return folder
    with _claimed(folder):
        held = _held(folder)
        refused = {CONFIG, VERSIONS} <= held <= {*EXPLAINS}  # what a run leaves that was refused after its start
        if held and not refused:
            if not overwrite:
                raise BadInput(f"save_dir={save_dir} exists: name another, or overwrite_dir=true to replace that run")
            if VERSIONS not in held:  # save_dir=. must never empty somebody's home
                raise BadInput(f"save_dir={save_dir} is not a run of this suite (no {VERSIONS}): name another save_dir")
            _remove_run(folder, keep)
        return _explain(cfg, folder, inputs)


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
    with _claimed(folder):
        held = _held(folder)
        strange = [name for name in sorted(held - {*EXPLAINS, FINISHED}) if not any(map(Path(name).match, own))]
        if strange or (held and VERSIONS not in held):
            raise BadInput(
                f"save_dir={save_dir} holds something else than an evaluation ({(strange or sorted(held))[0]}): name "
                "another save_dir"
            )
        (folder / FINISHED).unlink(missing_ok=True)  # until this one is complete, nothing here is
        if overwrite and held - {*EXPLAINS}:
            log.warning("replacing the evaluation in %s", folder)
            for name in held & _wrote(folder) - {*EXPLAINS}:
                (folder / name).unlink()
        return _explain(cfg, folder)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Claim a folder for a run that starts inside; where it is refused, nothing is left that was not there."""
    claim.make(folder)
    try:
        yield
    except BadInput:
        claim.give_up(folder)
        raise


def undo() -> None:
    """Remove the folders that this process made for runs that were refused before they wrote more than their config."""
    ours = {*EXPLAINS, WRITTEN, claim.CLAIM}
    for folder in claim.made():
        if {path.name for path in folder.iterdir()} <= ours:
            for name in ours - {claim.CLAIM}:
                (folder / name).unlink(missing_ok=True)
            claim.give_up(folder)


def in_a_sweep() -> bool:
    """Whether this process runs the jobs of a sweep, one after another."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _check_complete(cfg: DictConfig, folder: Path) -> None:
    """Look at the run in a sweep job's folder, if one is complete there.

    Raises:
        Complete: it was made with this config, from the same inputs.
        BadInput: it was made with another one; the keys are named.
    """
    if not all((folder / name).is_file() for name in (FINISHED, CONFIG, VERSIONS)):
        return
    if differ := provenance.other_config(folder, cfg):
        raise BadInput(
            f"save_dir={folder} holds a complete run with other settings: {', '.join(differ)}: name another save_dir, "
            "or overwrite_dir=true to replace it"
        )
    raise Complete(str(folder))


class Complete(Exception):
    """A sweep's job that is complete already, by its folder."""


def note(folder: str | Path, *names: str) -> None:
    """Write down which files a run is about to create in its folder: those alone are removed with it. Rank 0 only."""
    if ranks.rank() > 0:
        return
    path = Path(folder) / WRITTEN
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    with path.open("a", encoding="utf-8") as out:
        out.writelines(f"{name}\n" for name in names if name not in known)


def _wrote(folder: Path) -> set[str]:
    """The files in a folder that a run of this suite wrote; without a list, those with names that runs give."""
    there = {path.name for path in folder.iterdir() if not path.is_dir()}
    if (folder / WRITTEN).is_file():
        return there & {WRITTEN, *(folder / WRITTEN).read_text(encoding="utf-8").splitlines()}
    return {name for name in there if any(map(Path(name).match, KNOWN))}


def _held(folder: Path) -> set[str]:
    """The names in a folder, without what a killed write left aside, which is removed, and without our own notes."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return {path.name for path in folder.iterdir()} - {WRITTEN, claim.CLAIM}


def _explain(cfg: DictConfig, folder: Path, read: tuple[str, ...] = ()) -> Path:
    """Put versions, config and uncommitted changes into the folder: with the first it is known as this suite's.

    Of a run that repeats another one, what differs beside the config is said.
    """
    note(folder, *EXPLAINS)
    found = provenance.versions(cfg, read)
    if run := provenance.repeated():
        differ = provenance.changed_since(run, found)
        log.log(
            logging.WARNING if differ else logging.INFO,
            "repeats %s: %s",
            run,
            f"these are others than then: {', '.join(differ)}" if differ else "versions, commit and inputs are equal",
        )
    utils.write_json(folder / VERSIONS, found)
    if patch := machine.patch():
        utils.write_text(folder / machine.PATCH, patch)
    else:
        (folder / machine.PATCH).unlink(missing_ok=True)
    utils.write_text(folder / CONFIG, utils.masked(OmegaConf.to_yaml(cfg, resolve=True)))
    return folder


def _remove_run(folder: Path, keep: tuple[str, ...]) -> None:
    """Remove an earlier run's own files, its mark of completion first, and the evaluations of its model."""
    log.warning("replacing the run in %s", folder)
    (folder / FINISHED).unlink(missing_ok=True)
    for path in _folders(folder):
        if path.name.startswith(("checkpoint-", "eval_results")) or _is_evaluation(path):
            _remove_evaluations(path)
    for name in _wrote(folder) - {VERSIONS, WRITTEN, *keep}:  # with VERSIONS it stays known as this suite's
        (folder / name).unlink()
    (folder / WRITTEN).unlink(missing_ok=True)
    note(folder, VERSIONS, *(name for name in keep if (folder / name).is_file()))


def _remove_evaluations(folder: Path) -> None:
    """Remove the files that evaluations left in a folder and in those below it, and what is empty then."""
    for path in _folders(folder):
        _remove_evaluations(path)
    for name in _wrote(folder):
        (folder / name).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder; a link leads elsewhere, where nothing is removed."""
    return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]


def _is_evaluation(folder: Path) -> bool:
    return (folder / VERSIONS).is_file() and any(folder.glob("eval_log*.json"))


def finish_run(save_dir: str | Path, scores: dict[str, Any]) -> None:
    """Write `finished.json`, the last file of a run: that it is there is what "complete" means. Rank 0 only.

    It holds the scores, the stages and the manifest of all files that the run wrote.
    """
    if ranks.rank() == 0:
        folder = Path(save_dir)
        note(folder, FINISHED)
        known = {"stages": stages.take(), manifest.KEY: manifest.manifest(folder, _left(folder))}
        utils.write_json(folder / FINISHED, {**scores, **known})
        claim.release(folder)
        log.info("finished: %s", save_dir)


def _left(folder: Path) -> list[str]:
    """The files that the run in a folder wrote and that stay as they are, also into its folders checkpoint-STEP."""
    places = [folder, *(path for path in _folders(folder) if path.name.startswith("checkpoint-"))]
    found = [path.relative_to(folder) / name for path in places if (path / WRITTEN).is_file() for name in _wrote(path)]
    return [str(name) for name in found if name.name not in (FINISHED, WRITTEN, ALTERABLE)]
