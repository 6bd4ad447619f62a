"""Result folders as runs: ours, the original benchmark's, OpenUnlearning's. What can't be read is listed with why."""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import utils
from tofu.evaluation import log_formats, logs
from tofu.reporting import foreign, places, records, runs
from tofu.reporting.runs import OURS, SETTINGS, Collected, Number, Refused, Run
from tofu.runtime.provenance import CONFIG, FINISHED, VERSIONS

METRICS = log_formats.METRICS
LOGS = ("eval_log*.json", "eval_real_*.json")  # of single sets: a folder with these alone was left in the middle
BROKEN = (ValueError, OSError, KeyError, TypeError, AttributeError)  # what a file of another content ends in
Paths = Sequence[str | Path]


def collect(
    paths: Paths,
    retain: Paths | None = None,
    start: str | Path | None = None,
    truth_ratio: str = "geometric",
) -> Collected:
    """Every evaluation in folders and files of results.

    Args:
        paths: folders, read with all that is below them, and single files: a log of any suite under any name, or a
            leaderboard's CSV.
        retain: retain models' logs, for results whose own record names none; of several, the one with the same rows,
            and of these the nearest by folder.
        start: the starting model's evaluation, for the same results: its folder or its log.
        truth_ratio: of logs of other suites, as of `tofu_metrics.log_ratio`.

    Returns:
        The runs, sorted by name, and what was refused.

    Raises:
        BadInput: `retain` or `start` can't be read. Of `paths` nothing stops: it is refused, and listed.
    """
    for cached in (records.config, records.steps_of, records.digest):
        cached.cache_clear()
    given = _given([retain] if isinstance(retain, str | Path) else retain or (), start, truth_ratio)
    found, refused, strays = [], [], []
    named = [_place(path) for path in paths]
    for place in named:
        if os.path.isfile(place):
            _try(place, lambda place=place: _of_file(place, given), found, refused)
        elif os.path.isdir(place):
            before = len(found) + len(refused) + len(strays)
            _below(place, given, found, refused, strays)
            if len(found) + len(refused) + len(strays) == before:
                refused.append(Refused(place, "no evaluation in it: a log under another name can be named itself"))
        else:
            refused.append(Refused(place, "no such file or folder"))
    compared = [*given.retain, *([given.start] if given.start else [])]
    refused += places.not_named(strays, found, [*named, *compared])
    different, copies = places.once(found)
    _judge(different)
    said: dict[tuple[str, str], Refused] = {}
    for one in (*refused, *copies):
        said.setdefault((os.path.abspath(one.place), one.why), one)
    return Collected(_named(different), list(said.values()))


def _place(path: str | Path) -> Path:
    try:
        return Path(utils.find(path))
    except OSError:  # below a folder that may not be read
        return Path(path)


class Given(NamedTuple):
    """What the command line says of results that have no record."""

    retain: list[Path]
    start: Path | None
    truth_ratio: str


def _given(retain: Paths, start: str | Path | None, truth_ratio: str) -> Given:
    """The logs that the command line names, known to be logs."""
    found = []
    for key, path in (*(("retain_result", one) for one in retain), *((("start_result", start),) if start else ())):
        place = Path(utils.find(path))
        place = place / logs.AGGREGATED if (place / logs.AGGREGATED).is_file() else place
        place = place / foreign.EVAL if (place / foreign.EVAL).is_file() else place
        log_formats.read(str(place), key)
        found.append(place)
    return Given(found[:-1], found[-1], truth_ratio) if start else Given(found, None, truth_ratio)


def _below(top: Path, given: Given, found: list[Run], refused: list[Refused], strays: list[Path]) -> None:
    """Read a folder and all that is below it."""
    trainings = []
    for folder, there in places.walk(top, refused):
        strays += places.strays(folder, there)
        if read := _reader(folder, there):
            _try(folder, functools.partial(read, folder, given), found, refused)
        elif CONFIG in there and VERSIONS in there:
            trainings.append(folder)
    for folder in trainings:
        try:
            why = _incomplete(folder, [run for run in found if run.of == str(folder.resolve())])
        except BROKEN as error:
            why = utils.one_line(error)
        if why:
            refused.append(Refused(folder, why))


def _reader(folder: Path, there: set[str]) -> Callable[[Path, Given], list[Run]] | None:
    """What reads a folder with such files; None where it holds no evaluation."""
    if logs.AGGREGATED in there:
        if METRICS in there or {CONFIG, VERSIONS} <= there:
            return _ours
        return lambda folder, given: [foreign.of_log(folder / logs.AGGREGATED, folder, *given)]
    other = _without_log(there)
    if other is None:
        return None
    checkpoint = other is _half and METRICS in there and records.step_in(folder.name) is not None

    def read(folder: Path, given: Given) -> list[Run]:
        ours = checkpoint or records.evaluates(records.config(folder))  # its log, which is large, was not kept
        return _ours(folder, given) if ours else other(folder, given)

    return read


