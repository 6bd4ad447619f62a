"""What `loading.load` could not do is refused before a run has a folder or reads a weight."""

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available, is_liger_kernel_available

import utils
from tofu.models import architectures, pickles, varlen
from tofu.models.engines import Engine
from tofu.models.folders import base_of, config_of, is_adapter, told
from utils import BadInput

log = logging.getLogger(__name__)


def attention_of(path: str, engine: Engine, family: Any, wanted: str, *, packing: bool, compiled: bool) -> str | None:
    """What the key `attention` asks a training for; None: transformers' choice.

    auto is flash attention where the family says so, else varlen where it runs.

    Raises:
        BadInput: varlen where it does not run; no architecture in `path`.
    """
    if wanted not in ("auto", varlen.NAME):
        return wanted
    if wanted == "auto" and family.flash_attention2:
        return "flash_attention_2"
    config = config_of(path)
    why = varlen.why_not(config, bf16=engine.bf16, packing=packing, compiled=compiled)
    if why and wanted == varlen.NAME:
        raise BadInput(f"attention={wanted}: {why}: take attention=auto")
    varlen.register()
    return None if why else varlen.NAME


def check_loadable(
    path: str,
    engine: Engine,
    attention: str | None = None,
    *,
    packing: bool = False,
    quantize: str | None = None,
    liger_kernel: bool = False,
    states: bool = False,
    weights: bool = True,
) -> None:
    """Refuse what `load` could not do; called before a run has a folder or reads a weight.

    Args:
        path: as `resolve` gave it.
        weights: whether those in `path` are wanted; a hub model's are fetched now. False where random ones are, and
            while DeepSpeed ZeRO-3 is set up, which would shard what is only looked at.

    Raises:
        BadInput: only an adapter where the processes share one model; an attention that is not there; packing for a
            model that might see across samples; four bits without bitsandbytes; Liger's kernels for a model that they
            don't know; hidden states of one whose blocks may be elsewhere; weights that are not there, can't be read
            or leave a tensor of the model without its value.
    """
    if attention == "flash_attention_2" and not (is_flash_attn_2_available() and engine.bf16):
        raise BadInput(
            "attention=flash_attention_2 (also by flash_attention2: true in model_config.yaml) needs the flash_attn "
            "package, a CUDA GPU and bf16"
        )
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise BadInput("attention=flex_attention needs a CUDA GPU: take attention=sdpa")
    if liger_kernel and not (torch.cuda.is_available() and is_liger_kernel_available()):
        raise BadInput("liger_kernel=true needs a GPU and the liger-kernel package")
    adapter = is_adapter(path)
    if quantize and not is_bitsandbytes_available():
        raise BadInput(f"LoRA.quantize={quantize} needs the bitsandbytes package: pip install bitsandbytes")
    if quantize and (engine.name != "ddp" or adapter):
        what = f"the adapter in {path}" if adapter else f"engine={engine.name}"
        raise BadInput(f"LoRA.quantize={quantize} does not go with {what}: take engine=ddp and a whole model")
    if adapter:
        _check_kind(path)
    if adapter and engine.sharded:  # merging needs the whole model
        raise BadInput(
            f"{path} holds only an adapter, which no engine that shards can load: take engine=ddp, or merge it first "
            "(our runs save merged models)"
        )
    config = config_of(path)
    _check_architecture(config, attention, packing, liger_kernel, states)
    _check_plain(base_of(path) if adapter else path, config)
    if weights:
        check_weights(path)


def check_weights(path: str) -> None:
    """The part of `check_loadable` that looks at the weights in `path`; a hub model's are fetched now."""
    adapter = is_adapter(path)
    shell = _check_weights(base_of(path) if adapter else path)
    if adapter:
        _check_adapter(shell, path)


def _check_plain(path: str, config: PretrainedConfig) -> None:
    """Raise BadInput for weights that were saved in fewer bits: they can't be trained, nor scored as others are."""
    packed = getattr(config, "quantization_config", None)
    if packed is None:
        return
    method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    raise BadInput(
        f"{path} was saved quantised ({getattr(method, 'value', method)}; quantization_config in its config.json): "
        "take the model as it was before, or dequantise it and save it"
    )


