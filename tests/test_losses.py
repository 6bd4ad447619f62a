"""Objectives against worked numbers, properties that every loss must have, and gradients against finite differences."""

import inspect
import json
import math

import pytest
import torch
from conftest import SHARED, needs_shared

import losses
from losses import FORGET, RETAIN, Scored

EVERY = [*FORGET.values(), *RETAIN.values()]
NUMBERS = {"beta": 0.1, "scale": None}


def view(logits, labels, attended=None) -> Scored:
    """The view of a padded (B, T, V) batch with causal-LM labels (B, T): where the next label is an answer's."""
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    keep = following != -100 if attended is None else attended.bool()
    return Scored(logits[keep], following[keep], keep.nonzero()[:, 0])


@pytest.fixture(scope="module")
def toy() -> dict:
    """METHODS.md's fixture, built from its formula: logits for forget, retain and alternate rows of two models."""

    def grid(a, b, c, d):
        i, t, v = torch.meshgrid(torch.arange(2), torch.arange(5), torch.arange(6), indexing="ij")
        return ((a * i + b * t + c * v + d) % 11).double() / 4

    def boosted(z, y, x):
        z = z.clone()
        for i in range(2):
            for t in range(4):
                if y[i, t + 1] != -100:
                    z[i, t, y[i, t + 1]] += x
        return z

    n = -100
    y = {
        "forget": torch.tensor([[n, n, 3, 1, 4], [n, 2, 5, n, n]]),
        "retain": torch.tensor([[n, 0, 2, 4, n], [n, n, 1, 3, 4]]),
        "idk": torch.tensor([[n, n, 0, 4, n], [n, 5, 1, 4, n]]),
    }
    a = {"retain": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])}
    z = {
        "forget": boosted(grid(3, 5, 7, 1), y["forget"], 2),
        "ref_forget": boosted(grid(2, 3, 5, 4), y["forget"], 3),
        "retain": boosted(grid(4, 7, 2, 3), y["retain"], 2),
        "ref_retain": boosted(grid(1, 2, 9, 5), y["retain"], 2.5),
        "idk": boosted(grid(5, 1, 8, 2), y["idk"], 1),
        "ref_idk": boosted(grid(6, 4, 3, 7), y["idk"], 0.5),
    }
    return {"y": y, "a": a, "z": z}


def packed_view(logits, labels, attended=None) -> Scored:
    """The same view from one row without padding, as packing lays samples end to end: cut, join, select by position."""
    lengths = (labels != -100).long().mul(torch.arange(labels.shape[1])).amax(1) + 1
    if attended is not None:
        lengths = attended.sum(1)
    row = torch.cat([z[:n] for z, n in zip(logits, lengths, strict=True)])
    following = torch.cat([torch.cat([y[1:n], y.new_tensor([-100])]) for y, n in zip(labels, lengths, strict=True)])
    sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    keep = torch.ones_like(following, dtype=torch.bool) if attended is not None else following != -100
    return Scored(row[keep], following[keep], sample[keep])


def arguments(loss, logits, labels, attended, view=view) -> dict:
    """What a loss takes by name, from padded logits of each part and reference."""
    contract = losses.contract(loss)
    found = {}
    for name in (*contract.parts, *contract.refs):
        part = name.removeprefix("ref_")
        kind = {**contract.parts, **contract.refs}[name]
        found[name] = view(logits[name], labels[part], attended[part] if kind == "attended" else None)
        if kind == "logp":
            found[name] = losses.sequence_logp(found[name])
    return {**found, **{name: NUMBERS[name] for name in contract.args}}


def value(loss, toy, **numbers) -> float:
    return loss(**{**arguments(loss, toy["z"], toy["y"], toy["a"]), **numbers}).mean().item()


def test_worked_numbers(toy):
    """METHODS.md sections 2, 3.1-3.5 and 10."""
    expected = pytest.approx
    assert value(FORGET["grad_ascent"], toy) == expected(-0.857549, abs=1e-6)
    assert value(RETAIN["nll"], toy) == expected(0.904942, abs=1e-6)
    assert value(RETAIN["kl"], toy) == expected(0.293448, abs=1e-6)
    assert value(RETAIN["kl_completion"], toy) == expected(0.242579, abs=1e-6)
    assert value(FORGET["grad_ascent"], toy) + value(RETAIN["nll"], toy) == expected(0.047393, abs=1e-6)
    assert value(FORGET["grad_ascent"], toy) + value(RETAIN["kl"], toy) == expected(-0.564100, abs=2e-6)
    assert value(FORGET["grad_ascent"], toy) + value(RETAIN["kl_completion"], toy) == expected(-0.614970, abs=2e-6)
    assert value(FORGET["idk"], toy) == expected(1.122149, abs=1e-6)
    assert value(FORGET["idk_nll"], toy) + value(RETAIN["nll"], toy) == expected(2.287739, abs=2e-6)
    assert value(FORGET["dpo"], toy) == expected(12.073872, abs=1e-6)
    assert value(FORGET["dpo"], toy, scale=1.0) == expected(0.603694, abs=1e-6)
    assert value(FORGET["dpo"], toy) + value(RETAIN["nll"], toy) == expected(12.978814, abs=2e-6)


