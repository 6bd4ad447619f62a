"""From the rows of an evaluation to metrics.json: the chosen metrics, and their numbers per row.

metric_rows.json keeps the numbers set by set with what they were made from, for an evaluation that keeps a set's log.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import utils
from tofu.evaluation import console, holdout, judges, log_formats, logs, passes
from tofu.evaluation.inference import TokenScores
from tofu.evaluation.metrics import collapse, fluency, privacy, table
from tofu.evaluation.metrics.declared import Column, Metric, Statistics, Value
from tofu.evaluation.metrics.rows import Context, Row
from tofu.evaluation.passes import Asked
from tofu.evaluation.reference import Reference
from tofu.evaluation.sets import EvalSet, Task
from tofu.runtime import provenance, ranks, run_folder
from tofu.runtime.trained_on import Taught

logger = logging.getLogger(__name__)

METRICS, ROWS = log_formats.METRICS, "metric_rows.json"
VERSION = 2  # part of what the rows are made from: raise it whenever a change of the code moves a metric
Columns = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Measures:
    """Which metrics an evaluation computes, and what they read beside its own rows.

    Attributes:
        metrics: in the table's order, what they need included.
        beside: sets that are scored for them alone: no generation, no log.
        compat: `openunlearning` for that suite's form of a metric where ours is another; None.
        retain, start: what metrics.json beside `retain_result` and `start_result` holds; None where there is none.
        settings: the evaluation's config.
        reasons: why something that metrics read is not there, by the column's name or another that they know; passes
            that could not be run add theirs.
        about: of `rows.Context`.
        reference: the reference model, where there is one.
    """

    metrics: tuple[Metric, ...] = table.chosen(("tofu",))
    beside: tuple[Task, ...] = ()
    compat: str | None = None
    retain: Mapping[str, Mapping[str, Any]] | None = None
    start: Mapping[str, Mapping[str, Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: Reference | None = None

    def columns(self, task: str) -> tuple[Column, ...]:
        """The columns that are wanted of a set."""
        of = table.set_of(task)
        return tuple(column for column in table.columns(self.metrics) if column.of == of)

    def passes(self, task: str) -> set[str]:
        """The passes beside scoring and generation that a set's columns need."""
        return {column.extra for column in self.columns(task) if column.extra is not None}

    def run(self, task: str, asked: Asked) -> list[dict[str, Any]]:
        """What these passes find of each row, by name (`passes.found`). On all ranks."""
        reference = None if self.reference is None else self.reference.losses.get(task)
        extra, lost = passes.found(self.passes(task), asked._replace(reference=reference))
        self.reasons.update({column.name: lost[column.extra] for column in self.columns(task) if column.extra in lost})
        return extra

    def why_not_complete(self, folder: Path, task: str, made_from: Mapping[str, Any]) -> str | None:
        """Why the numbers per row that a folder holds of a set can't stand for new ones; None if they can."""
        wanted = [column.name for column in self.columns(task)]
        if not wanted:
            return None
        kept = _read(folder).get(task)
        if kept is None or kept.get("log") != _log_digest(folder, task):
            return "its metrics have no numbers per row"
        if missing := [name for name in wanted if name not in kept["rows"]]:
            return f"its rows have no {', '.join(missing)}"
        if differing := provenance.differing(kept["made"], self._made_from(task, made_from)):
            return f"its metrics were made with other {', '.join(differing)}"
        return None

    def keep(self, folder: Path, task: str, rows: Sequence[Row], made_from: Mapping[str, Any] | None) -> Columns:
        """Work out a set's columns and write them beside its log, which is there. Nothing on ranks but 0."""
        if ranks.rank() > 0:
            return {}
        # a reference model or a judge that is lacking is the config's choice, and part of what the rows are made from
        chosen = (None, "reference", "perplexity")
        wanted = [one for one in self.columns(task) if one.extra in chosen or one.name not in self.reasons]
        columns = table.rows_of(wanted, rows, self.compat == "openunlearning")
        if columns:
            run_folder.note(folder, ROWS)
            made = {"made": self._made_from(task, made_from or {}), "log": _log_digest(folder, task)}
            utils.write_json(folder / ROWS, _read(folder) | {task: {**made, "rows": columns}})
        behaviour = [column for column in collapse.COLUMNS if column.of == table.set_of(task)]
        return table.rows_of(behaviour, rows) | columns

    def kept(self, folder: Path, task: str) -> Columns:
        """A set's columns as an earlier evaluation kept them; `why_not_complete` has found nothing."""
        wanted = [column.name for column in self.columns(task)]
        rows = _read(folder)[task]["rows"] if wanted else {}
        return {name: rows[name] for name in wanted}

    def collapsed(self, log: Mapping[str, Any], statistics: Statistics, columns: Columns) -> list[str]:
        """The signs of a collapse, as far as the log and the columns tell (`collapse.signs`)."""
        limits = self.settings.get("collapse")
        texts = log.get(f"{logs.FORGET}.json", {}).get("generated_text") or {}
        found = collapse.of_texts([row[1] for row in texts.values()])
        for name in (*collapse.FLUENCY, collapse.REPEATING):
            if known := [value for value in columns.get(name, ()) if value is not None]:
                found[name] = sum(known) / len(known)
        start = {name: one["value"] for name, one in (self.start or {}).items() if one.get("value") is not None}
        return collapse.signs({**statistics.values, **found}, start, limits) if limits else []

    def _made_from(self, task: str, made_from: Mapping[str, Any]) -> dict[str, Any]:
        reads = self.reference is not None and "reference" in self.passes(task)
        compared = {"reference": self.reference.identity} if reads else {}
        compared |= judges.identity(self.settings, self.passes(task)) if self.passes(task) else {}
        return provenance.fingerprint(**made_from, **compared, compat=self.compat, metrics=VERSION)

    def write(self, folder: Path, log: Mapping[str, Any], statistics: Statistics, columns: Columns) -> dict[str, Value]:
        """Work out every metric and write metrics.json; those that are not TOFU's own come back. On rank 0."""
        lost = [column for column in table.columns(self.metrics) if column.name not in columns]
        context = Context(
            columns=columns,
            log=log,
            statistics=statistics,
            retain=self.retain,
            start=self.start,
            settings=self.settings,
            reasons={**{column.name: f"not evaluated: {column.of}" for column in lost}, **self.reasons},
            about=self.about,
        )
        found = table.values(self.metrics, context)
        run_folder.note(folder, METRICS)
        utils.write_json(folder / METRICS, table.record(self.metrics, found))
        more = {metric.name: found[metric.name] for metric in self.metrics if metric.group != "tofu"}
        lacking: dict[str | None, list[str]] = {}
        for name, one in more.items():
            if one.value is None:
                lacking.setdefault(one.reason, []).append(name)
        for reason, names in lacking.items():
            logger.info("no %s: %s", ", ".join(names), reason)
        values = {name: one.value for name, one in more.items() if one.value is not None}
        if values:
            logger.info("metrics:\n%s", "\n".join(console.columns(values)))
        return more


