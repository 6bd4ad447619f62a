"""The reference model of an attack: what it makes of the same answers, scored once and kept."""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import utils
from data_module import IGNORE, Sample
from tofu.evaluation import inference, row_logs
from tofu.evaluation.sets import Task, reach
from tofu.models import families, folders, loadable, loading
from tofu.models.engines import Engine
from tofu.runtime import cards, provenance, ranks, run_folder
from utils import BadInput

log = logging.getLogger(__name__)

FILE, KEY = "reference_losses.json", "reference_model"
VERSION = 1  # part of the fingerprint: raise it whenever a change of the code moves a loss


class Reference:
    """A model that was not trained on the members.

    Attributes:
        losses: task -> the mean loss per token of each row's answer, end token included, nats; set by `score`.
    """

    def __init__(
        self, path: str, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, str], prefix: str = ""
    ) -> None:
        """Find the model, and see whether it reads the same tokens.

        Args:
            tokenizer, record: the evaluated model's (`families.record`).
            prefix: what stands before `reference_model` in the config's keys.

        Raises:
            BadInput: no such model, another vocabulary, or a record of other tags.
        """
        key = f"{prefix}{KEY}"
        self.path = folders.resolve(path, key)
        theirs = folders.load_tokenizer(self.path, record["end_token"])
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise BadInput(
                f"{key}={path} has another tokenizer than the evaluated model: losses per token can't be compared: "
                "name a model of the same tokenizer"
            )
        made = families.recorded(self.path)
        if made is not None and (differ := families.differing(made, record)):
            raise BadInput(
                f"{key}={path} was trained as {made['model_family']}, with another {differ}: name one with the "
                "same tags"
            )
        self.losses: dict[str, list[float]] = {}

    @functools.cached_property
    def identity(self) -> str:
        """What its weights and tokenizer are (`folders.identity`)."""
        return folders.identity(self.path)

    def check(self, engine: Engine) -> None:
        """Raise BadInput where the model can't be loaded by this engine."""
        loadable.check_loadable(self.path, engine)

    def made_from(self, tasks: Sequence[Task], engine: Engine) -> dict[str, Any]:
        """What the losses are a function of. On rank 0."""
        texts = {task.data.task: _scored(task) for task in tasks}
        return provenance.fingerprint(
            model=self.identity,
            rows=provenance.digest(json.dumps(texts)),
            precision="bf16" if engine.bf16 else "fp32",
            version=VERSION,
        )

    def score(self, tasks: Sequence[Task], folder: Path, engine: Engine) -> None:
        """Set `losses`: the folder's where they are a function of the same; else the model is loaded, scores, and goes.

        Call it on all ranks, before the model to evaluate is loaded.
        """
        made_from = ranks.from_rank_0(self.made_from(tasks, engine) if ranks.rank() == 0 else {})
        kept = provenance.kept(folder / FILE, made_from) if ranks.rank() == 0 else None
        known = ranks.from_rank_0(kept and kept["losses"])
        self.losses = self._scored(tasks, engine) if known is None else known
        if known is None and ranks.rank() == 0:
            run_folder.note(folder, FILE)
            utils.write_json(folder / FILE, {"made_from": made_from, "losses": self.losses})

    def _scored(self, tasks: Sequence[Task], engine: Engine) -> dict[str, list[float]]:
        model: Any = loading.load_frozen(self.path, engine)
        found = {}
        for task in tasks:
            with inference.ready(model, reach(task), engine.sharded) as masks:
                scores = row_logs.score_rows(model, answers_alone(task), engine.sharded, masks)
            found[task.data.task] = [float(row["gt", 0].nll.sum()) / len(row["gt", 0].nll) for row in scores]
        del model  # it must be gone before the model to evaluate is loaded
        cards.collect()
        return found


def answers_alone(task: Task) -> Task:
    """A set with the true answers alone, to be scored and not to be generated for."""
    samples = []
    for whole, n in _scored(task):
        samples.append(Sample(tuple(whole[:-1]), (*[IGNORE] * (len(whole) - 1 - n), *whole[-n:]), False))
    return task._replace(
        data=task.data._replace(task=f"{task.data.task}, reference model"),
        answers=[[("gt", 0)] for _ in samples],
        trees=[inference.tree([sample]) for sample in samples],
    )


def _scored(task: Task) -> list[tuple[list[int], int]]:
    """Of each row the tokens of question and true answer, and how many of them, the last ones, are scored."""
    return [(list(texts[0]), len(tree.paths[0])) for texts, tree in zip(task.likely, task.trees, strict=True)]
