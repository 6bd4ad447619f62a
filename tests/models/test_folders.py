"""A folder whose tokenizer is not its model's is refused, or told of."""

import json
import shutil

import pytest
import torch
from helpers import evaluate
from safetensors.torch import load_file, save_file

from tofu.models import folders
from utils import BadInput


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def resize(folder, rows: int) -> None:
    """The same model with other numbers of embeddings."""
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        weights[name] = torch.cat([old, old[: max(0, rows - len(old))]])[:rows].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


def check(folder) -> None:
    folders.check_vocabulary(str(folder), folders.load_tokenizer(str(folder), None))


def test_fewer_embeddings_than_tokens_are_refused(folder):
    resize(folder, 299)
    with pytest.raises(BadInput, match="its tokenizer has 300 tokens and the model 299 embeddings"):
        check(folder)


def test_an_end_token_beyond_the_embeddings_is_refused(folder):
    """It would be an IndexError after training began."""
    tokenizer = folders.load_tokenizer(str(folder), None)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(BadInput, match=r"its end token <\|end\|> has the number 300, and the model has 300 embeddings"):
        check(folder)


@pytest.mark.parametrize(("rows", "warned"), [(300, False), (320, False), (500, True)])
def test_a_tokenizer_of_another_vocabulary_is_told_of(folder, caplog, rows, warned):
    """A few per cent more embeddings than tokens are padding; many more are another model's."""
    resize(folder, rows)
    check(folder)
    said = f"the tokenizer has 300 tokens and the model {rows} embeddings: is it this model's?"
    assert (said in caplog.text) == warned


def test_weights_that_are_not_numbers_are_told_as_that(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="its weights hold NaN or infinite numbers"):
        evaluate(folder, "data/mini", tmp_path / "out", ds_size=2)
