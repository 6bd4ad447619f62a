"""What a run will take of the card, before anything is loaded: said, compared with the card, and what would fit."""

import logging
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from transformers import PretrainedConfig
from transformers.utils import is_bitsandbytes_available

import dataloader
import utils
from data_module import IGNORE, ONE_ROW, GlobalBatches, TrainingSet, packed
from tofu.cli.schema import STOCHASTIC
from tofu.methods import objective
from tofu.methods.objective import Method
from tofu.models import folders, sizes
from tofu.models.engines import Engine
from tofu.models.sizes import Sizes
from tofu.runtime import ranks, run_folder
from tofu.training import optimisation
from tofu.training.estimate import Batch, Estimate, Setting, estimate
from utils import BadInput

log = logging.getLogger(__name__)

FUSED, PAGED = "adamw_torch_fused", "paged_adamw_32bit"
SPARE = (
    2 * 10**9
)  # bytes of a card that no tensor can have: CUDA's context, workspaces of kernels, the allocator's gaps


class Forecast(NamedTuple):
    """A run's estimate, and what it follows from."""

    sizes: Sizes
    setting: Setting
    batch: Batch
    estimate: Estimate
    card: int | None  # bytes; None without a GPU


def of_run(
    cfg: DictConfig,
    path: str,
    engine: Engine,
    attention: str | None,
    data: TrainingSet,
    method: Method,
    checkpointing: bool,
) -> tuple[str, Forecast | None]:
    """Foresee a run. It never ends one: what can't be counted is logged.

    Args:
        cfg: the checked config.
        path: of the model, as `folders.resolve` gave it.
        checkpointing: whether activations are made again in the backward.

    Returns:
        The optimiser, what auto means made definite; and the forecast, None where the model can't be counted.
    """
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_properties(0).total_memory if cuda else None
    asked = FUSED if cfg.optim == "auto" else cfg.optim
    try:
        config = folders.config_of(path)
        model = sizes.shell(config, attention)
        counted = sizes.sizes_of(model)
        row = dataloader.row_of(model.config) if cfg.packing else None
        batch = widest(data, method, cfg.batch_size, cfg.gradient_accumulation_steps, ranks.world_size(), row)
        setting = setting_of(cfg, config, engine, method, asked, checkpointing, cuda)
        found = Forecast(counted, setting, batch, estimate(counted, setting, batch), card)
    except BadInput:
        raise
    except Exception as error:  # whatever a config lacks: a run must not end for it
        log.warning("the memory of this run can't be estimated (%s)", utils.one_line(error) or type(error).__name__)
        found = None
    if cfg.optim == "auto":
        fits = found is None or card is None or found.estimate.peak <= room(card)
        asked = optimisation.best_optim(
            engine.name,
            ranks.world_size(),
            cuda=cuda,
            fits=fits,
            sweep=run_folder.in_a_sweep(),
            bitsandbytes=is_bitsandbytes_available(),
        )
    if found is not None and asked != found.setting.optim:
        setting = found.setting._replace(optim=asked)
        found = found._replace(setting=setting, estimate=estimate(found.sizes, setting, found.batch))
    return asked, found


def setting_of(
    cfg: DictConfig,
    config: PretrainedConfig,
    engine: Engine,
    method: Method,
    optim: str,
    checkpointing: bool,
    cuda: bool,
) -> Setting:
    """What of a checked config the memory depends on."""
    needs = objective.needs_of(method.terms)
    weights = optimisation.weights_type(engine, cfg.LoRA, optim)
    reference = None
    if "live" in needs and not cfg.LoRA.r:
        stored = engine.name == "ddp" and getattr(config, "dtype", None) == torch.bfloat16
        half = engine.bf16 and (engine.name == "deepspeed" or stored)
        reference = torch.bfloat16 if half else weights
    return Setting(
        engine=engine,
        processes=ranks.world_size(),
        optim=optim,
        weights=weights,
        rank=cfg.LoRA.r,
        dropout=cfg.LoRA.dropout > 0,
        quantize=cfg.LoRA.quantize,
        checkpointing=checkpointing,
        accumulation=cfg.gradient_accumulation_steps,
        compares="live" if "live" in needs else "log-probabilities" if needs else "none",
        reference=reference,
        cuda=cuda,
        blocks=method.trained_blocks(config.get_text_config()),
    )


