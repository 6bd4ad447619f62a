"""What one model predicts of a batch, as the losses see it: named views of logits or hidden states."""

from typing import Annotated, NamedTuple

from torch import Tensor


class Scored(NamedTuple):
    """One model's logits at the scored positions of B samples, and what should have been predicted there."""

    logits: Tensor  # (N, V) float32, unnormalised; N = scored positions of all samples
    labels: Tensor  # (N,) token ids; -100 at positions of an `Attended` view that predict a prompt token
    sample: Tensor  # (N,) which sample each position belongs to, 0..B-1, in any order; every sample has one at least
    lengths: tuple[int, ...] | None = None  # (B,) positions of each sample; None: counted, for which a GPU has to wait


class States(NamedTuple):
    """What one block of a model hands on where it reads the answers of B samples, end tokens too."""

    states: Tensor  # (N, hidden) float32
    sample: Tensor  # (N,) as of `Scored`
    lengths: tuple[int, ...] | None = None


def count_of(view: Scored | States) -> int:
    """How many samples a view holds."""
    return len(view.lengths) if view.lengths is not None else int(view.sample.max()) + 1


Attended = Annotated[Scored, "attended"]  # every position read, prompt too; a plain Scored: answer and end token only
