"""The operator on CPU: chunks of query rows over all keys, in a loop that Inductor compiles.

A chunk of rows holds its scores against every key at once, so that memory grows with the length and not with its square;
the rows' weights come out normalised, and one product with the *signed* weights ``p (1 + t - s2)`` replaces two. The loop is
torch's ``while_loop``, whose body Inductor compiles once, whatever the number of chunks and whether or not it is known.

The functions here are plain torch code with the operator's signature. :func:`lower` traces one on a node's fake tensors
and inlines the result where the node stood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dense import in_layout_of
from .mod_graphs import differentiated_buffers, is_always_true, is_identity
from .plan_stages import Direction, log_choice
from .torch_compat_inlining import inline_in_lowering, traced_while_loop
from .torch_compat_operator import vectorize_mod

MAX_ROWS = 256
MIN_ROWS = 32
ROWS_OF_ALL_HEADS = 2048

Mod = Callable[..., Any]
Graph = torch.fx.GraphModule


class _Mods(NamedTuple):
    """The mods of a call over whole chunks, None where one does nothing, with the tensors that each captures."""

    score: Mod | None
    covariance: Mod | None
    mask: Mod | None
    buffers: tuple[tuple, tuple, tuple]

    def flat(self) -> list[Any]:
        return [buffer for captured in self.buffers for buffer in captured]

    def with_buffers(self, flat: Sequence[Any]) -> _Mods:
        """The same mods with other tensors in place of the captured ones: inside a loop they are its operands."""
        found, rest = [], list(flat)
        for captured in self.buffers:
            found.append(tuple(rest[: len(captured)]))
            rest = rest[len(captured) :]
        return self._replace(buffers=(found[0], found[1], found[2]))


def _as_tensor(captured: Any) -> Any:
    """A captured number that is a symbol, as a scalar tensor: mods vectorise over tensors only."""
    if isinstance(captured, torch.SymInt):
        return torch.full((), captured, dtype=torch.int64)  # type: ignore[call-overload]
    if isinstance(captured, torch.SymFloat):
        return torch.full((), captured, dtype=torch.float64)  # type: ignore[call-overload]
    return captured


def _mods(score: Graph, covariance: Graph, mask: Graph, captured: tuple[tuple, tuple, tuple]) -> _Mods:
    first, second, third = (tuple(map(_as_tensor, buffers)) for buffers in captured)
    buffers = (first, second, third)
    return _Mods(
        None if is_identity(score) else vectorize_mod(score, n_buffers=len(buffers[0])),
        None if is_identity(covariance) else vectorize_mod(covariance, n_buffers=len(buffers[1])),
        None if is_always_true(mask) else vectorize_mod(mask, n_buffers=len(buffers[2]), kind="mask"),
        buffers,
    )


# --- chunks ---------------------------------------------------------------------------------------------------------


def _work_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _rows_per_chunk(query: Tensor) -> int:
    """Rows of one chunk: enough for the matrix products, few enough for the caches, a constant of the graph."""
    batch, heads = query.shape[:2]
    rows = ROWS_OF_ALL_HEADS // max(1, int(batch) * int(heads)) if isinstance(batch, int) else MIN_ROWS
    return max(MIN_ROWS, min(MAX_ROWS, 1 << max(0, rows.bit_length() - 1)))


def _length(tensor: Tensor) -> Tensor:
    """``L`` of ``[B, H, L, ...]`` as an int64 scalar tensor: comparisons with symbols do not lower everywhere."""
    return torch.full((), tensor.size(2), dtype=torch.int64)


def _within(tensor: Tensor, rows: Tensor) -> Tensor:
    """``rows``, those past the last one of ``tensor`` replaced by it."""
    return torch.minimum(rows, _length(tensor) - 1)


def _chunk(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``[B, H, L, ...]``; past the last one it repeats, and what it gives there is dropped."""
    return tensor.index_select(2, _within(tensor, rows))


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[B, Hq, C, D]`` as ``[B, Hkv, G * C, D]``: the query heads of a group are more rows for the same keys."""
    batch, heads, rows, width = tensor.shape
    return tensor.reshape(batch, kv_heads, (heads // kv_heads) * rows, width)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left [B, Hq, C, D]`` against ``right [B, Hkv, L, D]``: ``[B, Hq, C, L]``."""
    batch, heads, rows, _ = left.shape
    return (_grouped(left, right.size(1)) @ right.mT).reshape(batch, heads, rows, right.size(2))


