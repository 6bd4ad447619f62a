"""Objectives against worked numbers, properties that every loss must have, and gradients against finite differences."""

import inspect
import json
import math
from collections import defaultdict

import pytest
import torch
from helpers import GOLDEN, METHODS, NEEDED, checked
from omegaconf import OmegaConf

from tofu.cli import command_line, schema
from tofu.cli.schema import CONFIG_DIR
from tofu.methods import losses, objective
from tofu.methods.losses import FORGET, RETAIN, Scored, States

EVERY = [*FORGET.values(), *RETAIN.values()]
NUMBERS = defaultdict(lambda: 1.0)  # of hyper-parameters: a new one is tried with 1
NUMBERS |= {"beta": 0.1, "scale": None, "margin": 0.5, "c": 2.0, "beta1": 2.0, "beta2": 0.5, "skip": 1}
STATES = [loss for loss in EVERY if losses.contract(loss).states]


def view(logits, labels, attended=None) -> Scored:
    """The view of a padded (B, T, V) batch with causal-LM labels (B, T): where the next label is an answer's."""
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    keep = following != -100 if attended is None else attended.bool()
    return Scored(logits[keep], following[keep], keep.nonzero()[:, 0])


@pytest.fixture(scope="module")
def toy() -> dict:
    """The worked example of docs/methods.md: logits and states of forget, retain and alternate rows of two models."""

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

    def hidden(a, b, c, d):
        i, t, v = torch.meshgrid(torch.arange(2), torch.arange(5), torch.arange(4), indexing="ij")
        return ((a * i + b * t + c * v + d) % 7).double() / 2

    h = {"forget": hidden(2, 3, 5, 1), "retain": hidden(1, 2, 3, 0), "ref_retain": hidden(3, 1, 2, 5)}
    return {"y": y, "a": a, "z": z, "h": h, "u": torch.tensor([1, 2, 2, 4]).double() / 5}


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


def states_view(states, labels) -> States:
    """Of a padded (B, T, d) tensor: where the answers' tokens are read, unshifted."""
    keep = labels != -100
    return States(states[keep], keep.nonzero()[:, 0])


def arguments(loss, toy, view=view) -> dict:
    """What a loss takes by name, from padded logits or hidden states of each part and reference."""
    contract = losses.contract(loss)
    found = {name: toy["u"] for name in contract.supplied}
    for name in (*contract.parts, *contract.refs):
        part = name.removeprefix("ref_")
        kind = {**contract.parts, **contract.refs}[name]
        if kind == "states":
            found[name] = states_view(toy["h"][name], toy["y"][part])
            continue
        found[name] = view(toy["z"][name], toy["y"][part], toy["a"][part] if kind == "attended" else None)
        if kind == "logp":
            found[name] = losses.sequence_logp(found[name])
    return {**found, **{name: number(loss, name) for name in contract.args}}


def number(loss, name):
    """What a hyper-parameter is where its value does not matter: NUMBERS', or that of the first YAML of the loss."""
    if name in NUMBERS:
        return NUMBERS[name]
    files = (OmegaConf.load(path) for path in sorted((schema.CONFIG_DIR / "forget_loss").glob("*.yaml")))
    return next(file for file in files if file.forget == loss.__name__).forget_args[name]


def value(loss, toy, **numbers) -> float:
    return loss(**{**arguments(loss, toy), **numbers}).mean().item()