def _log_digest(folder: Path, task: str) -> str | None:
    """The digest of a set's log; None of a set that has none."""
    path = folder / f"{task}.json"
    return provenance.file_digest(path) if path.is_file() else None


def _read(folder: Path) -> dict[str, Any]:
    """What metric_rows.json holds, by task; nothing where there is none."""
    path = folder / ROWS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rows_of(
    task: Task,
    scores: Sequence[Mapping[tuple[str, int], TokenScores]],
    answers: Sequence[list[int]],
    texts: Sequence[str],
    extra: Sequence[Mapping[str, Any]],
    rouge: str,
) -> list[Row]:
    """A set's rows as metrics read them.

    Args:
        scores, answers, texts, extra: of each row, as the model's passes gave them.
        rouge: the tokenizer of `words.scorer`.
    """
    base = task.data.base_answer_key if task.data.base_answer_key != task.data.answer_key else None
    return [
        Row(
            answers=scores[i],
            ended=dict(zip(task.answers[i], task.ended[i], strict=True)),
            text=texts[i],
            tokens=answers[i],
            truth=row[task.data.answer_key],
            paraphrase=row[base] if base else None,
            question=task.questions[i],
            budget=task.budgets[i],
            rouge=rouge,
            extra=extra[i],
        )
        for i, row in enumerate(task.data.rows)
    ]


def of_config(
    cfg: Any,
    sets: Sequence[EvalSet],
    prepared: Callable[[EvalSet], Task],
    taught: Taught,
    compared: Callable[[str], Reference],
) -> Measures:
    """What a checked `schema.Evaluate` asks for.

    Args:
        sets: `load_sets`.
        prepared: makes a task of a set (`sets.prepare`).
        taught: what the model was trained on.
        compared: makes the reference model of `reference_model`.

    Raises:
        BadInput: see `holdout.load` and `Reference`.
    """
    metrics = table.of_config(cfg)
    retain = log_formats.metrics_beside(cfg["retain_result"], "retain_result")
    known: dict[str, Any] = {"compat": cfg["compat"], "retain": retain, "settings": cfg}
    known["reasons"] = {} if cfg["fluency"]["model"] else {fluency.LOSS.name: "it needs fluency.model"}
    if not cfg["reference_model"]:
        compares = [column for column in privacy.COLUMNS if column.extra == "reference"]
        known["reasons"] |= {column.name: "it needs reference_model" for column in compares}
    columns = [column for column in table.columns(metrics) if column.of == privacy.HOLDOUT]
    if columns:
        data, why_not, about = holdout.load(cfg, sets, taught)
        known |= {"beside": (prepared(data),) if data else (), "about": {privacy.HOLDOUT: about}}
        known["reasons"] |= {column.name: why_not for column in columns} if why_not else {}
    if cfg["reference_model"] and any(column.extra == "reference" for column in columns):
        known["reference"] = compared(cfg["reference_model"])
    return Measures(metrics=metrics, **known)
