"""How far this run trusts files that others made: what is verified, and whether a pickle that may run code is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERIFY = ("sizes", "full")


@dataclass(frozen=True)
class Trust:
    """The keys `verify` and `allow_pickle` of a run."""

    verify: str = VERIFY[0]
    allow_pickle: bool = False


now = Trust()


def settle(cfg: Mapping[str, Any]) -> None:
    """Take a checked config's keys, for this process, until the next job."""
    global now
    now = Trust(cfg["verify"], cfg["allow_pickle"])
