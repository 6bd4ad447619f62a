"""Evaluate a model on its sets: per-row logs, then statistics of the logs. The same code during training and after."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import utils
from data_module import Tags
from tofu.evaluation import inference, log_formats, logs, row_logs, slots, vllm_backend
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.evaluation.metrics.declared import Statistics
from tofu.evaluation.retain_log import load_retain_log
from tofu.evaluation.sets import Task, check_words, load_sets, prepare, reach
from tofu.runtime import provenance, ranks, run_folder

log = logging.getLogger(__name__)

STATISTICS = "aggregate_stat.csv"
REPORT = "eval_report.md"
FINGERPRINTS = "fingerprints.json"
OPENUNLEARNING = ("TOFU_EVAL.json", "TOFU_SUMMARY.json")
OWN = ("eval_*.json", logs.AGGREGATED, STATISTICS, REPORT, FINGERPRINTS, *OPENUNLEARNING)  # what an evaluation writes
OURS = ("backend", "ours")  # no part of a fingerprint: older ones are without it
VERSION = 2  # part of every fingerprint: raise it whenever a change of the code moves a number
Page = Callable[[Mapping[str, Any], Statistics, str], str]  # of a log, its statistics and the truth ratio's name


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
) -> dict[str, Any]:
    """Score and generate every row of every set; write the logs, their statistics and, with `page`, one to look at.

    Batches are formed once over all rows and dealt whole to the ranks: no bit depends on their number (but see slots).

    Args:
        model: unwrapped; put into eval mode for the while. None where `todo` is empty.
        tasks: what `prepare` made of the sets.
        save_dir: gets each set's log as soon as it is complete, then the other files (see docs/evaluation.md).
        batch_size: most prompts generated at once, or auto (`slots.resolve`).
        rouge: the tokenizer of `row_logs.scorer`.
        truth_ratio: geometric or arithmetic (`tofu_metrics.log_ratio`); the logs are the same for both.
        save_format: `openunlearning` also writes TOFU_EVAL.json and TOFU_SUMMARY.json.
        retain_log: the retain model's aggregated log; None: no forget quality.
        method_name: the Method column of the statistics.
        page: makes `eval_report.md`.
        fingerprints: task -> what its log is a function of (`fingerprint`); kept beside the logs.
        todo: the sets to evaluate, the same on all ranks; the others' logs are in save_dir already. None for all.
        sharded: whether the ranks share one model: then all of them run equally many forwards.
        answers: task -> what was generated for each of its rows beforehand, in tokens; the model generates the others.

    Returns:
        What finished.json holds (`metric.Statistics.record`), on rank 0; {} on the others.

    Raises:
        BadInput: a loss that is not finite.
    """
    folder = Path(save_dir)
    todo = [task.data.task for task in tasks] if todo is None else todo
    at_once = _at_once(batch_size, model, tasks, set(todo) - set(answers or {}))
    made: dict[str, dict] = {}
    for task in tasks:
        name = task.data.task
        if name in todo:
            texts, scores = _run(model, tokenizer, task, at_once, sharded, (answers or {}).get(name))
            made[f"{name}.json"] = row_logs.log_of(task, scores, texts, save_generated_text, rouge)
            _keep(folder, name, made[f"{name}.json"], (fingerprints or {}).get(name))
        elif ranks.rank() == 0:
            made[f"{name}.json"] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if ranks.rank() > 0:
        return {}
    return _write(made, folder, retain_log, method_name, truth_ratio, save_format, page, rouge).record()


def _at_once(
    batch_size: int | str, model: PreTrainedModel | None, tasks: Sequence[Task], written: set[str]
) -> tuple[int, int]:
    """`slots.resolve` for the sets that the model itself writes to; nothing is asked where there are none."""
    asked = [task for task in tasks if task.data.task in written]
    return slots.resolve(batch_size, model, asked) if asked else (0, 1)


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    at_once: tuple[int, int],
    sharded: bool,
    answers: list[list[int]] | None,
) -> tuple[list[str], list]:
    """What the model writes to each row of a set, unless that is known, and its scores of each row's answers."""
    batch_size, among = at_once
    with inference.ready(model, reach(task), sharded) as masks:
        # in this order: the cache is the largest thing, and what scoring leaves to the allocator isn't under it
        if answers is None:
            texts = row_logs.generate_rows(model, tokenizer, task, batch_size, sharded, masks, among)
        else:
            texts = row_logs.decoded(tokenizer, answers)
        return texts, row_logs.score_rows(model, task, sharded, masks)


def _keep(folder: Path, name: str, made: Mapping[str, Any], made_from: Mapping[str, Any] | None) -> None:
    """Write a set's log and its fingerprint, on rank 0."""
    if ranks.rank() == 0:
        run_folder.note(folder, f"{name}.json", FINGERPRINTS)
        utils.write_json(folder / f"{name}.json", made)
        _remember(folder, name, made_from)


