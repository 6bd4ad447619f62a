"""What a result was made from: fingerprints, digests, and the one comparison that says what differs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(content: bytes | str) -> str:
    """The sha256 of some bytes, or of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_digest(path: str | Path) -> str:
    """The sha256 of a file's bytes, read piece by piece."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(**parts: Any) -> dict[str, Any]:
    """What a result is a function of, by name: a result with the same fingerprint need not be made again.

    The parts are JSON values; they are kept as a JSON file gives them back, so that two fingerprints can be compared.
    """
    return json.loads(json.dumps(parts))


def differing(made: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> list[str]:
    """The parts of `asked` that `made` has not, or has otherwise; all of them where there is no `made`."""
    return [name for name in asked if name not in (made or {}) or made[name] != asked[name]]
