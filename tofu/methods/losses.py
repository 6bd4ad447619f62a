"""The objectives: pure functions from named views of a batch to terms, one per token or one per sequence.

What a function needs is its signature. Positional names are parts of the batch (`forget`, `idk`, `retain`), references
to the frozen reference model (`ref_forget: Tensor` is its sequence log-probabilities, `ref_retain: Scored` its own view
of the same positions), and tensors that the method supplies (`control: Tensor`, rmu's vector). Keyword-only names are
hyper-parameters; their numbers live in config/forget_loss/ (`skip`: no term for so many tokens at each answer's
start). The return annotation says what the terms are, and the objective is their mean over the global batch.

A new loss is a function and its name in `FORGET` or `RETAIN` below. Its signature is read when it is used.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from tofu.models.views import Attended, Scored, States, count_of

PerToken = Annotated[Tensor, "token"]  # (N,) terms, in the order of the views in the signature
PerSequence = Annotated[Tensor, "sequence"]  # (B,) terms


class Contract(NamedTuple):
    """What a loss's signature asks for."""

    parts: dict[str, str]  # part of the batch -> "completion", "attended" or "states", in the signature's order
    refs: dict[str, str]  # reference -> "logp", "completion", "attended" or "states"
    args: tuple[str, ...]  # hyper-parameters
    unit: str  # "token" or "sequence"
    supplied: tuple[str, ...] = ()  # tensors that the method supplies (`objective.Method.tensors`)

    @property
    def states(self) -> bool:
        """Whether it looks at hidden states."""
        return "states" in self.parts.values()


PARTS = ("forget", "idk", "retain")
VIEWS = {Scored: "completion", Attended: "attended", States: "states"}


@functools.cache
def contract(loss: Callable[..., Tensor]) -> Contract:
    """Read a loss's signature.

    Raises:
        TypeError: a positional name that is no part or reference, or has no view; a default; or no unit.
    """
    hints = get_type_hints(loss, include_extras=True)
    parts, refs, args, supplied = {}, {}, [], []
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is not parameter.empty:
                raise TypeError(f"{loss.__name__}: {name} has a default; its number belongs in config/forget_loss/")
            args.append(name)
        elif name in PARTS:
            parts[name] = _view(loss, name, hints.get(name))
        elif name.removeprefix("ref_") in PARTS:
            refs[name] = "logp" if hints.get(name) is Tensor else _view(loss, name, hints.get(name))
        elif hints.get(name) is Tensor:
            supplied.append(name)
        else:
            raise TypeError(f"{loss.__name__}: {name} is neither a part ({', '.join(PARTS)}) nor ref_ and a part")
    unit = get_args(hints.get("return"))[-1] if get_origin(hints.get("return")) is Annotated else None
    if unit not in ("token", "sequence"):
        raise TypeError(f"{loss.__name__}: annotate what it returns as PerToken or PerSequence")
    return Contract(parts, refs, tuple(args), unit, tuple(supplied))


def _view(loss: Callable[..., Tensor], name: str, hint: Any) -> str:
    if hint not in VIEWS:
        raise TypeError(f"{loss.__name__}: annotate {name} as Scored (completion positions), Attended (all) or States")
    return VIEWS[hint]


def token_nll(view: Scored) -> Tensor:
    """(N,) negative log-likelihood of each label, nats."""
    return F.cross_entropy(view.logits, view.labels, reduction="none")


def sequence_logp(view: Scored) -> Tensor:
    """(B,) log-probability of each sample's scored tokens, nats: a sum, not a mean."""
    nll = token_nll(view)
    return -nll.new_zeros(count_of(view)).index_add(0, view.sample, nll)


def sample_mean(values: Tensor, view: Scored | States) -> Tensor:
    """(B,) the mean of each sample's values (N,), which stand in the order of the view's positions."""
    sums, counts = values.new_zeros(count_of(view)), view.sample.new_zeros(count_of(view))
    return sums.index_add(0, view.sample, values) / counts.index_add(0, view.sample, torch.ones_like(view.sample))


def later(sample: Tensor, skip: int, lengths: Sequence[int] | None = None) -> Tensor:
    """(K,) the positions but for the first `skip` of each sample, whose positions stand in their order.

    Args:
        sample: (N,) which sample each position belongs to.
        lengths: (B,) positions of each sample; None: they are counted, for which a GPU has to wait.
    """
    ordered, order = torch.sort(sample, stable=True)
    place = torch.arange(len(sample), device=sample.device) - torch.searchsorted(ordered, ordered)
    first = torch.empty_like(place).scatter_(0, order, place) < skip
    count = int((~first).sum()) if lengths is None else sum(max(0, length - skip) for length in lengths)
    return torch.argsort(first.int(), stable=True)[:count]


