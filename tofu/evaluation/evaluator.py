"""Evaluate a model on its sets: per-row logs, then statistics of the logs. The same code during training and after."""

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import utils
from data_module import Tags
from tofu.evaluation import (
    console,
    inference,
    judges,
    log_files,
    log_formats,
    logs,
    measures,
    passes,
    reference,
    row_logs,
    slots,
    start_result,
    vllm_backend,
    words,
)
from tofu.evaluation.measures import Measures
from tofu.evaluation.metrics import collapse
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.evaluation.metrics.rows import Row
from tofu.evaluation.retain_log import load_retain_log
from tofu.evaluation.sets import Task, check_words, load_sets, prepare, reach
from tofu.models.engines import Engine
from tofu.runtime import ranks, run_folder, signals, stages, trained_on
from tofu.runtime.trained_on import Taught

log = logging.getLogger(__name__)

STATISTICS = "aggregate_stat.csv"
REPORT = "eval_report.md"
OPENUNLEARNING = ("TOFU_EVAL.json", "TOFU_SUMMARY.json")
OWN = (  # what an evaluation writes
    *("eval_*.json", logs.AGGREGATED, STATISTICS, REPORT, log_files.FINGERPRINTS, *OPENUNLEARNING),
    *(measures.METRICS, measures.ROWS, reference.FILE),
)
KEPT = (log_files.FINGERPRINTS, measures.ROWS, reference.FILE)  # beside the logs: each says what it was made from
OURS = ("backend", "ours")  # no part of a fingerprint: older ones are without it
TOFU_ALONE = Measures()
Page = Callable[..., str]  # see reporting.page


def evaluate(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    save_dir: str | Path,
    *,
    batch_size: int | str,
    save_generated_text: bool = True,
    rouge: str = "default",
    truth_ratio: str = "geometric",
    save_format: Sequence[str] = ("tofu",),
    retain_log: Mapping[str, Any] | None = None,
    method_name: str = "",
    page: Page | None = None,
    fingerprints: Mapping[str, Mapping[str, Any]] | None = None,
    todo: Sequence[str] | None = None,
    sharded: bool = False,
    answers: Mapping[str, list[list[int]]] | None = None,
    measured: Measures = TOFU_ALONE,
) -> dict[str, Any]:
    """Score and generate every row of every set; write the logs, their statistics and, with `page`, one to look at.

    Batches are formed once over all rows and dealt whole to the ranks: no bit depends on their number (but see slots).

    Args:
        model: unwrapped; put into eval mode for the while. None where `todo` is empty.
        tasks: what `prepare` made of the sets.
        save_dir: gets each set's log as soon as it is complete, then the other files (see docs/evaluation.md).
        batch_size: most prompts generated at once, or auto (`slots.resolve`).
        rouge: the tokenizer of `words.scorer`.
        truth_ratio: geometric or arithmetic (`tofu_metrics.log_ratio`); the logs are the same for both.
        save_format: `openunlearning` also writes TOFU_EVAL.json and TOFU_SUMMARY.json.
        retain_log: the retain model's aggregated log; None: no forget quality.
        method_name: the Method column of the statistics.
        page: makes `eval_report.md`.
        fingerprints: task -> what its log is a function of (`log_files.fingerprint`); kept beside the logs.
        todo: the sets to evaluate, the same on all ranks; the others' logs are in save_dir already. None for all.
        sharded: whether the ranks share one model: then all of them run equally many forwards.
        answers: task -> what was generated for each of its rows beforehand, in tokens; the model generates the others.
        measured: the metrics beside TOFU's own.

    Returns:
        What finished.json holds (`metric.Statistics.record`), on rank 0; {} on the others.

    Raises:
        BadInput: a loss that is not finite.
        Interrupted: on all ranks, a signal has come to one of them; the sets that are whole stay.
    """
    folder, every = Path(save_dir), (*tasks, *measured.beside)
    todo = [task.data.task for task in every] if todo is None else todo
    answers = {**(answers or {}), **{task.data.task: [[] for _ in task.prompts] for task in measured.beside}}
    at_once = _at_once(batch_size, model, tasks, todo, answers, measured)
    each = [passes.Asked(model, tokenizer, task, [], at_once, sharded, measured.settings) for task in every]
    with signals.handled():
        made, columns = _sets(folder, each, todo, answers, measured, rouge, save_generated_text, fingerprints or {})
        if ranks.rank() > 0:
            return {}
        told = (retain_log, method_name, truth_ratio, save_format, page, rouge)
        return _write(made, columns, measured, folder, *told)