def fingerprint(task: Task, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a set's log is a function of: a log with the same fingerprint need not be made again.

    Args:
        model: the identity of the weights and the tokenizer (`folders.identity`).
        settings: what else moves a number or a text. Not batch_size nor the engine: they move bits beyond the tenth.
    """
    rows = json.dumps([task.data, task.questions], ensure_ascii=False)
    return provenance.fingerprint(model=model, data=provenance.digest(rows), **settings, version=VERSION)


def _remember(folder: Path, name: str, made_from: Mapping[str, Any] | None) -> None:
    """Note a log's fingerprint together with its own digest, so that neither can go with another of the other."""
    path = folder / FINGERPRINTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if made_from is not None:
        utils.write_json(path, known | {name: {**made_from, "log": provenance.file_digest(folder / f"{name}.json")}})


def why_not_complete(folder: Path, name: str, made_from: Mapping[str, Any]) -> str | None:
    """Why a set's log in `folder` can't stand for a new one; None if it can."""
    path, known = folder / f"{name}.json", folder / FINGERPRINTS
    if not path.is_file():
        return "it is not there"
    noted = json.loads(known.read_text(encoding="utf-8")).get(name) if known.is_file() else None
    if noted is None or noted.get("log") != provenance.file_digest(path):
        return "it has no fingerprint"
    differing = provenance.differing(noted, made_from)
    return f"it was made with other {', '.join(differing)}" if differing else None


def _write(
    made: dict[str, dict],
    folder: Path,
    retain_log: Mapping[str, Any] | None,
    method_name: str,
    truth_ratio: str,
    save_format: Sequence[str],
    page: Page | None,
    rouge: str,
) -> Statistics:
    """Write the aggregated log and what follows from it."""
    run_folder.note(folder, logs.AGGREGATED, STATISTICS, REPORT, *OPENUNLEARNING)
    utils.write_json(folder / logs.AGGREGATED, made)
    scores = tofu_metrics.statistics(made, retain_log, truth_ratio)
    if missing := logs.missing_sets(made):
        log.info("no model utility: it needs %s too", ", ".join(missing))
    elif bare := logs.uncompared(made):
        log.info("no model utility: %s without wrong answers", ", ".join(bare))
    elif retain_log is not None:
        utils.write_text(
            folder / STATISTICS, tofu_metrics.to_csv([tofu_metrics.leaderboard_row(scores, method_name, "")])
        )
    if page is not None:
        utils.write_text(folder / REPORT, page(made, scores, truth_ratio))
    if "openunlearning" in save_format:
        geometric = scores if truth_ratio == "geometric" else tofu_metrics.statistics(made, retain_log)
        contents = log_formats.to_openunlearning(made, geometric, _f1(made, rouge))
        for name, content in zip(OPENUNLEARNING, contents, strict=True):
            utils.write_json(folder / name, content)
    log.info("evaluation logs: %s", folder)
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in scores.values.items()))
    return scores


def _f1(made: Mapping[str, Mapping[str, Any]], rouge: str) -> dict[str, dict[str, float]]:
    """ROUGE-L F1 of every row whose texts were kept."""
    texts = {name: one.get("generated_text", {}) for name, one in made.items()}
    return {
        name: {i: row_logs.scorer(rouge).score(truth, text)["rougeL"].fmeasure for i, (_, text, truth) in rows.items()}
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
    ) -> None:
        """Read and tokenise every set, and read the retain result.

        Args:
            tags: the family's.
            record: what `families.record` says of it.
            page: makes `eval_report.md`.
            prefix: what stands before the keys of `cfg` on the command line.

        Raises:
            BadInput: see `load_sets`, `prepare` and `load_retain_log`.
        """
        self.cfg, self.tokenizer, self.method_name = cfg, tokenizer, method_name
        self.tags, self.page = tags, page
        sets = load_sets(cfg)
        check_words(sets, cfg.rouge.tokenizer, prefix)
        room = {"max_length": cfg.generation.max_length, "max_new_tokens": cfg.generation.max_new_tokens}
        self.tasks = [prepare(data, tokenizer, self.tags, **room, prefix=prefix) for data in sets]
        self.retain_log = load_retain_log(cfg, self.tasks, record, tokenizer)
        self.scores: dict[str, Any] = {}  # the last evaluation's; filled on rank 0 only

    def fingerprints(self, model: str, bf16: bool) -> dict[str, dict[str, Any]]:
        """Task -> `fingerprint`.

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
        return {task.data.task: fingerprint(task, model, settings) for task in self.tasks}

    def missing(self, folder: Path, fingerprints: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The sets whose logs in `folder` are not there or not of these fingerprints. Rank 0 looks and says why."""
        todo = []
        if ranks.rank() == 0:
            for name, made_from in fingerprints.items():
                why = why_not_complete(folder, name, made_from)
                log.info("%s: %s", name, f"evaluated, because {why}" if why else "complete, and not evaluated again")
                todo += [name] if why else []
        return ranks.from_rank_0(todo)

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
        self.scores = evaluate(
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
            page=self.page,
            fingerprints=fingerprints,
            todo=todo,
            sharded=sharded,
            answers=answers,
        )
        return self.scores
