"""What the benchmarks share: reading memory, and the end of a run - the figures, RESULTS.md and the JSON file."""

import platform
import time
from pathlib import Path

import torch

import utils
from tofu.runtime import provenance

RESULTS = Path(__file__).parent / "RESULTS.md"
METHODS = sorted(path.stem for path in (utils.REPO / "config" / "forget_loss").glob("*.yaml"))


def status(key: str) -> int:
    """A number of kB from this process's /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def heading(script: str, how: str) -> str:
    """The head of an entry in RESULTS.md: the script, the day, the machine, the versions and the commit.

    Args:
        how: the settings that the numbers depend on.
    """
    about, cuda = provenance.versions(), torch.cuda.is_available()
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, CPU"
    return (
        f"## {script}, {time.strftime('%Y-%m-%d')}\n\n{torch.cuda.get_device_name() if cuda else where}; "
        f"torch {about['torch']}, transformers {about['transformers']}; commit {str(about['commit'])[:12]}"
        f"{' with changes' if about['uncommitted_changes'] else ''}; {how}\n\n"
    )


def tell(script: str, how: str, lines: list[str], figures: dict[str, float], json: Path | None, append: bool) -> None:
    """Print the tables and the figures, append them to RESULTS.md, write the figures.

    Args:
        script: names the entry in RESULTS.md.
        how: the settings that the numbers depend on.
        lines: the script's own tables.
        json: gets {"figures": figures}; None for no file.
        append: whether RESULTS.md gets an entry, with machine, versions and commit.
    """
    rows = [f"| {name} | {value:.2f} |" for name, value in figures.items()]
    text = "\n".join([*lines, *(["", "| figure | value |", "| --- | ---: |"] if rows else []), *rows])
    print(text)
    if append:
        old = RESULTS.read_text() if RESULTS.is_file() else "# Results\n"
        utils.write_text(RESULTS, f"{old.rstrip()}\n\n{heading(script, how)}{text}\n")
    if json:
        utils.write_json(json, {"figures": figures})
