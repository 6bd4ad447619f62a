"""How many bytes of tensors are alive, and were at most: counted at every operation, not by the system."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside make, and those that `hold` is told of, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # of a storage: where it is -> bytes
        self.now = self.peak = 0

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count these, if they are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.now += self.alive[key]
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.hold(*(one for one in tree_leaves(made) if isinstance(one, torch.Tensor)))
        return made


def saved_bytes(model: torch.nn.Module, forward: Any) -> int:
    """What a forward keeps for its backward, each storage once, without the model's own weights."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    del out
    return found
