"""Where results are: every folder below a path, through links, each once; logs under names that nobody looks for."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tofu.evaluation import log_formats, logs
from tofu.reporting.runs import Refused, Run
from tofu.runtime.provenance import CONFIG, FINISHED, VERSIONS

LOOK = 1 << 20  # bytes of a JSON file that are looked at
OURS = (CONFIG, FINISHED, VERSIONS, log_formats.METRICS, "metric_rows.json", "fingerprints.json", "trainer_state.json")
KNOWN = re.compile(  # files that lie beside results and models, and are read, or are no logs
    r"eval_(log|real)(_(?!aggregated)[a-z]+)*|eval_log_aggregated|TOFU_(EVAL|SUMMARY)|tokenizer.*|.*config|vocab|"
    r"special_tokens_map|trained_on|.*\.index"
)
LOG = re.compile(  # how an aggregated log begins; what a bare one and OpenUnlearning's hold
    rf'\A\ufeff?\s*\{{\s*"eval_\w+\.json"\s*:|"({logs.RIGHT}|{logs.WRONG}|forget_Q_A_PARA_Prob|forget_truth_ratio)"\s*:'
)


def walk(top: Path, refused: list[Refused]) -> Iterator[tuple[Path, set[str]]]:
    """A folder and all below it, with the names of its files; hidden ones are left out.

    Links are entered, after what lies in `top` itself, and each real folder comes once: a loop ends. What can't be
    read, and a link that leads nowhere, is added to `refused`.
    """

    def unread(error: OSError) -> None:
        refused.append(Refused(Path(os.fsdecode(error.filename)), f"it can not be read ({error.strerror})"))

    seen, waiting = set(), [str(top)]
    for start in waiting:  # grows
        for place, inner, names in os.walk(start, onerror=unread):
            real = os.path.realpath(place)
            inner[:] = sorted(name for name in inner if not name.startswith(".")) if real not in seen else []
            if real in seen:
                continue
            seen.add(real)
            waiting += [path for name in inner if os.path.islink(path := os.path.join(place, name))]
            there = {name for name in names if not name.startswith(".")}
            for path in (Path(place, name) for name in sorted(there)):
                if path.is_symlink() and not os.path.exists(path):
                    refused.append(Refused(path, f"a link to what is not there ({os.readlink(path)})"))
            yield Path(place), there


def strays(folder: Path, there: set[str]) -> list[Path]:
    """The files of a folder that hold an evaluation's log, as far as their first MiB tells, under another name."""
    found = []
    for name in sorted(there):
        file = folder / name
        if name.endswith(".json") and name not in OURS and not KNOWN.fullmatch(file.stem) and _is_log(file):
            found.append(file)
    return found


def _is_log(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return LOG.search(opened.read(LOOK).decode("utf-8", "replace")) is not None
    except OSError:
        return False


def not_named(files: Sequence[Path], runs: Sequence[Run], other: Sequence[Path]) -> list[Refused]:
    """The stray logs that neither a run nor the command line names, a line for each folder."""
    known = {path.resolve() for path in (*(run.log for run in runs if run.log is not None), *other)}
    folders: dict[Path, list[str]] = {}
    for file in files:
        if file.resolve() not in known:
            folders.setdefault(file.parent, []).append(file.name)
    return [
        Refused(
            folder,
            f"{len(names)} {'logs' if len(names) > 1 else 'log'} under another name than {logs.AGGREGATED} "
            f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}): name the file itself to take it",
        )
        for folder, names in folders.items()
    ]


def once(runs: Sequence[Run]) -> tuple[list[Run], list[Refused]]:
    """The runs without those that are the same one, reached by two paths, and without copies, which are listed.

    A copy has the same log and the same settings, its seed among them. Of two trainings that are the same the one with
    more evaluations counts, or with more numbers, else the first.
    """
    same: dict[tuple, Run] = {}
    for run in runs:
        same.setdefault((run.folder.resolve(), run.kind, run.log and run.log.resolve(), Path(run.of).resolve()), run)
    different = list(same.values())
    sizes = Counter(run.of for run in different)
    measured = Counter(run.of for run in different for one in run.metrics.values() if one.value is not None)
    first: dict[tuple, list[Run]] = {}
    copies: dict[tuple[str, str], list[tuple[Run, Run]]] = {}  # by both trainings
    order = sorted(different, key=lambda run: (-sizes[run.of], -measured[run.of], run.log is None, not _within(run)))
    for run in order:
        known = first.setdefault((run.kind, run.step, run.checkpoint, str(run.keys)), [])
        other = _copied(run, known)
        if other is None:
            known.append(run)
        else:
            copies.setdefault((run.of, other.of), []).append((run, other))
    gone = {id(run) for pairs in copies.values() for run, _ in pairs}
    return [run for run in different if id(run) not in gone], [_said(pairs) for pairs in copies.values()]


def _copied(run: Run, known: Sequence[Run]) -> Run | None:
    """Which of some runs with the same settings another one is a copy of; without a log the numbers tell."""
    logless = [one for one in known if None in (one.log, run.log) and _values(one) == _values(run)]
    same = [one for one in known if None not in (one.log, run.log) and one.digest == run.digest]
    same_numbers = [one for one in same if _values(one) == _values(run)]
    others = [one for one in same if one.of != run.of]  # a model that was evaluated again, by more metrics, is no copy
    return next(iter((*same_numbers, *others, *logless)), None)


def _said(pairs: Sequence[tuple[Run, Run]]) -> Refused:
    """The line of one copied run, or of all that are copied from one training."""
    run, other = pairs[0]
    if len(pairs) == 1:
        return Refused(place_of(run), f"a copy of {place_of(other)}: the same log, seed and settings")
    return Refused(
        Path(run.of),
        f"{len(pairs)} evaluations of it are copies of those of {other.of}: the same logs, seed and settings",
    )


def _within(run: Run) -> bool:
    """Whether an evaluation lies in the folder of its model."""
    return run.folder.resolve().is_relative_to(run.of)


def place_of(run: Run) -> Path:
    """What a run is named by: its folder, of a log with a name of its own the log."""
    return run.log if run.log is not None and run.of == str(run.log) else run.folder


def _values(run: Run) -> dict[str, float | None]:
    return {name: one.value for name, one in run.metrics.items()}
