"""How a run optimises: the Trainer's arguments out of a config's keys, and the optimisers, before a model is loaded."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames
from transformers.utils import is_torchao_available

import utils
from tofu.cli.schema import STOCHASTIC
from tofu.models.engines import Engine
from tofu.runtime import ranks
from utils import BadInput

# the keys that finetune.yaml and forget.yaml share and that `arguments` takes as they are
ARGUMENTS = (
    *("batch_size", "gradient_accumulation_steps", "num_epochs", "lr", "weight_decay"),
    *("max_grad_norm", "optim", "seed", "report_to", "progress", "logging_steps", "liger_kernel", "torch_compile"),
)


ALWAYS: dict[str, Any] = {  # the Trainer's arguments that are the same in every run
    "lr_scheduler_type": "linear",
    "logging_nan_inf_filter": False,  # on by default, it hides a loss that has become NaN
    "save_strategy": "no",
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "ddp_find_unused_parameters": False,
    "ddp_timeout": ranks.TIMEOUT,
    "remove_unused_columns": False,
    "liger_kernel_config": {"cross_entropy": False, "fused_linear_cross_entropy": False},  # the losses are our own
    "log_level": "warning",
    "log_level_replica": "error",
}


@dataclass
class Arguments(TrainingArguments):
    """The Trainer's arguments, and the run's own config: a tracker gets both, as the run's config."""

    tofu: dict[str, Any] | None = None


def _enough_steps(samples: int, batch_size: int, accumulation: int, num_epochs: int) -> int:
    """Optimiser steps in an epoch; raise BadInput where processes or steps do not fit the rows."""
    if samples < ranks.world_size():
        raise BadInput(f"{ranks.world_size()} processes share {samples} rows: start at most {samples}")
    per_epoch = steps_per_epoch(samples, batch_size * accumulation)
    if per_epoch * num_epochs < MOVING + 1:
        raise BadInput(_too_few_steps(samples, batch_size, accumulation, num_epochs))
    return per_epoch


def _named_optim(optim: str, engine: Engine) -> str:
    """The optimiser by transformers' name for it; raise BadInput for one that there is not."""
    choice_of_optim = sorted(name.value for name in OptimizerNames)
    if optim == STOCHASTIC:
        _check_stochastic(engine)
        return "adamw_torch"  # for the arguments; the Trainer is given the other
    if optim not in choice_of_optim:
        raise BadInput(f"optim={optim} is unknown: it may be auto, {STOCHASTIC}, {', '.join(choice_of_optim)}")
    return optim


def arguments(
    save_dir: str | Path,
    *,
    samples: int,
    engine: Engine,
    gradient_checkpointing: bool,
    batch_size: int,
    gradient_accumulation_steps: int,
    num_epochs: int,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
    optim: str,
    seed: int,
    report_to: str | list[str],
    progress: bool,
    logging_steps: int,
    liger_kernel: bool,
    torch_compile: bool,
) -> TrainingArguments:
    """The Trainer's arguments. Call it before the model is loaded: ZeRO-3 shards a model while it is read.

    Args:
        samples: rows in an epoch; sets the warm-up of one epoch.
        optim: as the config names it, but for auto: `best_optim` says what that is.

    Raises:
        BadInput: more processes than rows; fewer than two optimiser steps besides the first, whose learning rate is 0;
            an optimiser or a place to report to that transformers does not know, or whose package is not installed; an
            optimiser of bitsandbytes that does not run here.
    """
    per_epoch = _enough_steps(samples, batch_size, gradient_accumulation_steps, num_epochs)
    optim = _named_optim(optim, engine)
    made = Arguments(
        output_dir=str(save_dir),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        num_train_epochs=num_epochs,
        learning_rate=lr,
        warmup_steps=per_epoch,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        optim=optim,
        seed=seed,
        report_to=report_to if isinstance(report_to, str) else [*report_to],  # of OmegaConf's lists it knows nothing
        disable_tqdm=not progress,
        logging_steps=logging_steps,
        bf16=engine.bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=gradient_checkpointing,
        dataloader_num_workers=LOADERS if torch.cuda.is_available() else 0,
        torch_compile=torch_compile,
        use_liger_kernel=liger_kernel,
        deepspeed=copy.deepcopy(engine.deepspeed),  # it is filled in place
        **ALWAYS,
    )
    if made.n_gpu > 1:  # python without torchrun: the Trainer would split each batch over all cards by itself
        made._n_gpu = 1
    _check_installed(made, optim, report_to)
    return made


LOADERS = 2  # processes that make a GPU's batches


