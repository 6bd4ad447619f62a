"""A report's folder: whole or not at all, and never in the place of somebody else's files."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import utils
from utils import ASIDE, BadInput

RECORD = "report.json"  # the names of the files that a report wrote: another report may replace these


def check(save_dir: str | Path) -> None:
    """Refuse a folder that holds anything but an earlier report.

    Raises:
        BadInput: it does, or it is a file.
    """
    folder = Path(save_dir)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"save_dir={save_dir} is a file: name a folder for the report")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    file, known = folder / RECORD, set()
    if file.is_file():
        try:
            known = {RECORD, *json.loads(file.read_text(encoding="utf-8"))["files"]}
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"save_dir={save_dir}: its {RECORD} is no report's: name another save_dir") from None
    if strange := sorted(there - known):
        raise BadInput(f"save_dir={save_dir} holds something else than a report ({strange[0]}): name another save_dir")


@contextmanager
def whole(save_dir: str | Path) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `save_dir`, in the place of an earlier report, if the block ends well.

    Raises:
        BadInput: see `check`; or the folder cannot be made.
    """
    check(save_dir)
    target = Path(save_dir).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{ASIDE}{target.name}."))
    except OSError as error:
        raise BadInput(f"save_dir={save_dir} cannot be made: {error}") from None
    try:
        new, old = aside / "new", aside / "old"
        new.mkdir()
        yield new
        names = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        utils.write_json(new / RECORD, {"files": names})
        check(save_dir)  # nothing came there in the meantime
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