def _without_log(there: set[str]) -> Callable[[Path, Given], list[Run]] | None:
    """What reads a folder of another suite's with such files, none of which is an aggregated log."""
    if {foreign.EVAL, foreign.SUMMARY} & there:
        return lambda folder, given: [foreign.of_openunlearning(folder, given.retain, given.start)]
    if csvs := sorted(there & {*foreign.STATISTICS}):
        return lambda folder, given: foreign.of_csv(folder / csvs[0])
    if METRICS in there or any(Path(name).match(pattern) for name in there for pattern in LOGS):
        return _half
    return None


def _half(folder: Path, given: Given) -> list[Run]:
    raise ValueError(f"an evaluation that is not finished (no {logs.AGGREGATED}): run it again")


def _try(place: Path, read: Callable[[], list[Run]], found: list[Run], refused: list[Refused]) -> None:
    try:
        found += read()
    except BROKEN as error:
        why = f"{type(error).__name__} {error}" if isinstance(error, KeyError | TypeError | AttributeError) else error
        refused.append(Refused(place, utils.one_line(why)))


def _of_file(file: Path, given: Given) -> list[Run]:
    """The runs of a file that was named: within its folder's if that is an evaluation, else a log of any name."""
    if file.suffix == ".csv":
        return foreign.of_csv(file)
    if file.name in (logs.AGGREGATED, METRICS, FINISHED, foreign.EVAL, foreign.SUMMARY):
        read = _reader(file.parent, {one.name for one in file.parent.iterdir()})
        return read(file.parent, given) if read else []
    return [foreign.of_log(file, file.parent, *given)]


def _incomplete(folder: Path, evaluated: Sequence[Run]) -> str | None:
    """Why a folder with a run's record, but without an evaluation of its own, is listed; None where it need not be."""
    cfg = records.config(folder)
    if records.evaluates(cfg):
        lacking = logs.AGGREGATED if (folder / FINISHED).is_file() else FINISHED
        return f"an evaluation that is not finished (no {lacking}): run it again"
    if not records.trains(cfg):
        return None
    if not (folder / FINISHED).is_file():
        taken = f"; its {len(evaluated)} evaluations are in the report" if evaluated else ""
        return f"a training that is not finished (no {FINISHED}){taken}"
    if evaluated:
        return None
    return f"a training without an evaluation: python evaluate_util.py model_path={folder}"


def _ours(folder: Path, given: Given) -> list[Run]:
    """The run of an evaluation of ours: from disk, or on the way of a training, in its checkpoint-STEP.

    Raises:
        ValueError: it is not finished, or a file is not whole.
    """
    own = records.config(folder)
    step = records.step_in(folder.name)
    of = folder
    if records.evaluates(own):
        training = records.model_of(folder, own)
        of, evaluation, cfg = training or folder.resolve(), own, records.config(training) if training else {}
        finished = _finished(folder)
        step, checkpoint, at, prefix = (records.steps_of(training) if training else None), False, folder, ""
    else:
        of = folder.parent.resolve()
        cfg = records.config(of)
        if not records.trains(cfg):
            raise ValueError(f"an evaluation without a record of its run (no {CONFIG} here or above)")
        evaluation, finished, checkpoint, at, prefix = cfg.get("eval") or {}, {}, True, of, "eval."
        if cfg.get("eval_only"):
            training = records.model_of(of, cfg)
            of, cfg, finished = training or of, records.config(training) if training else {}, _finished(at)
    metrics = _metrics(folder, finished)
    known, said = records.compared(at, evaluation, prefix)
    log = folder / logs.AGGREGATED
    run = Run(
        "", folder, OURS, records.keys(evaluation, cfg), metrics, str(of), log if os.access(log, os.R_OK) else None
    )
    run.step, run.checkpoint, run.said = step, checkpoint, said
    if run.log is None:
        said.append(f"no generations: its {log.name} {'can not be read' if log.is_file() else 'is not there'}")
    run.retain, run.start = known.get("retain_result"), known.get("start_result") or given.start
    run.files = {name: one["sha256"] for name, one in (finished.get("manifest") or {}).items()}
    run.collapsed = list(finished.get("Collapse", ()))  # of a checkpoint: see `_judge`
    if run.retain is None and not evaluation.get("retain_result"):
        _compare(run, given.retain)
    return [run]