def _applied(weights: Tensor, right: Tensor) -> Tensor:
    """``weights [B, Hq, C, L]`` times ``right [B, Hkv, L, D]``: ``[B, Hq, C, D]``."""
    batch, heads, rows, _ = weights.shape
    return (_grouped(weights, right.size(1)) @ right).reshape(batch, heads, rows, right.size(3))


def _summed(weights: Tensor, left: Tensor, kv_heads: int) -> Tensor:
    """``sum over rows and group of weights^T left``: ``[B, Hkv, L, D]``."""
    return _grouped(weights, kv_heads).mT @ _grouped(left, kv_heads)


def _over_rows(
    rows_per_chunk: int,
    length_of: Tensor,
    body: Callable[..., tuple],
    carried: Sequence[Tensor],
    operands: Sequence[Any],
) -> tuple[Tensor, ...]:
    """Run ``body(rows, carried, operands) -> carried`` for each chunk of rows of ``length_of [B, H, L, ...]``.

    ``operands`` may hold tensors and constants; the loop's body may read no other tensor.
    """
    is_tensor = [isinstance(operand, Tensor) for operand in operands]
    constants = list(operands)
    tensors = [operand for operand, given in zip(operands, is_tensor, strict=True) if given]

    def unpack(flat: Sequence[Any]) -> list[Any]:
        given = iter(flat)
        return [next(given) if flag else constant for flag, constant in zip(is_tensor, constants, strict=True)]

    def rows_of(index: Tensor) -> Tensor:
        return index * rows_per_chunk + torch.arange(rows_per_chunk, device=index.device)

    length = length_of.size(2)
    if isinstance(length, int) and length <= rows_per_chunk:
        return tuple(body(torch.arange(rows_per_chunk), list(carried), list(operands)))

    def condition(index: Tensor, *state: Any) -> Tensor:
        return index * rows_per_chunk < _length(state[-1])

    def step(index: Tensor, *state: Any) -> tuple[Tensor, ...]:
        updated = body(rows_of(index), list(state[: len(carried)]), unpack(state[len(carried) : -1]))
        return (index + 1, *updated)

    start = torch.zeros((), dtype=torch.int64)
    _, *results = traced_while_loop(condition, step, (start, *carried), (*tensors, length_of))
    return tuple(results)


def _padded_rows(query: Tensor, rows_per_chunk: int, *width: int, dtype: torch.dtype) -> Tensor:
    """Zeros for whole chunks of rows: ``[B, Hq, chunks * rows, *width]``."""
    length = (query.size(2) + rows_per_chunk - 1) // rows_per_chunk * rows_per_chunk
    return torch.zeros((query.size(0), query.size(1), length, *width), dtype=dtype)


