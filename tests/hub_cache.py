"""A local cache as the hub's client leaves it, made of folders: no network, no blobs."""

import shutil
from pathlib import Path

import datasets

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add(home: Path, kind: str, name: str, source: Path, only: tuple[str, ...] = ("*",)) -> Path:
    """Put the files of `source` into the cache of HF_HOME `home` as the hub's `name`; returns their snapshot's folder.

    Args:
        kind: model or dataset.
        only: patterns of the files that were fetched.
    """
    repo = home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for path in sorted({path for pattern in only for path in Path(source).glob(pattern) if path.is_file()}):
        shutil.copy(path, snapshot / path.name)
    return snapshot


def prepare(home: Path, name: str, source: Path, split: str) -> None:
    """Leave one split of `source` in the cache of `datasets`, as a load_dataset(name, split) with the hub would."""
    owner, last = name.split("/")
    folder = shutil.copytree(source, home / "made" / last)
    datasets.load_dataset(str(folder), split, cache_dir=str(home / "made" / "cache"))
    shutil.move(home / "made" / "cache" / last, home / "datasets" / f"{owner}___{last}")
    shutil.rmtree(home / "made")
