"""One run at a time in a folder: a file that says which process writes there."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils import BadInput

log = logging.getLogger(__name__)

CLAIM = ".claim.json"
BEAT, QUIET, PAUSE = 20, 150, 1.0  # seconds; a network file system may show a file's time a minute late
_held: dict[Path, list[Path]] = {}  # this process's: the file, and the folders that were made for it


def take(folder: Path) -> None:
    """Claim a folder for this process until `release`; it must exist. Only rank 0 calls this.

    A claim whose process is gone is stale and replaced. One of another machine is stale if its own SLURM job was put
    back into the queue since, or if it gives no sign for QUIET seconds, which is waited for.

    Raises:
        BadInput: another run writes there, or nobody may.
    """
    file, silent = folder.resolve() / CLAIM, None
    while file not in _held:
        with _locked(file.parent):
            theirs = _read(file)
            if theirs is None or theirs == silent or _stale(folder, theirs):
                if theirs is not None:
                    log.warning(
                        "%s: the run that wrote there is gone (%s), its claim is replaced", folder, _who(theirs)
                    )
                    file.unlink(missing_ok=True)
                _write(folder, file)
                continue
        _listen(folder, file, theirs)
        silent = theirs


def _write(folder: Path, file: Path) -> None:
    """Write this process's claim, unless another one has come first: then it is looked at anew."""
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return
    except OSError as error:
        raise BadInput(f"save_dir={folder} cannot be written ({error.strerror}): name another save_dir") from None
    with os.fdopen(handle, "w") as out:
        json.dump({**_ours(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}, out)
    _held[file] = []
    if len(_held) == 1:
        threading.Thread(target=_beat, daemon=True, name="claim").start()


def _ours() -> dict[str, Any]:
    """Which process this is, and of which SLURM job in which of its starts."""
    found = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "beat": BEAT}
    job = os.environ.get("SLURM_JOB_ID")
    return {**found, "job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))} if job else found


def _beat() -> None:
    """While this process holds a claim, give a sign of it every BEAT seconds: the file's time, for other machines."""
    while _held:
        for file in list(_held):
            with contextlib.suppress(OSError):
                os.utime(file)
        time.sleep(BEAT)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else looks at the folder's claim meanwhile, where the file system can lock a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(file: Path) -> dict[str, Any] | None:
    """The claim in a file, {} where it is not whole; None: there is none."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else {}


def _who(theirs: Mapping[str, Any]) -> str:
    if not theirs:
        return "its claim is half written"
    return f"process {theirs.get('pid')} on {theirs.get('host')}, started {theirs.get('start')}"


def _stale(folder: Path, theirs: Mapping[str, Any]) -> bool:
    """Whether a claim's process is known to be gone; of another machine's that may not be known.

    Raises:
        BadInput: it is there.
    """
    ours = _ours()
    if not theirs:
        if time.time() - (folder / CLAIM).stat().st_mtime < 5:  # it is being written
            raise BadInput(f"save_dir={folder}: another run starts there: name another save_dir")
        return True
    if theirs["host"] != ours["host"]:
        return "job" in ours and theirs.get("job") == ours["job"] and theirs.get("restart", 0) < ours["restart"]
    alive = _born(int(theirs["pid"]))
    if int(theirs["pid"]) != os.getpid() and alive is not None and alive == theirs.get("born"):
        raise BadInput(
            f"save_dir={folder}: another run writes there ({_who(theirs)}): wait for it or name another save_dir"
        )
    return True


def _listen(folder: Path, file: Path, theirs: Mapping[str, Any]) -> None:
    """Return if the run of another machine gives no sign for QUIET seconds, by the file system's own clock.

    Raises:
        BadInput: it gives one, or it is of a version that gives none.
    """
    last, told = None, False
    while "beat" in theirs:
        with contextlib.suppress(FileNotFoundError):
            sign = file.stat().st_mtime
            if last is not None and sign != last:
                break
            with tempfile.TemporaryFile(dir=folder) as probe:
                silence = os.fstat(probe.fileno()).st_mtime - sign
            if silence > QUIET:
                return
            if not told:
                log.info("%s: %s wrote there %d s ago: waiting for a sign of it", folder, _who(theirs), silence)
            last, told = sign, True
            time.sleep(PAUSE)
            continue
        return  # it has ended
    raise BadInput(
        f"save_dir={folder}: another run writes there ({_who(theirs)}): wait for it or name another save_dir; if it is "
        f"gone, remove {file}"
    )


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
        if (_read(file) or {}).get("pid") == os.getpid():  # else another run has taken it over
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
