"""What is known of each architecture: one table, and the places where a model keeps what the forwards look for.

Importing it loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class Architecture(NamedTuple):
    """What a `model_type` of transformers is known to do; tests/models/test_architectures.py tries each."""

    packs: bool = True  # packed samples do not see each other
    blocks: str = "layers"  # where the base model keeps its decoder blocks, the first one first
    soft_cap: str | None = None  # the config's key of a soft cap on the logits: tanh(z / cap) * cap


KNOWN = {
    "llama": Architecture(),
    "phi": Architecture(),
    "gpt_neox": Architecture(),
    "stablelm": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(soft_cap="final_logit_softcapping"),
    "phi3": Architecture(),
    "gemma3_text": Architecture(soft_cap="final_logit_softcapping"),
    "olmo2": Architecture(),
    "olmo3": Architecture(),
    "qwen3_moe": Architecture(),
    "smollm3": Architecture(),
    "granite": Architecture(),
}
# another type may ignore positions that begin anew, and nothing would tell
PACKABLE = tuple(name for name, known in KNOWN.items() if known.packs)
# types whose scoring and generation under our 4-D masks equal their plain forwards: tests/models/test_masks.py
MASKABLE = {
    *KNOWN,
    *("apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "diffllama", "ernie4_5", "exaone4", "gemma"),
    *("gemma4_text", "glm", "glm4", "gpt2", "gpt_bigcode", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe"),
    *("lfm2", "ministral", "mixtral", "nemotron", "olmo", "olmoe", "opt", "persimmon", "phimoe", "qwen2_moe"),
    *("seed_oss", "starcoder2", "xglm"),
}
ATTENDS = {"full_attention", "sliding_attention"}  # kinds of layers that 4-D masks rule
MASKED = ("sdpa", "eager")  # attentions that take a 4-D mask
SUPPORT = {  # attention -> the mark of a model class that has it
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
    "varlen": "_supports_attention_backend",
}


def blocks_of(base_model: torch.nn.Module, model_type: str) -> torch.nn.ModuleList:
    """The decoder blocks of a base model (`PreTrainedModel.base_model`) of a known type, the first one first."""
    return getattr(base_model, KNOWN[model_type].blocks)


def soft_cap_key(config: PretrainedConfig) -> str | None:
    """The config's key of a soft cap on the logits, where this model has one that is not null."""
    known = KNOWN.get(config.model_type)
    key = known.soft_cap if known else None
    return key if key is not None and getattr(config, key, None) is not None else None


def has_attention(kind: type, attention: str) -> bool:
    """Whether a model class has an attention by transformers' name for it; True where the library has no mark of it."""
    return attention not in SUPPORT or bool(getattr(kind, SUPPORT[attention], False))


def attention_in_use(config: PretrainedConfig) -> str:
    """The attention that a loaded model's config names."""
    return config._attn_implementation


def one_row_only(config: PretrainedConfig) -> bool:
    """Whether the attention in use knows packed samples apart in a batch of one row only, and needs no mask."""
    return attention_in_use(config).startswith(("flash", "flex", "varlen"))


def why_no_masks(whole: PretrainedConfig, reach: int) -> str | None:
    """Why a model must not be given our 4-D masks for texts of up to `reach` tokens; None if it may.

    Some types ignore such a mask, some attend within windows that the mask would have to keep, some layers attend to
    nothing: each would give wrong numbers without a word. Types that no test has proved are not given any.
    """
    config = whole.get_text_config()  # of a model that also sees or hears; only the text models are proved
    if whole.model_type not in MASKABLE:
        return f"{whole.model_type} is not known to keep to attention masks"
    if strange := layer_kinds(config) - ATTENDS:
        return f"{config.model_type} has {', '.join(sorted(strange))} layers"
    width = window(config)
    if width and reach > width:
        return f"{config.model_type} attends to the last {width} tokens and a text has up to {reach}"
    return None


def masked_attention(model: Any) -> str | None:
    """The attention to change a model to, so that it takes 4-D masks; None where it takes them already."""
    if attention_in_use(model.config) in MASKED:
        return None
    return "sdpa" if has_attention(type(model), "sdpa") else "eager"


def layer_kinds(config: PretrainedConfig) -> set[str]:
    """The kinds of a model's layers where its config names them."""
    return set(getattr(config, "layer_types", None) or [])


def window(config: PretrainedConfig) -> int | None:
    """How many tokens back some of a model's layers attend at most; None: all of them attend to everything."""
    kinds, width = layer_kinds(config), getattr(config, "sliding_window", None)
    return width if width and ("sliding_attention" in kinds or not kinds) else None
