"""The jobs of a sweep side by side, each in a process of its own: on several cards each job gets one to itself."""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from omegaconf import open_dict

from tofu.cli import jobs, sweeps
from tofu.runtime import parent, signals
from utils import BadInput

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
LAUNCHER = "processes"  # hydra/launcher=
GRACE = 120  # seconds that jobs have to save when the sweep is interrupted, before they are killed
POLL = 0.1  # seconds between two looks at the jobs


def deal(parallel: int | str, cards: Sequence[str]) -> list[str | None]:
    """Whose turn it is for a card: the cards that jobs may take, one each; None for a job that needs none.

    Args:
        parallel: jobs at a time, or `auto`: as many as there are cards, one without a card.
        cards: what CUDA_VISIBLE_DEVICES calls them.

    Raises:
        BadInput: more jobs than cards, or no number of jobs.
    """
    if parallel == "auto":
        return list(cards) or [None]
    if type(parallel) is not int or parallel < 1:
        raise BadInput(f"hydra.launcher.parallel={parallel}: it must be auto, or a whole number of at least 1")
    if cards and parallel > len(cards):
        raise BadInput(
            f"hydra.launcher.parallel={parallel}: there are {len(cards)} GPUs, and each job has one to itself: take at "
            f"most {len(cards)}, or auto"
        )
    return list(cards[:parallel]) or [None] * parallel


def cards() -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES calls them."""
    if VISIBLE in os.environ:
        return [one.strip() for one in os.environ[VISIBLE].split(",") if one.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
    """Run jobs as Hydra's launcher does: here where this process is one of the pool, else in a process for each.

    Args:
        launcher: has `parallel`, and what Hydra set up: `context`, `task` (a `jobs.Jobs`) and `config`.
        first: the number of the first job.
    """
    setup_globals()
    if sweeps.POOL in os.environ:
        return [_here(launcher, overrides) for overrides in job_overrides]
    slots = deal(launcher.parallel, cards())
    numbers = range(first, first + len(job_overrides))
    pool = Pool(launcher.task, slots, launcher.task.scratch, [*numbers])
    with signals.handled(), ThreadPoolExecutor(len(slots)) as threads:
        ended = [threads.submit(pool.run, number, job) for number, job in zip(numbers, job_overrides, strict=True)]
        try:
            while wait(ended, timeout=POLL).not_done and not pool.asked_to_stop():
                pass
            if name := pool.asked_to_stop():
                threads.shutdown(wait=False, cancel_futures=True)
                pool.interrupt(getattr(signal, name))
                stop = signals.Interrupted(None, "what the sweep's jobs have saved stands", name=name)
                with contextlib.redirect_stderr(launcher.task.stderr):  # Hydra's own goes elsewhere
                    jobs.interrupted(stop)
            return [one.result() for one in ended]
        except KeyboardInterrupt:  # a second Ctrl-C
            threads.shutdown(wait=False, cancel_futures=True)
            pool.interrupt(signal.SIGKILL)
            raise


def _here(launcher: Any, overrides: Sequence[str]) -> JobReturn:
    """One job in this process, with the number that it has in the sweep."""
    number = int(os.environ[sweeps.POOL].partition(":")[0])
    config = launcher.context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=launcher.context,
        task_function=launcher.task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _pass_on(process: subprocess.Popen, said: Path, prefix: str) -> None:
    """Pass on the lines that a process writes into a file, until it has ended."""
    rest = b""
    with said.open("rb") as written:
        while True:
            ended = process.poll() is not None  # looked at before the lines are read: then they are all of them
            *lines, rest = (rest + written.read()).split(b"\n")
            for line in [*lines, rest] if ended and rest else lines:
                sys.stdout.write(f"{prefix}{line.decode(errors='replace')}\n")
            sys.stdout.flush()
            if ended:
                return
            time.sleep(POLL)


class Pool:
    """Processes that share cards: a job that begins takes one, a job that ends gives it back."""

    def __init__(self, jobs: Any, slots: Sequence[str | None], scratch: str, numbers: Sequence[int]) -> None:
        """Prepare to run jobs.

        Args:
            jobs: the `jobs.Jobs` of the command line.
            slots: see `deal`.
            scratch: the sweep's folder.
            numbers: the jobs that will run.
        """
        self.jobs, self.scratch, self.at_once = jobs, scratch, len(slots)
        self.todo = {number for number in numbers if not self._complete(number)}
        self.free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for slot in slots:
            self.free.put(slot)
        self.running: list[subprocess.Popen] = []
        self.stopped = self.interrupted = False

    def asked_to_stop(self) -> str | None:
        """The signal that this process has got, or SIGTERM where one of the jobs has: it ends the whole sweep."""
        return signals.requested() or ("SIGTERM" if self.interrupted else None)

    def _complete(self, number: int) -> bool:
        plan = self.jobs.plan
        return number < len(plan) and plan[number].state == sweeps.COMPLETE

    def run(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """One job, from its start to its end."""
        if self._complete(number):
            log.info("job %d: skipped, it is complete: %s", number, self.jobs.plan[number].place)
            return JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        card, began = self.free.get(), time.monotonic()
        try:
            if not self.stopped:
                told = sweeps.varying(self.jobs.plan, number) or sweeps.plain(" ".join(overrides))
                left = sweeps.left(self.jobs.seconds, len(self.todo), self.at_once)
                log.info("job %d%s: %s%s", number, "" if card is None else f" on GPU {card}", told, left)
                self._process(number, overrides, card)
        finally:
            self.todo.discard(number)
            self.free.put(card)
        return self._ended(number, list(overrides), time.monotonic() - began)

    def _process(self, number: int, overrides: Sequence[str], card: str | None) -> None:
        """Start a job's process and pass on what it says, each line with the job's number.

        It says so into a file: a pipe that closes when we are killed would end it before it has saved.
        """
        environment = {**os.environ, sweeps.POOL: f"{number}:{self.scratch}", parent.PARENT: str(os.getpid())}
        if card is not None:
            environment[VISIBLE] = card
        environment.setdefault(THREADS, str(max(1, len(os.sched_getaffinity(0)) // self.at_once)))
        said = Path(self.scratch) / f"said-{number}.txt"
        with (
            said.open("w") as out,
            subprocess.Popen(
                self.jobs.command(overrides),
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to us alone, and we pass it on once
            ) as process,
        ):
            self.running.append(process)
            if self.stopped:
                process.terminate()
            _pass_on(process, said, f"[{number}] ")
        self.running.remove(process)
        self.interrupted = self.interrupted or process.returncode == signals.CODE
        if process.returncode and not (Path(self.scratch) / f"outcome-{number}.json").is_file() and not self.stopped:
            how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
            failed = sweeps.Outcome(number, list(overrides), sweeps.FAILED, f"its process ended with {how}", code=1)
            sweeps.write(failed, self.scratch)

    def _ended(self, number: int, overrides: list[str], seconds: float) -> JobReturn:
        """A job's outcome as Hydra's launchers return it."""
        found = next((one for one in sweeps.outcomes(self.scratch) if one.number == number), None)
        made = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        if found is not None and found.state == sweeps.DONE:
            self.jobs.seconds.append(seconds)
        if found is None or found.state == sweeps.FAILED:
            made.status, made.return_value = JobStatus.FAILED, RuntimeError(found.why if found else "it did not run")
        else:
            made.return_value = found.value
        return made

    def interrupt(self, number: int) -> None:
        """Pass a signal on to the jobs, and wait for them; what does not end in time is killed."""
        self.stopped, until = True, time.monotonic() + GRACE
        for process in (running := list(self.running)):
            process.send_signal(number)
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
