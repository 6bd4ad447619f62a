"""From a family's entry in model_config.yaml to tokenizer, model, adapter, reference, and back to a folder on disk."""

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import utils
from losses import Scored
from utils import BadInput

log = logging.getLogger(__name__)


def resolve(path: str, key: str) -> str:
    """A model's folder or hub id, known to be reachable.

    Raises:
        BadInput: `path` is neither a folder with a model, nor in the hub's cache, nor on the hub; `key` is the config
            key to name.
    """
    if utils.is_local(path):
        folder = Path(utils.find(path))
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise BadInput(f"{key}={path} holds no model: there is neither config.json nor adapter_config.json in it")
        return str(folder)
    utils.check_hub(path, key, "model", "config.json")
    return path


def wants_bf16(precision: str) -> bool:
    """Whether to compute in bf16: asked for, or `auto` on a GPU that has it."""
    return precision == "bf16" or (precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def load_tokenizer(path: str, end_token: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`, its `eos_token` the one that ends an answer.

    Raises:
        BadInput: no fast tokenizer (the answer's first token is found by character offsets), or no end token.
    """
    if (adapter := Path(path) / "adapter_config.json").is_file() and not (
        Path(path) / "tokenizer_config.json"
    ).is_file():
        path = json.loads(adapter.read_text())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer of {path} is a slow one: a fast tokenizer (tokenizer.json) is needed")
    if end_token is not None:
        if tokenizer.convert_tokens_to_ids(end_token) in (None, tokenizer.unk_token_id):
            raise BadInput(f"end_token={end_token} is not in the vocabulary of {path}")
        tokenizer.eos_token = end_token
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {path} has no end token: name one as end_token in model_config.yaml")
    return tokenizer


def load(
    path: str,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard: bool = False,
    bf16_compute: bool = False,
    random_weights: bool = False,
) -> PreTrainedModel:
    """The causal language model in `path`; a folder with only an adapter is merged into its base in memory.

    Args:
        path: a local folder or hub id, as `resolve` gave it.
        attention: an attention implementation of transformers; None leaves the choice to it.
        dtype: of the weights. Full finetuning needs float32 masters: an Adam step of 1e-5 leaves 84 % of bf16 weights
            where they were.
        shard: split the parameters over all processes (FSDP2), as the model is read: no process ever holds it whole.
        bf16_compute: with `shard`, compute in bf16 over the float32 shards.
        random_weights: only the architecture is taken from `path`; the weights are drawn from the seed.

    Raises:
        BadInput: an adapter together with `shard`.
    """
    kwargs: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if random_weights:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **kwargs)
    if (Path(path) / "adapter_config.json").is_file():
        if shard:
            raise BadInput(f"{path} holds only an adapter: merge it first (our runs save merged models)")
        base = json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **kwargs), path).merge_and_unload()
    if shard:
        kwargs["distributed_config"] = DistributedConfig(
            fsdp_size=utils.world_size(), fsdp_mixed_precision=bf16_compute
        )
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def add_lora(model: PreTrainedModel, *, r: int, alpha: float, dropout: float) -> PeftModel:
    """Put float32 LoRA adapters on every linear layer but the output head; only they will train."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def score(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Scored]:
    """One forward over all samples of a batch, and what each part of it predicts at its scored positions.

    Args:
        model: a causal language model, wrapped by an engine or not.
        batch: what `data_module.collate` makes: input_ids, attention_mask, keep (S, T), targets (S, T), parts.

    Returns:
        One view a part, logits in float32 whatever the model computes in.
    """
    keep = batch["keep"]  # (S, T) bool: logits of the whole vocabulary exist at these positions only
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=keep, use_cache=False
    ).logits.float()
    labels, sample = batch["targets"][keep], keep.nonzero()[:, 0]
    views, start = {}, 0
    for name, (first, last) in batch["parts"].items():
        count = int(keep[first:last].sum())
        part = slice(start, start + count)
        views[name] = Scored(logits[part], labels[part], sample[part] - first)
        start += count
    return views


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """The starting model of a LoRA run: the same network, its adapters switched off, dropout too."""
    peft = next(module for module in model.modules() if isinstance(module, PeftModel))
    training = model.training
    model.eval()
    with peft.disable_adapter():
        yield
    model.train(training)


def save(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    bf16: bool,
) -> None:
    """Save the model whole, adapters merged, in one folder that `from_pretrained` loads; every rank must call this.

    Works alike for a plain model and for one that DeepSpeed ZeRO or FSDP2 has sharded: parameters are gathered one by
    one onto rank 0's host memory and put into an empty copy of the architecture.

    Args:
        model: unwrapped, with or without LoRA adapters.
        tokenizer: goes into the same folder.
        folder: the run's folder; files appear in it whole.
        bf16: save the weights in bf16, the precision that they were used in; else in float32.
    """
    weights = _gather(model)
    if utils.rank() > 0:
        return
    peft = model if isinstance(model, PeftModel) else None
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
        shell = shell.merge_and_unload()
    shell = shell.to(torch.bfloat16 if bf16 else torch.float32)
    shell.generation_config = generation_config
    if generation_config is not None and (generation_config.temperature or generation_config.top_p):
        shell.generation_config.do_sample = True  # Llama-2's file has a temperature without it, which can't be saved
    _write(shell, tokenizer, Path(folder))


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
        if utils.rank() == 0:
            weights[name] = whole
    return weights


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer aside, then move each whole file into `folder`, config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving."))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("model saved: %s", folder)


def release() -> None:
    """End a job: wait for all ranks, forget what accelerate and DeepSpeed keep per process; the next starts clean."""
    accelerate.PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
    accelerate.state.GradientState._reset_state()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