# what each name means on the worked example, and what the switches of docs/methods.md lead to: overrides -> value
NAMED = {
    ("grad_ascent",): -0.857549,
    ("grad_diff",): 0.047393,
    ("KL",): -0.564100,
    ("KL", "forget_loss.retain=kl_completion"): -0.614970,
    ("idk",): 1.122149,
    ("idk", "forget_loss.forget=idk_nll", "forget_loss.retain=nll"): 2.287739,
    ("dpo",): 12.073872,
    ("dpo", "forget_loss.forget_args.scale=1"): 0.603694,
    ("dpo", "forget_loss.forget_args.scale=10"): 6.036936,
    ("dpo_grad_diff",): 12.978814,
    ("npo",): 13.225641,
    ("npo", "forget_loss.forget_args.beta=0.5"): 2.180071,
    ("npo", "forget_loss.forget_args.beta=1"): 0.847947,
    ("npo_grad_diff",): 14.130583,
    ("npo_KL",): 13.519089,
    ("npo_KL", "forget_loss.retain=kl_completion"): 13.468220,
    ("simnpo", "split=forget10"): 0.009137,
    ("simnpo", "split=forget05"): 0.086890,
    ("simnpo", "split=forget01"): 0.086890,
    ("simnpo", "split=forget10", "forget_loss.forget_args.beta=0.5"): 1.995846,
    ("simnpo", "split=forget10", "forget_loss.forget_args.margin=0.5"): 0.079458,
    ("simnpo", "split=forget10", "forget_loss.forget_args.margin=0.111111111"): 0.014957,  # the paper's gamma 0.5
    ("simnpo_grad_diff", "split=forget10"): 0.906084,
    ("simnpo_grad_diff", "split=forget05"): 0.1375 * 0.08688976 + 0.90494206,
    ("rmu",): 4.027083,
    ("undial",): 2.634953,
    ("undial", "forget_loss.forget_args.beta=3"): 2.505815,
    ("altpo", f"forget_loss.alternates={__file__}"): 12.978814,
    ("wga",): -0.316320,
    ("wga", "forget_loss.forget_args.beta=5"): -0.026112,
    ("wga", "forget_loss.forget=tnpo", "forget_loss.forget_args.beta=4"): -0.401052,
    ("wga_grad_diff",): 0.588622,
    ("satimp",): -0.009804,
    ("satimp", "forget_loss.forget_args.beta2=0.1"): -0.023640,
    ("satimp_grad_diff",): 0.080690,
    ("ceu",): 1.917648,
    ("ceu", "forget_loss.forget_args.skip=0"): 2.037281,
    ("pdu",): 63.177192,
    ("me_gd",): 0.955688,
    ("me_gd", "forget_loss.forget=max_entropy_reverse"): 0.1 * 0.43799636 + 0.90494206,
    ("task_vector",): 0.857549,  # what it is trained on; the negation is of weights
}


@pytest.mark.parametrize("overrides", NAMED, ids=" ".join)
def test_named_method(toy, overrides):
    """What each name means, composed as a command line would and put together as the trainer does."""
    method, *more = overrides
    terms = objective.method_of(checked("forget", f"forget_loss={method}", *more).forget_loss).terms
    total = sum(term.weight * (value(term.function, toy, **term.args) - term.bound) for term in terms)
    assert total == pytest.approx(NAMED[overrides], abs=1.1e-6)


def test_every_method_has_its_number():
    assert {overrides[0] for overrides in NAMED} == set(METHODS)
    assert {command_line.ALIASES[name] for name in command_line.ALIASES} <= set(METHODS)


def test_terms_alone(toy):
    """Single terms of those methods."""
    assert value(losses.nll, toy) == pytest.approx(0.904942, abs=1e-6)
    assert value(losses.kl, toy) == pytest.approx(0.293448, abs=1e-6)
    assert value(losses.kl_completion, toy) == pytest.approx(0.242579, abs=1e-6)
    assert value(losses.rmu, toy) == pytest.approx(1.829167, abs=1e-6)
    assert value(losses.embed_diff, toy) == pytest.approx(2.197917, abs=1e-6)
    assert value(losses.pdu, toy) == pytest.approx(2.682986, abs=1e-6)


