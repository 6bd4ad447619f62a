"""Attention over packed samples without a mask is what packed samples see under masks."""

import copy

import pytest
import torch
from helpers import ARCHITECTURES, COMMON, GROUPED, make, prepared
from test_dataloader import assert_same, step, trainer_of
from transformers import AutoConfig

import data_module
from tofu.methods import references
from tofu.models import architectures, engines, loadable, varlen
from utils import BadInput

varlen.register()
NOT_THERE = {"Gemma2": "soft cap", "StableLm": "not known whether stablelm"}


@pytest.mark.parametrize("method", ["finetune", "KL", "idk"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NOT_THERE])
def test_it_is_packed_sdpa(tmp_path, name, method):
    """The same loss and gradients, of the policy beside a live reference too."""
    model, reference, terms, samples, logps = prepared(name, method)
    expected = step(trainer_of(model, terms, tmp_path, reference=reference, logps=logps), samples)
    for one in filter(None, (model, reference)):
        one.set_attn_implementation(varlen.NAME)
    trainer = trainer_of(model, terms, tmp_path, reference=reference, logps=logps)
    assert trainer.row == data_module.ONE_ROW
    assert_same(step(trainer, samples), expected)
    assert max(float(gradient.abs().max()) for gradient in expected[1].values()) > 1e-4


@pytest.mark.parametrize("name", ["Mistral", "Gemma3Text"])
def test_it_keeps_to_a_sliding_window(tmp_path, name):
    """One of 4 tokens, which is less than a sample has."""
    model, _, terms, samples, _ = prepared(name, "finetune")
    model.config.sliding_window = 4
    model = type(model)(model.config).eval()
    assert min(len(sample.input_ids) for parts, _ in samples for sample in parts.values()) > 4
    expected = step(trainer_of(model, terms, tmp_path), samples)
    config = copy.deepcopy(model.config)
    config.sliding_window = 100
    wide = type(model)(config)
    wide.load_state_dict(model.state_dict())
    whole = step(trainer_of(wide, terms, tmp_path), samples)
    model.set_attn_implementation(varlen.NAME)
    assert_same(step(trainer_of(model, terms, tmp_path), samples), expected)
    assert abs(float(whole[0] - expected[0])) > 1e-4


def test_reference_log_probabilities_are_those_of_sdpa():
    model, _, _, samples, _ = prepared("Llama", "npo")
    held = [parts["forget"] for parts, _ in samples]
    expected = references.reference_logps(model, held, 3, False)
    model.set_attn_implementation(varlen.NAME)
    got = references.reference_logps(model, held, 3, False)
    assert [got[sample] for sample in held] == pytest.approx([expected[sample] for sample in held], abs=1e-5)


def test_without_bounds_nothing_is_attended_to():
    """Samples would see each other, without a word."""
    model = make("Llama")
    model.set_attn_implementation(varlen.NAME)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q is missing"):
        model(torch.ones((1, 4), dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 4}, None),
        ("llama", {"attention_dropout": 0.1}, "neither the soft cap nor the dropout that this llama has"),
        ("gemma2", {"head_dim": 8}, "neither the soft cap nor the dropout that this gemma2 has"),
        ("llama", {"head_dim": 12}, "a head of this llama is 12 wide: it takes multiples of 8 up to 256"),
        ("stablelm", {}, NOT_THERE["StableLm"]),
        ("gpt2", {}, "not known whether gpt2 keeps packed samples apart so"),
    ],
)
def test_where_it_runs(name, more, why):
    config = AutoConfig.for_model(name, **{**(COMMON if name == "gpt2" else GROUPED), **more})
    found = varlen.why_not_there(config, bf16=True, packing=True, compiled=False)
    assert found is None if why is None else why in found
    if why is None:
        for how in ({"bf16": False}, {"packing": False}, {"compiled": True}):
            found = varlen.why_not_there(config, **{"bf16": True, "packing": True, "compiled": False, **how})
            assert found == "it goes with precision=bf16, packing=true and torch_compile=false"


def test_auto_takes_it_on_a_card_alone(model_folder):
    class Family:
        flash_attention2 = False

    about = (str(model_folder), engines.Engine("ddp", True), Family)
    how = {"packing": True, "compiled": False}
    assert loadable.attention_of(*about, "auto", **how) == (varlen.NAME if torch.cuda.is_available() else None)
    assert loadable.attention_of(*about, "eager", **how) == "eager"
    Family.flash_attention2 = True
    assert loadable.attention_of(*about, "auto", **how) == "flash_attention_2"
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="attention=varlen: it needs a CUDA GPU of the Ampere generation or a newer"):
            loadable.attention_of(*about, "varlen", **how)
    assert architectures.has_attention(type(make("Llama")), varlen.NAME)


@pytest.mark.gpu
def test_the_kernel_is_its_stand_in():
    """Of torch on a card, in bf16, grouped heads and a window too."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 40, 41, 64], dtype=torch.int32, device="cuda")
    for window in (None, 4):
        rows = [torch.randn(64, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
        rows = [row.requires_grad_() for row in rows]
        found = []
        for kernel in (varlen.on_card, varlen.plain):
            out = kernel(*rows, bounds, 35, 0.125, window)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), rows)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)