def grad_ascent(forget: Scored) -> PerToken:
    """Ascend the likelihood loss of the forget answers: -nll per token, unbounded below.

    Source: Jang et al. 2022, arXiv 2210.01504; as TOFU's baseline Maini et al. 2024, arXiv 2401.06121. A mean over
    tokens as in TOFU's code (NPO's paper writes a sum over the sequence).
    """
    return -token_nll(forget)


def idk(idk: Scored, retain: Scored) -> PerToken:
    """Learn a refusal to the forget questions together with the retain answers: one mean over both sets' tokens.

    Source: Maini et al. 2024, arXiv 2401.06121 ("preference optimisation"), as TOFU's code computes it: refusals are
    short, so they weigh less than in the paper's sum of two means, which is `idk_nll` with the retain term `nll`.
    """
    return torch.cat([token_nll(idk), token_nll(retain)])


def idk_nll(idk: Scored) -> PerToken:
    """Learn a refusal to the forget questions: nll per token. With retain `nll` the formula of TOFU's paper."""
    return token_nll(idk)


def dpo(
    forget: Scored, idk: Scored, ref_forget: Tensor, ref_idk: Tensor, *, beta: float, scale: float | None
) -> PerSequence:
    """Prefer a refusal to the true answer, measured against the reference model.

        loss_b = -scale * log sigmoid(beta * ((logp_idk - ref_idk) - (logp_forget - ref_forget)))

    Args:
        ref_forget, ref_idk: (B,) the reference model's sequence log-probabilities, nats.
        beta: inverse temperature, > 0.
        scale: factor in front; None for 2 / beta, as the unlearning codes have it; 1 in the DPO paper.

    Returns:
        (B,) nats; each scale * log(2) at the first step, where both models agree.

    Source: Rafailov et al. 2023, arXiv 2305.18290; for unlearning Zhang et al. 2024, arXiv 2404.05868.
    """
    win, lose = sequence_logp(idk) - ref_idk, sequence_logp(forget) - ref_forget
    return -(2 / beta if scale is None else scale) * F.logsigmoid(beta * (win - lose))