def _sets(
    folder: Path,
    each: Sequence[passes.Asked],
    todo: Sequence[str],
    answers: Mapping[str, list[list[int]]],
    measured: Measures,
    rouge: str,
    save_text: bool,
    fingerprints: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Every set's log, by its file's name, and the columns that the metrics read of all sets; whole on rank 0 alone."""
    made: dict[str, dict] = {}
    columns: dict[str, Any] = {}
    for done, asked in enumerate(each):
        name, logged = asked.task.data.task, not any(asked.task is one for one in measured.beside)
        if name in todo:
            with _told_whole(folder, done, len(each)):
                rows = _run(asked, answers.get(name), measured, rouge)
            if logged:
                made[f"{name}.json"] = row_logs.log_of(asked.task, rows, save_text)
                log_files.keep(folder, name, made[f"{name}.json"], fingerprints.get(name))
            columns |= measured.keep(folder, name, rows, fingerprints.get(name))
        elif ranks.rank() == 0:
            columns |= measured.kept(folder, name)
            if logged:
                made[f"{name}.json"] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return made, columns


@contextlib.contextmanager
def _told_whole(folder: Path, done: int, of: int) -> Iterator[None]:
    """Tell an interruption what is kept: the sets before the one at hand."""
    try:
        yield
    except signals.Interrupted as stop:
        raise signals.Interrupted(folder, f"{done} of {of} sets are whole", name=stop.name) from None


def _at_once(
    batch_size: int | str,
    model: PreTrainedModel | None,
    tasks: Sequence[Task],
    todo: Sequence[str],
    answers: Mapping[str, Any],
    measured: Measures,
) -> tuple[int, int]:
    """`slots.resolve` for the sets that the model itself writes to; nothing is asked where there are none."""
    todo = [name for name in todo if name not in answers or "generation" in measured.passes(name)]
    asked = [task for task in tasks if task.data.task in todo]
    return slots.resolve(batch_size, model, asked) if asked else (0, 1)


def _run(asked: passes.Asked, answers: list[list[int]] | None, measured: Measures, rouge: str) -> list[Row]:
    """A set's rows: what the model writes to each, its scores of each row's answers, and what the metrics' passes find.

    Args:
        answers: what was written beforehand, in tokens; the model writes where this is None.
    """
    model, tokenizer, task, _, (batch_size, among), sharded, *_ = asked
    with inference.ready(model, reach(task), sharded) as masks:
        # in this order: the cache is the largest thing, and what scoring leaves to the allocator isn't under it
        if answers is None:
            answers = row_logs.generate_rows(model, tokenizer, task, batch_size, sharded, masks, among)
        scores = row_logs.score_rows(model, task, sharded, masks)
    texts = row_logs.decoded(tokenizer, answers)
    extra = measured.run(task.data.task, asked._replace(texts=texts))
    return measures.rows_of(task, scores, answers, texts, extra, rouge)


def _write(
    made: dict[str, dict],
    columns: Mapping[str, Sequence[float | None]],
    measured: Measures,
    folder: Path,
    retain_log: Mapping[str, Any] | None,
    method_name: str,
    truth_ratio: str,
    save_format: Sequence[str],
    page: Page | None,
    rouge: str,
) -> dict[str, Any]:
    """Write the aggregated log and what follows from it. Returns what finished.json holds."""
    run_folder.note(folder, logs.AGGREGATED, STATISTICS, REPORT, *OPENUNLEARNING)
    utils.write_json(folder / logs.AGGREGATED, made)
    scores = tofu_metrics.statistics(made, retain_log, truth_ratio)
    signs, more = measured.collapsed(made, scores, columns), measured.write(folder, made, scores, columns)
    if missing := logs.missing_sets(made):
        log.info("no model utility: it needs %s too", ", ".join(missing))
    elif bare := logs.uncompared(made):
        log.info("no model utility: %s without wrong answers", ", ".join(bare))
    elif retain_log is not None:
        utils.write_text(
            folder / STATISTICS, tofu_metrics.to_csv([tofu_metrics.leaderboard_row(scores, method_name, "")])
        )
    if page is not None:
        utils.write_text(folder / REPORT, page(made, scores, truth_ratio, signs))
    if "openunlearning" in save_format:
        geometric = scores if truth_ratio == "geometric" else tofu_metrics.statistics(made, retain_log)
        contents = log_formats.to_openunlearning(made, geometric, _f1(made, rouge), columns, more)
        for name, content in zip(OPENUNLEARNING, contents, strict=True):
            utils.write_json(folder / name, content)
    log.info("evaluation logs: %s", folder)
    log.info("scores:\n%s", console.table(scores.values, truth_ratio))
    if signs:
        log.warning(collapse.warning(signs))
    values = {name: one.value for name, one in more.items() if one.value is not None}
    return {**scores.record(), **values, **({"Collapse": signs} if signs else {})}


def _f1(made: Mapping[str, Mapping[str, Any]], rouge: str) -> dict[str, dict[str, float]]:
    """ROUGE-L F1 of every row whose texts were kept."""
    texts = {name: one.get("generated_text", {}) for name, one in made.items()}
    return {
        name: {i: words.rouge(truth, text, rouge)["rougeL"].fmeasure for i, (_, text, truth) in rows.items()}
        for name, rows in texts.items()
    }


class Evaluator:
    """`evaluate` with all but the model bound, from a checked `schema.Evaluate`; it refuses bad input."""

    def __init__(
        self,
        cfg: DictConfig,
        tokenizer: PreTrainedTokenizerBase,
        tags: Tags,
        record: Mapping[str, str],
        page: Page | None = None,
        method_name: str = "",
        prefix: str = "",
        starts_from: str | None = None,
        taught: Taught = trained_on.UNKNOWN,
    ) -> None:
        """Read and tokenise every set, and read the retain result.

        Args:
            tags: the family's.
            record: what `families.record` says of it.
            page: makes `eval_report.md`.
            prefix: what stands before the keys of `cfg` on the command line.
            starts_from: the model that the training starts from, or did: its evaluation is looked for in its folder.
            taught: what the model was trained on.

        Raises:
            BadInput: see `load_sets`, `prepare`, `load_retain_log`, `measures.of_config` and `start_result.load`.
        """
        self.cfg, self.tokenizer, self.method_name = cfg, tokenizer, method_name
        self.tags, self.page, self.prefix = tags, page, prefix
        sets = load_sets(cfg)
        check_words(sets, cfg.rouge.tokenizer, prefix)
        room = {"max_length": cfg.generation.max_length, "max_new_tokens": cfg.generation.max_new_tokens}
        prepared = functools.partial(prepare, tokenizer=tokenizer, tags=self.tags, **room, prefix=prefix)
        self.tasks = [prepared(data) for data in sets]
        self.retain_log = load_retain_log(cfg, self.tasks, record, tokenizer)
        compared = functools.partial(reference.Reference, tokenizer=tokenizer, record=record, prefix=prefix)
        self.measured = measures.of_config(cfg, sets, prepared, taught, compared)
        start = start_result.load(cfg, self.tasks, record, prefix, starts_from, self.fingerprints("", False))
        self.measured = dataclasses.replace(self.measured, start=start)
        self.scores: dict[str, Any] = {}  # the last evaluation's; filled on rank 0 only

    def state_dict(self) -> dict[str, Any]:
        """The last evaluation's scores, for a training that goes on later."""
        return {"scores": json.dumps(self.scores)}  # as finished.json will have them

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.scores = json.loads(state["scores"])

    def fingerprints(self, model: str, bf16: bool) -> dict[str, dict[str, Any]]:
        """Task -> `log_files.fingerprint`.

        Args:
            model: the identity of the weights.
            bf16: whether the model computes in bf16.
        """
        settings = {
            "tags": [
                *([self.tags.system_prompt] if self.tags.system_prompt else []),
                *(self.tags.question_start_tag, self.tags.question_end_tag, self.tags.answer_tag),
            ],
            "end_token": self.tokenizer.eos_token,
            "generation": {key: value for key, value in self.cfg.generation.items() if (key, value) != OURS},
            "precision": "bf16" if bf16 else "fp32",
            "save_generated_text": self.cfg.save_generated_text,
            **({"rouge": self.cfg.rouge.tokenizer} if self.cfg.rouge.tokenizer != "default" else {}),
        }
        tasks = (*self.tasks, *self.measured.beside)
        return {task.data.task: log_files.fingerprint(task, model, settings) for task in tasks}

    def missing(self, folder: Path, fingerprints: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The sets whose logs in `folder` are not there or not of these fingerprints. Rank 0 looks and says why."""
        todo = []
        if ranks.rank() == 0:
            for name, made_from in fingerprints.items():
                beside = name in [task.data.task for task in self.measured.beside]
                why = None if beside else log_files.why_not_complete(folder, name, made_from)
                why = why or self.measured.why_not_complete(folder, name, made_from)
                log.info("%s: %s", name, f"evaluated, because {why}" if why else "complete, and not evaluated again")
                todo += [name] if why else []
        return ranks.from_rank_0(todo)

    def check(self, engine: Engine) -> None:
        """Raise BadInput where this engine can't load the reference model, or a judge of texts can't be loaded."""
        judges.check(
            self.cfg, {name for task in self.tasks for name in self.measured.passes(task.data.task)}, self.prefix
        )
        if self.measured.reference is not None:
            self.measured.reference.check(engine)

    def compare(self, folder: Path, engine: Engine, todo: Sequence[str] | None = None) -> None:
        """Let the reference model score what is compared with it, before the model to evaluate is loaded.

        Args:
            folder: keeps what it finds.
            todo: the sets to evaluate; None for all.
        """
        tasks = [
            task for task in (*self.tasks, *self.measured.beside) if "reference" in self.measured.passes(task.data.task)
        ]
        if self.measured.reference is not None and any(todo is None or task.data.task in todo for task in tasks):
            self.measured.reference.score(tasks, folder, engine)

    def generated(self, path: str, bf16: bool, todo: Sequence[str] | None = None) -> dict[str, list[list[int]]]:
        """What another generator than the model in memory writes, before that model is loaded: see `evaluate`.

        Args:
            path: the model, as `folders.resolve` gave it.
            bf16: whether it computes in bf16.
            todo: the sets to evaluate; None for all.

        Returns:
            Task -> the new tokens of each row, without the end token; {} where generation.backend is `ours`.

        Raises:
            BadInput: see `vllm_backend.generate`.
        """
        if self.cfg.generation.backend == "ours":
            return {}
        tasks = [task for task in self.tasks if todo is None or task.data.task in todo]
        return vllm_backend.generate(path, self.tokenizer, tasks, bf16=bf16)

    def _about(self, folder: Path) -> dict[str, Any]:
        """What the head of the page says of an evaluation into a folder."""
        step = folder.name.removeprefix("checkpoint-")
        trained = bool(self.prefix) and step != "0"  # by the run in whose folder this is; else a model from disk
        model = f"{folder.parent} at step {step}" if trained else self.cfg.model_path
        named = {"model": model, "split": self.cfg.split, "family": self.cfg.model_family}
        return {**named, "ds_size": self.cfg.ds_size, "date": datetime.date.today().isoformat()}

    def __call__(
        self,
        model: PreTrainedModel | None,
        save_dir: str | Path,
        sharded: bool = False,
        fingerprints: Mapping[str, Mapping[str, Any]] | None = None,
        todo: Sequence[str] | None = None,
        answers: Mapping[str, list[list[int]]] | None = None,
    ) -> dict[str, Any]:
        """Evaluate `model` into `save_dir`; see `evaluate`."""
        self.scores = stages.stage("evaluation")(evaluate)(
            model,
            self.tokenizer,
            self.tasks,
            save_dir,
            batch_size=self.cfg.batch_size,
            save_generated_text=self.cfg.save_generated_text,
            rouge=self.cfg.rouge.tokenizer,
            truth_ratio=self.cfg.truth_ratio,
            save_format=self.cfg.save_format,
            retain_log=self.retain_log,
            method_name=self.method_name,
            page=self.page and functools.partial(self.page, about=self._about(Path(save_dir))),
            fingerprints=fingerprints,
            todo=todo,
            sharded=sharded,
            answers=answers,
            measured=self.measured,
        )
        return self.scores
