"""The weights of a training's best epoch: kept in a folder of their own until the run ends, then the run's model."""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tofu.evaluation import best
from tofu.evaluation.best import Choice
from tofu.evaluation.measures import Measures
from tofu.evaluation.metrics import collapse
from tofu.models import saving
from tofu.runtime import ranks, run_folder
from utils import BadInput

log = logging.getLogger(__name__)


def choice_of(cfg: Any, measured: Measures, path: str) -> Choice | None:
    """How a run chooses its best epoch, if it does.

    Args:
        cfg: its checked config.
        measured: what its evaluations measure.
        path: the model that it starts from.

    Raises:
        BadInput: an evaluation that the run compares with is not known.
    """
    how = (
        f"evaluate it, python evaluate_util.py model_path={path} split={cfg.split} with the same data_path, ds_size "
        "and generation keys, or name its evaluation, eval.start_result=..."
    )
    if cfg.stop_on.collapse and (measured.start or {}).get(collapse.UTILITY) is None:
        raise BadInput(f"stop_on.collapse=true compares with the starting model, whose utility is not known: {how}")
    if cfg.keep_best.metric is None:
        return None
    return best.choice(cfg.keep_best, best.known(cfg), measured.start, measured.retain, how)


class KeepBest:
    """Saves the weights whenever an evaluation is better than all before it; of equal ones the first is kept.

    Attributes:
        step: of the weights that are kept; None: none yet.
        scores: of their evaluation; the same on all ranks.
    """

    def __init__(self, choice: Choice, save: Callable[[Path], None], out: Path) -> None:
        """
        Args:
            choice: how evaluations are compared.
            save: saves the model in memory into a folder; called on every rank.
            out: the run's folder.
        """
        self.choice, self.save, self.out = choice, save, out
        self.step: int | None = None
        self.scores: dict[str, Any] = {}

    def look(self, step: int, scores: Mapping[str, Any]) -> None:
        """Keep the weights in memory if their evaluation is the best so far. On every rank.

        Raises:
            BadInput: the first evaluation has no value of what is compared: the later ones would have none either.
        """
        if missing := self.choice.missing(scores):
            why = f"{self.out}/checkpoint-{step} has no {missing}, whose reason its metrics.json tells"
            if self.step is None:
                raise BadInput(f"keep_best: {why}: nothing can be compared by it")
            log.warning("keep_best: %s: step %d can't be the best", why, step)
            return
        told = self.choice.told(scores)
        if self.step is not None and self.choice.rank(scores) <= self.choice.rank(self.scores):
            log.info("keep_best: step %d, %s, is not better than step %d", step, told, self.step)
            return
        log.info("keep_best: step %d is the best so far, %s: its weights are kept", step, told)
        former, self.step, self.scores = self.step, step, dict(scores)
        self.save(self.folder())
        if former is not None and ranks.rank() == 0:
            shutil.rmtree(self.folder(former), ignore_errors=True)

    def folder(self, step: int | None = None) -> Path:
        """Where the weights of a step are kept; None: of the best one."""
        return self.out / f"{run_folder.BEST}{self.step if step is None else step}"

    def place(self) -> None:
        """Make the weights that are kept the run's model, and say which they are."""
        told = self.choice.told(self.scores)
        if self.choice.holds(self.scores):
            log.info("the model of step %d is saved, the best epoch's: %s", self.step, told)
        else:
            log.warning(
                "no epoch holds %s: the model of step %d is saved, which is nearest to it: %s",
                *(self.choice.constraint, self.step, told),
            )
        if ranks.rank() == 0:
            saving.copy_to(self.folder(), self.out)  # until the run is complete a kill may still cost what is there

    def record(self) -> dict[str, Any]:
        """For finished.json: which weights are saved, by what, and whether they hold the constraint."""
        if self.step is None:
            return {}
        name, constraint = self.choice.metric, self.choice.constraint
        said = {"constraint": str(constraint), "held": self.choice.holds(self.scores)} if constraint else {}
        return {"best": {"step": self.step, "metric": name, "value": self.scores[name], **said}}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON can hold it."""
        return {"step": self.step, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Where its weights gave way to better ones after the checkpoint, those are found again.

        Raises:
            BadInput: its weights were removed, and no better ones are there.
        """
        self.step, self.scores = state["step"], dict(state["scores"])
        if self.step is None or ranks.from_rank_0((self.folder() / "config.json").is_file()):
            return
        later = any(step > self.step for step in run_folder.kept_steps(self.out))
        if not ranks.from_rank_0(later):
            raise BadInput(
                f"keep_best: {self.folder()}, the weights of the best epoch so far, is not there any more, and the run "
                "can't go on without it: overwrite_dir=true starts again"
            )
        log.info("keep_best: step %d gave way to a later one, which is found again", self.step)
        self.step, self.scores = None, {}
