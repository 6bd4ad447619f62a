"""A run's folder: what may be written where, what may be removed, and what says that a run is complete."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.runtime import claim, machine, manifest, provenance, ranks, resumption, signals, stages
from tofu.runtime.provenance import CONFIG, FINISHED, VERSIONS
from tofu.runtime.signals import INTERRUPTED, Interrupted
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
CURVE = "trainer_state.json"  # the training log, written as it grows
BEST = "best-"  # begins the name of the folder that keeps the best epoch's weights while a run goes on
REFERENCE = "reference_logps.json"  # the reference model's log-probabilities: a run that replaces this one may use them


def start_run(
    cfg: DictConfig,
    save_dir: str | Path,
    *,
    overwrite: bool,
    inputs: tuple[str, ...],
    keep: tuple[str, ...] = (),
    resume: resumption.Resume | None = None,
) -> Path:
    """Make a training run's folder and put into it what explains it: the resolved config and the versions.

    Rank 0 alone looks at the disk and writes, so that no rank can mistake the folder just made for an older run.

    Args:
        cfg: the checked config.
        save_dir: the folder, relative to the working directory.
        overwrite: whether an earlier run's files there may be removed; runs in sub-folders of their own stay.
        inputs: local paths that this run reads; none of them may be removed by the overwriting.
        keep: files of an earlier run that stay.
        resume: how an interrupted run is treated; gets the checkpoint to go on from. None: it is refused.

    Raises:
        BadInput: the folder holds something and `overwrite` is false, or it is (or holds) one of `inputs`; also an
            interrupted run that this one can't go on from (`resumption.Resume.look`).
    """
    folder = Path(save_dir)
    for path in inputs:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise BadInput(
                f"save_dir={save_dir} is, or lies above, {path}, which this run reads: name another save_dir"
            )
    if not overwrite and in_a_sweep() and found(cfg, folder) == "complete":  # on every rank: they all go on
        raise Complete(str(folder))
    if ranks.rank() > 0:
        return folder
    with _claimed(folder):
        held = _held(folder)
        if held and not {CONFIG, VERSIONS} <= held <= {*EXPLAINS}:  # these a refused run leaves
            if not overwrite and resume is not None and _interrupted(cfg, folder, held, resume, keep):
                return _explain(cfg, folder, inputs)
            if not overwrite:
                raise BadInput(f"save_dir={save_dir} exists: name another, or overwrite_dir=true to replace that run")
            if VERSIONS not in held:  # save_dir=. must never empty somebody's home
                raise BadInput(f"save_dir={save_dir} is not a run of this suite (no {VERSIONS}): name another save_dir")
            _remove_run(folder, keep)
        return _explain(cfg, folder, inputs)


def start_evaluation(
    cfg: DictConfig, save_dir: str | Path, *, overwrite: bool, own: tuple[str, ...], keep: tuple[str, ...] = ()
) -> Path:
    """Make an evaluation's folder, as `start_run` does a training's; only an evaluation's own files are removed.

    Args:
        overwrite: whether an earlier evaluation's files are removed first; else they stay, for the new one to use.
        own: patterns of the files that an evaluation writes.
        keep: files that stay where the earlier evaluation was interrupted or killed, for the new one to go on.

    Raises:
        BadInput: the folder holds something that is no evaluation of this suite.
    """
    folder = Path(save_dir)
    if ranks.rank() > 0:
        return folder
    with _claimed(folder):
        held = _held(folder)
        ours = {*EXPLAINS, FINISHED, INTERRUPTED}
        strange = [name for name in sorted(held - ours) if not any(map(Path(name).match, own))]
        if strange or (held and VERSIONS not in held):
            raise BadInput(
                f"save_dir={save_dir} holds something else than an evaluation ({(strange or sorted(held))[0]}): name "
                "another save_dir"
            )
        if overwrite and held - {*EXPLAINS}:
            kept = {*EXPLAINS} if FINISHED in held else {*EXPLAINS, INTERRUPTED, *keep}
            (folder / FINISHED).unlink(missing_ok=True)  # first: until this one is complete, nothing here is
            if FINISHED in held:
                log.warning("replacing the evaluation in %s", folder)
            else:
                log.info("the evaluation in %s is not complete: what fits of it is kept", folder)
            for name in held & _wrote(folder) - kept:
                (folder / name).unlink()
        (folder / FINISHED).unlink(missing_ok=True)
        return _explain(cfg, folder)


def _interrupted(
    cfg: DictConfig, folder: Path, held: set[str], resume: resumption.Resume, keep: tuple[str, ...]
) -> bool:
    """Whether a folder holds an interrupted run; then it is made ready for the run to go on, or to start again.

    Raises:
        BadInput: see `resumption.Resume.look`.
    """
    if FINISHED in held:
        _clear(folder)  # it was killed while it did so
        return False
    if held == {VERSIONS}:  # killed between its first two files
        return VERSIONS in _wrote(folder) and (folder / WRITTEN).is_file()
    if not {CONFIG, VERSIONS} <= held:
        return False
    found = resume.look(cfg, folder)
    if found is None and resume.mode == "false":
        return False
    if found is None:
        log.info("%s: interrupted before its first checkpoint, the run starts again", folder)
        _remove_run(folder, (*keep, CONFIG))
        return True
    log.info("going on after step %d, from %s", resumption.step_of(found), found)
    for path in folder.glob("checkpoint-*"):  # evaluations of later steps are made again
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and int(step) > resumption.step_of(found):
            _remove_evaluations(path)
    return True


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
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= ours:
            for name in ours - {claim.CLAIM}:
                (folder / name).unlink(missing_ok=True)
            claim.give_up(folder)


def in_a_sweep() -> bool:
    """Whether this process runs the jobs of a sweep, one after another."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def found(cfg: DictConfig, folder: Path) -> str:
    """What a training's folder holds for a job of a sweep: `complete`, `cut off`, or "": no run that it may replace.

    Nothing is changed there.

    Args:
        cfg: the job's checked config.

    Raises:
        BadInput: a run with another config, or from other inputs; the keys are named.
    """
    if not (folder / VERSIONS).is_file():
        return ""
    whole, explained = (folder / FINISHED).is_file(), (folder / CONFIG).is_file()
    names = {path.name for path in folder.iterdir() if not path.name.startswith(ASIDE)}
    if (whole and not explained) or names <= {*EXPLAINS, WRITTEN, claim.CLAIM}:
        return ""
    but = () if whole else resumption.not_weights(cfg)
    if explained and (differ := provenance.other_config(folder, cfg, but=but)):
        raise BadInput(
            f"save_dir={folder} holds {'a complete' if whole else 'an unfinished'} run with other settings: "
            f"{', '.join(differ)}: name another save_dir, or overwrite_dir=true to replace it"
        )
    return "complete" if whole else "cut off"


