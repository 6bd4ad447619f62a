"""From a family's entry in model_config.yaml to tokenizer, model, adapter, reference, and back to a folder on disk."""

import copy
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils import (
    cached_file,
    extract_commit_hash,
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_liger_kernel_available,
)

import architectures
import ranks
import utils
from utils import BadInput

log = logging.getLogger(__name__)


def resolve(path: str, key: str) -> str:
    """A model's folder or hub id, known to be reachable; of a folder with an adapter, its base too.

    Raises:
        BadInput: `path` is neither a folder with a model, nor in the hub's cache, nor on the hub; `key` is the config
            key to name.
    """
    if utils.is_local(path):
        folder = Path(utils.find(path))
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise BadInput(f"{key}={path} holds no model: there is neither config.json nor adapter_config.json in it")
        if _is_adapter(str(folder)):
            base = _base(str(folder))
            resolve(base, f"{folder}/adapter_config.json: base_model_name_or_path")
            if _is_adapter(base):
                raise BadInput(
                    f"{path} holds an adapter to another adapter, {base}: merge that one into its base first"
                )
        return str(folder)
    if path in utils.SHIPPED:
        raise BadInput(f"{path} is not built yet: python scripts/make_tiny.py builds it in a few minutes")
    utils.check_hub(path, key, "model", "config.json")
    return path


def identity(path: str, *, random_weights: bool = False) -> str:
    """A digest of everything in a model's folder that its predictions depend on; of a hub model, its commit.

    Args:
        path: as `resolve` gave it.
        random_weights: only the architecture and the tokenizer count.
    """
    kind = "random weights of " if random_weights else ""
    if not Path(path).is_dir():
        return f"{kind}{path}@{extract_commit_hash(cached_file(path, 'config.json'), None)}"
    patterns = ["config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json"]
    patterns += ["vocab*", "merges*"] + (
        [] if random_weights else ["*.safetensors", "pytorch_model*", "adapter_model*"]
    )
    files = sorted({file for pattern in patterns for file in Path(path).glob(pattern)})
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run, and a large model has many files
        listing = [f"{file.name} {digest}\n" for file, digest in zip(files, pool.map(_digest, files), strict=True)]
    if _is_adapter(path):
        listing.append(identity(_base(path), random_weights=random_weights))
    return f"{kind}sha256:{hashlib.sha256(''.join(listing).encode()).hexdigest()}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Engine(NamedTuple):
    """How processes share the work, and the precision they compute in."""

    name: str  # ddp, deepspeed or fsdp
    bf16: bool
    deepspeed: dict[str, Any] | None = None  # DeepSpeed's own config, "auto" values not filled

    @property
    def sharded(self) -> bool:
        """Whether the processes share one model, so that all of them must run every forward together."""
        return self.name == "fsdp" or (self.deepspeed is not None and self.deepspeed["zero_optimization"]["stage"] == 3)


def engine(name: str, ds_config: str, precision: str) -> Engine:
    """What the keys `engine`, `ds_config` and `precision` ask for, made definite.

    `auto` is DeepSpeed where several GPUs share the work, as in the published runs, else DDP; and bf16 on GPUs that
    have it, else float32.

    Raises:
        BadInput: `ds_config` is no DeepSpeed config of ZeRO-2 or ZeRO-3.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "deepspeed" if cuda and ranks.world_size() > 1 else "ddp"
    bf16 = precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    if name != "deepspeed":
        return Engine(name, bf16)
    found = utils.read_json(ds_config, "ds_config")
    if not isinstance(found, dict) or found.get("zero_optimization", {}).get("stage") not in (2, 3):
        raise BadInput(f"ds_config={ds_config}: its zero_optimization.stage must be 2 or 3")
    _stand_alone()
    return Engine(name, bf16, found)


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
    adapter = _is_adapter(path)
    if quantize and not is_bitsandbytes_available():
        raise BadInput(f"LoRA.quantize={quantize} needs the bitsandbytes package: pip install bitsandbytes")
    if quantize and (engine.name != "ddp" or adapter):
        what = f"the adapter in {path}" if adapter else f"engine={engine.name}"
        raise BadInput(f"LoRA.quantize={quantize} does not go with {what}: take engine=ddp and a whole model")
    if adapter and engine.sharded:  # merging needs the whole model
        raise BadInput(
            f"{path} holds only an adapter, which no engine that shards can load: take engine=ddp, or merge it first "
            "(our runs save merged models)"
        )
    whole = _base(path) if adapter else path
    with _told("architecture", whole):
        config = AutoConfig.from_pretrained(whole)
    _check_architecture(config, attention, packing, liger_kernel, states)
    if weights and getattr(config, "quantization_config", None) is None:  # packed numbers can't be looked at so
        shell = _check_weights(whole)
        if adapter:
            _check_adapter(shell, path)


@contextmanager
def _told(what: str, path: str) -> Iterator[None]:
    """Make one line of whatever a library raises of files that it can't read: its types differ with their format."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        todo = "save or copy it again" if Path(path).is_dir() else f"hf download {path} fetches it whole"
        raise BadInput(f"the {what} of {path} cannot be loaded ({type(error).__name__}: {why}): {todo}") from None