def widest(
    data: TrainingSet, method: Method, batch_size: int, accumulation: int, processes: int, row: int | None
) -> Batch:
    """The most rows and scored positions of any rank's micro-batches in the first epoch, from lengths alone.

    Args:
        row: tokens of a packed row; None: each sample is padded to the longest of its batch.
    """
    kinds = {(part, kind) for term in method.terms for part, kind in term.contract.parts.items()}
    shape, scored = (0, 0), 0
    for rank in range(processes):
        by = data.length if row is None else None
        for slots in GlobalBatches(len(data), batch_size, rank, processes, accumulation, by):
            held = [data[slot][0] for slot in slots]
            rows: list[int] = []
            count = 0
            for part in objective.parts_of(method.terms):
                samples = [parts[part] for parts in held]
                states = (part, "states") in kinds  # its end token is read too, and it has no logits
                lengths = [len(sample.input_ids) + states for sample in samples]
                rows += _filled(lengths, row)
                if (part, "attended") in kinds:
                    count += sum(lengths)
                elif not states:
                    count += sum(target != IGNORE for sample in samples for target in sample.targets)
            rows = [sum(rows)] if row == ONE_ROW else rows
            shape = max(shape, (len(rows), max(rows)), key=lambda one: one[0] * one[1])
            scored = max(scored, count)
    return Batch(*shape, scored, batch_size)


def _filled(lengths: list[int], row: int | None) -> list[int]:
    """The tokens of each row that samples of these lengths make."""
    return [sum(lengths[i] for i in places) for places in packed(lengths, row)] if row else lengths


def room(card: int) -> int:
    """What tensors can have of a card."""
    return card - SPARE


def refuse(found: Forecast) -> None:
    """Raise BadInput where a step needs more than the card has, naming what would fit it."""
    if found.card is None or found.estimate.peak <= room(found.card):
        return
    raise BadInput(
        f"this run needs about {size(found.estimate.peak)} on each card at its peak ({parts(found.estimate)}), and the "
        f"card has {size(found.card)}, {size(SPARE)} of which CUDA itself needs: {advice(found)}"
    )


def advice(found: Forecast) -> str:
    """What to do where a run does not fit its card."""
    fitting = alternatives(found.sizes, found.setting, found.batch, found.card or 0)
    if not fitting:
        return "neither adapters nor more GPUs make it fit; take a smaller model"
    return "what fits: " + "; ".join(f"{words} ({size(peak)})" for words, peak in fitting)


def alternatives(counted: Sizes, setting: Setting, batch: Batch, card: int) -> list[tuple[str, int]]:
    """The changes of a run's settings, one at a time, with which it fits a card of so many bytes, and their peaks.

    What does not fit by itself is tried together with gradient checkpointing.
    """
    found, card = [], room(card)
    for words, *changed in _changes(counted, setting, batch, card):
        peak = estimate(counted, *changed).peak
        if peak > card and not setting.checkpointing:
            words, changed[0] = f"{words} with {CHECKPOINTING}", changed[0]._replace(checkpointing=True)
            peak = estimate(counted, *changed).peak
        if peak <= card:
            found.append((words, peak))
    return found


TIMES = (2, 4, 8, 16, 32, 64)  # as many GPUs, or as many times smaller a batch, are tried
CHECKPOINTING = "gradient_checkpointing: true in config/model_config.yaml"