def _scores(
    query: Tensor, probe: Tensor | None, key: Tensor, rows: Tensor, mods: _Mods, scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """``raw1, raw2, s1, s2, keep, indices`` of a chunk; not allowed: s1 -inf, s2 0; keep None allows everything."""
    batch, heads = query.shape[:2]
    index = (
        torch.arange(batch, dtype=torch.int32),
        torch.arange(heads, dtype=torch.int32),
        rows.to(torch.int32),
        torch.arange(key.size(2), dtype=torch.int32),
    )
    raw1 = _products(query, key) * scale
    raw2 = None if probe is None else _products(probe, key)
    s1 = raw1 if mods.score is None else mods.score(raw1, *index, *mods.buffers[0]).to(raw1.dtype)
    s2 = raw2
    if raw2 is not None and mods.covariance is not None:
        s2 = mods.covariance(raw2, *index, *mods.buffers[1]).to(raw2.dtype)
    keep = None
    if mods.mask is not None:
        keep = mods.mask(*index, *mods.buffers[2])
        s1 = torch.where(keep, s1, -float("inf"))
        s2 = None if s2 is None else torch.where(keep, s2, 0.0)
    return raw1, raw2, s1, s2, keep, index


# --- forward and backward -------------------------------------------------------------------------------------------


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None,
    score_mod: Graph,
    covariance_mod: Graph,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    save_value_mean: bool,
    kernel_options: dict[str, Any],
    score_mod_buffers: tuple = (),
    covariance_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's forward; arguments and results as in :func:`.dense.forward`."""
    dtype, count = _work_dtype(query), _rows_per_chunk(query)
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    mods = _mods(score_mod, covariance_mod, block_mask[-1], buffers)
    width = value.size(3)

    def chunk(rows: Tensor, carried: list[Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        query, key, value, *rest = operands
        probe = rest.pop(0) if has_probe else None
        q = _chunk(query, rows).to(dtype)
        r = None if probe is None else _chunk(probe, rows).to(dtype)
        _, _, s1, s2, _, _ = _scores(q, r, key, _within(query, rows), mods.with_buffers(rest), scale)
        largest = s1.amax(-1, keepdim=True)
        largest = torch.where(largest == -float("inf"), 0.0, largest)
        weights = torch.exp(s1 - largest)
        total = weights.sum(-1, keepdim=True)
        inverse = 1.0 / torch.where(total == 0, 1.0, total)
        lse = (largest + total.log()).squeeze(-1)
        mean = torch.zeros_like(lse)
        signed = weights * inverse
        if s2 is not None:
            mean = (weights * s2).sum(-1) * inverse.squeeze(-1)
            factor = (1 + mean)[..., None] - s2 if intercept else s2
            signed = weights * (inverse * factor)
        results = [_applied(signed, value), lse, mean]
        if save_value_mean:
            results.append(_applied(weights * inverse, value))
        return tuple(old.index_copy(2, rows, new.to(old.dtype)) for old, new in zip(carried, results, strict=True))

    has_probe = probe is not None
    carried = [
        _padded_rows(query, count, width, dtype=query.dtype),
        _padded_rows(query, count, dtype=dtype),
        _padded_rows(query, count, dtype=dtype),
    ]
    if save_value_mean:
        carried.append(_padded_rows(query, count, width, dtype=query.dtype))
    operands: list[Any] = [query, key.to(dtype), value.to(dtype), *([probe] if has_probe else []), *mods.flat()]
    out, lse, mean, *value_mean = _over_rows(count, query, chunk, carried, operands)
    rows = query.size(2)
    return (
        in_layout_of(query, out[:, :, :rows]),
        in_layout_of(query, value_mean[0][:, :, :rows]) if value_mean else query.new_empty(0),
        lse[:, :, :rows].contiguous(),
        mean[:, :, :rows].contiguous(),
    )


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    probe_mean: Tensor,
    tau: Tensor,
    beta: Tensor,
    fw_graphs: tuple[Graph, Graph],
    joint_graphs: tuple[Graph, Graph],
    block_mask: tuple,
    scale: float,
    intercept: bool,
    needs_grad: tuple[bool, bool, bool, bool],
    kernel_options: dict[str, Any],
    score_mod_buffers: tuple = (),
    covariance_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
    score_grad_sum: Tensor | None = None,
    probe_score_grad_sum: Tensor | None = None,
    adjoint: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple, tuple]:
    """The operator's backward; arguments and results as in :func:`.dense.backward`."""
    dtype, count, kv_heads = _work_dtype(query), _rows_per_chunk(query), key.size(1)
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    mods = _mods(*fw_graphs, block_mask[-1], buffers)
    has_probe, has_adjoint = probe is not None, adjoint is not None
    need_query, need_key, need_value, need_probe = (*needs_grad[:3], needs_grad[3] and has_probe)
    joints = [
        None if mod is None else vectorize_mod(graph, n_buffers=len(captured), kind="joint")
        for mod, graph, captured in zip(mods[:2], joint_graphs, buffers[:2], strict=True)
    ]
    wanted = [differentiated_buffers(graph) for graph in joint_graphs]

    def chunk(rows: Tensor, carried: list[Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        query, key, value, grad_out, lse, mean, tau, beta, *rest = operands
        probe = rest.pop(0) if has_probe else None
        a = _chunk(rest.pop(0), rows).to(dtype) if has_adjoint else None
        local = mods.with_buffers(rest)
        q, g = _chunk(query, rows).to(dtype), _chunk(grad_out, rows).to(dtype)
        r = None if probe is None else _chunk(probe, rows).to(dtype)
        raw1, raw2, s1, s2, keep, index = _scores(q, r, key, _within(query, rows), local, scale)
        row_lse, t, row_tau, row_beta = (_chunk(rows_of, rows)[..., None] for rows_of in (lse, mean, tau, beta))
        # Rows without a key, and rows past the last, weigh nothing.
        live = (row_lse > -float("inf")) & (rows < _length(query))[:, None]
        weights = torch.exp(s1 - torch.where(live, row_lse, float("inf")))
        products = _products(g, value)
        if a is not None:
            products = products + _products(a, key)
        ds2 = None
        if s2 is None:
            signed, ds1 = weights, weights * (products - row_tau)
        elif intercept:
            below, above = t - s2, products - row_beta
            signed = weights * (1 + below)
            ds1, ds2 = weights * ((products - row_tau) + below * above), -weights * above
        else:
            above = products - row_beta
            signed, ds1, ds2 = weights * s2, weights * (s2 * above - row_tau), weights * above
        captured: list[Tensor] = []

        def through(which: int, raw: Tensor, ds: Tensor) -> Tensor:
            joint = joints[which]
            if joint is None:
                return ds
            found = joint(raw, *index, ds, *local.buffers[which])
            captured.extend(grad for grad, want in zip(found[5:], wanted[which], strict=True) if want)
            return found[0].to(dtype) if keep is None else torch.where(keep, found[0].to(dtype), 0.0)

        draw1 = through(0, raw1, ds1) * scale
        draw2 = None if raw2 is None or ds2 is None else through(1, raw2, ds2)
        old, results = iter(carried), []
        if need_query:
            new = _applied(draw1, key)
            previous = next(old)
            results.append(previous.index_copy(2, rows, new.to(previous.dtype)))
        if need_probe and draw2 is not None:
            new = _applied(draw2, key)
            previous = next(old)
            results.append(previous.index_copy(2, rows, new.to(previous.dtype)))
        if need_key:
            summed = _summed(draw1, q, kv_heads)
            if draw2 is not None and r is not None:
                summed = summed + _summed(draw2, r, kv_heads)
            if a is not None:
                summed = summed + _summed(signed, a, kv_heads)
            results.append(next(old) + summed)
        if need_value:
            results.append(next(old) + _summed(signed, g, kv_heads))
        results += [next(old) + grad.to(dtype) for grad in captured]
        return tuple(results)

    carried = []
    if need_query:
        carried.append(_padded_rows(query, count, query.size(3), dtype=query.dtype))
    if need_probe and probe is not None:
        carried.append(_padded_rows(query, count, query.size(3), dtype=probe.dtype))
    if need_key:
        carried.append(torch.zeros(key.shape, dtype=dtype))
    if need_value:
        carried.append(torch.zeros(value.shape, dtype=dtype))
    differentiated = [
        buffer
        for captured, flags in zip(buffers[:2], wanted, strict=True)
        for buffer, want in zip(captured, flags, strict=True)
        if want
    ]
    carried += [torch.zeros(buffer.shape, dtype=dtype) for buffer in differentiated]
    operands: list[Any] = [query, key.to(dtype), value.to(dtype), grad_out, lse, probe_mean, tau, beta]
    operands += [*([probe] if has_probe else []), *([adjoint] if has_adjoint else []), *mods.flat()]
    results = iter(_over_rows(count, query, chunk, carried, operands))
    rows = query.size(2)
    dq = in_layout_of(query, next(results)[:, :, :rows]) if need_query else None
    dr = in_layout_of(query, next(results)[:, :, :rows]) if need_probe else None
    dk = in_layout_of(key, next(results).to(key.dtype)) if need_key else None
    dv = in_layout_of(value, next(results).to(value.dtype)) if need_value else None
    captured_grads = tuple(
        tuple(next(results).to(buffer.dtype) if want else None for buffer, want in zip(captured, flags, strict=True))
        for captured, flags in zip(buffers[:2], wanted, strict=True)
    )
    return dq, dk, dv, dr, captured_grads[0], captured_grads[1]


def solve(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    ridge: Tensor,
    grad_out: Tensor | None,
    probe: Tensor | None,
    grad_mean: Tensor | None,
    right: Tensor | None,
    score_mod: Graph,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    solver: dict[str, Any],
    score_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The solve operator by conjugate gradients on chunks of rows; arguments and results as in :func:`.dense.solve`."""
    dtype, count = _work_dtype(query), _rows_per_chunk(query)
    mods = _mods(score_mod, score_mod, block_mask[-1], (score_mod_buffers, (), mask_mod_buffers))
    given = {"value": value, "grad_out": grad_out, "probe": probe, "grad_mean": grad_mean, "right": right}
    present = [name for name, tensor in given.items() if tensor is not None]
    makes_output = probe is None and value is not None

    def chunk(rows: Tensor, carried: list[Tensor], operands: list[Any]) -> tuple[Tensor, ...]:
        query, key, ridge, *rest = operands
        named = dict(zip(present, rest, strict=False))
        q = _chunk(query, rows).to(dtype)
        local = mods.with_buffers(rest[len(present) :])
        _, _, s1, _, _, _ = _scores(q, None, key, _within(query, rows), local, scale)
        largest = s1.amax(-1, keepdim=True)
        largest = torch.where(largest == -float("inf"), 0.0, largest)
        weights = torch.exp(s1 - largest)
        total = weights.sum(-1, keepdim=True)
        lse = (largest + total.log()).squeeze(-1)
        weights = weights / torch.where(total == 0, 1.0, total)
        mean = _applied(weights, key)
        lam = _chunk(ridge, rows)[..., None]
        moment = torch.zeros_like(lam)
        if probe is None:
            b = mean - q if intercept else q
        else:
            b = _chunk(named["right"], rows).to(dtype) if right is not None else torch.zeros_like(mean)
            if grad_out is not None:
                signed = weights * _products(_chunk(named["grad_out"], rows).to(dtype), named["value"])
                moment = signed.sum(-1, keepdim=True)
                found = _applied(signed, key)
                b = b + (moment * mean - found if intercept else found)
            if grad_mean is not None:
                b = b + _chunk(named["grad_mean"], rows).to(dtype)[..., None] * mean

        def product(x: Tensor, weights: Tensor, key: Tensor, mean: Tensor, lam: Tensor) -> Tensor:
            along = _products(x, key)
            if not intercept:
                return _applied(weights * along, key) + lam * x
            signed = weights * (along - (weights * along).sum(-1, keepdim=True))
            return _applied(signed, key) - signed.sum(-1, keepdim=True) * mean + lam * x

        x, residual, used = conjugate_gradients(product, b, lam, solver, (weights, key, mean, lam.contiguous()))
        along = (x * mean).sum(-1)
        results = [x]
        if probe is None:
            results += [lse, along]
        else:
            offset = lam * x + residual
            if right is not None:
                offset = offset - _chunk(named["right"], rows).to(dtype)
            results += [moment.squeeze(-1) + along, -(_chunk(named["probe"], rows) * offset).sum(-1)]
        results += [used, residual.norm(dim=-1)]
        if makes_output:
            scores = _products(x, key)
            signed = weights * (1 + along[..., None] - scores if intercept else scores)
            results.append(_applied(signed, named["value"]))
        return tuple(old.index_copy(2, rows, new.to(old.dtype)) for old, new in zip(carried, results, strict=True))

    carried = [_padded_rows(query, count, query.size(3), dtype=dtype)]
    carried += [_padded_rows(query, count, dtype=kind) for kind in (dtype, dtype, torch.int32, dtype)]
    if makes_output and value is not None:
        carried.append(_padded_rows(query, count, value.size(3), dtype=value.dtype))
    if value is not None:
        given["value"] = value.to(dtype)
    operands: list[Any] = [query, key.to(dtype), ridge.to(dtype), *(given[name] for name in present), *mods.flat()]
    x, *results = _over_rows(count, query, chunk, carried, operands)
    rows = query.size(2)
    first, second, iterations, residual = (result[:, :, :rows].contiguous() for result in results[:4])
    out = in_layout_of(query, results[4][:, :, :rows]) if makes_output else query.new_empty(0)
    return x[:, :, :rows].contiguous(), out, first, second, iterations, residual


def conjugate_gradients(
    product: Callable[..., Tensor], b: Tensor, ridge: Tensor, solver: dict[str, Any], system: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``product(x, *system) = b`` for each row, all rows at once, until each has converged.

    A row stops when its last term is below the square of its tolerance. That is relative to the norm of M, in which the parts
    that the ridge alone holds count little and the gradient of the keys is made of them: the smaller the ridge is against M,
    the smaller the tolerance.

    Args:
        b: ``[..., D]``; ridge: ``[..., 1]``; solver: ``tolerance`` and ``max_iterations``.

    Returns:
        ``x``, the residual ``b - M x`` (both ``[..., D]``) and iterations ``[...]``.
    """
    tolerance, most = solver["tolerance"], solver["max_iterations"]

    def condition(step: Tensor, moving: Tensor, *_: Tensor) -> Tensor:
        return (step < most) & moving.any()

    def iterate(step: Tensor, moving: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, residual, direction, gained, goal, used, ridge, *system = state
        image = product(direction, *system)
        curvature = (direction * image).sum(-1, keepdim=True)
        safe = torch.where(curvature > 0, curvature, 1.0)
        share = ridge * direction.square().sum(-1, keepdim=True) / safe
        goal = torch.where(step == 0, tolerance * tolerance * share.clamp(0.01, 1.0), goal)
        along = (residual * direction).sum(-1, keepdim=True)
        # A row that has converged stays where it is: its terms are rounding.
        alpha = torch.where((curvature > 0) & moving, along / safe, 0.0)
        x, residual = x + alpha * direction, residual - alpha * image
        beta = torch.where(curvature > 0, -(residual * image).sum(-1, keepdim=True) / safe, 0.0)
        term = alpha * along
        gained, used = gained + term, used + moving.to(used.dtype)
        direction = torch.where(moving, residual + beta * direction, direction)
        moving = moving & ((term > goal * gained) | (used < 2))
        return step + 1, moving, x, residual, direction, gained, goal, used

    column = torch.zeros_like(b[..., :1])
    start = (
        torch.zeros((), dtype=torch.int64),
        b.square().sum(-1, keepdim=True) > 0,
        torch.zeros_like(b),
        b.clone(),
        b.clone(),
        column,
        column.clone(),
        column.to(torch.int32),
    )
    _, _, x, residual, _, _, _, used = traced_while_loop(condition, iterate, start, (ridge.contiguous(), *system))
    return x, residual, used.squeeze(-1)


def lower(function: Callable[..., Any], arguments: Sequence[Any], stage: str | None = None) -> Any:
    """Inline :func:`forward`, :func:`backward` or another in place of the node that Inductor is lowering."""
    direction: Direction = "backward" if function is backward else "forward"
    reason = "cpu: chunks of rows over all keys, in a compiled loop"
    log_choice(stage or f"core_{function.__name__}", direction, "row chunks", reason)
    return inline_in_lowering(function, arguments)
