"""Results of other suites as runs: the original benchmark's logs and CSVs, and OpenUnlearning's evaluations."""

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tofu.cli.command_line import ALIASES
from tofu.evaluation import log_formats, logs
from tofu.evaluation.metrics import collapse, privacy, table
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.evaluation.metrics.rows import Context
from tofu.reporting.records import LOADER
from tofu.reporting.runs import BENCHMARK, DIRECTIONS, OPENUNLEARNING, Number, Run, numbers, read_json

STATISTICS = ("aggregate_stat.csv", "aggr_result.csv")  # a line of the leaderboard
EVAL, SUMMARY = log_formats.EVAL, "TOFU_SUMMARY.json"
LIMITS = {"utility": 0.5, "fluency": 0.5, "repeat": 0.5}  # of a collapse, as config/eval_everything.yaml has them
NAMES = {  # OpenUnlearning's aggregates -> ours; all others keep their name
    **{"model_utility": "Model Utility", "forget_quality": "Forget Quality", log_formats.LEAK: "PrivLeak"},
    **{theirs: ours for theirs, ours in (*log_formats.OF_ROWS.items(), *privacy.THEIRS.items())},
    **{f"{prefix}_Q_A_ROUGE": f"ROUGE {ours}" for prefix, ours in log_formats.PREFIXES.items()},
    **{f"{prefix}_Q_A_Prob": f"Prob. {ours}" for prefix, ours in log_formats.PREFIXES.items()},
    **{f"{prefix}_Truth_Ratio": f"Truth Ratio {ours}" for prefix, ours in log_formats.PREFIXES.items()},
    **{"forget_truth_ratio": "Truth Ratio Forget"},
}
NORMALISED = {  # of the sets with options, the right one's share among them is what counts
    f"{prefix}_Q_A_Prob_normalised": f"Prob. {ours}"
    for prefix, ours in log_formats.PREFIXES.items()
    if ours in logs.REAL
}
NAMES = {theirs: ours for theirs, ours in NAMES.items() if ours not in NORMALISED.values()} | NORMALISED


def of_log(file: Path, folder: Path, retain: Sequence[Path], start: Path | None, truth_ratio: str) -> Run:
    """The run of a log of the benchmark's, of any name, with the CSV beside it.

    Args:
        retain: retain models' logs; of those with the same rows the one nearest by folder is compared with.
        start: the starting model's evaluation, for the signs of a collapse.

    Raises:
        ValueError: the log is not whole, or none.
    """
    log = read_log(file)
    found, taken, said = computed(log, file, retain, truth_ratio)
    if file.name == logs.AGGREGATED:
        for beside in (folder / name for name in STATISTICS):
            if beside.is_file():
                (row, *_) = _csv(beside)
                found = _filled(found, _of_row(row, beside))
    keys = {"method": "", "truth_ratio": truth_ratio, "rows": rows_of(log)}
    run = Run("", folder, BENCHMARK, keys, found, str(folder), file, taken)
    if file.name != logs.AGGREGATED:
        run.of = str(file)
    run.said, run.start = [] if run.value("Forget Quality") is not None else said, start
    run.collapsed = signs(log, run, start)
    return run


def of_csv(file: Path) -> list[Run]:
    """The runs of a leaderboard's CSV, a line each.

    Raises:
        ValueError: it is none.
    """
    rows = _csv(file)
    found = []
    for number, row in enumerate(rows):
        of = str(file.parent) if len(rows) == 1 else f"{file}:{number + 2}"
        run = Run("", file.parent, BENCHMARK, {"method": row.get("Method") or ""}, _of_row(row, file), of)
        run.said = ["only the numbers of its CSV: no generations, no truth ratios of rows"]
        found.append(run)
    return found


