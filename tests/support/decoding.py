"""Decode calls and what they should give: each sequence by itself, from the definition of the member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import parallax_compile as plx

from .oracle import low_precision

__all__ = ["Call", "random_blocks"]


@dataclass
class Call:
    """A decode call on random caches whose unused memory is NaN.

    Attributes:
        lengths: keys of each sequence before the call.
        queries: rows of each sequence; ``new``: keys that the call appends.
        page: page size of shuffled pages; 0 is a contiguous cache.
        keep: which keys a row sees, by the positions of row and key; the masks of ``spec`` and ``block_mask`` say the same.
    """

    lengths: tuple[int, ...]
    capacity: int = 100
    q_heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    new: int = 0
    width: int = 32
    value_width: int = 24
    dtype: torch.dtype = torch.bfloat16
    page: int = 0
    spec: plx.AttentionSpec = plx.PARALLAX
    keep: Callable[[Tensor, Tensor], Tensor] | None = None
    score: Any = None
    covariance: Any = None
    offset: float = 0.0
    options: dict[str, Any] | None = None
    block_mask: BlockMask | None = None
    inputs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        batch = len(self.lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shift = self.offset * normal(1, 1, 1, self.width)
        self.totals = [min(n + self.new, self.capacity) for n in self.lengths]
        key, value = (normal(batch, self.kv_heads, self.capacity, w) for w in (self.width, self.value_width))
        key = key + shift
        for b, n in enumerate(self.lengths):
            key[b, :, n:], value[b, :, n:] = float("nan"), float("nan")
        found: dict[str, Any] = {
            "query": normal(batch, self.q_heads, self.queries, self.width),
            "key_cache": key,
            "value_cache": value,
            "probe": 0.3 * normal(batch, self.q_heads, self.queries, self.width),
            "key": normal(batch, self.kv_heads, self.new, self.width) + shift if self.new else None,
            "value": normal(batch, self.kv_heads, self.new, self.value_width) if self.new else None,
        }
        if self.spec.probe.kind != "learned":
            found["probe"] = None
        found = {name: None if x is None else x.to(self.dtype) for name, x in found.items()}
        self.order: Tensor | None = None
        if self.page:
            count = -(-self.capacity // self.page)
            self.order = torch.randperm(batch * count + 1, generator=generator)[: batch * count].view(batch, count)
            for name in ("key_cache", "value_cache"):
                found[name] = self._paged(found[name], batch * count + 1)
        self.inputs = found | {
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "page_table": None if self.order is None else self.order.to(torch.int32),
        }

    def _paged(self, cache: Tensor, pages: int) -> Tensor:
        assert self.order is not None
        pool = torch.full((pages, self.page, *cache.shape[1::2]), float("nan"), dtype=cache.dtype)
        padding = cache.new_full(
            (*cache.shape[:2], self.order.size(1) * self.page - cache.size(2), cache.size(3)), float("nan")
        )
        whole = torch.cat([cache, padding], 2).unflatten(2, (-1, self.page))
        pool[self.order] = whole.permute(0, 2, 3, 1, 4)
        return pool

    def caches(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values of ``inputs`` as contiguous caches."""
        pair = (inputs["key_cache"], inputs["value_cache"])
        if self.order is not None:
            pair = tuple(pool[self.order].flatten(1, 2).transpose(1, 2) for pool in pair)
        return pair

    def fresh(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments, copied: an append writes into them."""

        def copied(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(dtype, copy=True) if dtype is not None and x.is_floating_point() else x.clone()

        return {name: copied(x) for name, x in self.inputs.items()}

    def __call__(self, inputs: dict[str, Any], **more: Any) -> Any:
        """``plx.decode`` on ``inputs``."""
        mods = {"score_mod": self.score, "covariance_mod": self.covariance}
        more = {"block_mask": self.block_mask, **more}
        return plx.decode(**inputs, spec=self.spec, kernel_options=self.options, **mods, **more)

    def want(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``out`` by the definition, products in ``dtype``; a sequence or row without keys gives 0."""
        pair = self.caches(self.inputs)
        found = []
        for b, (n, total) in enumerate(zip(self.lengths, self.totals, strict=True)):
            keys, values = (x[b : b + 1, :, :n] for x in pair)
            if self.new:
                keys = torch.cat([keys, self.inputs["key"][b : b + 1, :, : total - n]], 2)
                values = torch.cat([values, self.inputs["value"][b : b + 1, :, : total - n]], 2)
            query, probe = (
                None if self.inputs[name] is None else self.inputs[name][b : b + 1] for name in ("query", "probe")
            )
            position = torch.arange(self.queries)[:, None] + total - self.queries
            column = torch.arange(total)
            allowed = (position >= 0) & (column >= 0)
            if self.keep is not None:
                allowed = allowed & self.keep(position, column)
            if total == 0:
                found.append(torch.zeros(1, self.q_heads, self.queries, self.value_width, dtype=dtype))
                continue

            def placed(mod: Any, at: Tensor = position, b: int = b) -> Any:
                if mod is None:
                    return None
                return lambda s, z, h, q, k: mod(s, torch.tensor(b), h, at.clamp(min=0), k)

            args = (None if x is None else x.to(dtype) for x in (query, keys, values, probe))
            mods = {"score": placed(self.score), "covariance": placed(self.covariance)}
            found.append(low_precision(*args, mask=allowed, intercept=self.spec.intercept, **mods))  # type: ignore[arg-type]
        return torch.cat(found)

    def appended(self, inputs: dict[str, Any]) -> bool:
        """Whether the caches of ``inputs`` hold what they held before and the new keys behind it, and nothing else changed."""
        for name, got, before in zip(("key", "value"), self.caches(inputs), self.caches(self.inputs), strict=True):
            wanted = before.clone()
            for b, (n, total) in enumerate(zip(self.lengths, self.totals, strict=True)):
                wanted[b, :, n:total] = self.inputs[name][b, :, : total - n].to(wanted.dtype)
            if not torch.equal(got.float().nan_to_num(7.0), wanted.float().nan_to_num(7.0)):
                return False
        return True


def random_blocks(
    capacity: int, lists: int, sizes: tuple[int, int], mask_mod: Callable[..., Tensor], q_heads: int = 4
) -> tuple[BlockMask, Callable[[Tensor, Tensor], Tensor]]:
    """A block mask of random kinds over positions, whose full blocks its ``mask_mod`` knows nothing of.

    Returns:
        The block mask, and ``keep(row, column)``: bool ``[q_heads, rows, columns]``, of positions ``[rows, 1]``, ``[columns]``.
    """
    blocks = [-(-capacity // size) for size in sizes]
    kinds = torch.randint(0, 3, (1, lists, *blocks), generator=torch.Generator().manual_seed(3), dtype=torch.int8)

    def keep(row: Tensor, column: Tensor) -> Tensor:
        kind = kinds[0][:, row.clamp(min=0) // sizes[0], column // sizes[1]]
        zero, head = torch.tensor(0), torch.arange(q_heads)[:, None, None]
        return (kind == 2) | ((kind == 1) & mask_mod(zero, head, row, column))

    return plx.masks.from_kinds(kinds, (capacity, capacity), sizes, mask_mod), keep
