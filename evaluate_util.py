"""Evaluate a model on the four TOFU sets: per-row logs, then statistics of the logs. Library and entry script.

python evaluate_util.py model_family=phi split=forget10_perturbed model_path=PATH
torchrun --nproc_per_node=2 evaluate_util.py model_family=phi split=forget10_perturbed model_path=PATH
python evaluate_util.py model_family=tiny data_path=data/mini model_path=runs/tiny/full retain_result=LOG
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from omegaconf import DictConfig
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import command_line
import data_module
import inference
import log_formats
import metrics
import models
import report
import schema
import utils
from data_module import Tags
from inference import Tree
from utils import BadInput

log = logging.getLogger(__name__)

AGGREGATED = "eval_log_aggregated.json"
STATISTICS = "aggregate_stat.csv"
REPORT = "eval_report.md"
FINGERPRINTS = "fingerprints.json"
OPENUNLEARNING = ("TOFU_EVAL.json", "TOFU_SUMMARY.json")
OWN = ("eval_*.json", AGGREGATED, STATISTICS, REPORT, FINGERPRINTS, *OPENUNLEARNING)  # what an evaluation writes
VERSION = 2  # part of every fingerprint: raise it whenever a change of the code moves a number
SEED = 42  # only reinitialize_weights draws anything
SCORED_AT_ONCE = 1024  # nodes in a scoring batch: more are no faster (benchmarks/eval_speed.py) and need more memory
LOGITS_AT_ONCE = 2**28  # numbers, 1 GiB in float32: bounds such a batch where the vocabulary is large
REFILLS = 2  # prompts that share a generation's places, in multiples of batch_size: more keep the places full
INSTEAD = {"paraphrased_question": "question"}  # the two real-world sets have no paraphrases
NORMALISED = ("eval_real_author_wo_options", "eval_real_world_wo_options")  # these are multiple choice
ROUGE = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


class EvalSet(NamedTuple):
    """One set of rows and what to score of each."""

    task: str  # names its log: TASK.json
    rows: list[dict[str, Any]]
    question_key: str
    answer_key: str
    base_answer_key: str  # the right answer that the truth ratio compares the perturbed ones with
    perturbed_answer_key: str


class Task(NamedTuple):
    """A set, tokenised: all that a model has to be given."""

    data: EvalSet
    questions: list[str]  # as the model is asked them, tags included
    answers: list[list[tuple[str, int]]]  # a path of a row's tree: gt, paraphrased or perturb, and its number
    trees: list[Tree]
    prompts: list[list[int]]
    likely: list[list[tuple[int, ...]]]  # of each prompt, its answered texts: generating is faster where it follows one
    budgets: list[int]  # the most tokens generated for a row; 0 where its prompt fills max_length


def load_sets(cfg: DictConfig) -> list[EvalSet]:
    """Read the rows of every set of a checked `schema.Evaluate`.

    Raises:
        BadInput: missing data, split or column, or a column of another kind.
    """
    sets, lists = [], ("split_list", "data_path", "eval_task")
    keys = (*lists, "question_key", "answer_key", "base_answer_key", "perturbed_answer_key")
    for split, data_path, task, *columns in zip(*(cfg[key] for key in keys), strict=True):
        rows = data_module.load_rows(data_path, split, columns, cfg.ds_size, instead=INSTEAD)
        data = EvalSet(task, rows, *columns)
        _check_columns(data, f"{data_path}, {split}")
        sets.append(data)
    return sets


def _check_columns(data: EvalSet, where: str) -> None:
    """Raise BadInput unless questions and answers are texts and the perturbed answers lists of texts."""
    for i, row in enumerate(data.rows):
        for key in ("question_key", "answer_key", "base_answer_key"):
            if not isinstance(row[getattr(data, key)], str):
                raise BadInput(f"{where}: {key}={getattr(data, key)} is no text in row {i}")
        texts = row[data.perturbed_answer_key]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise BadInput(
                f"{where}: perturbed_answer_key={data.perturbed_answer_key} must be a list of wrong answers in "
                f"every row; row {i} has {str(texts)[:60]!r}"
            )


def prepare(
    data: EvalSet,
    tokenizer: PreTrainedTokenizerBase,
    tags: Tags,
    *,
    max_length: int,
    max_new_tokens: int | None = None,
    prefix: str = "",
) -> Task:
    """Tokenise a set: each row's question and answers as one prefix tree, and the prompt to generate from.

    Args:
        max_length: cuts every scored text, and is a row's budget for prompt and generation together.
        max_new_tokens: a row's budget for its generation alone, instead; None for the former.
        prefix: what stands before `generation.max_length` in the config's keys.

    Raises:
        BadInput: a row without an answer token within max_length.
    """
    task = Task(data, [], [], [], [], [], [])
    cut = scored = 0
    for row in data.rows:
        question = row[data.question_key]
        answers = {("gt", 0): row[data.answer_key]}
        if data.base_answer_key != data.answer_key:
            answers["paraphrased", 0] = row[data.base_answer_key]
        answers |= {("perturb", j): text for j, text in enumerate(row[data.perturbed_answer_key])}
        samples = [
            data_module.encode(tokenizer, tags, question, text, max_length, f"{prefix}generation.max_length")
            for text in answers.values()
        ]
        cut, scored = cut + sum(sample.cut for sample in samples), scored + len(samples)
        task.questions.append(data_module.prompt(tags, question))
        task.answers.append(list(answers))
        task.trees.append(inference.tree(samples))
        task.prompts.append(tokenizer(task.questions[-1])["input_ids"])
        task.likely.append([(*sample.input_ids, sample.targets[-1]) for sample in samples])
        task.budgets.append(max_new_tokens or max(0, max_length - len(task.prompts[-1])))
    if cut:
        log.info("%s: %d of %d scored texts are cut at max_length=%d", data.task, cut, scored, max_length)
    if empty := task.budgets.count(0):
        log.warning("%s: %d prompts fill max_length=%d, so nothing is generated for them", data.task, empty, max_length)
    return task


def load_retain_log(cfg: DictConfig, sets: Sequence[EvalSet]) -> Mapping[str, Any] | None:
    """The log that `retain_result` names, known to fit the sets; None, with the way to make one, without it.

    Raises:
        BadInput: no such file, no evaluation log, or one of other rows than the forget set's.
    """
    if cfg.retain_result is None:
        _tell_how(cfg)
        return None
    retain = log_formats.read(cfg.retain_result, "retain_result")
    for data in sets:
        if data.task == metrics.FORGET:
            tags = schema.family(cfg.model_family)
            shell = {
                str(i): [data_module.prompt(tags, row[data.question_key]), "", row[data.answer_key]]
                for i, row in enumerate(data.rows)
            }
            ours = {f"{metrics.FORGET}.json": {metrics.RIGHT: shell, "generated_text": shell}}
            try:
                metrics.columns(retain, metrics.FORGET, metrics.RIGHT, metrics.WRONG)
                metrics.same_rows(ours, retain)
            except ValueError as error:
                raise BadInput(f"retain_result={cfg.retain_result}: {error}") from None
    return retain


def _tell_how(cfg: DictConfig) -> None:
    """Log the two commands that make the missing retain result."""
    percent = "".join(c for c in cfg.split if c.isdigit())
    retain = f"retain{100 - int(percent):02d}" if percent else "the retain split"
    made, data = f"runs/{cfg.model_family}/{retain}", cfg.data_path[-1]
    size = "null" if cfg.ds_size is None else cfg.ds_size
    log.info(
        "no forget quality: retain_result is missing, the log of a model finetuned on %s alone with the same settings. "
        "Two commands make it: (1) python finetune.py model_family=%s data_path=%s split=%s save_dir=%s %s "
        "(2) python evaluate_util.py model_family=%s data_path=%s model_path=%s split=%s ds_size=%s "
        "generation.max_length=%s save_dir=%s/eval_%s; then retain_result=%s/eval_%s/%s",
        *(
            retain,
            cfg.model_family,
            data,
            retain,
            made,
            utils.recipe(cfg.model_path) or "(lr=... as the finetuned model)",
        ),
        *(cfg.model_family, data, made, cfg.split, size, cfg.generation.max_length, made, cfg.split),
        *(made, cfg.split, AGGREGATED),
    )


def evaluate(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    save_dir: str | Path,
    *,
    batch_size: int,
    save_generated_text: bool = True,
    truth_ratio: str = "geometric",
    save_format: Sequence[str] = ("tofu",),
    retain_log: Mapping[str, Any] | None = None,
    method_name: str = "",
    fingerprints: Mapping[str, Mapping[str, Any]] | None = None,
    todo: Sequence[str] | None = None,
    sharded: bool = False,
) -> dict[str, Any]:
    """Score and generate every row of every set; write the logs, their statistics and a page to look at.

    Batches are formed once over all rows and dealt whole to the ranks, so that no bit of the result depends on how many
    there are. Each set's log is written as soon as it is complete.

    Args:
        model: unwrapped; put into eval mode for the while. None where `todo` is empty.
        tasks: what `prepare` made of the sets.
        save_dir: gets TASK.json for each set, `eval_log_aggregated.json`, `eval_report.md`, with all four sets and
            `retain_log` `aggregate_stat.csv`, and what `save_format` asks for.
        batch_size: most prompts generated at once.
        truth_ratio: geometric or arithmetic (`metrics.log_ratio`); the logs hold losses and are the same for both.
        save_format: `openunlearning` also writes TOFU_EVAL.json and TOFU_SUMMARY.json.
        retain_log: the aggregated log of a model finetuned on the retain set alone; None: no forget quality.
        method_name: the Method column of the statistics.
        fingerprints: task -> what its log is a function of (`fingerprint`); kept beside the logs.
        todo: the sets to evaluate, the same on all ranks; the other sets' logs are in save_dir already. None for all.
        sharded: whether the ranks share one model (ZeRO-3, FSDP): then all of them run equally many forwards.

    Returns:
        The scores by name (`metrics.statistics`) on rank 0; {} on the others.

    Raises:
        BadInput: a loss that is not finite.
    """
    folder = Path(save_dir)
    todo = [task.data.task for task in tasks] if todo is None else todo
    logs: dict[str, dict] = {}
    for task in tasks:
        name = task.data.task
        if name in todo:
            with inference.ready(model, _reach(task)):
                # in this order: the cache is the largest thing, and what scoring leaves to the allocator isn't under it
                texts = _generate_rows(model, tokenizer, task, batch_size, sharded)
                scores = _score_rows(model, task, sharded)
            logs[f"{name}.json"] = _log_of(task, scores, texts, save_generated_text)
            if utils.rank() == 0:
                utils.write_json(folder / f"{name}.json", logs[f"{name}.json"])
                _remember(folder, name, (fingerprints or {}).get(name))
        elif utils.rank() == 0:
            logs[f"{name}.json"] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if utils.rank() > 0:
        return {}
    return _write(logs, folder, retain_log, method_name, truth_ratio, save_format)


def _reach(task: Task) -> int:
    """The longest text of a set, prompt and answer, in tokens."""
    return max(
        *(max(tree.depths) + 1 for tree in task.trees),
        *(len(prompt) + budget for prompt, budget in zip(task.prompts, task.budgets, strict=True)),
    )


def _score_rows(model: PreTrainedModel, task: Task, sharded: bool) -> list[dict[tuple[str, int], tuple[float, int]]]:
    """A row: (kind, number) -> (sum of token losses in nats, number of tokens), for each of its answers."""
    order = sorted(range(len(task.trees)), key=lambda i: (len(task.trees[i].tokens), i))
    budget = max(1, min(SCORED_AT_ONCE, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size))
    batches: list[list[int]] = [[]]
    for i in order:  # ascending, so the newest is the widest
        if batches[-1] and (len(batches[-1]) + 1) * len(task.trees[i].tokens) > budget:
            batches.append([])
        batches[-1].append(i)
    found = {}
    for batch in share(batches, f"{task.data.task}: scoring", sharded):
        found.update(zip(batch, inference.score_trees(model, [task.trees[i] for i in batch]), strict=True))
    found = merge(found)
    return [dict(zip(answers, found[i], strict=True)) for i, answers in enumerate(task.answers)]


def _generate_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int, sharded: bool
) -> list[str]:
    """Each row's greedy answer, up to an end token or its own budget."""
    order = sorted((i for i, budget in enumerate(task.budgets) if budget), key=lambda i: (len(task.prompts[i]), i))
    parts = -(-len(order) // (REFILLS * batch_size))  # of nearly equal size
    batches = [order[len(order) * k // parts : len(order) * (k + 1) // parts] for k in range(parts)]
    ends = inference.end_tokens(model, tokenizer)
    together = inference.Together(model) if sharded else None
    found = {}
    for batch in share(batches, f"{task.data.task}: generating"):
        tokens = inference.greedy(
            model,
            [task.prompts[i] for i in batch],
            [task.budgets[i] for i in batch],
            ends,
            at_once=batch_size,
            known=[task.likely[i] for i in batch],
            before_forward=together.work if together else lambda: None,
        )
        found.update(zip(batch, tokens, strict=True))
    if together:
        together.wait()
    found = merge(found)
    return [tokenizer.decode(found.get(i, []), skip_special_tokens=True).strip() for i in range(len(task.prompts))]


def share(batches: Sequence[list], what: str, sharded: bool = False) -> Iterable[list]:
    """This rank's batches, with a progress bar on rank 0.

    Args:
        sharded: whether a rank that runs out repeats a batch, so that ranks which share one model run equally many.
    """
    rank, world = utils.rank(), utils.world_size()
    mine = list(batches[rank::world])
    if sharded and batches:
        mine += [batches[0]] * (-(-len(batches) // world) - len(mine))
    return tqdm(mine, desc=what, disable=rank > 0, leave=False)


def merge(found: dict) -> dict:
    """All ranks' results on every rank."""
    merged = {}
    for part in gather_object([found]):
        merged.update(part)
    return merged


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A collated batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _log_of(task: Task, scores: list[dict], texts: list[str], save_text: bool) -> dict[str, dict]:
    """The per-row log in the public benchmark's format: metric -> row number as a string -> value."""
    rows = [_row_of(task, i, scores[i], texts[i]) for i in range(len(task.prompts))]
    if not save_text:
        for row in rows:
            del row["generated_text"]
    return {metric: {str(i): row[metric] for i, row in enumerate(rows)} for metric in rows[0]}


def _row_of(task: Task, i: int, scores: dict[tuple[str, int], tuple[float, int]], text: str) -> dict[str, Any]:
    truth = task.data.rows[i][task.data.answer_key]
    gt, count = scores["gt", 0]
    base, base_count = scores.get(("paraphrased", 0), (gt, count))
    perturbed = [score for (kind, _), score in scores.items() if kind == "perturb"]
    averages = [total / n for total, n in perturbed]
    if not np.isfinite([gt, base, *averages]).all():
        raise BadInput(f"{task.data.task}, row {i}: a loss is not finite: the model has diverged")
    rouge = ROUGE.score(truth, text)
    found = {
        "avg_gt_loss": gt / count,
        "gt_loss": gt,
        "num_token_gt": count,
        "generated_text": [task.questions[i], text, truth],
        "rouge1_recall": rouge["rouge1"].recall,
        "rougeL_recall": rouge["rougeL"].recall,
        "average_perturb_loss": averages,
        "avg_paraphrased_loss": base / base_count,
        "truth_ratio": float(np.exp(min(base / base_count - np.mean(averages), 700.0))),
        "paraphrased_loss": base,
        "perturb_loss": [total for total, _ in perturbed],
        "num_token_paraphrased": base_count,
        "num_token_perturb": [n for _, n in perturbed],
    }
    if task.data.task in NORMALISED:
        found["normalized_gt_loss"] = float(np.logaddexp.reduce([-gt / count, *(-a for a in averages)]) + gt / count)
    return found


def fingerprint(task: Task, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a set's log is a function of: a log with the same fingerprint need not be made again.

    Args:
        model: the identity of the weights and the tokenizer (`models.identity`).
        settings: what else moves a number or a text. Not batch_size nor the engine: they move bits beyond the tenth.
    """
    rows = json.dumps([task.data, task.questions], ensure_ascii=False)
    return {"model": model, "data": _digest(rows.encode()), **settings, "version": VERSION}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _remember(folder: Path, name: str, made_from: Mapping[str, Any] | None) -> None:
    """Note a log's fingerprint together with its own digest, so that neither can go with another of the other."""
    path = folder / FINGERPRINTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if made_from is not None:
        utils.write_json(path, known | {name: {**made_from, "log": _digest((folder / f"{name}.json").read_bytes())}})


def why_not_complete(folder: Path, name: str, made_from: Mapping[str, Any]) -> str | None:
    """Why a set's log in `folder` can't stand for a new one; None if it can."""
    path, known = folder / f"{name}.json", folder / FINGERPRINTS
    if not path.is_file():
        return "it is not there"
    noted = json.loads(known.read_text(encoding="utf-8")).get(name) if known.is_file() else None
    if noted is None or noted.get("log") != _digest(path.read_bytes()):
        return "it has no fingerprint"
    differing = [key for key in made_from if noted.get(key) != made_from[key]]
    return f"it was made with other {', '.join(differing)}" if differing else None


def _write(
    logs: dict[str, dict],
    folder: Path,
    retain_log: Mapping[str, Any] | None,
    method_name: str,
    truth_ratio: str,
    save_format: Sequence[str],
) -> dict[str, Any]:
    """Write the aggregated log and what follows from it."""
    utils.write_json(folder / AGGREGATED, logs)
    scores = metrics.statistics(logs, retain_log, truth_ratio)
    if missing := [task for task in metrics.TASKS.values() if f"{task}.json" not in logs]:
        log.info("no model utility: it needs %s too", ", ".join(missing))
    elif retain_log is not None:
        utils.write_text(folder / STATISTICS, metrics.to_csv([metrics.leaderboard_row(scores, method_name, "")]))
    utils.write_text(folder / REPORT, report.evaluation_page(logs, scores, truth_ratio))
    if "openunlearning" in save_format:
        geometric = scores if truth_ratio == "geometric" else metrics.statistics(logs, retain_log)
        contents = log_formats.to_openunlearning(logs, geometric, _f1(logs))
        for name, content in zip(OPENUNLEARNING, contents, strict=True):
            utils.write_json(folder / name, content)
    log.info("evaluation logs: %s", folder)
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if isinstance(value, float)))
    return scores


def _f1(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """ROUGE-L F1 of every row whose texts were kept."""
    texts = {name: one.get("generated_text", {}) for name, one in logs.items()}
    return {
        name: {i: ROUGE.score(truth, text)["rougeL"].fmeasure for i, (_, text, truth) in rows.items()}
        for name, rows in texts.items()
    }


class Evaluator:
    """`evaluate` with all but the model bound, from a checked `schema.Evaluate`; bad input is told when it is made."""

    def __init__(
        self, cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, method_name: str = "", prefix: str = ""
    ) -> None:
        """Read and tokenise every set, and read the retain result.

        Args:
            prefix: what stands before the keys of `cfg` on the command line.

        Raises:
            BadInput: see `load_sets`, `prepare` and `load_retain_log`.
        """
        self.cfg, self.tokenizer, self.method_name = cfg, tokenizer, method_name
        self.tags = schema.family(cfg.model_family)
        sets = load_sets(cfg)
        self.retain_log = load_retain_log(cfg, sets)
        self.tasks = [prepare(data, tokenizer, self.tags, **cfg.generation, prefix=prefix) for data in sets]
        self.scores: dict[str, Any] = {}  # the last evaluation's; filled on rank 0 only

    def fingerprints(self, model: str, bf16: bool) -> dict[str, dict[str, Any]]:
        """Task -> `fingerprint`.

        Args:
            model: the identity of the weights.
            bf16: whether the model computes in bf16.
        """
        settings = {
            "tags": [self.tags.question_start_tag, self.tags.question_end_tag, self.tags.answer_tag],
            "end_token": self.tokenizer.eos_token,
            "generation": dict(self.cfg.generation),
            "precision": "bf16" if bf16 else "fp32",
            "save_generated_text": self.cfg.save_generated_text,
        }
        return {task.data.task: fingerprint(task, model, settings) for task in self.tasks}

    def missing(self, folder: Path, fingerprints: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The sets whose logs in `folder` are not there or not of these fingerprints. Rank 0 looks and says why."""
        todo = []
        if utils.rank() == 0:
            for name, made_from in fingerprints.items():
                why = why_not_complete(folder, name, made_from)
                log.info("%s: %s", name, f"evaluated, because {why}" if why else "complete, and not evaluated again")
                todo += [name] if why else []
        return _from_rank_0(todo)

    def __call__(
        self,
        model: PreTrainedModel | None,
        save_dir: str | Path,
        sharded: bool = False,
        fingerprints: Mapping[str, Mapping[str, Any]] | None = None,
        todo: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Evaluate `model` into `save_dir`; see `evaluate`."""
        self.scores = evaluate(
            model,
            self.tokenizer,
            self.tasks,
            save_dir,
            batch_size=self.cfg.batch_size,
            save_generated_text=self.cfg.save_generated_text,
            truth_ratio=self.cfg.truth_ratio,
            save_format=self.cfg.save_format,
            retain_log=self.retain_log,
            method_name=self.method_name,
            fingerprints=fingerprints,
            todo=todo,
            sharded=sharded,
        )
        return self.scores


def _from_rank_0(value: Any) -> Any:
    accelerate.PartialState(cpu=not torch.cuda.is_available())
    return broadcast_object_list([value])[0]


@command_line.entry("eval_everything", after=models.release)
def main(cfg: DictConfig) -> None:
    """Evaluate one model from disk."""
    cfg = schema.check(cfg, schema.Evaluate)
    family = schema.family(cfg.model_family)
    path = models.resolve(*((family.hf_key, "model_family") if cfg.use_pretrained else (cfg.model_path, "model_path")))
    tokenizer = models.load_tokenizer(path, family.end_token)
    evaluator = Evaluator(cfg, tokenizer)
    engine = models.engine(cfg.engine, cfg.ds_config, cfg.precision)
    models.check_loadable(path, engine, weights=not cfg.reinitialize_weights)

    out = utils.start_evaluation(
        cfg, cfg.save_dir, overwrite=cfg.overwrite, own=(*OWN, *(f"{task}.json" for task in cfg.eval_task))
    )
    identity = models.identity(path, random_weights=cfg.reinitialize_weights) if utils.rank() == 0 else ""
    fingerprints = evaluator.fingerprints(identity, engine.bf16)
    todo, model = evaluator.missing(out, fingerprints), None
    if todo:
        set_seed(SEED)
        model = models.load_frozen(path, engine, random_weights=cfg.reinitialize_weights)
    utils.finish_run(out, evaluator(model, out, engine.sharded, fingerprints, todo))


if __name__ == "__main__":
    main()
