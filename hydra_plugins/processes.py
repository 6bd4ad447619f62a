"""hydra/launcher=processes: each job of a sweep is a process of its own, with a card of its own (tofu/cli/pool.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class Config:
    """The launcher's keys: hydra.launcher.parallel=2."""

    _target_: str = "hydra_plugins.processes.Processes"
    parallel: Any = "auto"  # jobs at a time; auto: one for each card, 1 without one


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=Config, provider="tofu")


class Processes(Launcher):
    """Hydra's launcher that starts a process for every job."""

    def __init__(self, parallel: int | str) -> None:  # noqa: D107
        self.parallel = parallel

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: D102
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:  # noqa: D102
        from tofu.cli import pool  # here: Hydra imports this module whenever it starts

        return pool.launch(self, job_overrides, initial_job_idx)
