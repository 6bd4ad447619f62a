"""A method is one object: the terms of its objective, and hooks for what it does besides.

A method without state is a file of config/forget_loss/ alone: the plain `Method`. One with state names its class there
(`class: tofu.methods.rmu.Rmu`), which is imported only when the method is chosen.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import utils
from tofu.methods import losses
from utils import BadInput


@dataclass(frozen=True)
class Term:
    """One summand of an objective: weight * mean of function(views..., **args) over the global batch."""

    name: str  # forget or retain; names it in the log
    function: Callable[..., Tensor]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    bound: float = 0.0  # what counts is the mean's excess over it: a constraint's

    @property
    def contract(self) -> losses.Contract:
        """What the function's signature asks for."""
        return losses.contract(self.function)


class Method:
    """Terms, and hooks that do nothing by default. Every rank calls every hook at the same point, but for one.

    Attributes:
        terms: the summands of the objective.
        keys: the method's own keys of its config, an instance of `Keys`.
        start: folder or hub id of the model that the run starts from; set before `prepare`.
        steps_per_epoch, num_epochs: optimiser steps in an epoch, and epochs; set before `prepare`.
        block: the decoder block (from 0) whose output terms on hidden states look at.
        tensors: name -> tensor, for losses that take one by that name.
    """

    supplies: tuple[str, ...] = ()  # the names in `tensors` once `prepare` has run
    sees_states = False  # whether `prepare` sets `block`, so that terms may look at hidden states

    @dataclass
    class Keys:
        """The method's own keys in config/forget_loss/: names, types, and how a missing one is made (metadata)."""

    def __init__(self, terms: Sequence[Term], **own: Any) -> None:
        self.terms = list(terms)
        self.keys: Any = self.Keys(**own)
        self.start = ""
        self.steps_per_epoch = self.num_epochs = 1
        self.block: int | None = None
        self.tensors: dict[str, Tensor] = {}

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Look at a whole checked config before anything is loaded; `cfg.forget_loss` holds the method's keys.

        Raises:
            BadInput: the method cannot run so.
        """

    def reads(self) -> tuple[str, ...]:
        """Files that the run reads for this method: none of them may be removed by overwriting an older run."""
        return ()

    def rows(self, forget: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str] | None]:
        """The forget rows to train on, and for each a wrong answer as its part `idk`; None: refusals are drawn.

        Raises:
            BadInput: what the method reads does not fit these rows.
        """
        return forget, None

    def prepare(self, model: Any, out: Path, seed: int) -> None:
        """Change the model that will train, just loaded and not yet wrapped by an engine; `out` is the run's folder."""

    def trained_blocks(self, config: Any) -> range | None:
        """The blocks (from 0) whose MLP output projections alone train; None: nothing is frozen by the method.

        Args:
            config: the model's, of its text part.
        """
        return None

    def term_weight(self, term: Term, progress: float) -> float:
        """What multiplies a term in the step at hand; `progress` is the share of the run's steps that are done."""
        return term.weight

    def after_step(self, means: Mapping[str, float]) -> None:
        """After an optimiser step: each term's mean over the step's global batch, by name; the same on all ranks."""

    def before_saving(self, model: torch.nn.Module) -> None:
        """Change the whole trained model, adapters merged, in float32, on rank 0 alone, before it is saved."""

    def result(self) -> dict[str, float]:
        """Numbers for every line of the log and for finished.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on later needs, beside the model."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def overrides(method: Method, hook: str) -> bool:
    """Whether a method does something in a hook: what the hook needs is computed only then."""
    return getattr(type(method), hook) is not getattr(Method, hook)


def finetuning() -> Method:
    """Finetuning is the retain term alone."""
    return Method([Term("retain", losses.nll)])


def terms_of(cfg: Any) -> list[Term]:
    """The terms that a file of config/forget_loss/ names: forget_weight * forget + retain_weight * retain."""
    terms = [Term("forget", losses.FORGET[cfg.forget], cfg.forget_weight, dict(cfg.forget_args))]
    if cfg.retain is not None:
        terms.append(Term("retain", losses.RETAIN[cfg.retain], cfg.retain_weight, dict(cfg.retain_args)))
    return terms


def class_of(cfg: Any) -> type[Method]:
    """The class that a file of config/forget_loss/ names as `class`; the plain `Method` where it names none.

    Raises:
        BadInput: no such module or class, or one that is no `Method`.
    """
    name = cfg.get("class")
    if name is None:
        return Method
    module, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"forget_loss.class={name} cannot be imported ({utils.one_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise BadInput(f"forget_loss.class={name} is no subclass of {Method.__module__}.Method")
    return found


def method_of(cfg: Any) -> Method:
    """The method of a checked file of config/forget_loss/."""
    kind = class_of(cfg)
    return kind(terms_of(cfg), **{one.name: cfg[one.name] for one in fields(kind.Keys)})


def contract_of(key: str, name: str) -> losses.Contract:
    """What the loss `name`, which the config key `key` names, asks for.

    Raises:
        BadInput: there is no such loss, or its signature says too little.
    """
    table = losses.FORGET if key.endswith("forget") else losses.RETAIN
    utils.choice(key, name, table)
    try:
        return losses.contract(table[name])
    except TypeError as error:
        raise BadInput(f"{key}={name}: {error}") from None


def check_terms(cfg: Any) -> None:
    """Look at what the terms of a config and the method's class ask of each other; losses and numbers are checked.

    Raises:
        BadInput: an unknown loss; two terms that cannot share a forward; a term that needs what the class has not.
    """
    method, kind = cfg.forget_loss, class_of(cfg.forget_loss)
    terms = {"forget": contract_of("forget_loss.forget", method.forget)}
    if method.retain is not None:
        terms["retain"] = contract_of("forget_loss.retain", method.retain)
        for part, view in terms["retain"].parts.items():
            if len(both := {view, terms["forget"].parts.get(part, view)}) > 1 and "states" in both:
                raise BadInput(
                    f"forget_loss.retain={method.retain}: {method.forget} reads the {part} samples' logits, and so "
                    "cannot have their hidden states: take forget_loss.retain=nll, kl, kl_completion or null"
                )
    for name, contract in terms.items():
        if contract.states and not kind.sees_states:
            raise BadInput(
                f"forget_loss.{name}={method[name]} looks at hidden states, as forget_loss=rmu does: it needs "
                "++forget_loss.depth=... ++forget_loss.blocks=... ++forget_loss.class=tofu.methods.rmu.Rmu"
            )
        if lacking := [one for one in contract.supplied if one not in kind.supplies]:
            raise BadInput(
                f"forget_loss.{name}={method[name]} takes the tensor {lacking[0]}, which {kind.__name__} does not "
                "supply: name a class that does, ++forget_loss.class=..."
            )
    if cfg.torch_compile and any(contract.states for contract in terms.values()):
        raise BadInput(f"torch_compile=true does not go with {method.name}, which looks at hidden states: leave it out")


def parts_of(terms: Sequence[Term]) -> list[str]:
    """The parts of a batch that the terms score, each once."""
    return list(dict.fromkeys(part for term in terms for part in term.contract.parts))


def needs_of(terms: Sequence[Term]) -> set[str]:
    """What of the reference model the terms compare with: "logp" of sequences, "live" distributions, or nothing."""
    return {"logp" if kind == "logp" else "live" for term in terms for kind in term.contract.refs.values()}


def weights_of(
    term: Term,
    sample: Mapping[str, Tensor],
    weight: Tensor,
    lengths: Mapping[str, Sequence[int] | None] = MappingProxyType({}),
) -> Tensor:
    """The 0/1 weight of each value that a term returns, in its order: its parts' tokens, or the samples.

    Args:
        sample: part -> (N,) the sample that each of its scored positions belongs to.
        weight: (B,) of the samples; 0 at fillers.
        lengths: part -> (B,) scored positions of each sample, where that is known.
    """
    if term.contract.unit == "sequence":
        return weight
    found = {part: sample[part] for part in term.contract.parts}
    if skip := term.args.get("skip"):
        found = {part: of[losses.later(of, skip, lengths.get(part))] for part, of in found.items()}
    return torch.cat([weight[of] for of in found.values()])
