"""Evaluate a model on the four TOFU sets: per-row logs, then statistics of the logs. Library and entry script.

python evaluate_util.py model_family=phi split=forget10_perturbed model_path=PATH
torchrun --nproc_per_node=2 evaluate_util.py model_family=phi split=forget10_perturbed model_path=PATH
python evaluate_util.py model_family=tiny data_path=data/mini model_path=runs/tiny/full retain_result=LOG
"""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from omegaconf import DictConfig
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import data_module
import metrics
import models
import schema
import utils
from data_module import Sample, Tags
from losses import token_nll
from utils import BadInput

log = logging.getLogger(__name__)

AGGREGATED = "eval_log_aggregated.json"
STATISTICS = "aggregate_stat.csv"
SEED = 42  # only reinitialize_weights draws anything
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


class Completion(NamedTuple):
    """One text to score: which row's, which of its answers."""

    row: int
    kind: str  # gt, paraphrased, or perturb
    number: int  # which of the row's perturbed answers
    sample: Sample


def load_sets(cfg: DictConfig) -> list[EvalSet]:
    """Read the rows of every set of a checked `schema.Evaluate`.

    Raises:
        BadInput: missing data, split or column.
    """
    sets, lists = [], ("split_list", "data_path", "eval_task")
    keys = (*lists, "question_key", "answer_key", "base_answer_key", "perturbed_answer_key")
    for split, data_path, task, *columns in zip(*(cfg[key] for key in keys), strict=True):
        rows = data_module.load_rows(data_path, split, columns, cfg.ds_size)
        sets.append(EvalSet(task, rows, *columns))
    return sets


def load_retain_log(cfg: DictConfig, sets: Sequence[EvalSet]) -> dict[str, dict] | None:
    """The aggregated log that `retain_result` names, known to fit the sets; None, with the way to make one, without it.

    Raises:
        BadInput: no such file, no aggregated log, or one of other rows than the forget set's.
    """
    if cfg.retain_result is None:
        _tell_how(cfg)
        return None
    retain = utils.read_json(cfg.retain_result, "retain_result")
    for data in sets:
        if data.task == metrics.FORGET:
            shell = {str(i): ["", "", row[data.answer_key]] for i, row in enumerate(data.rows)}
            ours = {f"{metrics.FORGET}.json": {metrics.RIGHT: shell, "generated_text": shell}}
            try:
                metrics.same_rows(ours, retain)
            except ValueError as error:
                raise BadInput(f"retain_result={cfg.retain_result}: {error}") from None
    return retain


def _tell_how(cfg: DictConfig) -> None:
    percent = "".join(c for c in cfg.split if c.isdigit())
    retain = f"retain{100 - int(percent)}" if percent else "the retain split"
    made, data = f"runs/{cfg.model_family}/{retain}", cfg.data_path[-1]
    log.info(
        "no forget quality: retain_result is missing, the log of a model finetuned on %s alone. Two commands make it: "
        "(1) python finetune.py model_family=%s data_path=%s split=%s save_dir=%s "
        "(2) python evaluate_util.py model_family=%s data_path=%s model_path=%s split=%s; "
        "then retain_result=%s/eval_results/ds_size%s/%s",
        *(retain, cfg.model_family, data, retain, made),
        *(cfg.model_family, data, made, cfg.split, made, cfg.ds_size, AGGREGATED),
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tags: Tags,
    sets: Sequence[EvalSet],
    save_dir: str | Path,
    *,
    max_length: int,
    max_new_tokens: int | None,
    batch_size: int,
    save_generated_text: bool,
    retain_log: dict[str, dict] | None = None,
    method_name: str = "",
    sharded: bool = False,
) -> dict[str, Any] | None:
    """Score and generate every row of every set; write the logs and, with a retain result, the statistics.

    Batches are formed once over all rows and dealt whole to the ranks, so that no number depends on how many there are.

    Args:
        model: unwrapped; put into eval mode for the while.
        save_dir: gets TASK.json for each set, `eval_log_aggregated.json` and, with `retain_log`, `aggregate_stat.csv`.
        max_length: cuts every scored text, and is a row's budget for prompt and generation together.
        max_new_tokens: a row's budget for its generation alone, instead; None for the former.
        batch_size: most prompts generated at once; a scoring batch holds at most batch_size * max_length tokens.
        retain_log: the aggregated log of a model finetuned on the retain set alone; None: no forget quality.
        method_name: the Method column of the statistics.
        sharded: whether the ranks share one model (ZeRO-3, FSDP): then all of them run equally many forwards.

    Returns:
        On rank 0 the scores by name; None on the others.

    Raises:
        BadInput: a row without an answer token within max_length; a loss that is not finite.
    """
    training = model.training
    model.eval()
    logs = {}
    with torch.no_grad():
        for data in sets:
            rows = _score_rows(model, tokenizer, tags, data, max_length, batch_size * max_length, sharded)
            texts = _generate_rows(model, tokenizer, tags, data, max_length, max_new_tokens, batch_size, sharded)
            logs[f"{data.task}.json"] = _log_of(data, tags, rows, texts, save_generated_text)
    model.train(training)
    return _write(logs, Path(save_dir), retain_log, method_name) if utils.rank() == 0 else None