def _finished(folder: Path) -> Mapping[str, Any]:
    """What a run's finished.json holds.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    if not (folder / FINISHED).is_file():
        raise ValueError(f"an evaluation that is not finished (no {FINISHED}): run it again")
    found = runs.read_json(folder / FINISHED)
    if not isinstance(found, dict):
        raise ValueError(f"{FINISHED} holds no record")
    return found


def _metrics(folder: Path, finished: Mapping[str, Any]) -> dict[str, Number]:
    """The metrics of metrics.json; of an older evaluation, which has none, those of finished.json."""
    if (folder / METRICS).is_file():
        return runs.numbers(runs.read_json(folder / METRICS), folder / METRICS)
    intervals = finished.get("Confidence Intervals", {})
    known = {name: value for name, value in finished.items() if name in runs.DIRECTIONS}
    if not known:
        raise ValueError(f"no {METRICS}: the evaluation is not whole; run it again")
    found = {name: {"value": value, "interval": intervals.get(name)} for name, value in known.items()}
    return runs.numbers(found, folder / FINISHED)


def _compare(run: Run, retain: Sequence[Path]) -> None:
    """Work out an evaluation's forget quality where its own record names no retain result and the command line does."""
    if not retain or run.log is None:
        if run.value("Forget Quality") is None:
            why = "no retain_result is known" if not retain else "its log's rows are needed"
            run.said.append(f"no forget quality: {why}")
        return
    found, run.retain, said = foreign.computed(
        run.rows(), run.log or run.folder, retain, run.keys.get("truth_ratio") or "geometric"
    )
    run.said += said
    quality = {name for name, one in found.items() if "Quality" in name or "KS" in name}
    run.metrics |= {name: found[name] for name in quality if run.value(name) is None}


def _judge(found: Sequence[Run]) -> None:
    """Say which checkpoints have collapsed: no record of theirs does. The signs are those of an evaluation.

    The starting model's evaluation is the recorded one, or else the only one that is here of a finetuned model with
    the same family, split, rows and settings.
    """
    finetuned = [run for run in Collected([*found], []).final() if run.keys.get("method") == records.FINETUNED]
    values = functools.cache(_of_start)
    for run in found:
        if run.kind != OURS or not run.checkpoint:
            continue
        unlearned = "forget_loss" in records.config(Path(run.of))  # any other starts from a model that knows nothing
        start = run.start if unlearned else None
        same = [
            one for one in finetuned if all(one.keys.get(key) == run.keys.get(key) for key in ("family", *SETTINGS))
        ]
        if unlearned and start is None and len(same) == 1:
            start = same[0].log or same[0].folder
        try:
            run.collapsed = _signs(run, {} if start is None else values(start))
        except BROKEN as error:
            run.said.append(f"whether it has collapsed is not known: {utils.one_line(error)}")


def _of_start(start: Path) -> dict[str, float]:
    """What an evaluation of the starting model, a log or a folder, tells of its utility and its texts."""
    beside = start / METRICS if start.is_dir() else start.with_name(METRICS)
    found = runs.numbers(runs.read_json(beside), beside) if beside.is_file() else {}
    values = {name: one.value for name, one in found.items() if one.value is not None}
    return values | (foreign.of_start(foreign.read_log(start)) if start.is_file() and start != beside else {})


def _signs(run: Run, of_start: Mapping[str, float]) -> list[str]:
    """The signs of a collapse at a checkpoint, by its metrics and its texts."""
    evaluation = records.config(run.folder.parent.resolve()).get("eval") or {}
    if not evaluation.get("collapse", True):
        return []
    values = {name: one.value for name, one in run.metrics.items() if one.value is not None}
    texts = {} if run.log is None else foreign.of_texts(foreign.read_log(run.log))
    limits = {**foreign.LIMITS, **evaluation.get("collapse", {})}
    return foreign.collapse.signs({**texts, **values}, of_start, limits)


def _named(found: list[Run]) -> list[Run]:
    """The runs by name: the folder below what all of them have in common, of a log with a name of its own that name."""
    if not found:
        return []
    at = [run.folder if run.of != str(run.log) else Path(run.of).with_suffix("") for run in found]
    at = [Path(os.path.abspath(place)) for place in at]  # as the user names it, links unresolved
    top = Path(os.path.commonpath([place.parent for place in at]))
    for run, place in zip(found, at, strict=True):
        lines = run.log is None and run.kind == runs.BENCHMARK and ":" in Path(run.of).name  # of a CSV with several
        line = run.of.removeprefix(f"{run.folder}/") if lines else ""
        run.name = f"{place.relative_to(top)}{f'/{line}' if line else ''}"
    unknown = [run for run in found if not run.keys.get("method")]
    for run in unknown:  # as much of its name as no other one has
        parts = _telling(run)
        others = [_telling(one) for one in unknown if one is not run and one.kind == run.kind]
        n = next((n for n in range(1, len(parts)) if not any(one[-n:] == parts[-n:] for one in others)), len(parts))
        run.keys["method"] = "/".join(parts[-n:])
    return sorted(found, key=lambda run: _natural(run.name))


def _telling(run: Run) -> list[str]:
    """A name's parts without those that say only that it is a result."""
    parts = run.name.split("/")
    return [part for part in parts if not part.startswith(("eval", "openunlearning", "ds_size"))] or parts


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts checkpoint-9 before checkpoint-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
