"""One run at a time in a folder: a file that says which process writes there."""

import json
import logging
import os
import socket
import time
from pathlib import Path

from utils import BadInput

log = logging.getLogger(__name__)

CLAIM = ".claim.json"
_held: dict[Path, list[Path]] = {}  # this process's: the file, and the folders that were made for it


def take(folder: Path) -> None:
    """Claim a folder for this process until `release`; it must exist. Only rank 0 calls this.

    A claim whose process is gone is stale and replaced. One of another machine cannot be looked at.

    Raises:
        BadInput: another run writes there, or nobody may.
    """
    file = folder.resolve() / CLAIM
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
    ours["start"] = time.strftime("%Y-%m-%d %H:%M:%S")
    while file not in _held:
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _look(folder, file, ours)
            file.unlink(missing_ok=True)
        except OSError as error:
            raise BadInput(f"save_dir={folder} cannot be written ({error.strerror}): name another save_dir") from None
        else:
            with os.fdopen(handle, "w") as out:
                json.dump(ours, out)
            _held[file] = []


def _look(folder: Path, file: Path, ours: dict) -> None:
    """Return if the claim in `file` is stale, else raise BadInput."""
    try:
        theirs = json.loads(file.read_text())
        host, pid = theirs["host"], int(theirs["pid"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        if time.time() - file.stat().st_mtime < 5:  # it is being written
            raise BadInput(f"save_dir={folder}: another run starts there: name another save_dir") from None
        log.warning("%s: a claim that a killed run left half written is replaced", folder)
        return
    who = f"process {pid} on {host}, started {theirs.get('start')}"
    if host != ours["host"]:
        raise BadInput(
            f"save_dir={folder}: another run writes there ({who}): wait for it or name another save_dir; if it is "
            f"gone, remove {file}"
        )
    if pid != os.getpid() and _born(pid) is not None and _born(pid) == theirs.get("born"):
        raise BadInput(f"save_dir={folder}: another run writes there ({who}): wait for it or name another save_dir")
    log.warning("%s: the run that wrote there is gone (%s), its claim is replaced", folder, who)


def _born(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks: a pid is used again. None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a killed one that nobody has waited for yet is gone too
    except OSError:
        pass
    try:  # no /proc: macOS
        os.kill(pid, 0)
    except OSError:
        return None
    return "alive"


def release(folder: Path | None = None) -> None:
    """Give up this process's claim on a folder; None: all its claims."""
    for file in [file for file in _held if folder is None or file.parent == folder.resolve()]:
        file.unlink(missing_ok=True)
        del _held[file]


def held() -> list[Path]:
    """The folders that this process has claimed."""
    return [file.parent for file in _held]


def gone(folder: Path) -> str | None:
    """Where a folder that this process has claimed was removed, the line that says so."""
    if (folder / CLAIM).is_file():
        return None
    return f"save_dir={folder} is gone: it was removed while the run went on; run the same command again"


def made() -> dict[Path, list[Path]]:
    """This process's claimed folders that were not there before, each with all that was made, the innermost first."""
    return {file.parent: folders for file, folders in _held.items() if folders}


def make(folder: Path) -> None:
    """Make a folder and claim it.

    Raises:
        BadInput: see `take`; or it cannot be made.
    """
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not above.is_dir():
        raise BadInput(f"save_dir={folder}: {above} is a file, not a folder: name another save_dir")
    folders = [path for path in (folder.resolve(), *folder.resolve().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"save_dir={folder} cannot be made ({error.strerror}): name another save_dir") from None
    take(folder)
    if folders:
        _held[folder.resolve() / CLAIM] = folders


def give_up(folder: Path) -> None:
    """Release the folder of a run that was refused, and remove what `make` made, unless something was put into it."""
    folders = made().get(folder.resolve(), [])
    release(folder)
    for path in folders:
        try:
            path.rmdir()
        except OSError:  # another run has begun below it
            return