def _check_weights(path: str) -> PreTrainedModel:
    """The model in `path` without numbers: names and shapes are compared as `from_pretrained` compares them.

    It takes a quarter of a second and no memory for a GB of weights, whatever their format.

    Raises:
        BadInput: no weights, broken ones, or ones that don't fill the model.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it prints a table of what is missing: one line of ours says it
    try:
        with _told("weights", path):
            shell, found = AutoModelForCausalLM.from_pretrained(
                path, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_filled(path, found)
    if found["unexpected_keys"]:
        log.warning("%s: the model has no place for %s; left out", path, _named(found["unexpected_keys"]))
    return shell


def _check_adapter(shell: PreTrainedModel, path: str) -> None:
    """Raise BadInput unless each tensor of the adapter in `path` has its place in its base, and each place a tensor."""
    with _told("adapter", path):
        peft = PeftModel(shell, PeftConfig.from_pretrained(path), low_cpu_mem_usage=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys: it is an error here
            found = peft.load_adapter(path, "default", torch_device="cpu", low_cpu_mem_usage=True)
    missing = {key.replace(".default", "") for key in found.missing_keys}
    if missing or found.unexpected_keys:
        _refuse(path, missing, (), found.unexpected_keys)


def _check_filled(path: str, found: Mapping[str, Collection[Any]]) -> None:
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


def attention_of(family: Any, wanted: str = "auto") -> str | None:
    """What the key `attention` asks for: auto is flash attention where the family says so, else None."""
    if wanted != "auto":
        return wanted
    return "flash_attention_2" if family.flash_attention2 else None


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def _base(path: str) -> str:
    """The model that an adapter belongs to.

    Raises:
        BadInput: the adapter does not say.
    """
    file = Path(path) / "adapter_config.json"
    base = utils.read_json(file, "adapter").get("base_model_name_or_path")
    if not base:
        raise BadInput(f"{file} does not say which model the adapter belongs to: set its base_model_name_or_path")
    return utils.find(base)


def _stand_alone() -> None:
    """Tell DeepSpeed, which asks MPI otherwise, that a process without a launcher is alone."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))


def load_tokenizer(path: str, end_token: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`, its `eos_token` the one that ends an answer.

    Raises:
        BadInput: no tokenizer, no fast one (the answer's first token is found by character offsets), or no end token.
    """
    if _is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = _base(path)
    with _told("tokenizer", path):
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
    quantize: str | None = None,
) -> PreTrainedModel:
    """The causal language model in `path`; a folder with only an adapter is merged into its base in memory.

    Args:
        path: a local folder or hub id, as `resolve` gave it and `check_loadable` passed it.
        attention: an implementation by transformers' name for it; None: its own choice.
        dtype: of the weights. Full finetuning needs float32 masters: an Adam step of 1e-5 leaves 84 % of bf16 weights
            where they were.
        shard: split the parameters over all processes (FSDP2), as the model is read: no process ever holds it whole.
        bf16_compute: with `shard`, compute in bf16 over the float32 shards.
        random_weights: only the architecture is taken from `path`; the weights are drawn from the seed.
        quantize: 4bit: linear layers in four bits (NF4, constants quantised too), computing in `dtype`.

    Raises:
        BadInput: the weights leave a tensor of the model without its value (`check_loadable` tells it beforehand).
    """
    kwargs: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if quantize:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    adapter = _is_adapter(path)
    whole = _base(path) if adapter else path
    if random_weights:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole), **kwargs)
    if shard:
        kwargs["distributed_config"] = DistributedConfig(
            fsdp_size=ranks.world_size(), fsdp_mixed_precision=bf16_compute
        )
    model, found = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True, **kwargs)
    _check_filled(whole, found)
    if not adapter:
        return model
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
            as that one does before its first step. None: weights in the precision of the computation.

    Raises:
        BadInput: as of `check_loadable`, which a script asks before it makes a folder.
    """
    check_loadable(path, engine, attention, weights=False)  # `load` looks at them
    device = accelerate.PartialState(cpu=not torch.cuda.is_available()).device
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
        )
    finally:
        if alive is not None:
            unset_hf_deepspeed_config()
    model.requires_grad_(False)
    model.eval()
    if autocast and engine.bf16:  # as accelerate does to the model that it trains
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if zero3:
        import deepspeed

        model = deepspeed.initialize(model=model, config=config)[0].module  # ZeRO-3 hooks its modules
    return model if engine.sharded or quantize else model.to(device)  # in four bits it was put there when loaded


def add_lora(model: PreTrainedModel, *, r: int, alpha: float, dropout: float) -> PeftModel:
    """Put float32 LoRA adapters on every linear layer but the output head; only they will train."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


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
    change: Callable[[PreTrainedModel], None] | None = None,
) -> None:
    """Save the model whole, adapters merged, in one folder that `from_pretrained` loads; every rank must call this.

    Works alike for a plain model and for one that DeepSpeed ZeRO or FSDP2 has sharded: parameters are gathered one by
    one onto rank 0's host memory and put into an empty copy of the architecture.

    Args:
        model: unwrapped, with or without LoRA adapters.
        tokenizer: goes into the same folder.
        folder: the run's folder; files appear in it whole.
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
        return _write(merged, tokenizer, Path(folder))
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
        if ranks.rank() == 0:
            weights[name] = whole
    return weights


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every buffer that is saved."""
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer aside, then move each whole file into `folder`, config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=f"{utils.ASIDE}model."))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("model saved: %s", folder)