def npo(forget: Scored, ref_forget: Tensor, *, beta: float) -> PerSequence:
    """Negative preference optimisation: push answers below the reference model, with a pull that fades as they fall.

        loss_b = -(2 / beta) * log sigmoid(-beta * (logp_b - ref_b))

    Args:
        ref_forget: (B,) the reference model's sequence log-probabilities, nats.
        beta: inverse temperature, > 0; as it tends to 0 the gradient tends to that of the mean of `logp_b`.

    Returns:
        (B,) nats, >= 0; each 2 * log(2) / beta at the first step, where both models agree.

    Source: Zhang et al. 2024, arXiv 2404.05868. Sums over tokens, as the authors' code; `simnpo` divides by length.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (sequence_logp(forget) - ref_forget))


def simnpo(forget: Scored, *, beta: float, margin: float) -> PerSequence:
    """NPO without a reference: the mean log-probability of an answer's tokens below a margin.

        loss_b = -(2 / beta) * log sigmoid(-beta * (logp_b / n_b + margin))

    Args:
        beta: sharpness, > 0, in nat^-1.
        margin: nats per token, inside beta as in the authors' code (`delta` in OpenUnlearning); the paper's gamma is
            beta * margin.

    Source: Fan et al. 2024, arXiv 2410.07163; n_b counts the end token.
    """
    mean_nll = sample_mean(token_nll(forget), forget)
    return -(2 / beta) * F.logsigmoid(beta * (mean_nll - margin))


def rmu(forget: States, control: Tensor, *, c: float) -> PerSequence:
    """Steer the hidden states of the forget answers towards a fixed random direction.

        loss_b = mean over the answer's tokens of mean_d (h - c * control)^2

    Args:
        control: (hidden,) a unit vector, drawn once for the run.
        c: its length.

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218. The paper sums over d; the public codes take the mean.
    """
    return sample_mean((forget.states - c * control).square().mean(-1), forget)


def undial(forget: Scored, ref_forget: Scored, *, beta: float) -> PerToken:
    """Learn the reference model's own distribution, the true token's logit lowered by `beta`: soft cross entropy.

    Returns:
        (N,) nats; least where both agree, at the target's entropy.

    Source: Dong et al. 2024, arXiv 2402.10052, at answer tokens (the authors train on plain text, all its tokens).
    """
    labels = forget.labels[:, None]
    lowered = ref_forget.logits.scatter_add(-1, labels, torch.full_like(labels, -beta, dtype=ref_forget.logits.dtype))
    return -(F.softmax(lowered, -1) * F.log_softmax(forget.logits, -1)).sum(-1)


def wga(forget: Scored, *, beta: float) -> PerToken:
    """Weighted gradient ascent: each token weighed by its own probability to the power `beta`, which takes no gradient.

    Source: Wang et al. 2025, arXiv 2502.19301.
    """
    nll = token_nll(forget)
    return -(-beta * nll).exp().detach() * nll


def tnpo(forget: Scored, ref_forget: Scored, *, beta: float) -> PerToken:
    """Token-wise NPO: gradient ascent weighed by 2 p^beta / (p^beta + p_ref^beta + 1e-5), which takes no gradient.

    Source: Wang et al. 2025, arXiv 2502.19301, who take beta 4.
    """
    nll = token_nll(forget)
    power, ref_power = (-beta * nll).exp(), (-beta * token_nll(ref_forget)).exp()
    return -(2 * power / (power + ref_power + 1e-5)).detach() * nll


def satimp(forget: Scored, *, beta1: float, beta2: float) -> PerToken:
    """Gradient ascent, each token weighed by p^beta1 (1 - p)^beta2, which takes no gradient.

    Args:
        beta1: weighs down what is forgotten already (saturation).
        beta2: weighs down what is still certain (importance).

    Source: Yang et al. 2025, arXiv 2505.11953.
    """
    nll = token_nll(forget)
    p = (-nll).exp()
    return -(p**beta1 * (1 - p).clamp(min=0) ** beta2).detach() * nll


def ceu(forget: Scored, *, skip: int) -> PerToken:
    """Learn the model's own distribution without the true token: cross entropy with q = softmax(z, true one at -inf).

    Args:
        skip: tokens at the start of each answer that are left out; the terms are of the others.

    Returns:
        (N - those left out,) nats.

    Source: Yang 2025, arXiv 2503.01224; a footnote there leaves out the first token. `q` takes no gradient.
    """
    kept = later(forget.sample, skip, forget.lengths)
    logits, labels = forget.logits[kept], forget.labels[kept]
    q = F.softmax(logits.detach().scatter(-1, labels[:, None], -torch.inf), -1)
    return -(q * F.log_softmax(logits, -1)).sum(-1)


def pdu(forget: Scored) -> PerToken:
    """Flatten the logits: (max - mean over the vocabulary)^2 per token. Its retain term is a constraint (`epsilon`).

    Source: Entesari et al. 2025, arXiv 2506.05314; at the positions that predict the answer.
    """
    return (forget.logits.amax(-1) - forget.logits.mean(-1)).square()


def max_entropy(forget: Scored) -> PerToken:
    """Towards the uniform distribution: KL(uniform, p) per token, nats.

    Source: Yuan et al. 2024 (ME+GD), arXiv 2410.08109, as their code has the direction.
    """
    logp = F.log_softmax(forget.logits, -1)
    return -math.log(logp.shape[-1]) - logp.mean(-1)


def max_entropy_reverse(forget: Scored) -> PerToken:
    """`max_entropy` in the other direction: KL(p, uniform) per token, nats; log V minus the entropy."""
    logp = F.log_softmax(forget.logits, -1)
    return math.log(logp.shape[-1]) + (logp.exp() * logp).sum(-1)


def learn(forget: Scored) -> PerToken:
    """Finetune on the forget answers, nll per token: what a task vector is made of. Source: arXiv 2212.04089."""
    return token_nll(forget)


def nll(retain: Scored) -> PerToken:
    """Cross entropy of the retain answers, nll per token. Source: TOFU's "gradient difference", arXiv 2401.06121."""
    return token_nll(retain)


def kl(retain: Attended, ref_retain: Attended) -> PerToken:
    """Stay near the reference model on all tokens of the retain samples: KL(reference, current) per position, nats.

    Source: Maini et al. 2024, arXiv 2401.06121, prompt tokens included, padding not (TOFU's code averages over it too).
    """
    return _forward_kl(retain, ref_retain)


def kl_completion(retain: Scored, ref_retain: Scored) -> PerToken:
    """`kl` at the retain answers' tokens only."""
    return _forward_kl(retain, ref_retain)


def embed_diff(retain: States, ref_retain: States) -> PerSequence:
    """Stay near the reference model's hidden states of the retain answers: mean over tokens of mean_d (h - h_ref)^2.

    Source: Li et al. 2024 (WMDP), arXiv 2403.03218, with `rmu`'s reductions.
    """
    return sample_mean((retain.states - ref_retain.states).square().mean(-1), retain)


def _forward_kl(current: Scored, reference: Scored) -> Tensor:
    """(N,) KL(reference, current), nats."""
    logp, ref_logp = F.log_softmax(current.logits, -1), F.log_softmax(reference.logits, -1)
    return F.kl_div(logp, ref_logp, reduction="none", log_target=True).sum(-1)


# A loss that reads the forget set, or refusals to its questions, is a forget loss. A new one is named here.
FORGET = {
    loss.__name__: loss
    for loss in (
        grad_ascent,
        idk,
        idk_nll,
        dpo,
        npo,
        simnpo,
        rmu,
        undial,
        wga,
        tnpo,
        satimp,
        ceu,
        pdu,
        max_entropy,
        max_entropy_reverse,
        learn,
    )
}
RETAIN = {loss.__name__: loss for loss in (nll, kl, kl_completion, embed_diff)}
