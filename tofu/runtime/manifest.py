"""What a folder holds: sizes and sha256 of its files, and what of them is missing or altered."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tofu.runtime import provenance


def manifest(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Every file in a folder and below it, by its path from there with slashes: {"size": bytes, "sha256": hex}."""
    folder = Path(folder)
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": provenance.file_digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def problems(folder: str | Path, known: Mapping[str, Mapping[str, Any]], full: bool) -> list[str]:
    """What of a manifest a folder has not, or has otherwise, a text for each file; files beside it do not count.

    Args:
        full: whether bytes are compared by their sha256 too; sizes always are.
    """
    found = []
    for name, made in known.items():
        file = Path(folder) / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif (size := file.stat().st_size) != made["size"]:
            found.append(f"{name} has {size} bytes, not {made['size']}")
        elif full and provenance.file_digest(file) != made["sha256"]:
            found.append(f"{name} has other bytes")
    return found
