"""Infinite bandwidth in linear time: when the mask is a causal prefix, or none, a row's sums over its keys are a running state.

:func:`attention` is what the rest of the package calls. Under it are two operators that autograd sees, ``parallax::scan`` and
``parallax::scan_backward``, each a few calls of the two of :mod:`.scan_products` that the kernels implement: the sums of whole
segments of the sequence, in parallel, and products that take each segment chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_key import cache_salt
from .operator import empty_in_layout_of, statistics_dtype
from .plan_scan import CHUNK
from .scan_products import NO_SUMS, Sums, product, scan_product, totals


class Prefix(NamedTuple):
    """The keys of each row: ``[start, row]``, or all of them.

    Attributes:
        whole: every row sees every key.
        starts: first key of each row, int32 ``[B or 1, L]``, never decreasing, each the start of its own run; None is 0.
    """

    whole: bool
    starts: Tensor | None = None


class State(NamedTuple):
    """Sums over the keys that a row has seen, in the dtype of the statistics. What a member does not use is None.

    Attributes:
        count: number of keys, ``[B]``.
        key_value: ``sum_j k_j v_j^T``, ``[B, Hkv, D, Dv]``.
        key_sum: ``sum_j k_j``, ``[B, Hkv, D]``.
        value_sum: ``sum_j v_j``, ``[B, Hkv, Dv]``.
        key_key: ``sum_j k_j k_j^T``, ``[B, Hkv, D, D]``; solved and gradient probes.
    """

    count: Tensor  # type: ignore[assignment]  # the tuple's method of the same name is not needed
    key_value: Tensor | None = None
    key_sum: Tensor | None = None
    value_sum: Tensor | None = None
    key_key: Tensor | None = None


# --- the two operators that autograd sees ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The scan's forward and backward over something that computes :func:`.totals` and :func:`.product`.

    Attributes:
        segments: ``(batch, heads, length, width) -> int``: into how many segments a sequence is cut.
    """

    totals: Callable[..., Any]
    product: Callable[..., Any]
    segments: Callable[[Any, Any, Any, Any], int]

    def forward(
        self,
        query: Tensor,
        probe: Tensor,
        key: Tensor,
        value: Tensor,
        inverse: Tensor,
        starts: Tensor | None,
        matrix: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        intercept: bool,
        moment: bool,
        save_state: bool,
        whole: bool,
        cache_salt: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Attention with uniform weights.

        Args:
            query: ``[B, Hq, Lq, D]``, which is not read: what it has is a gradient, of zeros.
            probe: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``.
            inverse: ``1 / n`` of each row, ``[B or 1, Lq]``; starts: see :class:`Prefix`.
            matrix, first, second: the state before the sequence, all of them or none.
            intercept, moment, save_state, whole: see :func:`product`.
            cache_salt: not used here; see :func:`~.cache_key.cache_salt`.

        Returns:
            ``out [B, Hq, Lq, Dv]`` in value's dtype, ``t [B, Hq, Lq]``, and the state after the sequence; empty where
            it was not asked for.
        """
        sums = self.totals_of(key, value, None, None, starts, key.size(1), False, whole)
        switches = ("out", intercept, moment, save_state, whole, value.dtype)
        return self.product(probe, key, value, inverse, starts, None, *sums, matrix, first, second, *switches)

    def backward(
        self,
        grad_out: Tensor,
        grad_mean: Tensor | None,
        grad_matrix: Tensor | None,
        grad_first: Tensor | None,
        grad_second: Tensor | None,
        probe: Tensor,
        key: Tensor,
        value: Tensor,
        inverse: Tensor,
        starts: Tensor | None,
        mean: Tensor,
        matrix: Tensor | None,
        first: Tensor | None,
        second: Tensor | None,
        intercept: bool,
        whole: bool,
        needs: list[bool],
        cache_salt: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of :func:`forward` for probe, key, value and the initial state; empty where not needed.

        Args:
            grad_*: of the results of :func:`forward`; None is 0. Those of the state come together.
            mean: ``t`` of the forward; needs: whether probe, key, value and the initial state need one; the others as there.
        """
        need_probe, need_key, need_value, need_state = needs
        rows = inverse.unsqueeze(1)
        heads, wide = key.size(1), statistics_dtype(key)
        dprobe, dkey, dvalue, dmatrix, dfirst, dsecond = _no_gradients(probe, wide)
        key_level = None if grad_mean is None else grad_mean * rows
        value_level = 1.0 + mean if intercept else None

        if need_probe or (intercept and (need_key or need_state)):
            sums = self.totals_of(key, value, None, None, starts, heads, False, whole)
            dprobe, found, *_ = self.product(
                grad_out, value, key, inverse, starts, grad_mean, *sums, matrix, first, second,
                "probe", intercept, False, False, whole, probe.dtype,
            )  # fmt: skip
            key_level = found if intercept else key_level
        if not (need_key or need_value or need_state):
            return dprobe, dkey, dvalue, dmatrix, dfirst, dsecond
        # A tile that is divided on its way goes through registers and is not copied ahead: bfloat16 is divided before.
        divided = grad_out.dtype == probe.dtype == torch.bfloat16
        grad = (grad_out * rows.unsqueeze(-1)).to(grad_out.dtype) if divided else grad_out
        weight = None if divided else inverse
        final: Sums = NO_SUMS
        if grad_matrix is not None:
            final = (-grad_matrix if intercept else grad_matrix, grad_first, grad_second)
        sums = self.totals_of(probe, grad, key_level, value_level, starts, heads, True, whole, weight)
        if need_value or need_state:
            dvalue, _, dmatrix, _, dsecond = self.product(
                key, probe, grad, weight, starts, value_level, *sums, *final,
                "value", intercept, False, need_state, whole, value.dtype,
            )  # fmt: skip
            dmatrix = -dmatrix if intercept else dmatrix
        if need_key or need_state:
            # The gradient of a solved probe goes to the key too and takes most of this one away: rounded after their sum,
            # which Inductor forms in float32.
            dkey, _, _, dfirst, _ = self.product(
                value, grad, probe, weight, starts, key_level, *sums, *final,
                "key", intercept, False, need_state, whole, torch.promote_types(probe.dtype, key.dtype),
            )  # fmt: skip
            dkey = dkey.to(key.dtype)
        return dprobe, dkey, dvalue, dmatrix, dfirst, dsecond

    def totals_of(
        self,
        key: Tensor,
        value: Tensor,
        key_level: Tensor | None,
        value_level: Tensor | None,
        starts: Tensor | None,
        heads: int,
        backward: bool,
        whole: bool,
        weight: Tensor | None = None,
        tf32: bool = False,
    ) -> Sums:
        """The sums of each segment that another one continues (all of them if ``whole``), or none."""
        segments = self.segments(key.size(0), heads, key.size(2), value.size(3))
        if segments == 1 and not whole:
            return NO_SUMS
        levels = (key_level, value_level, weight)
        return self.totals(key, value, *levels, starts, heads, segments, whole, backward, tf32)


def _no_gradients(like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [like.new_empty(0, dtype=dtype) for _ in range(6)]


PLAIN = Kernels(totals, product, lambda *sizes: 1)
scan = torch.library.custom_op("parallax::scan", PLAIN.forward, mutates_args=())
scan_backward = torch.library.custom_op("parallax::scan_backward", PLAIN.backward, mutates_args=())


@scan.register_fake
def _(
    query: Tensor, probe: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import register_lowerings

    register_lowerings()  # whoever traces a call comes here
    intercept, moment, save_state, whole, _ = rest[-5:]
    return scan_product(
        probe, key, value, rest[0], None, None, *(None,) * 6, "out", intercept, moment, save_state, whole, value.dtype
    )


@scan_backward.register_fake
def _(grad_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    probe, key, value, matrix = rest[4], rest[5], rest[6], rest[10]
    intercept, _, needs, _ = rest[-4:]
    need_probe, need_key, need_value, need_state = needs
    wide = statistics_dtype(key)
    found = _no_gradients(probe, wide)
    if need_probe or (intercept and (need_key or need_state)):
        found[0] = empty_in_layout_of(probe, probe.size(3))
    if need_key or need_state:
        found[1] = empty_in_layout_of(key, key.size(3))
    if need_value or need_state:
        found[2] = empty_in_layout_of(value, value.size(3))
    if need_state and matrix is not None:
        found[3:] = [probe.new_empty(state.shape, dtype=wide) for state in rest[10:13]]
    return tuple(found)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, *tensors, ctx.intercept, _, _, ctx.whole, ctx.cache_salt = inputs
    ctx.query = (query.shape, query.dtype)
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple:
    probe, key, value, inverse, starts, *initial, mean = ctx.saved_tensors
    grad_out, grad_mean, *grad_state = grads
    if grad_out is None:
        grad_out = value.new_zeros((*probe.shape[:3], value.size(3)))
    if any(grad is not None for grad in grad_state):
        shapes = [
            (*key.shape[:2], key.size(3), value.size(3)),
            (*key.shape[:2], key.size(3)),
            (*key.shape[:2], value.size(3)),
        ]
        grad_state = [
            probe.new_zeros(shape, dtype=statistics_dtype(key)) if grad is None else grad
            for grad, shape in zip(grad_state, shapes, strict=True)
        ]
    needs = [*ctx.needs_input_grad[1:4], initial[0] is not None and any(ctx.needs_input_grad[6:9])]
    found = scan_backward(
        grad_out, grad_mean, *grad_state, probe, key, value, inverse, starts, mean, *initial,
        ctx.intercept, ctx.whole, needs, ctx.cache_salt,
    )  # fmt: skip
    found = tuple(grad if need else None for grad, need in zip(found, [*needs[:3], *needs[3:] * 3], strict=True))
    dquery = None
    if ctx.needs_input_grad[0]:
        shape, dtype = ctx.query
        # One number, seen everywhere: no memory is filled.
        dquery = probe.new_zeros((), dtype=dtype).expand(shape)
    return (dquery, *found[:3], None, None, *found[3:], *(None,) * 5)


scan.register_autograd(_differentiate, setup_context=_setup)


# --- attention ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Output ``[B, Hq, Lq, Dv]``; ``t`` and LSE ``[B, Hq, Lq]`` (``t`` empty where not asked for); final state."""

    out: Tensor
    mean: Tensor
    lse: Tensor
    state: State | None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None,
    prefix: Prefix,
    intercept: bool,
    *,
    moment: bool = False,
    initial: State | None = None,
    save_state: bool = False,
) -> Result:
    """A member of infinite bandwidth whose probe is zero (None), learned or found; differentiable.

    Args:
        query: ``[B, Hq, Lq, D]``, of which only the shape is used; its gradient is zeros.
        key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``; probe: ``[B, Hq, Lq, D]`` or None.
        prefix: which keys each row sees, ``Lq = Lk`` unless whole.
        moment: whether ``t`` is wanted.
        initial: sums over the keys before these, which rows of the first run see too.
        save_state: whether the sums that end with the last key are wanted.
    """
    wide = statistics_dtype(key)
    count = counts(prefix, query.size(2), key, initial)
    lse = count.log()[:, None].expand(query.shape[:3]).contiguous()
    zero = probe is None
    if zero:
        # The value average has no product: keys and a probe of zeros stand for those that it does not read. Two columns:
        # where values have one column too, Inductor leaves part of a product of one by one unwritten (torch 2.13, CPU).
        key, probe = (value.new_zeros((*tensor.shape[:3], 2)) for tensor in (key, query))
        intercept = True
        if initial is not None:
            assert initial.value_sum is not None
            none = [initial.value_sum.new_zeros((*value.shape[:2], *width)) for width in ((2, value.size(3)), (2,))]
            initial = initial._replace(key_value=none[0], key_sum=none[1])
    assert probe is not None
    # The covariance does not see a shift of the keys, and what is rounded gets smaller: FAMILY, "Centre the probe score".
    center = key.detach()[:, :, :CHUNK].to(wide).mean(2, keepdim=True) if intercept and not zero else None
    centred = key if center is None else key.to(wide) - center
    # Beside a solution in float32 the keys are not rounded again: its products are large.
    if probe is None or probe.dtype == key.dtype:
        centred = centred.to(key.dtype)
    sums: Sums = NO_SUMS if initial is None else (initial.key_value, initial.key_sum, initial.value_sum)
    if center is not None and initial is not None:
        assert initial.key_value is not None
        assert initial.key_sum is not None
        assert initial.value_sum is not None
        before = initial.count.to(wide)[:, None, None]
        moved = initial.key_value - center.mT * initial.value_sum[:, :, None]
        sums = (moved, initial.key_sum - before * center[:, :, 0], initial.value_sum)
    switches = (intercept, moment, save_state, prefix.whole, cache_salt())
    out, mean, matrix, first, second = scan(query, probe, centred, value, 1.0 / count, prefix.starts, *sums, *switches)
    if center is not None and moment and probe is not None:
        group = probe.size(1) // key.size(1)
        mean = mean + (probe.to(wide) * center.repeat_interleave(group, 1)).sum(-1)
    if not save_state:
        return Result(out, mean, lse, None)
    after = count[:, -1].expand(key.size(0))
    if center is not None:
        matrix = matrix + center.mT * second[:, :, None]
        first = first + after[:, None, None] * center[:, :, 0]
    state = State(after, value_sum=second) if zero else State(after, matrix, first, second)
    return Result(out, mean, lse, state)


def final_products(key: Tensor, prefix: Prefix, initial: State | None) -> Tensor:
    """``sum_j k_j k_j^T`` over the keys that the state after the last one holds, ``[B, Hkv, D, D]``."""
    keys = key.to(statistics_dtype(key))
    left = keys
    if prefix.starts is not None:
        kept = torch.arange(key.size(2), device=key.device) >= prefix.starts[:, -1:]
        left = torch.where(kept[:, None, :, None], keys, 0.0)
    found = left.mT @ keys
    if initial is None or initial.key_key is None:
        return found
    if prefix.starts is None:
        return found + initial.key_key
    return found + torch.where(prefix.starts[:, -1] == 0, 1.0, 0.0)[:, None, None, None] * initial.key_key


def counts(prefix: Prefix, length: Any, key: Tensor, initial: State | None) -> Tensor:
    """Keys of each row, ``[B or 1, Lq]``."""
    wide = statistics_dtype(key)
    before = None if initial is None else initial.count.to(wide)[:, None]
    if prefix.whole:
        count = torch.full((1, length), key.size(2), dtype=wide, device=key.device)
        return count if before is None else count + before
    position = torch.arange(length, device=key.device)[None]
    if prefix.starts is None:
        count = (position + 1).to(wide)
        return count if before is None else count + before
    count = (position + 1 - prefix.starts).to(wide)
    return count if before is None else count + torch.where(prefix.starts == 0, before, 0.0)