def _check_architecture(
    config: PretrainedConfig, attention: str | None, packing: bool, liger_kernel: bool, states: bool
) -> None:
    if states and config.model_type not in architectures.PACKABLE:
        raise BadInput(
            f"the method looks at the hidden states of a block, and it is not known where {config.model_type} keeps "
            f"its blocks: take another method, or one of {', '.join(architectures.PACKABLE)}"
        )
    if packing and config.model_type not in architectures.PACKABLE:
        raise BadInput(
            f"packing: it is not known whether packed samples of {config.model_type} see each other (known not to: "
            f"{', '.join(architectures.PACKABLE)}): take packing=false"
        )
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if attention is not None and kind is not None and not architectures.has_attention(kind, attention):
        raise BadInput(f"attention={attention}: {config.model_type} has no such attention: take attention=auto")
    if liger_kernel:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise BadInput(f"liger_kernel: Liger has no kernels for {config.model_type}: take liger_kernel=false")


def _check_weights(path: str) -> PreTrainedModel:
    """The model in `path` without numbers: names and shapes are compared as `from_pretrained` compares them.

    It takes a quarter of a second and no memory for a GB of weights, whatever their format.

    Raises:
        BadInput: no weights, broken ones, or ones that don't fill the model.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it prints a table of what is missing: one line of ours says it
    try:
        with told("weights", path):
            shell, found = pickles.from_folder(path, device_map="meta", ignore_mismatched_sizes=True)
    finally:
        transformers.logging.set_verbosity(verbosity)
    check_filled(path, found)
    if found["unexpected_keys"]:
        log.warning("%s: the model has no place for %s; left out", path, _named(found["unexpected_keys"]))
    return shell


PROMPTS = {"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "ADAPTION_PROMPT"}


def _check_kind(path: str) -> None:
    """Raise BadInput for an adapter that is no change of weights: a run loads a whole model."""
    about = utils.read_json(Path(path) / "adapter_config.json", "adapter")
    kind = about.get("peft_type")
    if lost := [key for key in ("peft_type", "r", "lora_alpha") if about.get(key, 1) is None]:
        raise BadInput(f"{path}/adapter_config.json: {', '.join(lost)} is null: save or copy the adapter again")
    if kind in PROMPTS:
        raise BadInput(
            f"{path} holds an adapter of the kind {kind}, which cannot be merged into its model: take LoRA's"
        )


def _check_adapter(shell: PreTrainedModel, path: str) -> None:
    """Raise BadInput unless each tensor of the adapter in `path` has its place in its base, and each place a tensor."""
    from peft import PeftConfig, PeftModel  # its import takes seconds, and few models are adapters

    with told("adapter", path):
        peft = PeftModel(shell, PeftConfig.from_pretrained(path), low_cpu_mem_usage=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys: it is an error here
            found = peft.load_adapter(path, "default", torch_device="cpu", low_cpu_mem_usage=True)
    missing = {key.replace(".default", "") for key in found.missing_keys}
    if missing or found.unexpected_keys:
        _refuse(path, missing, (), found.unexpected_keys)


def check_filled(path: str, found: Mapping[str, Collection[Any]]) -> None:
    """Raise BadInput if transformers' report on loading says that it drew a tensor at random."""
    if found["missing_keys"] or found["mismatched_keys"]:
        _refuse(path, found["missing_keys"], found["mismatched_keys"], found["unexpected_keys"])


WRAPPERS = {"_orig_mod.": "torch.compile's", "module.": "DistributedDataParallel's"}  # prefix -> whose it is


def _refuse(
    path: str, missing: Collection[str], mismatched: Collection[tuple[str, Any, Any]], unexpected: Collection[str]
) -> None:
    """Say which tensors don't fit.

    Args:
        mismatched: (name, shape in the file, shape in the model).
    """
    said = []
    if missing:
        said += [f"the file lacks {_named(missing)}"]
    if mismatched:
        shapes = [f"{name} {tuple(theirs)} instead of {tuple(ours)}" for name, theirs, ours in mismatched]
        said += [f"of another shape than the model's: {_named(shapes)}"]
    if unexpected:
        said += [f"the model has no place for {_named(unexpected)}"]
    todo = "save the whole model again"
    if prefix := prefix_of(missing, unexpected):
        whose = f", {WRAPPERS[prefix]}," if prefix in WRAPPERS else ""
        todo = f"the prefix {prefix}{whose} stands before the names: save the model inside the wrapper, or take it off"
    raise BadInput(f"{path}: its weights do not fit its config.json: {'; '.join(said)}: {todo}")


def _named(names: Collection[str], shown: int = 3) -> str:
    """Some names and how many there are."""
    rest = ", ..." if len(names) > shown else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(sorted(names)[:shown])}{rest})"


def prefix_of(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """What stands before the names of most tensors that are there under another name; None if nothing does."""
    wanted = set(missing)
    tails = ((name, dot + 1) for name in unexpected for dot, letter in enumerate(name) if letter == ".")
    found = Counter(name[:at] for name, at in tails if name[at:] in wanted)
    return found.most_common(1)[0][0] if found else None
