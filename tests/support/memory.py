"""Memory that tells on the kernels: what is not written is NaN, and writes outside of a tensor are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["GuardedMemory", "poison"]

_GUARD = 16384  # bytes before and behind each tensor


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN; integers with a number that no index may have. In place."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)


class GuardedMemory:
    """Allocates poisoned CPU tensors between two poisoned guards, which :meth:`check` finds unchanged."""

    def __init__(self) -> None:
        self._storages: list[tuple[Tensor, int, int]] = []

    def empty_strided(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor as ``torch.empty_strided`` makes it."""
        extent = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        guard = _GUARD // dtype.itemsize
        storage = poison(torch.empty(extent + 2 * guard, dtype=dtype))
        self._storages.append((storage, guard, extent))
        return storage.as_strided(tuple(size), tuple(stride), guard)

    def copy(self, tensor: Tensor) -> Tensor:
        """``tensor`` with the same strides; gaps between its elements are poisoned."""
        copied = self.empty_strided(tensor.shape, tensor.stride(), tensor.dtype)
        if not any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            return copied.copy_(tensor)
        # Expanded dimensions share their elements: write each once.
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        copied[index].copy_(tensor[index])
        return copied

    def check(self) -> None:
        """Raise AssertionError if a guard was written to."""
        for storage, guard, extent in self._storages:
            fresh = poison(torch.empty(1, dtype=storage.dtype))
            for name, part in (("before", storage[:guard]), ("behind", storage[guard + extent :])):
                same = part.isnan() if part.is_floating_point() else part == fresh
                if not bool(same.all()):
                    raise AssertionError(f"a kernel wrote {name} a tensor of {extent} elements of {storage.dtype}")