def of_openunlearning(folder: Path, retain: Sequence[Path], start: Path | None) -> Run:
    """The run of a folder with OpenUnlearning's TOFU_EVAL.json, TOFU_SUMMARY.json or both: its numbers as it has them.

    What it has not, but its rows tell, is worked out from them.

    Args:
        retain, start: as of `of_log`.

    Raises:
        ValueError: a file is not whole, or holds no evaluation.
    """
    file, summary = folder / EVAL, folder / SUMMARY
    found: dict[str, Number] = {}
    run = Run("", folder, OPENUNLEARNING, _openunlearning_keys(folder), found, str(folder))
    if file.is_file():
        raw = read_json(file)
        log = log_formats.as_aggregated(raw)
        found |= _theirs({name: one.get("agg_value") for name, one in raw.items() if isinstance(one, Mapping)}, file)
        run.log, run.start = file, start
        run.keys["rows"] = rows_of(log)
    if summary.is_file():
        found |= _theirs(read_json(summary), summary)
    if file.is_file():
        more, run.retain, run.said = computed(log, file, retain, "geometric")
        run.metrics = _filled(found, more)
        run.said = [] if run.value("Forget Quality") is not None else run.said
        run.collapsed = signs(log, run, start)
    if not run.metrics:
        raise ValueError(f"no number in {', '.join(one.name for one in (file, summary) if one.is_file())}")
    quality = run.value("Forget Quality")
    if quality and run.value("log10 Forget Quality") is None:
        known = run.metrics["Forget Quality"]
        run.metrics["log10 Forget Quality"] = Number(math.log10(quality), "max", known.file)
    return run


