"""Signals that ask a run to stop: a handler sets a flag, and what trains or evaluates looks at it."""

import signal
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
_asked: list[str] = []


class Interrupted(Exception):
    """Raised on all ranks by what has saved: the checkpoint's folder, and its step."""


def install() -> None:
    """Let the signals of NAMES set this process's flag."""
    _asked.clear()
    for name in NAMES:
        signal.signal(getattr(signal, name), _note)


def _note(number: int, frame: Any) -> None:
    _asked.append(signal.Signals(number).name)


def requested() -> str | None:
    """The name of the signal that this process got first; None: none."""
    return _asked[0] if _asked else None