def evaluated(cfg: DictConfig, folder: Path) -> bool:
    """Whether a folder holds the complete evaluation that `cfg` asks for, of the model that is there now.

    Only of a run's model is that known here, by its finished.json; of another one the evaluation itself looks.
    """
    if not all((folder / name).is_file() for name in (FINISHED, CONFIG, VERSIONS)):
        return False
    made = json.loads((folder / VERSIONS).read_text(encoding="utf-8")).get("inputs", {})
    return "model_path" in made and not provenance.other_config(folder, cfg)


class Complete(Exception):
    """A sweep's job that is complete already, by its folder."""


def note(folder: str | Path, *names: str) -> None:
    """Write down which files a run is about to create in its folder: those alone are removed with it. Rank 0 only.

    Raises:
        BadInput: the run's folder was removed.
    """
    if ranks.rank() > 0:
        return
    for ours in claim.held():
        if Path(folder).resolve().is_relative_to(ours) and (why := claim.gone(ours)):
            raise BadInput(why)  # else the rest of the run would look like a whole one
    path = Path(folder) / WRITTEN
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    with path.open("a", encoding="utf-8") as out:
        out.writelines(f"{name}\n" for name in names if name not in known)


def write_curve(folder: str | Path, state: Any) -> None:
    """Write the training log, whole or not at all, once it has a line. Rank 0 only.

    Args:
        state: the Trainer's (`transformers.TrainerState`).
    """
    if state.log_history and ranks.rank() == 0:
        note(folder, CURVE)
        with utils.atomic(Path(folder) / CURVE) as aside:
            state.save_to_json(str(aside))


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
    resumption.remove(folder)
    for path in _folders(folder):
        if path.name.startswith(("checkpoint-", "eval_results", BEST)) or _is_evaluation(path):
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


def going_on(save_dir: str | Path) -> None:
    """Training or evaluation begins: a signal's note of an earlier start in this folder says nothing any more."""
    if ranks.rank() == 0:
        (Path(save_dir) / INTERRUPTED).unlink(missing_ok=True)


def interrupt(stop: Interrupted) -> None:
    """Write `interrupted.json`, the last file of a run that a signal has stopped. Rank 0 only.

    TOFU_INTERRUPTED names a file that gets the same: a script that started the run need not know its folder.
    """
    if ranks.rank() > 0:
        return
    said = {"signal": stop.name, "saved": stop.saved, "step": stop.step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    said |= {"folder": str(stop.folder) if stop.folder else None, "do": signals.again()}
    if stop.folder is not None and Path(stop.folder).is_dir():
        note(stop.folder, INTERRUPTED)
        utils.write_json(Path(stop.folder) / INTERRUPTED, said)
    if copy := os.environ.get("TOFU_INTERRUPTED"):
        utils.write_json(copy, said)


def finish_run(save_dir: str | Path, scores: dict[str, Any]) -> None:
    """Write `finished.json`, the last file of a run: that it is there is what "complete" means. Rank 0 only.

    It holds the scores, the stages and the manifest of all files that the run wrote. Checkpoints to go on from are
    removed after it: a kill in between must not cost the training.
    """
    if ranks.rank() == 0:
        folder = Path(save_dir)
        going_on(folder)
        note(folder, FINISHED)
        known = {"stages": stages.take(), manifest.KEY: manifest.manifest(folder, _left(folder))}
        utils.write_json(folder / FINISHED, {**scores, **known})
        _clear(folder)
        claim.release(folder)
        log.info("finished: %s", save_dir)


def kept_steps(folder: Path) -> list[int]:
    """The steps whose weights are kept, whole, as the best of their time."""
    return sorted(int(path.name.removeprefix(BEST)) for path in _best(folder) if (path / "config.json").is_file())


def _best(folder: Path) -> list[Path]:
    """The folders of weights that were the best of their time."""
    return [path for path in _folders(folder) if re.fullmatch(rf"{BEST}\d+", path.name)]


def _clear(folder: Path) -> None:
    """Remove what only a run that goes on needs: checkpoints, and the weights that were the best of their time."""
    resumption.remove(folder)
    for path in _best(folder):
        shutil.rmtree(path)


def _left(folder: Path) -> list[str]:
    """The files that the run in a folder wrote and that stay as they are, also into its folders checkpoint-STEP."""
    places = [folder, *(path for path in _folders(folder) if path.name.startswith("checkpoint-"))]
    found = [path.relative_to(folder) / name for path in places if (path / WRITTEN).is_file() for name in _wrote(path)]
    return [str(name) for name in found if name.name not in (FINISHED, WRITTEN, ALTERABLE)]