def test_fixtures(toy):
    """The tensors made here are those of the file, and every number of it for these objectives comes out."""
    shared = json.loads((GOLDEN / "fixtures.json").read_text())
    letter = {"forget": "F", "retain": "R", "idk": "I"}
    for name, z in toy["z"].items():
        assert z.tolist() == shared["tensors"][f"Z{letter[name.removeprefix('ref_')]}{'0' * name.startswith('ref_')}"]
    for part, y in toy["y"].items():
        assert y.tolist() == shared["tensors"][f"y{letter[part]}"]
    for name, h in toy["h"].items():
        assert h.tolist() == shared["tensors"][f"H{letter[name.removeprefix('ref_')]}{'0' * name.startswith('ref_')}"]
    assert toy["u"].tolist() == shared["tensors"]["u"]
    ascent, nll, kl, kl_completion = (
        value(f, toy) for f in (losses.grad_ascent, losses.nll, losses.kl, losses.kl_completion)
    )
    simnpo = [value(losses.simnpo, toy, beta=beta, margin=0) for beta in (2.5, 4.5, 0.5)]
    rmu, embed_diff = value(losses.rmu, toy), value(losses.embed_diff, toy)
    satimp = value(losses.satimp, toy, beta1=5, beta2=1)
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
        **{f"npo_beta{beta}": value(losses.npo, toy, beta=beta) for beta in (0.1, 0.5, 1.0)},
        "npo_grad_diff_beta0.1": value(losses.npo, toy) + nll,
        "npo_KL_answer_tokens_beta0.1": value(losses.npo, toy) + kl_completion,
        **{f"simnpo_beta{beta}_delta0": one for beta, one in zip(("2.5", "4.5", "0.5"), simnpo, strict=True)},
        "simnpo_beta4.5_delta0.5": value(losses.simnpo, toy, beta=4.5, margin=0.5),
        "simnpo_paper_beta4.5_gamma0.5": value(losses.simnpo, toy, beta=4.5, margin=0.5 / 4.5),
        "simnpo_grad_diff_beta4.5_w0.125": 0.125 * simnpo[1] + nll,
        **{"rmu_forget_openunlearning": rmu, "rmu_retain_openunlearning": embed_diff},
        "rmu_openunlearning_alpha1": rmu + embed_diff,
        **{f"undial_answer_mean_beta{beta}": value(losses.undial, toy, beta=beta) for beta in (3, 10)},
        **{f"wga_beta{beta}": value(losses.wga, toy, beta=beta) for beta in (1, 5)},
        "wga_grad_diff_beta1": value(losses.wga, toy, beta=1) + nll,
        "tnpo_beta4": value(losses.tnpo, toy, beta=4),
        **{"satimp_5_1": satimp, "satimp_5_1_plus_0.1_retain": satimp + 0.1 * nll},
        "satimp_5_0.1": value(losses.satimp, toy, beta1=5, beta2=0.1),
        **{f"ceu_skip{skip}": value(losses.ceu, toy, skip=skip) for skip in (1, 0)},
        "pdu_forget_shifted_mask": value(losses.pdu, toy),
        "me_klUp_answer": value(losses.max_entropy, toy),
        "me_klpU_answer": value(losses.max_entropy_reverse, toy),
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
    same = {**toy, "z": z, "h": {**toy["h"], "ref_retain": toy["h"]["retain"]}}
    assert value(losses.dpo, same) == pytest.approx(2 * math.log(2) / 0.1, abs=1e-9)
    assert value(losses.npo, same) == pytest.approx(13.862944, abs=1e-6)
    assert value(losses.kl, same) == pytest.approx(0, abs=1e-12)
    assert value(losses.embed_diff, same) == 0


def gradients_of(loss, toy, part, **numbers):
    z = {**toy["z"], part: toy["z"][part].clone().requires_grad_()}
    loss(**{**arguments(loss, {**toy, "z": z}), **numbers}).mean().backward()
    return z[part].grad


def test_npo_tends_to_ascent_of_the_sequences(toy):
    """As beta tends to 0: the gradient of the mean over sequences of their log-probabilities."""
    gentle = gradients_of(losses.npo, toy, "forget", beta=1e-7)
    z = toy["z"]["forget"].clone().requires_grad_()
    losses.sequence_logp(view(z, toy["y"]["forget"])).mean().backward()
    torch.testing.assert_close(gentle, z.grad, rtol=1e-5, atol=1e-6)


