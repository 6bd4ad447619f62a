"""A process that another one has started for itself, and that ends with it: a job of a sweep, an oracle's script."""

import os
import signal
import threading
import time
from pathlib import Path

PARENT = "TOFU_PARENT"  # set for such a process: the number of the other one


def end_with_parent() -> None:
    """End this process, as by SIGTERM, when the one that PARENT names is gone: nobody would ask for the result.

    Between the two may be a launcher, so that it need not be the one that started this process.
    """
    if not (parent := os.environ.pop(PARENT, "")):
        return

    def watch() -> None:
        while _alive(int(parent)):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _alive(number: int) -> bool:
    """Whether a process of ours is there; one that is dead may still be listed, until its own parent asks for it."""
    try:
        os.kill(number, 0)
        stat = Path(f"/proc/{number}/stat")
        return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
