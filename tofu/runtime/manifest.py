"""Whether a run's folder is whole: which files the run left, how large they are, and the sha256 of each."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import utils
from tofu.runtime import provenance, ranks, trust
from tofu.runtime.provenance import CONFIG, FINISHED, VERSIONS
from utils import BadInput

KEY = "manifest"  # of finished.json
Manifest = Mapping[str, Mapping[str, Any]]  # file -> its size in bytes and its sha256


def manifest(folder: str | Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The sizes and digests of files.

    Args:
        folder: where they are.
        names: relative to it; one that is not there is left out. None: every file in it and below it.

    Returns:
        Name -> `size` in bytes and `sha256` in hexadecimal, sorted by name.
    """
    if names is None:
        names = (file.relative_to(folder).as_posix() for file in Path(folder).rglob("*"))
    there = sorted(name for name in names if (Path(folder) / name).is_file())
    return {
        name: {"size": (Path(folder) / name).stat().st_size, "sha256": digest}
        for name, digest in zip(there, digests(Path(folder) / name for name in there), strict=True)
    }


def digests(files: Iterable[Path]) -> list[str]:
    """The sha256 of each file: hashing lets other threads run, and a large model has many files."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(provenance.file_digest, files))


def problems(folder: str | Path, manifest: Manifest, full: bool) -> list[str]:
    """What is not as a manifest says, one text for each file; [] where all is whole.

    Args:
        full: whether to hash the files too; else their sizes are compared alone.
    """
    found, same = [], []
    for name, known in manifest.items():
        file = Path(folder) / name
        if not utils.inside(name):
            found.append(f"{name} leads out of the folder")
        elif not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != known["size"]:
            found.append(f"{name} has {file.stat().st_size} bytes instead of {known['size']}")
        else:
            same.append(name)
    if full:
        hashed = zip(same, digests(Path(folder) / name for name in same), strict=True)
        found += [f"{name} has other content" for name, digest in hashed if digest != manifest[name]["sha256"]]
    return found


def read(folder: Path) -> Manifest | None:
    """The manifest of the run in a folder; None where there is none: no run, an older version's, one not finished.

    Raises:
        BadInput: a finished.json that is not whole.
    """
    file = folder / FINISHED
    if not file.is_file():
        return None
    found = utils.read_json(file, "the run's record")
    found = found.get(KEY) if isinstance(found, dict) else None
    if found is None:
        return None
    if not isinstance(found, dict) or not all(
        isinstance(one, dict) and isinstance(one.get("size"), int) and isinstance(one.get("sha256"), str)
        for one in found.values()
    ):
        raise BadInput(f"{file} has no whole manifest: copy the folder again")
    return found


def check_model(folder: str | Path, key: str) -> None:
    """Refuse a run's folder that is not finished, or not as the run left it. A folder of somebody else's passes.

    What the user adds to a folder is no problem. With `verify: full` rank 0 hashes every file.

    Args:
        folder: a local folder with a model.
        key: the config key that names it.

    Raises:
        BadInput: it names what is missing or altered.
    """
    folder = Path(folder)
    if (folder / VERSIONS).is_file() and (folder / CONFIG).is_file() and not (folder / FINISHED).is_file():
        raise BadInput(
            f"{key}={folder} is not finished: the run that made it was stopped before its end (it has a {VERSIONS} and "
            f"no {FINISHED}): start that run again, or name another model"
        )
    known = {name: one for name, one in (read(folder) or {}).items() if "/" not in name or not utils.inside(name)}
    _refuse(f"{key}={folder}", problems(folder, known, trust.now.verify == "full" and ranks.rank() == 0))


def check_file(file: str | Path, key: str) -> None:
    """Refuse one file that is not as its run left it, an evaluation's log say, which is small and hashed always.

    Args:
        file: in a run's folder, or in a folder checkpoint-STEP of a run.
        key: the config key that names it.

    Raises:
        BadInput: see `check_model`.
    """
    file = Path(file)
    run = file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent
    name = str(file.relative_to(run))
    known = (read(run) or {}).get(name)
    if known is not None:
        _refuse(f"{key}={file}", problems(run, {name: known}, True))


def _refuse(what: str, found: list[str]) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise BadInput(
            f"{what} is not as its run left it: {', '.join(found[:3])}{more}: copy it again from where it was made, or "
            f"make it again (if you changed it yourself, remove its {FINISHED} and {VERSIONS}: it is no run's then)"
        )