def test_ceu_gradient(toy):
    """p_true on the true logit, -p_j p_true / (1 - p_true) on the others, both over the number of tokens."""
    found = gradients_of(losses.ceu, toy, "forget", skip=0)
    scored = view(toy["z"]["forget"], toy["y"]["forget"])
    p = scored.logits.softmax(-1)
    true = p.gather(1, scored.labels[:, None])
    expected = (-p * true / (1 - true)).scatter(1, scored.labels[:, None], true) / len(p)
    following = torch.cat([toy["y"]["forget"][:, 1:], torch.full((2, 1), -100)], 1)
    torch.testing.assert_close(found[following != -100], expected)


@pytest.mark.parametrize("loss", [losses.wga, losses.satimp, losses.tnpo], ids=lambda f: f.__name__)
def test_weights_take_no_gradient(loss, toy):
    """The gradient is that of weighted likelihoods with the weights as constants."""
    found = gradients_of(loss, toy, "forget")
    given = arguments(loss, toy)
    nll = losses.token_nll(given["forget"])
    weights = -loss(**given) / nll
    z = toy["z"]["forget"].clone().requires_grad_()
    (-weights * losses.token_nll(view(z, toy["y"]["forget"]))).mean().backward()
    torch.testing.assert_close(found, z.grad)


def test_certain_tokens_stay_finite():
    """A token that is certain, and one that is impossible: every term and gradient that has to be a number is one."""
    for logits in ([[200.0, 0.0, 0.0]], [[-200.0, 0.0, 0.0]]):
        z = torch.tensor(logits).requires_grad_()
        scored = Scored(z, torch.tensor([0]), torch.tensor([0]))
        for loss in (losses.wga, losses.satimp, losses.ceu, losses.max_entropy, losses.max_entropy_reverse, losses.pdu):
            terms = loss(scored, **{name: {**NUMBERS, "skip": 0}[name] for name in losses.contract(loss).args})
            (gradient,) = torch.autograd.grad(terms.sum(), z)
            assert terms.isfinite().all() and gradient.isfinite().all(), loss.__name__


def test_later_leaves_out_the_first_tokens_of_each_sample():
    sample = torch.tensor([1, 1, 1, 0, 0, 2])
    for lengths in (None, tuple(torch.bincount(sample).tolist())):
        assert losses.later(sample, 1, lengths).tolist() == [1, 2, 4]
        assert losses.later(sample, 2, lengths).tolist() == [2]


@pytest.mark.parametrize("loss", STATES, ids=lambda f: f.__name__)
class TestEveryLossOfStates:
    def test_gradient_equals_finite_differences(self, loss, toy):
        part = next(iter(losses.contract(loss).parts))
        total = lambda h: loss(**arguments(loss, {**toy, "h": {**toy["h"], part: h}})).mean()  # noqa: E731
        assert torch.autograd.gradcheck(total, [toy["h"][part].clone().requires_grad_()])

    def test_only_the_answers_states_count_and_in_any_order(self, loss, toy):
        part = next(iter(losses.contract(loss).parts))
        plain = loss(**arguments(loss, toy))
        moved = torch.where((toy["y"][part] != -100)[..., None], toy["h"][part], 9.0)
        torch.testing.assert_close(loss(**arguments(loss, {**toy, "h": {**toy["h"], part: moved}})), plain)
        turned = {name: h.flip(0) for name, h in toy["h"].items()}
        other = {**toy, "h": turned, "y": {name: y.flip(0) for name, y in toy["y"].items()}}
        torch.testing.assert_close(loss(**arguments(loss, other)).flip(0), plain)


