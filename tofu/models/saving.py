"""From a model in memory, sharded or not, to a folder that `from_pretrained` loads."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import utils
from tofu.models import families
from tofu.models.loading import load
from tofu.runtime import ranks, run_folder

log = logging.getLogger(__name__)


def all_finite(model: torch.nn.Module) -> bool:
    """Whether the parameters that this rank holds (its shards, where an engine shards) are neither NaN nor infinite."""
    return all(bool(_held(parameter).isfinite().all()) for parameter in model.parameters())


def _held(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter, any shape, perhaps empty."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3 pads the last ranks' shards with memory that was never written
        shard = parameter.ds_tensor
        return shard.detach()[: max(0, parameter.ds_numel - shard.ds_numel * ranks.rank())]
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def save(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    bf16: bool,
    family: Mapping[str, str],
    change: Callable[[PreTrainedModel], None] | None = None,
) -> None:
    """Save the model whole, adapters merged, in one folder that `from_pretrained` loads; every rank must call this.

    Works alike for a plain model and for one that DeepSpeed ZeRO or FSDP2 has sharded: parameters are gathered one by
    one onto rank 0's host memory and put into an empty copy of the architecture.

    Args:
        model: unwrapped, with or without LoRA adapters.
        tokenizer: goes into the same folder.
        folder: the run's folder; files appear in it whole.
        family: what `families.RECORD` says of the model.
        bf16: save the weights in bf16, the precision that they were used in; else in float32.
        change: called on rank 0 with the whole model, adapters merged, in float32, just before it is saved.
    """
    peft = model if isinstance(model, PeftModel) else None
    quantized = peft is not None and getattr(peft.get_base_model(), "is_quantized", False)
    weights = {} if quantized else _gather(model)
    if ranks.rank() > 0:
        return
    if quantized:  # adapters are merged into the weights that the four bits were made from, so these differ a little
        whole = get_peft_model(load(peft.get_base_model().name_or_path), peft.peft_config["default"])
        set_peft_model_state_dict(whole, get_peft_model_state_dict(peft))
        merged = whole.merge_and_unload()
        if change is not None:
            change(merged)
        merged = merged.to(torch.bfloat16 if bf16 else torch.float32)
        return _write(merged, tokenizer, Path(folder), family)
    config = copy.deepcopy((peft.get_base_model() if peft else model).config)
    if hasattr(config, "distributed_config"):  # FSDP's: with it save_pretrained waits for ranks that are not here
        del config.distributed_config
    generation_config = (peft.get_base_model() if peft else model).generation_config
    with torch.device("meta"):
        shell = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        if peft is not None:
            shell = get_peft_model(shell, peft.peft_config["default"])
    shell.load_state_dict(weights, strict=False, assign=True)
    (shell.get_base_model() if peft else shell).tie_weights()
    if missing := [name for name, parameter in shell.named_parameters() if parameter.is_meta]:
        raise RuntimeError(f"parameters that the trained model did not give: {missing[:5]}")
    if peft is not None:
        shell = (shell.float() if change is not None else shell).merge_and_unload()
    if change is not None:
        change(shell)
    shell = shell.to(torch.bfloat16 if bf16 else torch.float32)
    shell.generation_config = generation_config
    if generation_config is not None and (generation_config.temperature or generation_config.top_p):
        shell.generation_config.do_sample = True  # Llama-2's file has a temperature without it, which can't be saved
    _write(shell, tokenizer, Path(folder), family)


def _gather(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer, whole, on rank 0's host memory ({} on the others)."""
    weights = {}
    for name, tensor in _tensors(model):
        if hasattr(tensor, "ds_id"):  # ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                whole = tensor.detach().cpu().clone()
        else:
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        if ranks.rank() == 0:
            weights[name] = whole
    return weights


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every buffer that is saved."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, family: Mapping[str, str]) -> None:
    """Write model and tokenizer aside, then move each whole file into `folder`, config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=f"{utils.ASIDE}model."))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        utils.write_json(aside / families.RECORD, dict(family))
        move(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move(aside: Path, folder: Path) -> None:
    """Move the files of a whole model into `folder`, each whole, config.json last; theirs is removed."""
    for path in _in_order(aside, folder):
        path.chmod(utils.mode())  # safetensors writes 0600
        os.replace(path, folder / path.name)
    aside.rmdir()
    log.info("model saved: %s", folder)


def copy_to(kept: Path, folder: Path) -> None:
    """As `move`, but theirs stays; no second copy on the disk where the file system knows hard links."""
    for path in _in_order(kept, folder):
        with utils.atomic(folder / path.name) as aside:
            aside.unlink()
            try:
                os.link(path, aside)
            except OSError:
                shutil.copyfile(path, aside)
    log.info("model saved: %s", folder)


def _in_order(source: Path, folder: Path) -> list[Path]:
    """A model's files, config.json last, noted as files of the run in `folder`."""
    found = [path for path in source.iterdir() if path.name != run_folder.WRITTEN]
    run_folder.note(folder, *sorted(path.name for path in found))
    return sorted(found, key=lambda path: (path.name == "config.json", path.name))
