"""The objectives: pure functions from named views of a batch to terms, one a token or one a sequence.

What a function needs is its signature. Positional names are parts of the batch (`forget`, `idk`, `retain`) and
references to the frozen starting model: `ref_forget: Tensor` is its sequence log-probabilities, `ref_retain: Scored`
its own view of the same positions. Keyword-only names are hyper-parameters; their numbers live in config/forget_loss/.
The return annotation says what the terms are, and the objective is their mean over the global batch.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor


class Scored(NamedTuple):
    """One model's logits at the scored positions of B samples, and what should have been predicted there."""

    logits: Tensor  # (N, V) float32, unnormalised; N = scored positions of all samples
    labels: Tensor  # (N,) token ids; -100 at positions of an `Attended` view that predict a prompt token
    sample: Tensor  # (N,) which sample each position belongs to, 0..B-1, in any order; every sample has one at least


Attended = Annotated[Scored, "attended"]  # every position read, prompt too; a plain Scored: answer and end token only
PerToken = Annotated[Tensor, "token"]  # (N,) terms, in the order of the views in the signature
PerSequence = Annotated[Tensor, "sequence"]  # (B,) terms


class Contract(NamedTuple):
    """What a loss's signature asks for."""

    parts: dict[str, str]  # part of the batch -> "completion" or "attended", in the signature's order
    refs: dict[str, str]  # reference -> "logp", "completion" or "attended"
    args: tuple[str, ...]  # hyper-parameters
    unit: str  # "token" or "sequence"


PARTS = ("forget", "idk", "retain")


@functools.cache
def contract(loss: Callable[..., Tensor]) -> Contract:
    """Read a loss's signature.

    Raises:
        TypeError: a positional name that is no part or reference, or has no view; a default; or no unit.
    """
    hints = get_type_hints(loss, include_extras=True)
    parts, refs, args = {}, {}, []
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is not parameter.empty:
                raise TypeError(f"{loss.__name__}: {name} has a default; its number belongs in config/forget_loss/")
            args.append(name)
        elif name in PARTS:
            parts[name] = _view(loss, name, hints.get(name))
        elif name.removeprefix("ref_") in PARTS:
            refs[name] = "logp" if hints.get(name) is Tensor else _view(loss, name, hints.get(name))
        else:
            raise TypeError(f"{loss.__name__}: {name} is neither a part ({', '.join(PARTS)}) nor ref_ and a part")
    unit = get_args(hints.get("return"))[-1] if get_origin(hints.get("return")) is Annotated else None
    if unit not in ("token", "sequence"):
        raise TypeError(f"{loss.__name__}: annotate what it returns as PerToken or PerSequence")
    return Contract(parts, refs, tuple(args), unit)


def _view(loss: Callable[..., Tensor], name: str, hint: Any) -> str:
    if hint not in (Scored, Attended):
        raise TypeError(f"{loss.__name__}: annotate {name} as Scored (completion positions) or Attended (all)")
    return "attended" if hint == Attended else "completion"


def token_nll(view: Scored) -> Tensor:
    """(N,) negative log-likelihood of each label, nats."""
    return F.cross_entropy(view.logits, view.labels, reduction="none")


def sequence_logp(view: Scored) -> Tensor:
    """(B,) log-probability of each sample's scored tokens, nats: a sum, not a mean."""
    nll = token_nll(view)
    sums = nll.new_zeros(int(view.sample.max()) + 1)
    return -sums.index_add(0, view.sample, nll)


def grad_ascent(forget: Scored) -> PerToken:
    """Ascend the likelihood loss of the forget answers: -nll a token, unbounded below.

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
    """Learn a refusal to the forget questions: nll a token. With retain `nll` the formula of TOFU's paper."""
    return token_nll(idk)


def dpo(
    forget: Scored, idk: Scored, ref_forget: Tensor, ref_idk: Tensor, *, beta: float, scale: float | None
) -> PerSequence:
    """Prefer a refusal to the true answer, measured against the starting model.

        loss_b = -scale * log sigmoid(beta * ((logp_idk - ref_idk) - (logp_forget - ref_forget)))

    Args:
        ref_forget, ref_idk: (B,) the starting model's sequence log-probabilities, nats.
        beta: inverse temperature, > 0.
        scale: factor in front; None for 2 / beta, as the unlearning codes have it; 1 in the DPO paper.

    Returns:
        (B,) nats; each scale * log(2) at the first step, where both models agree.

    Source: Rafailov et al. 2023, arXiv 2305.18290; for unlearning Zhang et al. 2024, arXiv 2404.05868.
    """
    win, lose = sequence_logp(idk) - ref_idk, sequence_logp(forget) - ref_forget
    return -(2 / beta if scale is None else scale) * F.logsigmoid(beta * (win - lose))


def nll(retain: Scored) -> PerToken:
    """Cross entropy of the retain answers, one term a token. Source: TOFU's "gradient difference", arXiv 2401.06121."""
    return token_nll(retain)


def kl(retain: Attended, ref_retain: Attended) -> PerToken:
    """Stay near the starting model on every token of the retain samples: KL(reference, current) a position, >= 0 nats.

    Source: Maini et al. 2024, arXiv 2401.06121, prompt tokens included, padding not (TOFU's code averages over it too).
    """
    return _forward_kl(retain, ref_retain)


def kl_completion(retain: Scored, ref_retain: Scored) -> PerToken:
    """`kl` at the retain answers' tokens only."""
    return _forward_kl(retain, ref_retain)


def _forward_kl(current: Scored, reference: Scored) -> Tensor:
    """(N,) KL(reference, current), nats."""
    logp, ref_logp = F.log_softmax(current.logits, -1), F.log_softmax(reference.logits, -1)
    return F.kl_div(logp, ref_logp, reduction="none", log_target=True).sum(-1)


FORGET = {f.__name__: f for f in (grad_ascent, idk, idk_nll, dpo)}
RETAIN = {f.__name__: f for f in (nll, kl, kl_completion)}
