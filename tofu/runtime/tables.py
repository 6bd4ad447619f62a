"""A data set's splits and their rows: a folder's own files, what `datasets` has saved, or a data set of the hub."""

import csv
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import utils
from utils import BadInput

log = logging.getLogger(__name__)


def read(data_path: str, split: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a split, and the names of its columns.

    Args:
        data_path: a folder (see `utils.split_files`), one laid out like a hub data set, or a hub id.

    Raises:
        BadInput: no such data or split; files that cannot be read; no rows.
    """
    files = utils.split_files(data_path)
    if files is not None and split in files:
        rows = _read_file(files[split]) if files[split].is_file() else _read_saved(data_path, split, files[split])
    elif files is not None:
        raise BadInput(utils.no_split(data_path, split, files))
    else:
        rows = _read_set(data_path, split)
    if not rows:
        raise BadInput(f"{data_path}, {split}: no rows")
    return rows, list(dict.fromkeys(name for row in rows for name in row))


def _read_file(file: Path) -> list[dict[str, Any]]:
    """The rows of one .json (lines, or one list), .jsonl, .csv or .parquet file; values of a CSV are texts.

    Raises:
        BadInput: it cannot be read.
    """
    if file.suffix == ".parquet":
        import pyarrow.parquet  # it comes with datasets

        with _told(str(file), "train"):
            return pyarrow.parquet.read_table(file).to_pylist()
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a mark before the text
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror})") from None
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
        rows = list(reader)
        if not reader.fieldnames:
            raise BadInput(f"{file} is empty: its first line must name the columns")
        for i, row in enumerate(rows):
            if "" in row or None in row.values():
                raise BadInput(f"{file}: row {i} has not as many fields as the first line has names")
        return rows
    return _json_rows(file, text)


def _json_rows(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
            rows = [json.loads(line) for i, line in lines]
    except ValueError as error:
        raise BadInput(f"{file} cannot be read as JSON lines, nor as one list ({error})") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadInput(f"{file}: row {i} is no object with named columns: {str(row)[:60]!r}")
    return rows


def _read_saved(data_path: str, split: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a `Dataset.save_to_disk` folder."""
    import datasets

    with _told(data_path, split):
        rows: Any = datasets.load_from_disk(str(folder))
        return list(rows)


def _read_set(data_path: str, split: str) -> list[dict[str, Any]]:
    """The rows of a configuration of a hub data set, or of a folder laid out like one."""
    import datasets
    from datasets.config import HF_HUB_OFFLINE

    datasets.disable_progress_bars()  # a bar for each split, on every rank
    if utils.is_local(data_path):
        path = utils.find(data_path)
        if not Path(path).is_dir():
            raise BadInput(f"data_path={data_path} is a file: name the folder that holds the splits")
    else:
        utils.check_hub(data_path, "data_path", "dataset", None)
        path = _offline(data_path) if HF_HUB_OFFLINE else data_path
    with _told(data_path, split):
        names = datasets.get_dataset_config_names(path)
    # of an id whose tables are in its own cache, and without the hub, `datasets` tells no names but this
    if split not in names and (Path(path).is_dir() or names != ["default"]):
        raise BadInput(utils.no_split(data_path, split, names))
    with tempfile.TemporaryDirectory() as fresh:
        # the cache knows a folder by its last name alone: another data/mini, or edited rows, would come back old
        cache = fresh if Path(path).is_dir() else None
        with _told(data_path, split):
            rows: Any = datasets.load_dataset(path, split, split="train", cache_dir=cache)
            return list(rows)


def _offline(name: str) -> str:
    """What `datasets` reads of a hub data set without the hub: its folder in the hub's cache, where whole, or the id.

    Given the id, `datasets` looks only into its own cache, which holds the splits that were loaded before.
    """
    import datasets

    folder = utils.snapshot(name)
    try:
        return folder if folder and datasets.get_dataset_config_names(folder) else name
    except Exception:  # of files that are missing, which differs with the layout
        return name


@contextmanager
def _told(data_path: str, split: str) -> Iterator[None]:
    """Make one line of whatever a library raises of data that it cannot read: its types differ with the file format."""
    try:
        yield
    except Exception as error:
        why = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        raise BadInput(
            f"data_path={data_path}, split={split} cannot be read ({type(why).__name__}: {' '.join(str(why).split())})"
        ) from None