def read_log(file: Path) -> Mapping[str, Any]:
    """An aggregated log.

    Raises:
        ValueError: it is none, or not whole.
    """
    try:
        return log_formats.as_aggregated(read_json(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is not whole: a row without {error}") from None


def rows_of(log: Mapping[str, Any]) -> int | None:
    """The rows of a log's forget set, which tell splits apart where no record does."""
    columns = log.get(logs.FORGET) or {}
    return max((len(rows) for rows in columns.values() if isinstance(rows, Mapping)), default=None)


def computed(
    log: Mapping[str, Any], file: Path, retain: Sequence[Path], truth_ratio: str
) -> tuple[dict[str, Number], Path | None, list[str]]:
    """TOFU's metrics worked out from a log: the numbers, the retain log they were compared with, what was left out.

    Raises:
        ValueError: a value in the log is no number.
    """
    taken, said, theirs = None, [], None
    for path in sorted(retain, key=lambda path: -_shared(path, file)):  # of two models' logs the nearer one is its own
        one = read_log(path)
        try:
            logs.same_rows(log, one)
        except ValueError as error:
            said.append(f"no forget quality against {path}: {error}")
        else:
            taken, theirs, said = path, one, []
            break
    if len(said) > 1:
        said = [f"no forget quality: none of {len(said)} retain results has its rows; {said[0]}"]
    if not retain and logs.compared(log, logs.FORGET):
        said.append("no forget quality: no retain_result is known")
    context = Context(log=log, statistics=tofu_metrics.statistics(log, theirs, truth_ratio))
    found = table.record(tofu_metrics.METRICS, table.values(tofu_metrics.METRICS, context))
    return numbers(found, file), taken, said


def _shared(path: Path, other: Path) -> int:
    """How many folders two paths have in common."""
    return len(Path(os.path.commonpath([path.resolve(), other.resolve()])).parts)


def signs(log: Mapping[str, Any], run: Run, start: Path | None) -> list[str]:
    """The signs of a collapse that a log's texts, and a starting model's log, tell."""
    known = of_start(read_log(start)) if start is not None and start.is_file() else {}
    values = {name: one.value for name, one in run.metrics.items() if one.value is not None}
    return collapse.signs({**values, **of_texts(log)}, known, LIMITS)


def of_start(log: Mapping[str, Any]) -> dict[str, float]:
    """What a starting model's log tells of its utility and its texts."""
    found = of_texts(log)
    if log and not logs.missing_sets(log) and not logs.uncompared(log):
        found |= {collapse.UTILITY: tofu_metrics.utility(log)[collapse.UTILITY]}
    return found


def of_texts(log: Mapping[str, Any]) -> dict[str, float]:
    """What the texts of a log's forget set tell (`collapse.of_texts`); {} where it has none."""
    texts = log.get(f"{logs.FORGET}.json", {}).get("generated_text") if log else None
    rows = logs.rows(log, logs.FORGET, "generated_text").values() if texts else ()
    return collapse.of_texts([row[1] for row in rows])


def _filled(found: Mapping[str, Number], more: Mapping[str, Number]) -> dict[str, Number]:
    """Metrics, and from others those that have no value, and the intervals of those that are the same to 1e-4."""
    joined = dict(found)
    for name, one in more.items():
        known = joined.get(name)
        if known is None or known.value is None:
            joined[name] = one
        elif known.n is None and one.value is not None and math.isclose(known.value, one.value, rel_tol=1e-4):
            joined[name] = Number(known.value, known.direction, known.file, one.n, one.interval)
    return joined


def _theirs(summary: Any, file: Path) -> dict[str, Number]:
    """OpenUnlearning's numbers by our names."""
    if not isinstance(summary, Mapping):
        raise ValueError(f"{file.name} holds no numbers by name")
    known = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    return {
        ours: Number(float(known[name]), DIRECTIONS.get(ours, "none"), file)
        for name, ours in {**{name: name for name in known}, **NAMES}.items()
        if name in known and (name in NAMES or name not in HIDDEN)
    }


HIDDEN = {  # parts of the truth ratios: probabilities of wrong answers, say
    *(f"{prefix}_Q_A_{kind}" for prefix in log_formats.PREFIXES for kind in ("PERT_Prob", "PARA_Prob", "Prob")),
}


def _openunlearning_keys(folder: Path) -> dict[str, Any]:
    """What the Hydra record in the run's folder says, or else the folder's own name."""
    found: dict[str, Any] = {"method": ""}
    for above in (folder, *folder.parents[:2]):
        file = above / ".hydra" / "config.yaml"
        cfg = yaml.load(file.read_text(encoding="utf-8"), LOADER) if file.is_file() else None
        if isinstance(cfg, dict):
            args = (cfg.get("trainer") or {}).get("args") or {}
            handler = (cfg.get("trainer") or {}).get("handler")
            found |= {"method": ALIASES.get(handler, handler) or "", "split": cfg.get("forget_split")}
            found |= {
                "lr": args.get("learning_rate"),
                "num_epochs": args.get("num_train_epochs"),
                "seed": args.get("seed"),
            }
            break
    parts = re.split(r"[/_]", str(folder))
    found["method"] = found["method"] or next((ALIASES[part] for part in reversed(parts) if part in ALIASES), "")
    found.setdefault("split", next((part for part in reversed(parts) if re.fullmatch(r"forget\d\d", part)), None))
    return {key: value for key, value in found.items() if value is not None}


def _csv(file: Path) -> list[dict[str, str]]:
    """The rows of a leaderboard's CSV.

    Raises:
        ValueError: it is none.
    """
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not set(rows[0]) & {metric.name for metric in tofu_metrics.METRICS}:
        raise ValueError(f"{file.name} is no leaderboard's CSV: it has none of its columns, or no row")
    return rows


def _of_row(row: Mapping[str, str], file: Path) -> dict[str, Number]:
    known = {metric.name: row.get(metric.name) for metric in tofu_metrics.METRICS}
    try:
        found = {name: float(value) for name, value in known.items() if value}
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    read = {name: Number(value, DIRECTIONS[name], file) for name, value in found.items()}
    quality = found.get("Forget Quality")
    if quality and "log10 Forget Quality" not in found:
        read["log10 Forget Quality"] = Number(math.log10(quality), "max", file)
    return read
