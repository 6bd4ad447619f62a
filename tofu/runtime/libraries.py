"""The heavy libraries, imported without what a run does not use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def load_trainer() -> None:
    """Import transformers' Trainer, and with it peft and bitsandbytes, in about two thirds of the time.

    bitsandbytes calls torch.compile as it is imported, which loads all of inductor for functions that few runs call.
    """
    with compiled_when_called():
        from transformers import Trainer  # noqa: F401


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While the block runs, torch.compile puts its work off until the function is called for the first time."""
    import torch

    compile_now = torch.compile

    def put_off(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda function: put_off(function, **options)

        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile_now(model, **options)

        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = put_off  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.compile = compile_now
