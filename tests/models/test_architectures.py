"""The table of architectures holds what a model does."""

import json

import pytest
from helpers import ARCHITECTURES, make

import data_module
import dataloader
import utils
from tofu.models import architectures, engines, loadable


def test_flash_attention_gets_one_row():
    """It tells samples apart by their positions in a batch of one row only."""
    config = make("Llama").config
    config._attn_implementation = "flash_attention_2"
    assert dataloader.row_of(config) == data_module.ONE_ROW


def test_a_model_that_is_not_all_attention_is_not_packed(tmp_path):
    """One has linear attention, which knows no positions; one numbers positions by itself; one has no attention."""
    engine = engines.Engine("ddp", False)
    for kind in ("qwen3_next", "opt", "rwkv"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(utils.BadInput, match=f"packed samples of {kind} see each other.*: take packing=false"):
            loadable.check_loadable(str(tmp_path), engine, packing=True)
        loadable.check_loadable(str(tmp_path), engine, weights=False)
    assert {make(name).config.model_type for name in ARCHITECTURES} == set(architectures.PACKABLE)


def test_an_attention_that_a_model_lacks_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(utils.BadInput, match="attention=sdpa: gemma2 has no such attention: take attention=auto"):
        loadable.check_loadable(str(tmp_path), engines.Engine("ddp", False), "sdpa")
    loadable.check_loadable(str(tmp_path), engines.Engine("ddp", False), "eager", weights=False)
