"""Models that judge what another one wrote: the hub's gibberish classifier, and a language model's perplexity.

Texts are dealt to the ranks in batches that do not depend on their number; every rank loads the judge whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed

import utils
from data_module import Sample
from tofu.evaluation import inference, row_logs
from tofu.evaluation.sets import EvalSet, Task
from tofu.models import engines, folders, loadable, loading
from tofu.runtime import ranks
from utils import BadInput

CLEAN = 0  # the class whose probability is taken: of OpenUnlearning's classifier `clean`
READ = 32  # tokens of a text that the classifier reads, as there
BATCH = 32  # texts that it reads at once
LONGEST = 512  # tokens of a text that a language model reads


def check(settings: Mapping[str, Any], names: set[str], prefix: str = "") -> None:
    """Refuse a judge that can't be found or loaded, before anything is evaluated.

    Args:
        settings: the evaluation's config.
        names: the passes that will run.
        prefix: what stands before its keys on the command line.

    Raises:
        BadInput: no such folder, not in the hub's cache nor on the hub; or no classifier, or no language model.
    """
    asked = settings["fluency"]
    if "classifier" in names:
        key = f"{prefix}fluency.classifier"
        path = folders.resolve(asked["classifier"], key)
        file = Path(path) / "config.json" if Path(path).is_dir() else utils.hub_file(path, "config.json")
        kinds = json.loads(Path(file).read_text(encoding="utf-8")).get("architectures") or [] if file else []
        if not any("SequenceClassification" in kind for kind in kinds):
            raise BadInput(
                f"{key}={asked['classifier']} is no classifier of texts (its config.json says "
                f"{', '.join(kinds) or 'no architecture'}): name one, or take fluency.by=ngrams"
            )
    if "perplexity" in names and asked["model"] is not None:
        key = f"{prefix}fluency.model"
        path = folders.resolve(asked["model"], key)
        folders.load_tokenizer(path, None)
        loadable.check_loadable(path, _engine(settings))


def identity(settings: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    """What the judges' numbers are functions of, by pass: part of what a set's rows are made from."""
    keys = {"classifier": "classifier", "perplexity": "model"}
    named = {name: settings["fluency"][key] for name, key in keys.items() if name in names}
    return {name: folders.identity(utils.find(path)) for name, path in named.items() if path is not None}


def clean(texts: Sequence[str], path: str) -> list[float]:
    """Of each text, the classifier's probability of its first class, `clean`, from the first 32 tokens.

    An empty text gets what the classifier says of it, as in OpenUnlearning.
    """
    path, device = utils.find(path), ranks.state().device
    with _whole(), folders.told("classifier", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False).to(device).eval()
    pads = tokenizer.pad_token_id is not None  # without it texts of several lengths cannot be read at once
    size = BATCH if pads else 1
    batches = [list(range(i, min(i + size, len(texts)))) for i in range(0, len(texts), size)]
    found = {}
    with torch.inference_mode():
        for batch in ranks.share(batches, "fluency: classifying"):
            read = tokenizer(
                [texts[i] for i in batch], padding=pads, truncation=True, max_length=READ, return_tensors="pt"
            )
            chances = model(**read.to(device)).logits.float().softmax(-1)[:, CLEAN]
            found.update(zip(batch, chances.tolist(), strict=True))
    found = ranks.merge(found)
    return [found[i] for i in range(len(texts))]


def losses(texts: Sequence[str], settings: Mapping[str, Any]) -> list[float | None]:
    """Of each text, a language model's mean loss per token in nats; None for a text of no token to score.

    The model reads the text alone, without its question, after its begin token; one without a begin token does not
    score the first token. At most 512 tokens are read.
    """
    path = utils.find(settings["fluency"]["model"])
    tokenizer = folders.load_tokenizer(path, None)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [
        [*begin, *tokenizer(text, add_special_tokens=False, truncation=True, max_length=LONGEST).input_ids]
        for text in texts
    ]
    kept = [i for i, one in enumerate(ids) if len(one) > 1]
    trees = [inference.tree([Sample(tuple(ids[i][:-1]), tuple(ids[i][1:]), False)]) for i in kept]
    none = EvalSet("fluency.model", [], "", "", "", None)
    task = Task(none, [], [[("gt", 0)] for _ in kept], [], trees, [], [], [])
    with _whole():
        model = loading.load_frozen(path, _engine(settings))
    with inference.ready(model, max((len(one) for one in ids), default=1)) as masks:
        scores = row_logs.score_rows(model, task, False, masks) if kept else []
    found = {i: float(one["gt", 0].nll.mean()) for i, one in zip(kept, scores, strict=True)}
    return [found.get(i) for i in range(len(texts))]


def _engine(settings: Mapping[str, Any]) -> engines.Engine:
    return engines.engine_of("ddp", settings["ds_config"], settings["precision"])


@contextmanager
def _whole() -> Iterator[None]:
    """Models are read whole, also while a training by ZeRO-3 is alive, which would shard what is read."""
    known = deepspeed._hf_deepspeed_config_weak_ref
    alive = None if known is None else known()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            deepspeed.set_hf_deepspeed_config(alive)