def _score_rows(model, tokenizer, tags, data: EvalSet, max_length: int, budget: int, sharded: bool) -> dict:
    """(row, kind, number) -> (sum of token losses in nats, number of tokens), for every completion of every row."""
    completions = list(_completions(tokenizer, tags, data, max_length))
    if cut := sum(completion.sample.cut for completion in completions):
        log.info("%s: %d of %d scored texts were cut at max_length=%d", data.task, cut, len(completions), max_length)
    completions.sort(key=lambda completion: len(completion.sample.input_ids))
    batches = _by_budget(completions, budget)
    found = {}
    for batch in share(batches, f"{data.task}: scoring", sharded):
        view = models.score(model, to_device(data_module.collate({"eval": [c.sample for c in batch]}), model.device))[
            "eval"
        ]
        sums = torch.zeros(len(batch), dtype=torch.float64, device=view.logits.device)
        sums.index_add_(0, view.sample, token_nll(view).double())
        counts = torch.bincount(view.sample, minlength=len(batch))
        for completion, total, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
            found[completion[:3]] = (total, count)
    return merge(found)


def _completions(tokenizer, tags: Tags, data: EvalSet, max_length: int) -> Iterator[Completion]:
    for i, row in enumerate(data.rows):
        answers = [("gt", 0, row[data.answer_key])]
        if data.base_answer_key != data.answer_key:
            answers.append(("paraphrased", 0, row[data.base_answer_key]))
        answers += [("perturb", j, text) for j, text in enumerate(row[data.perturbed_answer_key])]
        for kind, number, text in answers:
            sample = data_module.encode(tokenizer, tags, row[data.question_key], text, max_length)
            yield Completion(i, kind, number, sample)


def _by_budget(completions: list[Completion], budget: int) -> list[list[Completion]]:
    """Cut a list sorted by length into batches whose padded size is at most `budget` tokens (one sample at least)."""
    batches: list[list[Completion]] = [[]]
    for completion in completions:
        if batches[-1] and (len(batches[-1]) + 1) * len(completion.sample.input_ids) > budget:
            batches.append([])
        batches[-1].append(completion)
    return batches


def _generate_rows(
    model, tokenizer, tags, data: EvalSet, max_length: int, max_new_tokens: int | None, batch_size: int, sharded: bool
) -> dict[int, str]:
    """Row -> greedy answer, up to an end token or the row's own budget."""
    prompts = [tokenizer(data_module.prompt(tags, row[data.question_key]))["input_ids"] for row in data.rows]
    budgets = [max_new_tokens or max(0, max_length - len(ids)) for ids in prompts]
    if empty := sum(budget == 0 for budget in budgets):
        log.warning("%s: %d prompts fill max_length=%d, so nothing is generated for them", data.task, empty, max_length)
    order = sorted((i for i, budget in enumerate(budgets) if budget), key=lambda i: (len(prompts[i]), i))
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    ends = _end_tokens(model, tokenizer)
    found = {i: "" for i, budget in enumerate(budgets) if not budget}
    for batch in share(batches, f"{data.task}: generating", sharded):
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        padding = torch.tensor([width - len(prompts[i]) for i in batch], device=model.device)
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max(budgets[i] for i in batch),
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        mask = (torch.arange(width, device=model.device) >= padding[:, None]).long()
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, use_cache=True, synced_gpus=sharded
        )
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            answer = row[: budgets[i]]
            answer = answer[: next((k for k, token in enumerate(answer) if token in ends), len(answer))]
            found[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return merge(found)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's, then whatever else the model's generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [named] if isinstance(named, int) else list(named or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *named]))