def stochastic(optim: str, args: TrainingArguments) -> dict[str, Any]:
    """What the Trainer is given for `optim=adamw_8bit_stochastic`: 6 bytes per weight in all, and no update is lost.

    AdamW with states in 8 bits over bf16 weights, whose updates are rounded stochastically: at
    lr 1e-5 rounding to the nearest leaves 84 % of the weights where they are. Torchao's.
    """
    if optim != STOCHASTIC:
        return {}
    from torchao.optim import AdamW8bit  # optional

    betas = (args.adam_beta1, args.adam_beta2)
    kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "bf16_stochastic_round": True}
    return {"optimizer_cls_and_kwargs": (AdamW8bit, kwargs)}


def _check_stochastic(engine: Engine) -> None:
    """Raise BadInput where `stochastic` can't be: each process would round its copy of the weights differently."""
    if engine.name != "ddp" or ranks.world_size() > 1 or not engine.bf16:
        raise BadInput(
            f"optim={STOCHASTIC} trains bf16 weights on one process: take engine=ddp precision=bf16 and no torchrun"
        )
    if not is_torchao_available():
        raise BadInput(f"optim={STOCHASTIC} needs the torchao package: pip install torchao")


def best_optim(engine: str, processes: int, *, cuda: bool, fits: bool, sweep: bool, bitsandbytes: bool) -> str:
    """What `optim=auto` means: torch's AdamW in one kernel; where it does not fit the card, one with paged states.

    Paged states wait for the device after every parameter, and their memory is not given back before the process ends:
    in a sweep each job would take more of it.

    Args:
        engine: its name.
        fits: whether a step with torch's AdamW fits the card, by the run's own estimate.
        sweep: whether the process runs several jobs.
        bitsandbytes: whether that package is there.
    """
    paged = engine == "ddp" and processes == 1 and cuda and bitsandbytes and not fits and not sweep
    return "paged_adamw_32bit" if paged else "adamw_torch_fused"


def _check_installed(args: TrainingArguments, optim: str, report_to: str | list[str]) -> None:
    """Try what the Trainer will do once the model is loaded: find the optimiser's class, make the reporters."""
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except Exception as error:  # ValueError, RuntimeError or ImportError, by the integration
        raise BadInput(f"report_to={report_to}: {error}") from None
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))  # some ask for a model, any
    except Exception as error:
        raise BadInput(f"optim={optim}: {error}") from None
    if kind.__module__.startswith("bitsandbytes"):
        _try_step(optim, kind, kwargs, args.device)


def _try_step(optim: str, kind: type[torch.optim.Optimizer], kwargs: dict[str, Any], device: torch.device) -> None:
    """Raise BadInput where an optimiser's native library does not run: it would be found out at the first step."""
    weight = torch.nn.Parameter(torch.ones(TRIED, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is paged on a CPU
            kind([weight], **kwargs).step()
    except Exception as error:  # RuntimeError, NameError, AttributeError, by what is missing
        raise BadInput(
            f"optim={optim}: bitsandbytes cannot step on {device.type}: take optim=adamw_torch_fused, or install a "
            f"build of it for this machine ({utils.one_line(error)[:80]})"
        ) from None


TRIED = 2**17  # weights: fewer would have no states in 8 bits, and none that are paged


MOVING = 2  # optimiser steps with a learning rate above 0 that a run has at least; the very first has 0


def steps_per_epoch(samples: int, per_process: int) -> int:
    """Optimiser steps in an epoch, the last one perhaps over fewer samples.

    Args:
        per_process: samples of one process in a step, all its micro-batches together.
    """
    return -(-samples // (per_process * ranks.world_size()))


def _too_few_steps(samples: int, batch_size: int, accumulation: int, num_epochs: int) -> str:
    """The line that refuses such a run, with the batch size that would work."""
    said = (
        f"batch_size={batch_size}: {samples} rows, gradient_accumulation_steps={accumulation}, {ranks.world_size()} "
        f"processes and num_epochs={num_epochs} make fewer than {MOVING} steps with a learning rate above 0"
    )
    for cut in (accumulation, 1):
        for size in range(batch_size, 0, -1):
            if steps_per_epoch(samples, size * cut) * num_epochs > MOVING:
                return f"{said}: take batch_size={size}" + (
                    " gradient_accumulation_steps=1" if cut < accumulation else ""
                )
    return f"{said}: take num_epochs={-(-(MOVING + 1) // steps_per_epoch(samples, 1))}"


def weights_type(engine: Engine, lora: Any, optim: str) -> torch.dtype:
    """Float32 masters where all weights train, unless the optimiser rounds by chance; else as the run computes."""
    return torch.bfloat16 if engine.bf16 and (lora.r or optim == STOCHASTIC) else torch.float32
