"""Compare what a complete run was made with and what is asked now: made_with.py RUN key=value ...

Prints the settings that differ, nothing where none does. A run's own record is its command line in versions.json.
"""

import json
import sys
from pathlib import Path

NOT_SETTINGS = ("save_dir", "overwrite", "overwrite_dir")
ABSENT = "not given"


def settings(args: list[str]) -> dict[str, str]:
    """A command line's settings by key, those left out that do not change a number."""
    pairs = (arg.partition("=") for arg in args)
    return {key: value for key, _, value in pairs if key not in NOT_SETTINGS}


def same(one: str, other: str) -> bool:
    """Whether two texts say one value: equal numbers, or one file named relatively and absolutely."""
    if one.lower() == other.lower():
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        pass
    if "/" not in one + other or ABSENT in (one, other):
        return False
    one, other = sorted((one, other), key=len)  # the recorded one may be relative to another working directory
    return Path(one).resolve() == Path(other).resolve() or other.endswith(f"/{one.removeprefix('./')}")


def differences(made: list[str], asked: list[str]) -> list[str]:
    """One text for each setting that differs."""
    then, now = settings(made), settings(asked)
    pairs = {key: (then.get(key, ABSENT), now.get(key, ABSENT)) for key in {**then, **now}}
    return [f"{key}={old} (now {new})" for key, (old, new) in pairs.items() if not same(old, new)]


if __name__ == "__main__":
    record = json.loads((Path(sys.argv[1]) / "versions.json").read_text())
    if found := differences(record["command"][1:], sys.argv[2:]):
        print(", ".join(found))
