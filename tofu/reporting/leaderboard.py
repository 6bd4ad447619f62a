"""The leaderboard: the CSV that the public one takes, and a page of submissions with what is needed to check them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import utils
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.reporting import grouping, tables
from tofu.reporting.records import LOADER
from tofu.reporting.runs import Refused, Run, read_json
from tofu.runtime.provenance import VERSIONS

SUBMISSION = "submission.yaml"  # beside a result, or in a folder above it
WHO, WHAT, HOW = "submitted_by", "method", "reproduce"
NEEDED = [name for name in tofu_metrics.COLUMNS if name not in ("Method", "Submitted By")]


def submissions(runs: Sequence[Run]) -> tuple[dict[str, dict[str, str]], list[Refused]]:
    """Run -> what its submission says, by the run's name, and the submissions that are not whole.

    Of our own runs the commands that made them stand for a missing `reproduce`.
    """
    found, refused = {}, []
    for run in runs:
        file = next((above / SUBMISSION for above in _above(run) if (above / SUBMISSION).is_file()), None)
        if file is None:
            continue
        try:
            found[run.name] = _read(file, run)
        except (ValueError, OSError, yaml.YAMLError) as error:
            refused.append(Refused(file, utils.one_line(error)))
    return found, refused


def _above(run: Run) -> list[Path]:
    folder = run.folder.resolve()
    return [folder, *folder.parents[:2]]


def _read(file: Path, run: Run) -> dict[str, str]:
    said = yaml.load(file.read_text(encoding="utf-8"), LOADER)
    if not isinstance(said, dict):
        raise ValueError(f"no submission: it must have {WHO}, {WHAT} and {HOW}")
    known = {WHAT: run.keys.get(grouping.METHOD), HOW: commands(run), **said}
    missing = [key for key in (WHO, WHAT, HOW) if not known.get(key)]
    missing += [name for name in NEEDED if run.value(name) is None]
    if missing:
        raise ValueError(f"the submission has no {', '.join(missing)}")
    known[HOW] = " && ".join(line for line in str(known[HOW]).splitlines() if line.strip())
    return {key: utils.one_line(value) for key, value in known.items()}


def commands(run: Run) -> str | None:
    """The commands that made one of our runs, with the commit of the code; None where they are not recorded."""
    told, commit = [], None
    for folder in dict.fromkeys((Path(run.of), run.folder)):
        file = folder / VERSIONS
        made = read_json(file) if file.is_file() else {}
        if made.get("command"):
            told.append(" ".join(("python", *made["command"])))
            commit = made.get("commit") or commit
    return f"{' && '.join(told)}{f' (commit {commit})' if commit else ''}" if told else None


def to_csv(runs: Sequence[Run], submitted: Mapping[str, Mapping[str, str]]) -> str:
    """The runs that have every score as the public leaderboard's CSV."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        if all(run.value(name) is not None for name in NEEDED):
            said = submitted.get(run.name, {})
            about = {"Method": said.get(WHAT) or run.keys.get(grouping.METHOD), "Submitted By": said.get(WHO, "")}
            rows.append({**{name: run.value(name) for name in NEEDED}, **about})
    return tofu_metrics.to_csv(rows)


def page(runs: Sequence[Run], submitted: Mapping[str, Mapping[str, str]]) -> str:
    """`LEADERBOARD.md`: a table for each problem, the highest forget quality first; collapsed models stand last."""
    here = [run for run in runs if run.name in submitted]
    text = ["# Leaderboard", "", "Forget quality is the p-value of a KS test: 1 is like the retain model.", ""]
    for of in dict.fromkeys(map(_problem, here)):
        lines = sorted((run for run in here if _problem(run) == of), key=_place)
        text += [f"## {of}", "", "| | method | submitted by | forget quality | model utility | sha256 of the log |"]
        text.append("| ---: | --- | --- | ---: | ---: | --- |")
        for place, run in enumerate(lines, 1):
            said = submitted[run.name]
            method = f"{tables.plain(said[WHAT])}{f' {tables.MARK}' if run.collapsed else ''}"
            scores = " | ".join(tables.number(run.value(name)) for name in ("Forget Quality", "Model Utility"))
            digest = f"`{run.digest[:16]}`" if run.digest else "-"
            text.append(f"| {place} | {method} | {tables.plain(said[WHO])} | {scores} | {digest} |")
        text.append("")
    text += [f"{tables.MARK}: the model has collapsed.", ""] if any(run.collapsed for run in here) else []
    text += ["## How to reproduce", ""]
    for run in here:
        said = submitted[run.name]
        text += [f"- {tables.plain(said[WHAT])}, {tables.plain(said[WHO])}: `{said[HOW].replace('`', '')}`"]
        text += [f"  - `{run.name}`, sha256 {run.digest}"] if run.digest else []
        text += [f"  - {tables.plain(run.collapsed[0])}"] if run.collapsed else []
    return "\n".join(text) + "\n"


def _problem(run: Run) -> str:
    names = ("split", "family", "ds_size", "truth_ratio")
    return ", ".join(f"{name} {run.keys[name]}" for name in names if run.keys.get(name) is not None) or "unknown rows"


def _place(run: Run) -> tuple:
    return (bool(run.collapsed), -(run.value("Forget Quality") or 0.0), -(run.value("Model Utility") or 0.0))
