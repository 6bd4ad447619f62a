"""The sets that an evaluation scores: their rows, and what of them a model is given as tokens."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

import data_module
from data_module import Tags
from tofu.evaluation import inference, words
from tofu.evaluation.inference import Tree
from utils import BadInput

log = logging.getLogger(__name__)

OPTIONAL = ("paraphrased_answer", "perturbed_answer")  # a set may lack them; a name that was typed must be there
INSTEAD = {"paraphrased_question": "question"}  # the two real-world sets have no paraphrases


class EvalSet(NamedTuple):
    """One set of rows and what to score of each."""

    task: str  # names its log: TASK.json
    rows: list[dict[str, Any]]
    question_key: str
    answer_key: str
    base_answer_key: str  # the right answer that the truth ratio compares the perturbed ones with
    perturbed_answer_key: str | None  # None: the set has none, and no truth ratio


class Task(NamedTuple):
    """A set, tokenised: all that a model has to be given."""

    data: EvalSet
    questions: list[str]  # as the model is asked them, tags included
    answers: list[list[tuple[str, int]]]  # a path of a row's tree: gt, paraphrased or perturb, and its number
    ended: list[list[bool]]  # whether that path's last token is the end token, which a text that was cut has not
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
        rows = data_module.load_rows(data_path, split, columns, cfg.ds_size, instead=INSTEAD, optional=OPTIONAL)
        question, answer, base, perturbed = columns
        if perturbed not in rows[0]:
            log.warning("%s, %s: no column %s, so %s has no truth ratio", data_path, split, perturbed, task)
            base, perturbed = answer, None
        elif base not in rows[0]:
            log.warning("%s, %s: no column %s, so %s is taken instead", data_path, split, base, answer)
            base = answer
        data = EvalSet(task, rows, question, answer, base, perturbed)
        _check_columns(data, f"{data_path}, {split}")
        sets.append(data)
    return sets


def _check_columns(data: EvalSet, where: str) -> None:
    """Raise BadInput unless questions and answers are texts and the perturbed answers lists of texts."""
    for i, row in enumerate(data.rows):
        for column in dict.fromkeys((data.question_key, data.answer_key, data.base_answer_key)):
            data_module.check_text(row[column], where, i, column)
        if data.perturbed_answer_key is None:
            continue
        texts = row[data.perturbed_answer_key]
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise BadInput(
                f"{where}: perturbed_answer_key={data.perturbed_answer_key} must be a list of wrong answers in "
                f"every row; row {i} has {str(texts)[:60]!r}"
            )


def check_words(sets: Sequence[EvalSet], rouge: str, prefix: str = "") -> None:
    """Raise BadInput if ROUGE would read nothing of an answer: whatever is generated, it would score 0.

    Args:
        rouge: the tokenizer of `words.scorer`.
        prefix: what stands before `rouge.tokenizer` in the config's keys.
    """
    for data in sets:
        for i, row in enumerate(data.rows):
            answer = row[data.answer_key]
            if rouge == "default" and words.unread(answer):
                raise BadInput(
                    f"{data.task}: ROUGE reads a to z and 0 to 9, and the answer of row {i} has none "
                    f"({answer[:40]!r}): take {prefix}rouge.tokenizer=unicode, for every log that is compared"
                )
            if not words.tokens(answer):
                log.warning("%s: the answer of row %d has no word, so its ROUGE is 0: %r", data.task, i, answer[:40])


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
    task = Task(data, [], [], [], [], [], [], [])
    cut = scored = 0
    for row in data.rows:
        question = row[data.question_key]
        answers = {("gt", 0): row[data.answer_key]}
        if data.base_answer_key != data.answer_key:
            answers["paraphrased", 0] = row[data.base_answer_key]
        wrong = row[data.perturbed_answer_key] if data.perturbed_answer_key else ()
        answers |= {("perturb", j): text for j, text in enumerate(wrong)}
        samples = [
            data_module.encode(tokenizer, tags, question, text, max_length, f"{prefix}generation.max_length")
            for text in answers.values()
        ]
        cut, scored = cut + sum(sample.cut for sample in samples), scored + len(samples)
        task.questions.append(data_module.prompt(tags, question))
        task.answers.append(list(answers))
        task.ended.append([sample.targets[-1] == tokenizer.eos_token_id for sample in samples])
        task.trees.append(inference.tree(samples))
        task.prompts.append(data_module.asked(samples[0]))
        task.likely.append([(*sample.input_ids, sample.targets[-1]) for sample in samples])
        task.budgets.append(max_new_tokens or max(0, max_length - len(task.prompts[-1])))
    if cut:
        log.info("%s: %d of %d scored texts are cut at max_length=%d", data.task, cut, scored, max_length)
    if empty := task.budgets.count(0):
        log.warning("%s: %d prompts fill max_length=%d, so nothing is generated for them", data.task, empty, max_length)
    return task


def reach(task: Task) -> int:
    """The longest text of a set, prompt and answer, in tokens."""
    return max(
        *(max(tree.depths) + 1 for tree in task.trees),
        *(len(prompt) + budget for prompt, budget in zip(task.prompts, task.budgets, strict=True)),
    )