def share(batches: Sequence[list], what: str, sharded: bool) -> Iterable[list]:
    """This rank's batches, with a progress bar on rank 0.

    Where the ranks share one model, a rank that runs out repeats a batch, so that nobody waits for it for ever.
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
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _log_of(data: EvalSet, tags: Tags, scores: dict, texts: dict[int, str], save_text: bool) -> dict[str, dict]:
    """The per-row log in the public benchmark's format: metric -> row number as a string -> value."""
    rows = [_row_of(data, tags, i, scores, texts[i]) for i in range(len(data.rows))]
    if not save_text:
        for row in rows:
            del row["generated_text"]
    return {metric: {str(i): row[metric] for i, row in enumerate(rows)} for metric in rows[0]}


def _row_of(data: EvalSet, tags: Tags, i: int, scores: dict, text: str) -> dict[str, Any]:
    row = data.rows[i]
    gt, count = scores[i, "gt", 0]
    base, base_count = scores.get((i, "paraphrased", 0), (gt, count))
    perturbed = [scores[i, "perturb", j] for j in range(len(row[data.perturbed_answer_key]))]
    averages = [total / n for total, n in perturbed]
    if not np.isfinite([gt, base, *averages]).all():
        raise BadInput(f"{data.task}, row {i}: a loss is not finite: this model has diverged and cannot be evaluated")
    rouge = ROUGE.score(row[data.answer_key], text)
    found = {
        "avg_gt_loss": gt / count,
        "gt_loss": gt,
        "num_token_gt": count,
        "generated_text": [data_module.prompt(tags, row[data.question_key]), text, row[data.answer_key]],
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
    if data.task in NORMALISED:
        found["normalized_gt_loss"] = float(np.logaddexp.reduce([-gt / count, *(-a for a in averages)]) + gt / count)
    return found


def _write(
    logs: dict[str, dict], save_dir: Path, retain_log: dict[str, dict] | None, method_name: str
) -> dict[str, Any]:
    """Write every log and the aggregated one, and work out the statistics that they allow."""
    for name, one in logs.items():
        utils.write_json(save_dir / name, one)
    utils.write_json(save_dir / AGGREGATED, logs)
    log.info("evaluation logs: %s", save_dir)
    if missing := [task for task in metrics.TASKS.values() if f"{task}.json" not in logs]:
        log.info("no model utility: it needs %s too", ", ".join(missing))
        row = metrics.partial_row(logs, retain_log)
    else:
        row = metrics.leaderboard_row(logs, retain_log, method_name, "")
        if retain_log is not None:
            utils.write_text(save_dir / STATISTICS, metrics.to_csv([row]))
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))
    return row


class Evaluator:
    """`evaluate` with all but the model bound, from a checked `schema.Evaluate`; bad input is told when it is made."""

    def __init__(self, cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, method_name: str = "") -> None:
        """Load the rows of every set and the retain result.

        Raises:
            BadInput: see `load_sets` and `load_retain_log`.
        """
        self.sets = load_sets(cfg)
        self.scores: dict[str, Any] = {}  # the last evaluation's; filled on rank 0 only
        self._evaluate = functools.partial(
            evaluate,
            tokenizer=tokenizer,
            tags=schema.family(cfg.model_family),
            sets=self.sets,
            max_length=cfg.generation.max_length,
            max_new_tokens=cfg.generation.max_new_tokens,
            batch_size=cfg.batch_size,
            save_generated_text=cfg.save_generated_text,
            retain_log=load_retain_log(cfg, self.sets),
            method_name=method_name,
        )

    def __call__(self, model: PreTrainedModel, save_dir: str | Path, sharded: bool = False) -> dict[str, Any]:
        """Evaluate `model` into `save_dir`; see `evaluate`."""
        self.scores = self._evaluate(model, save_dir=save_dir, sharded=sharded) or {}
        return self.scores


@schema.entry("eval_everything", after=models.release)
def main(cfg: DictConfig) -> None:
    """Evaluate one model from disk."""
    cfg = schema.check(cfg, schema.Evaluate)
    family = schema.family(cfg.model_family)
    path = models.resolve(*((family.hf_key, "model_family") if cfg.use_pretrained else (cfg.model_path, "model_path")))
    tokenizer = models.load_tokenizer(path, family.end_token)
    evaluator = Evaluator(cfg, tokenizer)

    engine = models.engine(cfg.engine, cfg.ds_config, cfg.precision)
    out = utils.start_run(cfg, cfg.save_dir, overwrite=cfg.overwrite, key="overwrite", inputs=(path,))
    set_seed(SEED)
    model = models.load_frozen(
        path, engine, flash_attention2=family.flash_attention2, random_weights=cfg.reinitialize_weights
    )
    utils.finish_run(out, evaluator(model, out, engine.sharded))


if __name__ == "__main__":
    main()
