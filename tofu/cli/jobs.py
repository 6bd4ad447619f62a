"""The jobs of one command line: one, or those of a sweep. What ends a job is told in a line, and a sweep goes on."""

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tofu.cli import sweeps
from tofu.runtime import claim, peers, ranks, run_folder, signals
from tofu.runtime.provenance import FINISHED
from utils import BadInput, masked, one_line

log = logging.getLogger(__name__)

PATIENCE = 30  # seconds that other ranks wait for rank 0 to tell an error that all of them found
ARRIVAL = 60  # seconds in which all ranks must have refused a job of a sweep
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


class Jobs:
    """What Hydra calls for each job, of one or of a sweep; it can be sent to another process.

    Attributes:
        plan: the jobs of a sweep as they were before the first one started; [] where nobody knows them.
        result: what the last job returned.
        ended: what became of the jobs, where the sweep has ended.
        scratch: the sweep's folder, where each job leaves what became of it.
    """

    def __init__(
        self, task: Callable[[DictConfig], Any], after: Callable[[], None], typed: list[str], logs: Callable[[], None]
    ) -> None:
        """Prepare the jobs of one command line.

        Args:
            task: does one job.
            after: called after every job of a sweep, and after a single one that ended well.
            typed: the command line, as a run's record tells it.
            logs: sets up logging in the process of a job.
        """
        functools.update_wrapper(self, task)  # Hydra looks at where the task comes from
        self.task, self.after, self.logs, self.typed, self.argv = task, after, logs, typed, typed
        self.stderr: TextIO | None = sys.stderr  # Hydra's own goes elsewhere
        self.plan: list[sweeps.Planned] = []
        self.seconds: list[float] = []
        self.ended: list[sweeps.Outcome] = []
        self.scratch, self.started = "", False
        self.result: Any = None
        self.given: frozenset[str] = frozenset()  # keys that the record of a repeated run gave, which are not told
        self.bug: Exception | None = None  # of a single job: it keeps its traceback

    def __getstate__(self) -> dict[str, Any]:
        """Without what another process has of its own."""
        return {**self.__dict__, "stderr": None}

    def __call__(self, cfg: DictConfig) -> Any:
        """One job. In a sweep one that fails is noted."""
        sys.argv = self.typed
        with contextlib.redirect_stderr(self.stderr or sys.stderr):
            self.logs()
            if self.argv != self.typed and not self.started:
                log.info("taken as: %s", " ".join(self.argv[1:]))
            self.started = True
            bars = cfg.get("progress", True) and sweeps.POOL not in os.environ
            for name in NO_BARS:
                os.environ.pop(name, None) if bars else os.environ.update({name: "1"})
            try:
                return self._of_sweep(cfg) if HydraConfig.get().mode == RunMode.MULTIRUN else self._single(cfg)
            finally:
                peers.leave()
                signals.clear()
                claim.release()

    def _single(self, cfg: DictConfig) -> Any:
        """The only job: what it raises ends the script."""
        try:
            self._begin(cfg)
        except signals.Interrupted as stopped:
            interrupted(stopped)
        except BadInput as error:
            run_folder.undo()
            stop(error)
        except Exception as error:
            if cause := _cause(error):
                stop(BadInput(cause), 1)
            signals.clear()
            if not _speaks():
                sys.exit(1)
            self.bug = error
            raise
        self.after()
        return self.result

    def _begin(self, cfg: DictConfig) -> None:
        log.info("%s: checking the config, then loading the libraries", os.path.basename(self.argv[0]))
        self.result = self.task(cfg)
        self.result = objective(cfg, self.result)

    def _of_sweep(self, cfg: DictConfig) -> Any:
        """One of several jobs. What became of it is written down for the table at the end.

        Raises:
            BadInput: it has failed, and a sweeper asks for its objective.
        """
        hydra, began = HydraConfig.get(), time.monotonic()
        number, overrides = int(hydra.job.num), list(hydra.overrides.task)
        told = sweeps.plain(" ".join(one for one in overrides if one.split("=")[0].lstrip("+~") not in self.given))
        planned = self.plan[number : number + 1]
        ended, failure = sweeps.Outcome(number, overrides, sweeps.DONE), None
        known = bool(planned) and planned[0].state == sweeps.COMPLETE
        try:
            try:
                if known:
                    raise run_folder.Complete(planned[0].place)
                todo = sum(one.state != sweeps.COMPLETE for one in self.plan[number:])
                left = sweeps.left(self.seconds, todo)
                log.info("job %d: %s%s", number, sweeps.varying(self.plan, number) or told, left)
                self._begin(cfg)
                self.seconds.append(time.monotonic() - began)
            except run_folder.Complete as complete:
                log.info("job %d: skipped, it is complete: %s", number, complete)
                ended.state, self.result = sweeps.COMPLETE, objective(cfg, _scores(str(complete)))
        except signals.Interrupted as stopped:
            ended.state, ended.why, ended.seconds = sweeps.NOT_RUN, one_line(stopped), time.monotonic() - began
            sweeps.write(ended, self.scratch)
            interrupted(stopped)
        except Exception as error:
            failure, self.result = error, None
            ended.state, ended.why, ended.code = sweeps.FAILED, one_line(error), 2 if isinstance(error, BadInput) else 1
        ended.seconds, ended.value = time.monotonic() - began, self.result if cfg.get("objective") else None
        sweeps.write(ended, self.scratch)
        if failure is not None:
            self._note(failure, number, told)
            failure = None  # it holds the job's frames, and they hold its model
        if not known:  # nothing has been loaded for one that is skipped
            self.after()
        if ended.state == sweeps.FAILED and cfg.get("objective"):
            raise BadInput(ended.why)
        return self.result

    def _note(self, error: Exception, number: int, told: str) -> None:
        """Tell a failed job's error and go on, or end the sweep where the next job could not run either."""
        cause, alone, bad = _cause(error), ranks.world_size() == 1, isinstance(error, BadInput)
        if cause is not None and (not alone or _disk_full(error)):
            stop(BadInput(cause), 1)
        if bad:
            run_folder.undo()
        elif cause is None:
            traceback.print_exception(error)
        said = f"job {number} ({told}): {cause or one_line(error)}"
        if not alone and not (bad and ranks.all_arrive(f"failed/{number}", ARRIVAL)):
            stop(BadInput(f"{said}: the sweep ends, since its processes might wait for each other"), 2 if bad else 1)
        if ranks.rank() == 0:
            sys.stderr.write(masked(f"error: {said}\n"))

    def command(self, overrides: Sequence[str]) -> list[str]:
        """The command line of one job of a sweep by itself."""
        flags = [arg for arg in self.argv[1:] if arg.startswith("-") or ("=" not in arg and not arg.startswith("~"))]
        return [sys.executable, self.argv[0], *flags, *map(sweeps.plain, overrides)]

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Tell at the end of a sweep, however it ends, what became of its jobs."""
        try:
            yield
        except Exception:
            self._tell()
            if self.bug is not None or not self.failed:
                raise  # else it is a sweeper's, after jobs that failed
        finally:
            self._tell()

    def _tell(self) -> None:
        if not self.ended:
            own = os.environ.get(sweeps.POOL, "").partition(":")[0]  # of the pool's process: its own job alone
            self.ended = [one for one in sweeps.outcomes(self.scratch, self.plan) if own in ("", str(one.number))]
            if len(self.ended) > 1:
                log.info(sweeps.summary(self.ended))

    @property
    def failed(self) -> list[sweeps.Outcome]:
        """The jobs that failed."""
        return [one for one in self.ended if one.state == sweeps.FAILED]

    def end(self) -> None:
        """Exit with an error, and the list, if jobs of a sweep failed."""
        if self.failed:
            named = ", ".join(f"{one.number} ({sweeps.plain(' '.join(one.overrides))})" for one in self.failed)
            code = 1 if any(one.code == 1 for one in self.failed) else 2
            if sweeps.POOL in os.environ:
                sys.exit(code)  # it has said why
            stop(BadInput(f"{len(self.failed)} of {len(self.ended)} jobs failed: {named}"), code)


def objective(cfg: DictConfig, scores: Any) -> Any:
    """What a job returns: the score that the key `objective` names, a list of them for several; all without it.

    Raises:
        BadInput: the run has no such score.
    """
    names = cfg.get("objective")
    if names is None or ranks.rank() > 0:  # scores are rank 0's
        return scores
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if not isinstance((scores or {}).get(name), int | float):
            there = [key for key, value in (scores or {}).items() if isinstance(value, int | float)]
            raise BadInput(f"objective={name}: the run has no such score: it has {', '.join(there) or 'none'}")
    values = [float(scores[name]) for name in asked]
    return values[0] if isinstance(names, str) else values


def _scores(folder: str) -> dict[str, Any]:
    """The scores of a complete run, as its last file tells them."""
    file = Path(folder) / FINISHED
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def interrupted(stopped: signals.Interrupted) -> None:
    """Say in a file and in a line that a signal has stopped the run, and exit; a sweep ends with its job."""
    run_folder.interrupt(stopped)
    if ranks.rank() == 0:
        sys.stderr.write(f"{one_line(stopped)}; {signals.again()}\n")
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

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        bars = sys.modules.get("tqdm") if sys.stderr.isatty() else None
        with bars.tqdm.external_write_mode(file=sys.stdout) if bars else contextlib.nullcontext():
            super().emit(record)
