"""From a model's folder to a model: to train, frozen, or with adapters."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from tofu.models import pickles, varlen
from tofu.models.engines import Engine
from tofu.models.folders import base_of, is_adapter
from tofu.models.loadable import check_filled, check_loadable
from tofu.runtime import cards, ranks


def load(
    path: str,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard: bool = False,
    bf16_compute: bool = False,
    random_weights: bool = False,
    quantize: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The causal language model in `path`; a folder with only an adapter is merged into its base in memory.

    Args:
        path: a local folder or hub id, as `resolve` gave it and `check_loadable` passed it.
        attention: an implementation by transformers' name for it, or varlen; None: transformers' choice.
        dtype: of the weights. Full finetuning needs float32 masters: an Adam step of 1e-5 leaves 84 % of bf16 weights
            where they were.
        shard: split the parameters over all processes (FSDP2), as the model is read: no process ever holds it whole.
        bf16_compute: with `shard`, compute in bf16 over the float32 shards.
        random_weights: only the architecture is taken from `path`; the weights are drawn from the seed.
        quantize: 4bit: linear layers in four bits (NF4, constants quantised too), computing in `dtype`.
        device: where the weights are read to; None: the host's memory, of which every process takes its own.

    Raises:
        BadInput: the weights leave a tensor of the model without its value (`check_loadable` tells it beforehand).
    """
    cards.settle()
    varlen.register()
    kwargs: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if device is not None:
        kwargs["device_map"] = {"": device}
    if quantize:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    adapter = is_adapter(path)
    whole = base_of(path) if adapter else path
    if random_weights:
        kwargs.pop("device_map", None)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole, trust_remote_code=False), **kwargs)
    if shard:
        kwargs["distributed_config"] = DistributedConfig(
            fsdp_size=ranks.world_size(), fsdp_mixed_precision=bf16_compute
        )
    model, found = pickles.from_folder(whole, **kwargs)
    check_filled(whole, found)
    for module in model.modules() if quantize else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # where a CPU has it, bitsandbytes' first forward without gradients packs the weights for bf16, for good: a
            # reference would compute otherwise than the model that trains, and narrow layers fail
            module.support_avx512bf16_for_cpu = False
    if not adapter:
        return model
    from peft import PeftModel  # its import takes seconds, and few models are adapters

    return PeftModel.from_pretrained(model, path).merge_and_unload().requires_grad_(True)  # peft froze the base


def load_frozen(
    path: str,
    engine: Engine,
    *,
    attention: str | None = None,
    random_weights: bool = False,
    trained_in: torch.dtype | None = None,
    quantize: str | None = None,
) -> torch.nn.Module:
    """A model that only predicts, for an evaluation or as reference: in place, in eval mode, sharded where `engine` is.

    Args:
        path, attention, random_weights, quantize: as of `load`.
        trained_in: for the reference of a training, the type of the trained model's weights: it then computes exactly
            as that one does before its first step, from half the bytes where they say the same (`narrow`). None:
            weights in the precision of the computation.

    Raises:
        BadInput: as of `check_loadable`, which a script asks before it makes a folder.
    """
    check_loadable(path, engine, attention, weights=False)  # `load` looks at them
    device = ranks.state().device
    dtype = torch.bfloat16 if engine.bf16 and engine.name != "fsdp" else torch.float32
    autocast = trained_in is not None and engine.name != "deepspeed"  # DeepSpeed itself turns what it trains into bf16
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it; nothing is trained
        "zero_optimization": {
            k: v for k, v in (engine.deepspeed or {}).get("zero_optimization", {}).items() if v != "auto"
        },
        "bf16": {"enabled": engine.bf16},
    }
    zero3 = engine.sharded and engine.name == "deepspeed"
    # while one is alive (a training's own is, already), from_pretrained keeps this rank's shard only
    alive = HfDeepSpeedConfig(config) if zero3 and not is_deepspeed_zero3_enabled() else None
    try:
        model = load(
            path,
            attention=attention,
            dtype=trained_in if autocast else dtype,
            shard=engine.name == "fsdp",
            bf16_compute=engine.bf16,
            random_weights=random_weights,
            quantize=quantize,
            device=None if engine.sharded or quantize else loading_device(),
        )
    finally:
        if alive is not None:
            unset_hf_deepspeed_config()
    model.requires_grad_(False)
    model.eval()
    if autocast and engine.bf16 and engine.name == "ddp" and not quantize:
        narrow(model)
    if autocast and engine.bf16:  # as accelerate does to the model that it trains
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if zero3:
        import deepspeed

        model = deepspeed.initialize(model=model, config=config)[0].module  # ZeRO-3 hooks its modules
    return model if engine.sharded or quantize else model.to(device)  # in four bits it was put there when loaded


def loading_device() -> torch.device | None:
    """The card that this process reads a whole model to; None without one: it is read to where it will be anyway."""
    return ranks.state().device if torch.cuda.is_available() else None


def narrow(model: torch.nn.Module) -> None:
    """Keep the weights of a model's linear layers in bf16 where bf16 says the same: of one that was saved in bf16.

    Under bf16 autocast such a layer computes in bf16 whatever its weights are in, so that no bit of the output changes.
    Norms, embeddings, and what a layer shares with them compute in the type that they have.
    """
    others = [module for module in model.modules() if type(module) is not torch.nn.Linear]
    shared = {id(one) for module in others for one in module.parameters(recurse=False)}
    for module in model.modules():
        for one in module.parameters(recurse=False) if type(module) is torch.nn.Linear else ():
            if id(one) not in shared and torch.equal(one, (short := one.bfloat16()).float()):
                one.data = short


def add_lora(model: PreTrainedModel, *, r: int, alpha: float, dropout: float) -> PreTrainedModel:
    """Put float32 LoRA adapters on every linear layer but the output head; only they will train."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)
