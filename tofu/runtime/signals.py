"""Signals that ask a run to stop: here they only set a flag, which the run looks at where it can stop without loss.

Importing it loads no torch: the command line asks for it before anything heavy is loaded.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")  # a scheduler's end, SLURM's warning before it, Ctrl-C
CODE = 75  # EX_TEMPFAIL: the same command may be run again, and goes on
AGAIN = "run the same command again to continue"
INTERRUPTED = "interrupted.json"  # in the folder of a run that was interrupted, until it goes on

_flag: str | None = None
_before: dict[str, Any] = {}  # name -> the handler that stood before ours


class Interrupted(Exception):
    """A signal has stopped the run, and what was to be kept of it is whole. Raised on all ranks."""

    def __init__(self, folder: str | Path | None, saved: str, step: int | None = None, name: str | None = None) -> None:
        """Say what a run that is interrupted leaves.

        Args:
            folder: the run's; None where it has none.
            saved: what is kept, in words: "saved at step 12".
            step: the optimiser step that a training has reached.
            name: the signal's; None for this process's own flag.
        """
        self.folder, self.saved, self.step = folder, saved, step
        self.name = name or requested() or "a signal to another process"
        super().__init__(f"interrupted by {self.name}: {saved}")


class Flagged(Exception):
    """This process is asked to stop: raised by `look`, caught before the next meeting of the ranks."""


def install() -> None:
    """Let SIGTERM, SIGUSR1 and SIGINT set a flag from now on; a second SIGINT ends the process at once.

    Nothing happens where they do so already, and in a thread, where Python allows no handlers.
    """
    with contextlib.suppress(ValueError):
        for name in [name for name in NAMES if name not in _before]:
            _before[name] = signal.signal(getattr(signal, name), _note)


def _note(number: int, frame: Any) -> None:
    global _flag
    name = signal.Signals(number).name
    if name == _flag == "SIGINT":
        signal.default_int_handler(number, frame)
    if name == "SIGINT" and os.environ.get("RANK", "0") == "0":  # somebody waits; not by the log: it might be locked
        os.write(2, b"SIGINT: stopping where nothing is lost; once more ends the script at once\n")
    _flag = name if _flag is None or name == "SIGINT" else _flag


def requested() -> str | None:
    """The name of the signal that this process has got since `install`; None if there was none."""
    return _flag


def clear() -> None:
    """Forget the flag and put back the handlers that stood before `install`."""
    global _flag
    for name, handler in _before.items():
        signal.signal(getattr(signal, name), handler)
    _before.clear()
    _flag = None


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """`install` for the while; inside of another such block nothing changes."""
    outermost = not _before
    install()
    try:
        yield
    finally:
        if outermost:
            clear()


def look() -> None:
    """Raise Flagged if this process is asked to stop: only between two meetings of the ranks."""
    if _flag is not None:
        raise Flagged(_flag)
