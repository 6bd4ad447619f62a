"""What forget.yaml asks for at the end of epochs: evaluations, the best one kept, what stops a training."""

from omegaconf import DictConfig

import utils
from utils import BadInput, choice

EVALUATE = ("end",)


def check(cfg: DictConfig) -> None:
    """Look at these keys of a checked forget.yaml; names of metrics become those of metrics.json.

    Raises:
        BadInput: what is asked for needs an evaluation that the run does not make, or is not known.
    """
    if cfg.evaluate is not None:
        choice("evaluate", cfg.evaluate, EVALUATE)
    utils.at_least(cfg, 0, "stop_on.budget", above=True)
    keep, stop_on = cfg.keep_best, cfg.stop_on
    if cfg.eval_only and (cfg.evaluate or keep.metric or stop_on.collapse or stop_on.budget):
        raise BadInput("eval_only=true trains nothing: leave it out, or evaluate, keep_best and stop_on")
    if keep.metric is None and (keep.constraint or keep.direction):
        key = "constraint" if keep.constraint else "direction"
        raise BadInput(f"keep_best.{key}={keep[key]} chooses the best epoch: say by what, keep_best.metric=...")
    if (keep.metric or stop_on.collapse) and not cfg.eval_while_train:
        wanted = f"keep_best.metric={keep.metric}" if keep.metric else "stop_on.collapse=true"
        raise BadInput(f"{wanted} reads the evaluation at each epoch's end: it needs eval_while_train=true")
    if keep.metric is None:
        return
    if not cfg.save_model:
        raise BadInput(f"keep_best.metric={keep.metric} says which weights are saved, and save_model=false saves none")
    from tofu.evaluation import best  # it imports numpy

    if keep.direction is not None:
        choice("keep_best.direction", keep.direction, best.DIRECTIONS)
    keep.metric = best.check(cfg)
