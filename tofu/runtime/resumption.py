"""What an interrupted training left in its folder: whole checkpoints, and whether a run may go on from them.

A checkpoint is the folder RUN/resume/step-N. It is written aside and renamed when all ranks have written, its
manifest last; so what bears that name and has what its manifest says is whole.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.runtime import manifest, provenance
from utils import ASIDE, BadInput

log = logging.getLogger(__name__)

RESUME = "resume"  # below a run's folder
MANIFEST, MADE_FROM = "manifest.json", "made_from.json"  # in a checkpoint
NOT_WEIGHTS = (  # keys that move no weight, with all below them: a run goes on with other values of these
    *(
        "eval",
        "eval_while_train",
        "evaluate",
        "save_model",
        "log_gradient_norms",
        "allow_overlap",
        "engine",
        "ds_config",
    ),
    *("batch_size", "gradient_accumulation_steps"),  # their product with the processes is compared instead
)
CHOOSES = ("eval", "eval_while_train")  # of these, where the evaluations choose the weights or end the run
UNITS = {"s": 1, "min": 60, "h": 3600}
MODES = ("auto", "false")
CUT = "batch_size x gradient_accumulation_steps x processes"  # in `Resume.made_from`


class Interval(NamedTuple):
    """How often a checkpoint is written: every `count` seconds, optimiser steps or epochs; 0: never."""

    unit: str  # seconds, steps or epoch
    count: float


def interval(value: Any) -> Interval:
    """What the key checkpoint_every says: 15min, 30s, 2h, epoch, 200 (optimiser steps) or 0.

    Raises:
        BadInput: something else.
    """
    text = str(value).strip().lower()
    if text == "epoch":
        return Interval("epoch", 1)
    if text.isdigit():
        return Interval("steps", int(text))
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text)) and float(match[1]) > 0:
        return Interval("seconds", float(match[1]) * UNITS[match[2]])
    raise BadInput(
        f"checkpoint_every={value}: it may be a time (30s, 15min, 2h), epoch, a number of optimiser steps, or 0: never"
    )


def not_weights(cfg: Any) -> tuple[str, ...]:
    """The keys that a run may have otherwise than the interrupted one that it goes on from."""
    chosen = OmegaConf.select(cfg, "keep_best.metric") is not None or OmegaConf.select(cfg, "stop_on.collapse")
    return tuple(key for key in NOT_WEIGHTS if not (chosen and key in CHOOSES))


def check(cfg: Any) -> None:
    """Raise BadInput unless the keys checkpoint_every, resume and save_total_limit can be understood."""
    interval(cfg.checkpoint_every)
    utils.choice("resume", str(cfg.resume).lower(), MODES)
    utils.at_least(cfg, 1, "save_total_limit")


@dataclass
class Resume:
    """How a run treats what an interrupted one left.

    Attributes:
        mode: the key `resume`.
        made_from: what the weights follow from beside the config, by name: compared.
        engine: how the checkpoints are written (`kind`) and by how many `processes`: whether this run can read one.
        checkpoint: the one to go on from; set by `run_folder.start_run`, on rank 0.
    """

    mode: str
    made_from: Mapping[str, Any]
    engine: Mapping[str, Any]
    checkpoint: Path | None = field(default=None)

    def look(self, cfg: DictConfig, folder: Path) -> Path | None:
        """The checkpoint in an interrupted run's folder that this run goes on from; None: it starts again.

        Raises:
            BadInput: other settings, inputs or data than that run's; an engine that cannot read the checkpoint;
                `resume=false` where there is one.
        """
        found = newest(folder)
        if found is not None and self.mode == "false":
            raise BadInput(
                f"save_dir={folder} holds {RESUME}/{found.name} of an interrupted run, and resume=false: resume=auto "
                "goes on from it, overwrite_dir=true starts again"
            )
        differ = provenance.other_config(folder, cfg, but=not_weights(cfg))
        made = json.loads((found / MADE_FROM).read_text(encoding="utf-8")) if found is not None else {}
        for name in provenance.differing(made, self.made_from) if made else ():
            differ.append(f"{name}={made.get(name)} (now {self.made_from[name]})")
        if differ:
            raise BadInput(
                f"save_dir={folder} holds an interrupted run with other settings: {', '.join(differ)}: take the same, "
                "or overwrite_dir=true to start again"
            )
        if found is not None:
            self.check_engine(folder, made["engine"])
        self.checkpoint = found
        return found

    def check_engine(self, folder: Path, theirs: Mapping[str, Any]) -> None:
        """Raise BadInput where this run can't read their checkpoint; say so where it isn't the same to a bit."""
        if theirs == self.engine:
            return
        said = f"was interrupted under {theirs['kind']} with {theirs['processes']} processes"
        if theirs["kind"] != self.engine["kind"] or theirs["kind"].startswith("ZeRO"):
            raise BadInput(
                f"save_dir={folder} {said}, and its checkpoint is read in no other way (now {self.engine['kind']} with "
                f"{self.engine['processes']}): start {theirs['processes']} processes under {theirs['kind']}, or "
                "overwrite_dir=true to start again"
            )
        log.info(
            "the run %s, now %d: the same data in the same order, losses to 1e-4; bit for bit it is the same only with "
            "as many",
            said,
            self.engine["processes"],
        )


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    """The checkpoints below a run's folder, the newest first, damaged ones among them."""
    found = [path for path in (folder / RESUME).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a run's folder; half-written ones are removed, damaged ones passed over."""
    for path in (folder / RESUME).glob(f"{ASIDE}*"):
        shutil.rmtree(path)
    for path in _all(folder):
        try:
            found = manifest.problems(path, utils.read_json(path / MANIFEST, "resume"), full=True)
        except BadInput as error:
            found = [str(error)]
        if not found:
            return path
        log.warning("%s is damaged, and passed over: %s", path, ", ".join(found[:3]))
    return None


def aside(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is whole."""
    return folder / RESUME / f"{ASIDE}step-{step}"


def keep(written: Path, limit: int) -> Path:
    """Make what has been written aside a checkpoint, and remove all but the newest `limit`. Rank 0 only."""
    utils.write_json(written / MANIFEST, manifest.manifest(written))
    path = written.with_name(written.name.removeprefix(ASIDE))
    _remove(path)  # a damaged one of this step
    written.rename(path)
    for older in _all(path.parent.parent)[limit:]:
        _remove(older)
    return path


def remove(folder: Path) -> None:
    """Remove all checkpoints below a run's folder, and nothing else."""
    for path in [*_all(folder), *(folder / RESUME).glob(f"{ASIDE}*")]:
        _remove(path)
    if (folder / RESUME).is_dir() and not any((folder / RESUME).iterdir()):
        (folder / RESUME).rmdir()


def _remove(path: Path) -> None:
    """Remove a checkpoint; half removed, it is not taken for one."""
    if path.is_dir():
        gone = path if path.name.startswith(ASIDE) else path.rename(path.with_name(f"{ASIDE}old.{path.name}"))
        shutil.rmtree(gone)
