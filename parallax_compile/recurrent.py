"""Decoding at infinite bandwidth: every allowed key weighs the same, so that a state of constant size stands for all keys.

:func:`decode_state` adds new keys to a :class:`~parallax_compile.State` in place and reads it for their queries. With a
learned probe it is one kernel on a GPU, through which the state moves once (:mod:`.lowering.scan_step`), beside the count of
the keys; with others it is plain torch, which Inductor fuses around a batched solve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import validation
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.cache_key import CACHE_SALT
from .lowering.operator import statistics_dtype
from .lowering.scan import State
from .lowering.scan_step import of_query_heads, read, scan_step
from .lowering.torch_compat_errors import raise_input
from .spec import AttentionSpec, Gradient, Solved
from .states import check_parts, part_shapes

__all__ = ["decode_state", "empty_state"]

MOST_KEYS = 64


def empty_state(
    spec: AttentionSpec,
    batch: int,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
    *,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> State:
    """The state of no keys.

    Args:
        spec: a member of infinite bandwidth.
        width, value_width: ``D`` and ``Dv`` (None: the same).
        dtype: of the sums.

    Raises:
        InputError: a member of finite bandwidth, which has no state.
    """
    _check_member(spec)
    value_width = width if value_width is None else value_width

    shapes = part_shapes(spec, batch, kv_heads, width, value_width)
    return State(**{name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})


def decode_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    state: State,
    spec: AttentionSpec,
    ridge: Tensor | float | None = None,
) -> Tensor:
    """Attention of new positions to all keys up to their own, by a state of constant size that takes them in.

    What ``plx.attention`` gives for the last rows of the whole sequence under ``plx.masks.causal()``, or
    :func:`plx.decode` against a cache, at a cost that does not grow with the sequence.

    Args:
        query: ``[B, Hq, L, D]``; only solved and gradient probes read it. L is at most 64; longer ones go through
            ``plx.attention(..., initial_state=, return_aux=plx.AuxRequest(state=True))``.
        key: ``[B, Hkv, L, D]``; value: ``[B, Hkv, L, Dv]``; probe: ``[B, Hq, L, D]`` for a learned probe.
        state: of the keys before, of :func:`empty_state` or ``plx.attention``; its tensors are written in place.
        spec: a member of infinite bandwidth, whose mask is ``plx.masks.causal()`` or none.
        ridge: as for ``plx.attention``.

    Returns:
        ``out [B, Hq, L, Dv]`` in query's dtype.

    Raises:
        InputError: (a ValueError) an impossible value, shape or combination.
        InputTypeError: (a TypeError) a wrong type or dtype.
        UnsupportedError: a gradient is wanted (``plx.attention`` with ``initial_state`` has one).
    """
    validation.check_spec(spec)
    _check_member(spec)
    validation.check_tensors(query, key, value, probe, spec, True)
    validation.check_ridge(ridge, spec, query)
    if key.size(2) != query.size(2) or not 1 <= query.size(2) <= MOST_KEYS:
        raise_input(
            InputError,
            f"key must have query's length, from 1 to {MOST_KEYS}, but got {key.size(2)} and {query.size(2)}. "
            "Longer ones go through plx.attention with initial_state.",
        )
    _check_state(state, spec, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("probe", probe)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise_input(
                UnsupportedError,
                f"decode_state has no gradient, but {name} requires one. Call it under torch.no_grad(), or use "
                "plx.attention with initial_state, which has one.",
            )
    if spec.probe.kind == "learned":
        # Written out, because the sums are all there is: one kernel.
        assert probe is not None
        out = scan_step(
            state.key_value, state.key_sum, state.value_sum, state.count, key, value, probe, spec.intercept, CACHE_SALT
        )
        state.count.add_(query.size(2))
        return out
    wide = statistics_dtype(query)
    sums = state
    rows = []
    for i in range(query.size(2)):
        sums = _taken_in(sums, key[:, :, i].to(wide), value[:, :, i].to(wide))
        rho = None
        if isinstance(spec.probe, (Solved, Gradient)):
            rho = _found(query[:, :, i].to(wide), sums, spec, ridge, i, query.shape[:3])
        rows.append(_read(sums, rho, spec.intercept, query.size(1) // key.size(1)))
    for part, grown in zip(state, sums, strict=True):
        if part is not None and grown is not None:
            part.copy_(grown)
    return torch.stack(rows, 2).to(query.dtype)


def _taken_in(sums: State, key: Tensor, value: Tensor) -> State:
    """The state with one more key ``[B, Hkv, D]`` and value ``[B, Hkv, Dv]``."""

    def grown(part: Tensor | None, more: Tensor) -> Tensor | None:
        return None if part is None else part + more

    return State(
        count=sums.count + 1,
        key_value=grown(sums.key_value, key[..., :, None] * value[..., None, :]),
        key_sum=grown(sums.key_sum, key),
        value_sum=grown(sums.value_sum, value),
        key_key=grown(sums.key_key, key[..., :, None] * key[..., None, :]),
    )


def _read(sums: State, probe: Tensor | None, intercept: bool, group: int) -> Tensor:
    """``out [B, Hq, Dv]`` of one row."""
    assert sums.value_sum is not None
    if probe is None:
        return of_query_heads(sums.value_sum, group) / sums.count[:, None, None]
    assert sums.key_value is not None
    assert sums.key_sum is not None
    return read(sums.key_value, sums.key_sum, sums.value_sum, sums.count, probe, intercept)


def _found(
    query: Tensor, sums: State, spec: AttentionSpec, ridge: Tensor | float | None, row: int, rows: tuple[int, ...]
) -> Tensor:
    """The solved or gradient probe of one row, ``[B, Hq, D]``."""
    kind: Any = spec.probe
    group = query.size(1) // sums.key_sum.size(1)  # type: ignore[union-attr]
    inverse = 1.0 / sums.count[:, None, None, None]
    assert sums.key_key is not None
    matrix = of_query_heads(sums.key_key * inverse, group)
    given = kind.ridge if ridge is None else ridge
    if isinstance(given, Tensor):
        lam = given.to(query.dtype).expand(rows)[:, :, row, None]
    else:
        lam = torch.full_like(query[..., :1], given)
    if kind.ridge_scale == "sum":
        lam = lam * inverse[..., 0]
    right = query
    if spec.intercept:
        mean = of_query_heads(sums.key_sum, group) * inverse[..., 0]  # type: ignore[arg-type]
        matrix = matrix - mean[..., :, None] * mean[..., None, :]
        right = mean - query
    identity = torch.eye(query.size(-1), dtype=query.dtype, device=query.device)
    if isinstance(kind, Solved):
        # Symmetric and positive definite by the ridge: nothing to check, nothing for the host to wait for.
        solved, _ = torch.linalg.solve_ex(matrix + lam[..., None] * identity, right[..., None])
        return solved[..., 0]
    if kind.step_size is None:
        step = 1.0 / (lam + (matrix * identity).sum((-2, -1))[..., None])
    else:
        step = torch.full_like(lam, kind.step_size)
    x = step * right
    for _ in range(kind.steps - 1):
        x = x + step * (right - (matrix * x[..., None, :]).sum(-1) - lam * x)
    return x


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_member(spec: AttentionSpec) -> None:
    if spec.bandwidth.kind != "infinite":
        raise_input(
            InputError,
            f"spec must have infinite bandwidth, but got {spec!r}: at finite bandwidth the weights of all keys change with the "
            "query. Use plx.decode with a cache.",
        )
    if spec.covariance_mod is not None:
        raise_input(
            InputError, "a covariance_mod stands between probe scores and sums: it has no state. Use plx.decode."
        )
    from .masks import Causal

    if spec.mask_mod is not None and spec.mask_mod != Causal(0):
        raise_input(InputError, f"the spec's mask must be plx.masks.causal() or None, but got {spec.mask_mod!r}.")


def _check_state(state: Any, spec: AttentionSpec, key: Tensor, value: Tensor) -> None:
    check_parts("state", state, spec, key, value)
    wide = statistics_dtype(key)
    for name, part in zip(State._fields, state, strict=True):
        if part is not None and part.dtype != wide:
            raise_input(
                InputTypeError, f"state.{name} must be {wide} with queries of {key.dtype}, but got {part.dtype}."
            )