@needs_shared
def test_shared_fixtures(toy):
    """The tensors made here are the shared ones, and every shared number of these objectives comes out."""
    shared = json.loads((SHARED / "fixtures.json").read_text())
    letter = {"forget": "F", "retain": "R", "idk": "I"}
    for name, z in toy["z"].items():
        assert z.tolist() == shared["tensors"][f"Z{letter[name.removeprefix('ref_')]}{'0' * name.startswith('ref_')}"]
    for part, y in toy["y"].items():
        assert y.tolist() == shared["tensors"][f"y{letter[part]}"]
    ascent, nll, kl, kl_completion = (value(f, toy) for f in (losses.grad_ascent, *RETAIN.values()))
    logp = {name: losses.sequence_logp(view(z, toy["y"][name.removeprefix("ref_")])) for name, z in toy["z"].items()}
    found = {
        **{"ce_forget": -ascent, "ce_retain": nll, "ce_idk": value(losses.idk_nll, toy)},
        **{f"seq_nll_{part}": (-logp[part]).tolist() for part in ("forget", "idk")},
        **{f"seq_nll_{part}_ref": (-logp[f"ref_{part}"]).tolist() for part in ("forget", "idk")},
        **{"grad_ascent": ascent, "grad_diff": ascent + nll},
        **{"kl_retain_attended": kl, "kl_retain_answer_tokens": kl_completion},
        **{"KL_method_attended": ascent + kl, "KL_method_answer_tokens": ascent + kl_completion},
        "idk_code_concat_mean": value(losses.idk, toy),
        "idk_paper_sum_of_means": value(losses.idk_nll, toy) + nll,
        "dpo_peer_2_over_beta_beta0.1": value(losses.dpo, toy),
        "dpo_npo_paper_1_over_beta_beta0.1": value(losses.dpo, toy, scale=10.0),
        "dpo_standard_beta0.1": value(losses.dpo, toy, scale=1.0),
    }
    for name, number in found.items():
        assert number == pytest.approx(shared["losses"][name], abs=1e-9), name


def test_dpo_by_hand():
    """One scored token each. The model halves the answer's probability and doubles the refusal's: margin log 4."""
    true = Scored(torch.log(torch.tensor([[0.25, 0.75]])), torch.tensor([0]), torch.tensor([0]))
    refusal = Scored(torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([1]), torch.tensor([0]))
    reference = {"ref_forget": torch.log(torch.tensor([0.5])), "ref_idk": torch.log(torch.tensor([0.25]))}
    loss = losses.dpo(true, refusal, **reference, beta=1.0, scale=1.0)
    assert loss.item() == pytest.approx(-math.log(4 / 5), abs=1e-6)


def test_at_the_start_where_both_models_agree(toy):
    z = {**toy["z"], **{f"ref_{part}": toy["z"][part] for part in ("forget", "retain", "idk")}}
    assert value(losses.dpo, {**toy, "z": z}) == pytest.approx(2 * math.log(2) / 0.1, abs=1e-9)
    assert value(losses.kl, {**toy, "z": z}) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", EVERY, ids=lambda f: f.__name__)
