"""What a run was made on: the processor, the memory, the cards, and the code as it was."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import utils

PATCH = "uncommitted.patch"
MOST = 1_000_000  # bytes of a patch that are kept


def hardware() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, the memory in bytes, and the GPUs."""
    import torch

    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    about = [torch.cuda.get_device_properties(i) for i in cards]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": one.name, "memory": one.total_memory} for one in about],
        "cuda": torch.version.cuda,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or ARM
        return platform.processor() or platform.machine()


def git(*args: str) -> str | None:
    """Git's answer about the repository; None where it was installed without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(utils.REPO), *args], capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a disk that takes too long
        return None
    return done.stdout if done.returncode == 0 else None


def patch() -> str:
    """What tracked files have that the commit has not, without credentials, cut at MOST bytes; "" if nothing."""
    text = utils.masked(git("diff", "HEAD", "--no-color", "--no-ext-diff") or "")
    whole = text.encode()
    if len(whole) <= MOST:
        return text
    kept = whole[:MOST].decode(errors="ignore")
    return f"{kept}\n# cut here: the whole patch has {len(whole)} bytes, and {MOST} are kept\n"