@pytest.mark.parametrize("loss", [loss for loss in EVERY if loss not in STATES], ids=lambda f: f.__name__)
class TestEveryLoss:
    def test_terms_are_what_the_signature_says(self, loss, toy):
        contract = losses.contract(loss)
        terms = loss(**arguments(loss, toy))
        views = arguments(loss, toy)
        tokens = sum(len(views[part].labels) for part in contract.parts)
        if "skip" in contract.args:
            tokens -= NUMBERS["skip"] * 2
        assert terms.shape == ((2,) if contract.unit == "sequence" else (tokens,))
        assert terms.dtype == torch.float64
        single = {name: z.float() for name, z in toy["z"].items()}
        assert loss(**arguments(loss, {**toy, "z": single})).dtype == torch.float32

    def test_unscored_positions_get_no_gradient(self, loss, toy):
        contract = losses.contract(loss)
        z = {name: tensor.clone().requires_grad_() for name, tensor in toy["z"].items()}
        loss(**arguments(loss, {**toy, "z": z})).mean().backward()
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
        padded, packed = (loss(**arguments(loss, {**toy, "z": z}, make)) for make in (view, packed_view))
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)
        gradients = (torch.autograd.grad(terms.mean(), parts) for terms in (padded, packed))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-12)

    def test_padding_does_not_count(self, loss, toy):
        def wider(tensor, fill):
            return torch.cat([tensor, torch.full_like(tensor[:, :2], fill)], 1)

        plain = loss(**arguments(loss, toy))
        z = {name: wider(tensor, 9.0) for name, tensor in toy["z"].items()}
        y = {name: wider(tensor, -100) for name, tensor in toy["y"].items()}
        a = {name: wider(tensor, 0) for name, tensor in toy["a"].items()}
        torch.testing.assert_close(loss(**arguments(loss, {**toy, "z": z, "y": y, "a": a})), plain)

    def test_logits_count_only_up_to_a_constant(self, loss, toy):
        plain = loss(**arguments(loss, toy))
        moved = {name: z + 7 * k - torch.arange(5)[:, None] for k, (name, z) in enumerate(toy["z"].items())}
        torch.testing.assert_close(loss(**arguments(loss, {**toy, "z": moved})), plain)

    def test_order_of_examples_does_not_matter(self, loss, toy):
        def turned(tensors):
            return {name: tensor.flip(0) for name, tensor in tensors.items()}

        plain = loss(**arguments(loss, toy)).mean()
        other = loss(**arguments(loss, {**toy, **{key: turned(toy[key]) for key in "zya"}})).mean()
        torch.testing.assert_close(other, plain)

    def test_gradient_equals_finite_differences(self, loss, toy, monkeypatch):
        """In float64. What a loss detaches is a constant there: the values of the point where the gradient is taken."""
        parts = list(losses.contract(loss).parts)
        held, detach = {}, torch.Tensor.detach

        def total(*logits):
            z = {**toy["z"], **dict(zip(parts, logits, strict=True))}
            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "detach", lambda tensor: held.setdefault("it", detach(tensor)))
                return mean(z)

        def mean(z):
            return loss(**arguments(loss, {**toy, "z": z})).mean()

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
    assert losses.contract(losses.kl) == ({"retain": "attended"}, {"ref_retain": "attended"}, (), "token", ())
    assert losses.contract(losses.kl_completion).refs == {"ref_retain": "completion"}
    assert list(losses.contract(losses.idk).parts) == ["idk", "retain"]


def test_idk_returns_refusal_terms_first(toy):
    views = arguments(losses.idk, toy)
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


def test_the_methods_page_repeats_the_configs():
    """docs/methods.md's table: every method, its own lr and epochs, and its value on the worked example."""
    rows = {}
    for line in (CONFIG_DIR.parent / "docs" / "methods.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and cells[0].startswith("[`"):
            rows[cells[0].split("`")[1]] = cells
    assert set(rows) == set(METHODS), "a method needs its row in docs/methods.md"
    for name, cells in rows.items():
        method = checked("forget", f"forget_loss={name}", "split=forget10", *NEEDED.get(name, [])).forget_loss
        lr, epochs = cells[4].split(", ")
        assert (float(lr), int(epochs)) == (method.lr, method.num_epochs), name
        value = next(number for (its, *more), number in NAMED.items() if its == name and len(more) <= 1)
        assert name == "task_vector" or float(cells[5]) == pytest.approx(value, abs=1e-6), name
