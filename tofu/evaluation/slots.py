"""How many prompts an evaluation generates at once: what `batch_size: auto` comes to."""

import logging
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tofu.evaluation import inference, row_logs
from tofu.evaluation.sets import Task
from tofu.runtime import cards, ranks

log = logging.getLogger(__name__)

AUTO = "auto"
LEAST, MOST = 30, 256  # 256 slots need a third of the forwards of 30; a set has 300 rows, so more are of no use
ON_CPU = LEAST  # a log stays what it was to the byte, and more are hardly faster there
SHARE = 0.5  # of the free memory becomes slots; the rest is for what a forward needs besides
SHORT = 0.9  # of it, where half of it is not enough for the fewest slots


def cache_bytes(config: PretrainedConfig, itemsize: int, room: int) -> int:
    """Bytes of keys and values in one slot of a model's cache.

    Args:
        config: the model's; of one that also sees or hears, its text model's part counts.
        itemsize: bytes of a number in the cache.
        room: tokens that a slot holds.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = max(width, getattr(text, "global_head_dim", None) or 0)  # Gemma 4: some layers have wider heads
    return 2 * text.num_hidden_layers * heads * width * itemsize * room


def slots(free: int, per_slot: int) -> int:
    """How many slots fit: an even number from LEAST to MOST; fewer where memory is short, and never less than 1.

    Args:
        free: bytes that are free, once the model is on the device.
        per_slot: bytes that each slot needs.
    """
    wanted = min(MOST, max(LEAST, int(SHARE * free) // per_slot))
    found = min(wanted, int(SHORT * free) // per_slot)
    return max(1, found - found % 2)


def needs(config: PretrainedConfig, itemsize: int, tasks: Sequence[Task]) -> tuple[int, int]:
    """Bytes that a slot needs, its cache and a step's logits, and bytes that scoring needs at most for its logits.

    Args:
        config, itemsize: as of `cache_bytes`.
    """
    longest = max((len(p) + b for task in tasks for p, b in zip(task.prompts, task.budgets, strict=True)), default=1)
    room = cards.up(longest + inference.WIDEST, cards.ROUND_TO)  # as a card's cache is
    words = config.get_text_config().vocab_size
    step = 2 * inference.WIDEST * words * itemsize  # twice: a soft cap makes a copy
    scored = row_logs.scored_at_once(config) * words * (4 + itemsize)  # and in float32
    return cache_bytes(config, itemsize, room) + step, scored


def resolve(asked: int | str, model: PreTrainedModel, tasks: Sequence[Task]) -> tuple[int, int]:
    """What `batch_size` comes to for a model that is on its device; all ranks get the same.

    Args:
        asked: a number, or AUTO: ON_CPU on a CPU, and on CUDA what the free memory holds on every rank.
        tasks: the sets to be evaluated.

    Returns:
        Slots, and over how many ranks each set's prompts have to be spread at least: on CUDA, auto leaves none idle.
        A number that was asked for is taken as it is.
    """
    if asked != AUTO:
        return int(asked), 1
    if model.device.type != "cuda":
        return ON_CPU, 1
    per_slot, scored = needs(model.config, model.dtype.itemsize, tasks)
    free = _free(model.device)
    found = min(ranks.merge({ranks.rank(): slots(free - scored, per_slot)}).values())
    log.info("batch_size=auto: %d slots, %.1f MB each; %.1f GB are free", found, per_slot / 1e6, free / 1e9)
    return found, ranks.world_size()


def _free(device: torch.device) -> int:
    """Bytes that a CUDA device has left for this process: what nobody has, and what the allocator holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
