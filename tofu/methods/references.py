"""What a run compares with: the reference model beside it, or its log-probabilities, computed once and kept."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

import utils
from data_module import ONE_ROW, Sample, Slot, TrainingSet
from tofu.methods import losses, objective
from tofu.methods.objective import Term
from tofu.models import architectures, batches, folders, forward, loading
from tofu.models.engines import Engine
from tofu.runtime import cards, provenance, ranks, run_folder

log = logging.getLogger(__name__)


def compared(data: TrainingSet, terms: Sequence[Term], num_epochs: int) -> list[Sample]:
    """Every sequence whose log-probability under the reference model a run needs, shortest first.

    Which refusal a row gets in which epoch follows from the seed, so all of them are known beforehand.
    """
    parts = {ref.removeprefix("ref_") for term in terms for ref, kind in term.contract.refs.items() if kind == "logp"}
    slots = [Slot(epoch, place, 1.0) for epoch in range(num_epochs) for place in range(len(data))]
    return sorted({data[slot][0][part] for slot in slots for part in parts}, key=lambda s: (len(s.input_ids), s))


@torch.no_grad()
def reference_logps(
    model: PreTrainedModel, samples: Sequence[Sample], batch_size: int, sharded: bool
) -> dict[Sample, float]:
    """The reference model's log-probability of every sequence that a run compares with it, so that it can go.

    Args:
        model: the reference model, frozen and in place.
        samples: `compared`.
        batch_size: sequences in one forward.
        sharded: whether the ranks share one model.

    Returns:
        Sample -> nats, on every rank.
    """
    dealt = [list(samples[k : k + batch_size]) for k in range(0, len(samples), batch_size)]
    packs = architectures.one_row_only(model.config) and model.config.model_type in architectures.PACKABLE
    row, to, found = ONE_ROW if packs else None, cards.round_to(model.device), {}
    for batch in ranks.share(dealt, "reference log-probabilities", sharded):
        inputs = ranks.to_device(batches.collate({"forget": batch}, row=row, round_to=to), model.device)
        view: Any = forward.score(model, inputs)["forget"]
        logps = losses.sequence_logp(view)
        found.update(zip(batch, logps.tolist(), strict=True))
    return ranks.merge(found)


def logps_fingerprint(samples: Sequence[Sample], model: str, engine: Engine, **settings: Any) -> dict[str, Any]:
    """What reference log-probabilities are a function of.

    Args:
        model: the identity of the reference model (`folders.identity`).
        settings: how it is loaded: type of the weights, four bits, attention.
    """
    digest = provenance.digest(json.dumps(samples))
    return provenance.fingerprint(
        model=model, samples=digest, engine=engine.name, bf16=engine.bf16, **settings, version=1
    )


def read_logps(folder: Path, samples: Sequence[Sample], made_from: Mapping[str, Any]) -> dict[Sample, float] | None:
    """What an earlier run left in this folder, if it is a function of the same; every rank gets rank 0's answer."""
    known = provenance.kept(folder / run_folder.REFERENCE, made_from) if ranks.rank() == 0 else None
    found = ranks.from_rank_0(known and known["logps"])
    return None if found is None else dict(zip(samples, found, strict=True))


def write_logps(
    folder: Path, samples: Sequence[Sample], logps: Mapping[Sample, float], made_from: Mapping[str, Any]
) -> None:
    """Keep them for a later run in this folder. Rank 0 only."""
    if ranks.rank() == 0:
        run_folder.note(folder, run_folder.REFERENCE)
        utils.write_json(folder / run_folder.REFERENCE, {"made_from": made_from, "logps": [logps[s] for s in samples]})


def starting_logps(
    out: Path,
    samples: list[Sample],
    made_from: dict[str, Any],
    load: Callable[[], Any],
    batch_size: int,
    sharded: bool,
) -> dict[Sample, float]:
    """The reference model's log-probabilities of what a run compares with it: the folder's, or computed into it.

    Args:
        load: gives the reference model; it is called, and kept for the while, only where it is needed.
    """
    logps = read_logps(out, samples, made_from)
    if logps is None:
        model = load()
        logps = reference_logps(model, samples, batch_size, sharded)
        write_logps(out, samples, logps, made_from)
        del model  # it must be gone before the model to train is loaded
        cards.collect()
    return logps


def of_run(
    out: Path,
    cfg: DictConfig,
    path: str,
    engine: Engine,
    attention: str | None,
    data: TrainingSet,
    terms: Sequence[Term],
    trained_in: torch.dtype,
) -> dict[str, Any]:
    """What the Trainer is given of the reference model.

    Args:
        trained_in: the type of the trained model's weights.

    Returns:
        reference: the frozen model, where a term reads its distributions or states and all weights train. With LoRA the
            live one is the model itself, adapters off: there is never a second copy that nothing needs.
        logps: sample -> nats, where a term compares with them.
    """
    needs = objective.needs_of(terms)
    settings = {"trained_in": trained_in, "quantize": cfg.LoRA.quantize, "attention": attention}
    load_frozen = partial(loading.load_frozen, path, engine, **settings)
    frozen = load_frozen() if "live" in needs and not cfg.LoRA.r else None
    logps = None
    if "logp" in needs:
        samples = compared(data, terms, cfg.num_epochs)
        identity = folders.identity(path) if ranks.rank() == 0 else ""
        made_from = logps_fingerprint(samples, identity, engine, **{key: str(value) for key, value in settings.items()})
        starting = load_frozen if frozen is None else lambda: frozen
        logps = starting_logps(out, samples, made_from, starting, cfg.batch_size, engine.sharded)
    return {"reference": frozen, "logps": logps}