class TestEveryLoss:
    def test_terms_are_what_the_signature_says(self, loss, toy):
        contract = losses.contract(loss)
        terms = loss(**arguments(loss, toy["z"], toy["y"], toy["a"]))
        views = arguments(loss, toy["z"], toy["y"], toy["a"])
        tokens = sum(len(views[part].labels) for part in contract.parts)
        assert terms.shape == ((2,) if contract.unit == "sequence" else (tokens,))
        assert terms.dtype == torch.float64
        single = {name: z.float() for name, z in toy["z"].items()}
        assert loss(**arguments(loss, single, toy["y"], toy["a"])).dtype == torch.float32

    def test_unscored_positions_get_no_gradient(self, loss, toy):
        contract = losses.contract(loss)
        z = {name: tensor.clone().requires_grad_() for name, tensor in toy["z"].items()}
        loss(**arguments(loss, z, toy["y"], toy["a"])).mean().backward()
        for part, kind in contract.parts.items():
            labels = toy["y"][part]
            scored = torch.cat([labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], 1)
            if kind == "attended":
                scored = toy["a"][part].bool()
            gradient = z[part].grad.abs().sum(-1)
            assert (gradient[~scored] == 0).all() and gradient[scored].max() > 0

    def test_packed_equals_padded(self, loss, toy):
        z = {name: tensor.clone().requires_grad_() for name, tensor in toy["z"].items()}
        parts = [z[part] for part in losses.contract(loss).parts]
        padded, packed = (loss(**arguments(loss, z, toy["y"], toy["a"], make)) for make in (view, packed_view))
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)
        gradients = (torch.autograd.grad(terms.mean(), parts) for terms in (padded, packed))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-12)

    def test_padding_does_not_count(self, loss, toy):
        def wider(tensor, fill):
            return torch.cat([tensor, torch.full_like(tensor[:, :2], fill)], 1)

        plain = loss(**arguments(loss, toy["z"], toy["y"], toy["a"]))
        z = {name: wider(tensor, 9.0) for name, tensor in toy["z"].items()}
        y = {name: wider(tensor, -100) for name, tensor in toy["y"].items()}
        a = {name: wider(tensor, 0) for name, tensor in toy["a"].items()}
        torch.testing.assert_close(loss(**arguments(loss, z, y, a)), plain)

    def test_logits_count_only_up_to_a_constant(self, loss, toy):
        plain = loss(**arguments(loss, toy["z"], toy["y"], toy["a"]))
        moved = {name: z + 7 * k - torch.arange(5)[:, None] for k, (name, z) in enumerate(toy["z"].items())}
        torch.testing.assert_close(loss(**arguments(loss, moved, toy["y"], toy["a"])), plain)

    def test_order_of_examples_does_not_matter(self, loss, toy):
        def turned(tensors):
            return {name: tensor.flip(0) for name, tensor in tensors.items()}

        plain = loss(**arguments(loss, toy["z"], toy["y"], toy["a"])).mean()
        other = loss(**arguments(loss, turned(toy["z"]), turned(toy["y"]), turned(toy["a"]))).mean()
        torch.testing.assert_close(other, plain)

    def test_gradient_equals_finite_differences(self, loss, toy):
        parts = list(losses.contract(loss).parts)

        def total(*logits):
            z = {**toy["z"], **dict(zip(parts, logits, strict=True))}
            return loss(**arguments(loss, z, toy["y"], toy["a"])).mean()

        assert torch.autograd.gradcheck(total, [toy["z"][part].clone().requires_grad_() for part in parts])


def test_numbers_have_no_home_in_the_code():
    for loss in EVERY:
        assert all(p.default is p.empty for p in inspect.signature(loss).parameters.values())


def test_contract_reads_signatures():
    assert losses.contract(losses.dpo) == losses.Contract(
        {"forget": "completion", "idk": "completion"},
        {"ref_forget": "logp", "ref_idk": "logp"},
        ("beta", "scale"),
        "sequence",
    )
    assert losses.contract(losses.kl) == ({"retain": "attended"}, {"ref_retain": "attended"}, (), "token")
    assert losses.contract(losses.kl_completion).refs == {"ref_retain": "completion"}
    assert list(losses.contract(losses.idk).parts) == ["idk", "retain"]


def test_idk_returns_refusal_terms_first(toy):
    views = arguments(losses.idk, toy["z"], toy["y"], toy["a"])
    terms = losses.idk(**views)
    torch.testing.assert_close(terms[: len(views["idk"].labels)], losses.token_nll(views["idk"]))


def test_contract_refuses():
    def unknown(forgotten: Scored) -> losses.PerToken: ...

    def no_unit(forget: Scored): ...

    def default(forget: Scored, *, beta: float = 1.0) -> losses.PerToken: ...

    def no_view(forget) -> losses.PerToken: ...

    def tensor(forget: Scored, retain: torch.Tensor) -> losses.PerToken: ...

    for loss, why in (
        (unknown, "neither a part"),
        (no_unit, "PerToken or PerSequence"),
        (default, "has a default"),
        (no_view, "annotate forget as Scored"),
        (tensor, "annotate retain as Scored"),
    ):
        with pytest.raises(TypeError, match=why):
            losses.contract(loss)
