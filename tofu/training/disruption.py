"""How far a training has moved a model on what it must keep: KL(starting model || model) on a few retain rows."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

import data_module
from data_module import ONE_ROW, Sample, Tags, TrainingSet
from tofu.evaluation.best import RETAIN_KL
from tofu.methods import losses
from tofu.models import architectures, batches, forward
from tofu.models.views import Scored
from tofu.runtime import cards, ranks

KL = RETAIN_KL.name
ROWS = 64  # of the retain set, drawn once and for all: the same ones in every run on that set
AT_ONCE = 8  # rows of a forward; last bits depend on it


class Disruption:
    """The mean over all answer tokens of some retain rows of KL(starting model || model), in nats.

    The whole distributions are compared, in float32. The starting model's come from the reference model where the
    training has one in memory, and from the model without its adapters. Else they are computed before the training and
    kept on the host, dealt to the ranks: 3,200 tokens of 128k words are 1.6 GB in all.
    """

    def __init__(self, n: int, sample: Callable[[int], Sample]) -> None:
        """
        Args:
            n: rows of the retain set.
            sample: encodes one of them.
        """
        drawn = np.random.default_rng([*b"disruption"]).permutation(n)[:ROWS]
        samples = sorted(map(sample, drawn.tolist()), key=lambda one: (len(one.input_ids), one))
        self.batches: Sequence[Any] = list(enumerate(samples[k : k + AT_ONCE] for k in range(0, len(samples), AT_ONCE)))
        self.kept: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def keep(self, load: Callable[[], torch.nn.Module], sharded: bool) -> None:
        """Keep the starting model's distributions.

        Args:
            load: gives the starting model, frozen and in place; it is gone afterwards.
            sharded: whether the ranks share it.
        """
        start = load()
        for number, samples in ranks.share(self.batches, KL, sharded):
            self.kept[number] = forward.score(start, _batch(start, samples))["retain"].logits.cpu()
        del start  # before the model to train is loaded
        cards.collect()

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, reference: torch.nn.Module | None, sharded: bool) -> float:
        """Measure a model: nats per token, the same on every rank and on any number of them. On every rank.

        Args:
            model: unwrapped, with or without adapters.
            reference: the starting model, frozen; None: its distributions are kept, or `model` without adapters is it.
            sharded: whether the ranks share one model.
        """
        found, training = {}, model.training
        model.eval()
        try:
            for number, samples in ranks.share(self.batches, KL, sharded):
                batch = _batch(model, samples)
                view: Any = forward.score(model, batch)["retain"]
                start = self._start(model, reference, number, batch, view)
                values = losses.kl_completion(view, start)
                found[number] = (float(values.double().sum()), len(values))
        finally:
            model.train(training)
        every = ranks.merge(found).values()  # a batch is one rank's: its sum has the same bits on any number of them
        return math.fsum(total for total, _ in every) / sum(n for _, n in every)

    def _start(self, model: Any, reference: Any, number: int, batch: dict[str, Any], view: Scored) -> Scored:
        """The starting model's view of a batch."""
        if self.kept:
            return view._replace(logits=self.kept[number].to(view.logits.device))
        with forward.adapter_off(model) if reference is None else contextlib.nullcontext():
            start: Any = forward.score(model if reference is None else reference, batch)["retain"]
        return start


def of_run(cfg: Any, data: TrainingSet, tokenizer: PreTrainedTokenizerBase, family: Tags) -> Disruption | None:
    """What measures a run's `stop_on.budget`, on rows of its retain set; None where there is none.

    Args:
        data: its samples; where its method reads no retain rows, these are read here.

    Raises:
        BadInput: see `data_module.load_pairs` and `encode`.
    """
    if "stop_on" not in cfg or cfg.stop_on.budget is None:
        return None
    if "retain" in data.rows:
        return Disruption(len(data.rows["retain"]), data.rows["retain"].__getitem__)
    rows = data_module.load_pairs(cfg.data_path, cfg.retain_split, cfg.question_key, cfg.answer_key)

    def sample(i: int) -> Sample:
        return data_module.encode(tokenizer, family, rows[i]["question"], rows[i]["answer"], cfg.max_length)

    return Disruption(len(rows), sample)


def _batch(model: Any, samples: list[Sample]) -> dict[str, Any]:
    """Samples for one forward, each padded to the longest but where attention knows samples in a single row only."""
    device, packs = model.device, architectures.one_row_only(model.config)
    row = ONE_ROW if packs and model.config.model_type in architectures.PACKABLE else None
    return ranks.to_device(batches.collate({"retain": samples}, row=row, round_to=cards.round_to(device)), device)
