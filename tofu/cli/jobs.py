"""The jobs of one command line: one, or those of a sweep. What ends a job is told in a line, and a sweep goes on."""

import contextlib
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tofu.runtime import claim, peers, ranks, run_folder, signals
from utils import BadInput, masked, one_line

log = logging.getLogger(__name__)

PATIENCE = 30  # seconds that other ranks wait for rank 0 to tell an error that all of them found
NO_MEMORY = "can't allocate memory"  # what torch says on a CPU
NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")  # environment variables of the libraries


def stop(error: BadInput, code: int = 2) -> None:
    """Tell the error and exit. Where rank 0 tells it the other ranks are silent; what one alone has found, it tells."""
    signals.clear()  # what ends this process now is no request
    if not _speaks():
        sys.exit(code)
    sys.stderr.write(masked(f"error: {f'rank {ranks.rank()}: ' if ranks.rank() else ''}{one_line(error)}\n"))
    sys.stderr.flush()
    sys.exit(code)


def _speaks() -> bool:
    """Whether this rank tells what it ends with; where nobody decides that, the launcher ends those that wait."""
    told = peers.may_speak()
    if told is not None:
        peers.end_soon()  # a library may wait for the others at the interpreter's end
    elif ranks.rank() > 0:
        time.sleep(PATIENCE)
    return told is not False


def plain(override: str) -> str:
    """An override as it was typed: Hydra escapes braces."""
    return override.replace("\\{", "{").replace("\\}", "}")


class Jobs:
    """Runs jobs, and remembers what the last one returned and which ones failed."""

    def __init__(self, task: Callable[[DictConfig], Any], after: Callable[[], None]) -> None:
        self.task, self.after = task, after
        self.result: Any = None
        self.count = 0
        self.failed: list[str] = []
        self.code = 0
        self.given: frozenset[str] = frozenset()  # keys that the record of a repeated run gave, which are not told
        self.bug: Exception | None = None  # of a single job: it keeps its traceback

    def run(self, cfg: DictConfig) -> Any:
        """One job. In a sweep of one process one that fails is noted; of several, ranks might wait for each other."""
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        task = HydraConfig.get().overrides.task
        told = plain(" ".join(one for one in task if one.split("=")[0] not in self.given))
        number, self.count = self.count, self.count + 1
        if sweep:
            log.info("job %d: %s", number, told)
        for name in NO_BARS:
            os.environ.pop(name, None) if cfg.get("progress", True) else os.environ.update({name: "1"})
        try:
            self.result = self.task(cfg)
        except run_folder.Complete as complete:
            log.info("job %d: skipped, it is complete: %s", number, complete)
        except signals.Interrupted as interrupted:
            _interrupted(interrupted)
        except (BadInput, Exception) as error:
            self._fail(error, sweep, f"{number} ({told})")
        finally:
            peers.leave()
            signals.clear()
            claim.release()
        self.after()
        return self.result

    def _fail(self, error: Exception, sweep: bool, job: str) -> None:
        """Tell an error, and end the script unless it is a sweep that can go on with its other jobs."""
        cause, alone = _cause(error), ranks.world_size() == 1
        if cause is not None and (not (sweep and alone) or _disk_full(error)):
            stop(BadInput(cause), 1)
        if isinstance(error, BadInput):
            run_folder.undo()
        if not sweep or not alone:
            if isinstance(error, BadInput):
                stop(error)
            signals.clear()
            if not _speaks():
                sys.exit(1)
            self.bug = error
            raise error
        if cause is None and not isinstance(error, BadInput):
            traceback.print_exc()
        sys.stderr.write(masked(f"error: job {job}: {cause or one_line(error)}\n"))
        self.failed.append(job)
        self.code = max(self.code, 2) if isinstance(error, BadInput) and self.code != 1 else 1

    def end(self) -> None:
        """Exit with an error, and the list, if jobs of a sweep failed."""
        if self.failed:
            stop(BadInput(f"{len(self.failed)} of {self.count} jobs failed: {', '.join(self.failed)}"), self.code)


def _interrupted(stopped: signals.Interrupted) -> None:
    """Say in a file and in a line that a signal has stopped the run, and exit; a sweep ends with its job."""
    run_folder.interrupt(stopped)
    if ranks.rank() == 0:
        sys.stderr.write(f"{one_line(stopped)}; {signals.AGAIN}\n")
        sys.stderr.flush()
    sys.exit(signals.CODE)


def _cause(error: Exception) -> str | None:
    """What of this machine, not of the code, has caused an error, and what is left; None for any other error."""
    if _disk_full(error):
        return f"the disk is full ({one_line(error)}): files of earlier steps are whole"
    if isinstance(error, BadInput):
        return None
    for folder in claim.held():
        if why := claim.gone(folder):
            return why
        if not os.access(folder, os.W_OK):
            return f"save_dir={folder} can no longer be written ({one_line(error)}): what is there stands"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in str(error):
        return f"out of memory ({one_line(error)[:200]}): take a smaller batch_size; what was saved stands"
    return None


def _disk_full(error: Exception) -> bool:
    """Whether an error, of the system or of a library that writes weights, says that there is no room."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


class BesideBars(logging.StreamHandler):
    """Writes log lines to what is stdout now; above a progress bar, where both go to a terminal."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # noqa: D102
        return sys.stdout

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        return masked(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        bars = sys.modules.get("tqdm") if sys.stderr.isatty() else None
        with bars.tqdm.external_write_mode(file=sys.stdout) if bars else contextlib.nullcontext():
            super().emit(record)
