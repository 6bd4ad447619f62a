"""What a frozen model is read into: half the bytes where every bit of its output stays."""

import pytest
import torch
from helpers import ARCHITECTURES, items, make

from tofu.methods import references
from tofu.models import engines, loading
from tofu.runtime import ranks


@pytest.fixture(autouse=True)
def released():
    yield
    ranks.release()


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_reference_saved_in_bf16_is_kept_in_bf16(monkeypatch, tmp_path, name):
    """Its log-probabilities are equal to those of float32 weights, to the bit, under the autocast of the training."""
    make(name).bfloat16().save_pretrained(tmp_path)
    samples, found, sizes = [parts["forget"] for parts, _ in items()], [], []
    for narrow in (loading.narrow, lambda model: None):
        monkeypatch.setattr(loading, "narrow", narrow)
        reference = loading.load_frozen(str(tmp_path), engines.Engine("ddp", True), trained_in=torch.float32)
        found.append(references.reference_logps(reference, samples, 2, False))
        sizes.append(sum(one.numel() * one.element_size() for one in reference.parameters()))
    assert found[0] == found[1] and sizes[0] < sizes[1]


def test_what_is_kept_in_float32(tmp_path):
    """Weights that bf16 cannot say, norms, and what an output head shares with the embeddings."""
    model = make("Llama").bfloat16().float()
    last = model.model.layers[-1].mlp.down_proj
    last.weight.data[0, 0] += 1e-6
    loading.narrow(model)
    kinds = {name: one.dtype for name, one in model.named_parameters()}
    linear = [name for name in kinds if "proj" in name and name != "model.layers.1.mlp.down_proj.weight"]
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == {*linear, "lm_head.weight"}
    tied = make("Llama").bfloat16().float()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    loading.narrow(tied)
    assert tied.lm_head.weight.dtype == torch.float32 and last.weight.dtype == torch.float32


def test_weights_are_read_straight_to_a_device(model_folder):
    there, usual = loading.load(str(model_folder), device=torch.device("cpu")), loading.load(str(model_folder))
    for got, expected in zip(there.parameters(), usual.parameters(), strict=True):
        assert torch.equal(got, expected) and got.requires_grad