def _changes(counted: Sizes, setting: Setting, batch: Batch, card: int) -> list[tuple[str, Setting, Batch]]:
    """One change each: what the user writes, and what comes of it."""
    engine, found = setting.engine, []
    half = torch.bfloat16 if engine.bf16 else torch.float32
    if not setting.checkpointing:
        found.append((CHECKPOINTING, setting._replace(checkpointing=True), batch))
    alone = engine.name == "ddp" and setting.processes == 1
    for optim in (PAGED, "adamw_bnb_8bit") if alone and setting.cuda and not setting.adapted else ():
        if setting.optim != optim:
            words = f"optim={optim}, which needs bitsandbytes" + ", outside of sweeps" * (optim == PAGED)
            found.append((words, setting._replace(optim=optim, weights=torch.float32), batch))
    if alone and engine.bf16 and not setting.adapted and setting.optim != STOCHASTIC:
        found.append((f"optim={STOCHASTIC}", setting._replace(optim=STOCHASTIC, weights=half), batch))
    adapters = setting._replace(rank=setting.rank or 8, weights=half, optim=FUSED, reference=None, dropout=True)
    if not setting.adapted:
        found.append(("LoRA.r=8", adapters, batch))
    if not setting.quantize and engine.name == "ddp":
        words = f"LoRA.r={adapters.rank} LoRA.quantize=4bit"
        found.append((words, adapters._replace(quantize="4bit"), batch))
    found += _first_that_fits(counted, [_cut(setting, batch, by) for by in TIMES if by <= batch.samples], card)
    if not setting.quantize:
        sharded = Engine("deepspeed", engine.bf16, {"zero_optimization": {"stage": 3}})
        weights = half if setting.adapted else torch.float32
        shared = setting._replace(engine=sharded, optim=FUSED, weights=weights)
        more = [shared._replace(processes=n) for n in TIMES if n > setting.processes]
        many = [(f"{one.processes} GPUs with engine=deepspeed", one, batch) for one in more]
        found += _first_that_fits(counted, many, card)
    return found


def _first_that_fits(counted: Sizes, tried: list[tuple[str, Setting, Batch]], card: int) -> list:
    return [one for one in tried if estimate(counted, one[1], one[2]).peak <= card][:1]


def _cut(setting: Setting, batch: Batch, by: int) -> tuple[str, Setting, Batch]:
    """The same step in more micro-batches."""
    samples, steps = -(-batch.samples // by), setting.accumulation * by
    width = batch.width if batch.rows >= by else -(-batch.width * batch.rows // by)
    less = Batch(-(-batch.rows // by), width, -(-batch.scored // by), samples)
    words = f"batch_size={samples} gradient_accumulation_steps={steps}"
    return words, setting._replace(accumulation=steps), less


PARTS = ("weights", "copies", "gradients", "states", "activations", "logits", "reference")


def parts(found: Estimate) -> str:
    """The parts in one line."""
    return ", ".join(f"{name} {size(getattr(found, name))}" for name in PARTS)


def size(count: float) -> str:
    """Bytes as one reads them, in GB of 10^9 bytes or MB of 10^6."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def line(found: Forecast) -> str:
    """What a run says before it loads anything."""
    card = "" if found.card is None else f" of the card's {size(found.card)}"
    told = found.estimate
    return f"memory: about {size(told.peak)}{card} at the peak of a step ({parts(told)}); optim={found.setting.optim}"


def table(found: Forecast, family: str) -> str:
    """What `dry_run=true` says: a line for each part."""
    setting, told, batch = found.setting, found.estimate, found.batch
    engine, zero = setting.engine, (setting.engine.deepspeed or {}).get("zero_optimization", {}).get("stage")
    trained = f"adapters of rank {setting.rank}" if setting.adapted else "all weights"
    if setting.blocks is not None:
        trained = f"MLP output projections of {len(setting.blocks)} blocks"
    kind = f"{engine.name} ZeRO-{zero}" if zero else engine.name
    processes = f"{setting.processes} process{'es' * (setting.processes > 1)}"
    rows = [
        ("family", f"{family}, {found.sizes.weights / 1e9:.3g} * 10^9 weights"),
        ("trained", trained + (f" on a base in {setting.quantize}" if setting.quantize else "")),
        ("engine", f"{kind}, {'bf16' if engine.bf16 else 'fp32'}, {processes}"),
        ("optimiser", setting.optim),
        ("micro-batch", f"{batch.rows} rows of {batch.width} tokens, {batch.scored} scored, the widest of an epoch"),
        *((name, size(getattr(told, name))) for name in PARTS[:-1]),
        ("reference", f"{size(told.reference)} ({setting.compares})"),
        ("peak", f"{size(told.peak)} on each device{', states on the host' if told.paged else ''}"),
    ]
    if found.card is not None:
        fits = "fits" if told.peak <= room(found.card) else f"does not fit; {advice(found)}"
        rows.append(("card", f"{size(found.card)}: {fits}"))
    return "\n".join(["the memory of a step, estimated:", *(f"  {name:<12} {value}" for name, value in rows)])
