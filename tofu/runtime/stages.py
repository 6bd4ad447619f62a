"""Seconds and peak memory of each stage of a run, for finished.json."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MB = 1e6
_found: dict[str, dict[str, float]] = {}
_open: list[str] = []
_since = 0.0


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count what happens inside to a stage. A stage inside another one is taken out of it, so that no second is twice.

    Memory is this process's: of the host the largest resident set, of its GPU the most that torch had allocated.
    """
    _close()
    _open.append(name)
    _start()
    try:
        yield
    finally:
        _close()
        if name in _open:
            _open.remove(name)
        _start()


def take() -> dict[str, dict[str, float]]:
    """The stages so far, which are forgotten: of each its `seconds`, `host_mb` and, on a GPU, `gpu_mb`."""
    _close()
    found = {name: {key: round(value, 3) for key, value in one.items()} for name, one in _found.items()}
    _found.clear()
    _start()
    return found


def _start() -> None:
    global _since
    _since = time.monotonic()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins at what is held now
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def _close() -> None:
    """Count the time since the last border to the innermost stage."""
    if not _open:
        return
    known = _found.setdefault(_open[-1], {"seconds": 0.0})
    known["seconds"] += time.monotonic() - _since
    known["host_mb"] = max(known.get("host_mb", 0.0), _peak() / MB)
    if (cuda := _cuda()) is not None:
        known["gpu_mb"] = max(known.get("gpu_mb", 0.0), cuda.max_memory_allocated() / MB)


def _peak() -> int:
    """The largest resident set since the last border, in bytes; since the process began where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda() -> Any:
    """torch's module of the GPU that this process uses; None where there is none, or nothing uses it yet."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
