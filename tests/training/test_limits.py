"""docs/limits.md: its tables are the estimate's. `WRITE=1 pytest tests/training/test_limits.py` writes them."""

import os
import re

import pytest
import torch
import transformers
from helpers import REPO

from tofu.models import sizes
from tofu.models.engines import Engine
from tofu.training import estimate, forecast
from tofu.training.estimate import Batch, Setting

PAGE = REPO / "docs" / "limits.md"
GB = 1e9
BATCH = Batch(5, 250, 850, 16)  # 16 finetuning samples, packed
SPARE = forecast.SPARE // 10**9  # GB
GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS = {  # the published shapes: name -> model type, config
    "llama3.2-1b": ("Llama", {"vocab_size": 128256, "num_hidden_layers": 16, **GROUPED, "tie_word_embeddings": True}),
    "phi": ("Phi", {"vocab_size": 51200, "num_hidden_layers": 24, "num_attention_heads": 32}),
    "qwen2.5-1.5b": ("Qwen2", {"vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 12}),
    "gemma2-2b": ("Gemma2", {"vocab_size": 256000, "num_hidden_layers": 26, "num_attention_heads": 8}),
    "stablelm": ("StableLm", {"vocab_size": 50304, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "llama3.2-3b": ("Llama", {"vocab_size": 128256, "num_hidden_layers": 28, "num_attention_heads": 24}),
    "phi3-mini": ("Phi3", {"vocab_size": 32064, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "llama2-7b": ("Llama", {"vocab_size": 32000, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "mistral-7b": ("Mistral", {"vocab_size": 32768, "num_hidden_layers": 32, **GROUPED}),
    "llama3.1-8b": ("Llama", {"vocab_size": 128256, "num_hidden_layers": 32, **GROUPED}),
}
WIDTHS = {  # hidden_size, intermediate_size
    **{"llama3.2-1b": (2048, 8192), "phi": (2048, 8192), "qwen2.5-1.5b": (1536, 8960), "gemma2-2b": (2304, 9216)},
    **{"stablelm": (2560, 6912), "llama3.2-3b": (3072, 8192), "phi3-mini": (3072, 8192), "llama2-7b": (4096, 11008)},
    **{"mistral-7b": (4096, 14336), "llama3.1-8b": (4096, 14336)},
}
MORE = {
    "qwen2.5-1.5b": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2-2b": {"num_key_value_heads": 4, "head_dim": 256},
    "stablelm": {"num_key_value_heads": 32},
    "llama3.2-3b": {"num_key_value_heads": 8, "tie_word_embeddings": True},
}
PUBLISHED = (1.24, 1.42, 1.54, 2.61, 2.80, 3.21, 3.82, 6.74, 7.25, 8.03)  # 10^9 weights


@pytest.fixture(scope="module")
def counted() -> dict[str, sizes.Sizes]:
    found = {}
    for name, (kind, config) in MODELS.items():
        hidden, wide = WIDTHS[name]
        config = config | MORE.get(name, {}) | {"hidden_size": hidden, "intermediate_size": wide}
        found[name] = sizes.sizes_of(sizes.shell(getattr(transformers, f"{kind}Config")(**config)))
    return found


def setting(optim: str = forecast.FUSED, engine: str = "ddp", processes: int = 1, stage: int = 0, **more) -> Setting:
    config = {"zero_optimization": {"stage": stage}} if stage else None
    half = more.get("rank") or optim.endswith("stochastic")
    weights = torch.bfloat16 if half else torch.float32
    return Setting(Engine(engine, True, config), processes, optim, weights, dropout=True, cuda=True, **more)


SETTINGS = {  # what a user writes -> its setting
    "full, `optim=adamw_torch_fused`": setting(),
    "full, `optim=paged_adamw_32bit`": setting("paged_adamw_32bit"),
    "full, `optim=adamw_bnb_8bit`": setting("adamw_bnb_8bit"),
    "full, `optim=adamw_8bit_stochastic`, one process": setting("adamw_8bit_stochastic"),
    "full, `engine=ddp`, 8 cards": setting(processes=8),
    "full, `engine=deepspeed`, ZeRO-2, 8 cards": setting(engine="deepspeed", processes=8, stage=2),
    "full, `engine=deepspeed`, ZeRO-3, 8 cards": setting(engine="deepspeed", processes=8, stage=3),
    "full, `engine=fsdp`, 8 cards": setting(engine="fsdp", processes=8),
    "`LoRA.r=8`": setting(rank=8),
    "`LoRA.r=8 LoRA.quantize=4bit`": setting(rank=8, quantize="4bit"),
}
COLUMNS = {  # of the table of models
    "full": setting(),
    "paged": setting("paged_adamw_32bit"),
    "8-bit": setting("adamw_bnb_8bit"),
    "stochastic": setting("adamw_8bit_stochastic"),
    "LoRA": setting(rank=8),
    "LoRA, 4bit": setting(rank=8, quantize="4bit"),
    "ZeRO-3, 8 cards": setting(engine="deepspeed", processes=8, stage=3),
}
ORDER = ("full", "paged", "stochastic", "LoRA", "LoRA, 4bit")  # the most exact arithmetic first


def number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def per_weight(counted) -> list[str]:
    large = counted["llama3.1-8b"]
    lines = ["| setting | weights | gradients | states |", "| --- | ---: | ---: | ---: |"]
    for words, given in SETTINGS.items():
        found = estimate.estimate(large, given, BATCH)
        each = (found.weights, found.gradients, found.states)
        lines.append(f"| {words} | {' | '.join(f'{count / large.weights:.2f}' for count in each)} |")
    return lines


def per_unit(counted) -> list[str]:
    lines = ["| model | float32 weights, bf16 autocast | bf16 weights | `LoRA.r=8` |", "| --- | ---: | ---: | ---: |"]
    kinds = (setting(), setting("adamw_8bit_stochastic"), setting(rank=8))
    for name, one in counted.items():
        each = (estimate.per_token(one, given, BATCH.width) / one.hidden for given in kinds)
        lines.append(f"| {name} | {' | '.join(f'{value:.0f}' for value in each)} |")
    return lines


def peaks(counted) -> list[str]:
    head = ["model", "weights, 10^9", *COLUMNS, "24 GB", "40 GB", "80 GB"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (1 + len(COLUMNS))}{' --- |' * 3}"]
    for name, one in counted.items():
        again = one.weights > 6e9
        found = {
            words: estimate.estimate(one, given._replace(checkpointing=again), BATCH).peak / GB
            for words, given in COLUMNS.items()
        }
        best = [next((words for words in ORDER if found[words] + SPARE <= card), "-") for card in (24, 40, 80)]
        lines.append(f"| {' | '.join([name, f'{one.weights / 1e9:.2f}', *map(number, found.values()), *best])} |")
    return lines


TABLES = {"bytes per weight": per_weight, "activations": per_unit, "peaks": peaks}


def test_the_shapes_are_the_published_ones(counted):
    assert [round(one.weights / 1e9, 2) for one in counted.values()] == pytest.approx(PUBLISHED, abs=0.006)


def test_the_tables_are_the_estimates(counted):
    text = PAGE.read_text()
    for name, make in TABLES.items():
        block = "\n".join([f"<!-- {name} -->", "", *make(counted), "", "<!-- end -->"])
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", block, text, flags=re.S)
        assert count == 1, name
    if os.environ.get("WRITE"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def test_the_numbers_in_the_text_are_the_estimates(counted):
    text = " ".join(PAGE.read_text().split())
    small, large = counted["llama3.2-1b"], counted["llama3.1-8b"]
    for one, again in ((small, False), (large, False), (small, True), (large, True)):
        found = estimate.estimate(one, setting(checkpointing=again), BATCH).activations / GB
        assert f"{found:.1f} GB" in text
    assert f"{estimate.estimate(small, setting(), BATCH).logits / GB:.1f} GB" in text
    assert f"{estimate.LOSS} bytes" in text and f"{SPARE} GB" in text
