"""Decoding: :func:`decode`, a few query rows of each sequence against its cache of keys and values.

Like :func:`~parallax_compile.attention`, a call runs the dense reference uncompiled and fused kernels under
``torch.compile``. It has no gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import validation
from .attention import (
    AuxOutput,
    ScoreMod,
    _aux_request,
    _Call,
    _compose,
    _everything,
    _gradient_stage,
    _identity,
    _ridge,
    _uncompiled,
    _uniform,
    _warn_unfused,
)
from .block_masks import visited_blocks
from .cache_validation import check_call, check_positions, check_values
from .errors import InputError
from .lowering import decode as lowered
from .lowering import decode_blocks, probes
from .lowering.append import append
from .lowering.cache_key import CACHE_SALT, cache_salt
from .lowering.operator import statistics_dtype
from .lowering.torch_compat_dynamo import mark_static
from .lowering.torch_compat_errors import raise_input
from .masks import reach
from .spec import PARALLAX, SOFTMAX, AttentionSpec, Gradient, Solved

__all__ = ["decode"]


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    probe: Tensor | None = None,
    *,
    spec: AttentionSpec | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cache_seqlens: Tensor | int,
    page_table: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    covariance_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    ridge: Tensor | float | None = None,
    return_lse: bool = False,
    return_aux: Any = None,
    check: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> Any:
    """Attention of the last ``Lq`` positions of each sequence to its keys in a cache; new keys are appended first.

    Row ``i`` of sequence ``b`` has the position ``n - Lq + i``, where ``n`` is its number of keys after the append:
    ``q_idx`` of mods and masks. A row sees every key unless the spec's mask says otherwise: with more than one row a
    model that was trained with ``plx.masks.causal()`` wants that mask here too. (The names are those of
    ``flash_attn_with_kvcache``.)

    Args:
        query: ``[B, Hq, Lq, D]``, bfloat16, float16, float32 (uncompiled also float64). ``Hq`` is a multiple of ``Hkv``.
        key_cache: ``[B, Hkv, capacity, D]``, or with a page table ``[pages, page size, Hkv, D]``; query's dtype or
            float8_e4m3fn. The last dimension must be contiguous.
        value_cache: the same with ``Dv``.
        probe: ``[B, Hq, Lq, D]`` for a learned probe.
        spec: the member; None means PARALLAX with a probe and SOFTMAX without. Its mask may be any; under a
            ``plx.masks.sliding_window`` the keys before the window are not read.
        key, value: ``[B, Hkv, Lnew, D]`` and ``Dv``, written into the caches in place behind each sequence's keys. What would
            lie past the capacity of its sequence, or on a page that does not exist, is left out.
        cache_seqlens: keys of each sequence before the append, int32 or int64 ``[B]`` on query's device, or one int.
            Not updated. A sequence without keys gives zeros.
        page_table: int32 or int64 ``[B, most pages of a sequence]``: vLLM's block table;
            :func:`~parallax_compile.caches.flex_pages` sees the cache of flex_attention's ``PagedAttention`` as pages. The page
            size must be a multiple of 16.
        k_scale, v_scale: factors of 8-bit caches: a number, or a tensor that broadcasts to ``[B, Hkv]``. A key is
            ``k_scale * key_cache``; appended keys are divided by it.
        scale: factor of the scores; None means ``1/sqrt(D)``.
        score_mod, covariance_mod, ridge, return_lse, return_aux: as for :func:`~parallax_compile.attention`.
        block_mask: a torch ``BlockMask`` over positions, for lengths of at least the capacity on both sides: the lengths choose
            its blocks of rows. Keys of blocks that no row of a key head visits are not read. Combines with the spec's mask by
            and.
        check: check lengths and page table on the device too, which waits for it (not in compiled code). Otherwise lengths are
            clamped to the capacity, and entries of the page table to the cache.
        kernel_options: of the compiled kernel: ``BLOCK_N, num_warps, num_stages``; ``PROGRAMS_PER_SM``, that splits aim at;
            ``USE_TMA`` (bool): read through tensor descriptors;
            ``MERGE``: "kernel" (the last program of a head merges its splits) or "stage" (a kernel of its own).

    Returns:
        ``out [B, Hq, Lq, Dv]`` in query's dtype, alone or with what was asked for. A row that sees no key gives 0 and LSE -inf.

    Raises:
        InputError: (a ValueError) an impossible value, shape or combination.
        InputTypeError: (a TypeError) a wrong type or dtype.
        UnsupportedError: a gradient is wanted, or the compiled path does not cover the call.
    """
    if spec is None:
        spec = SOFTMAX if probe is None else PARALLAX
    validation.check_spec(spec)
    validation.check_flag("check", check)
    check_call(
        query,
        key_cache,
        value_cache,
        probe,
        spec,
        key,
        value,
        cache_seqlens,
        page_table,
        k_scale,
        v_scale,
        kernel_options,
    )
    validation.check_scale(scale, spec)
    validation.check_mods(spec, score_mod, covariance_mod)
    validation.check_ridge(ridge, spec, query)
    request = _aux_request(return_lse, return_aux, spec)
    if request.state:
        raise_input(
            InputError,
            "return_aux asks for state, which a call against a cache does not make. plx.decode_state goes on from the state of "
            "plx.attention.",
        )
    compiled = torch.compiler.is_dynamo_compiling()
    check_positions(block_mask, query, lowered.capacity_of(key_cache, page_table))
    if check:
        check_values(compiled, key_cache, cache_seqlens, page_table, 0 if key is None else key.size(2))
    batch, kv_heads = query.size(0), key_cache.size(1 if page_table is None else 2)
    lengths = cache_seqlens
    if not isinstance(lengths, Tensor):
        lengths = torch.full((batch,), lengths, dtype=torch.int32, device=query.device)
    scales = [_scale(factor, batch, kv_heads) for factor in (k_scale, v_scale)]
    room = key_cache.numel() != 0 and lowered.capacity_of(key_cache, page_table) != 0
    new_keys = 0
    if key is not None and value is not None:
        new_keys = key.size(2)
        if key.numel() and value.numel() and room:
            append(key_cache, value_cache, key, value, lengths, page_table, *_apart(scales), CACHE_SALT)
    score_mod = _compose(spec.score_mod, score_mod)
    covariance_mod = _compose(spec.covariance_mod, covariance_mod)
    if not compiled:
        _warn_unfused("plx.decode")
    call = _Call(
        query, key_cache, value_cache, probe, spec, score_mod, covariance_mod, block_mask, scale, ridge, kernel_options
    )
    call = call._replace(request=request)
    cached = _Cached(lengths, new_keys, page_table, *scales)
    run = _empty if query.numel() == 0 or not room else _fused if compiled else _reference
    out, aux = run(call, cached)
    if request.value_mean and aux.value_mean is None:
        softmax = SOFTMAX.replace(mask_mod=spec.mask_mod, bandwidth=spec.bandwidth)
        mean, _ = run(call._replace(probe=None, spec=softmax, covariance_mod=None, ridge=None), cached)
        aux = aux._replace(value_mean=mean)
    if return_lse:
        return out, aux.lse
    if return_aux is not None:
        wanted = {name: getattr(aux, name) for name in AuxOutput._fields if getattr(request, name)}
        return out, AuxOutput(**wanted)
    return out


# --- parts ----------------------------------------------------------------------------------------------------------


class _Cached(NamedTuple):
    """Where the keys of a call lie (:class:`.lowering.decode.AttentionDecode`). A scale is ``[B, Hkv]`` or a number."""

    lengths: Tensor
    new_keys: int
    page_table: Tensor | None
    key_scale: Tensor | float
    value_scale: Tensor | float


def _scale(factor: Tensor | float | None, batch: int, heads: int) -> Tensor | float:
    if factor is None:
        return 1.0
    return factor.expand(batch, heads) if isinstance(factor, Tensor) else float(factor)


def _apart(scales: list[Tensor | float]) -> tuple[Tensor | None, Tensor | None, float, float]:
    """The scales that are tensors, and those that are numbers."""
    tensors = [factor if isinstance(factor, Tensor) else None for factor in scales]
    numbers = [1.0 if isinstance(factor, Tensor) else factor for factor in scales]
    return tensors[0], tensors[1], numbers[0], numbers[1]


def _total(call: _Call, cached: _Cached) -> Tensor:
    return lowered.totals(cached.lengths, cached.new_keys, lowered.capacity_of(call.key, cached.page_table))


def _dense(call: _Call, cached: _Cached, dtype: torch.dtype) -> _Call:
    """The call on gathered caches, without what is not there, and with mods and masks over row numbers."""
    total, rows = _total(call, cached), call.query.size(2)
    key = lowered.gathered(call.key, cached.page_table, cached.key_scale, total, dtype)
    value = lowered.gathered(call.value, cached.page_table, cached.value_scale, total, dtype)
    mask_mod = _everything if call.spec.mask_mod is None else call.spec.mask_mod
    if call.block_mask is not None:
        mask_mod = _both(call.spec.mask_mod, visited_blocks(call.block_mask, total, call.query.size(2)).predicate())
    spec = call.spec.replace(
        mask_mod=_bound(lowered.within_keys(mask_mod, rows), total), score_mod=None, covariance_mod=None
    )

    def placed(mod: ScoreMod | None) -> ScoreMod | None:
        return None if mod is None else _bound(lowered.at_positions(mod, score=True, rows=rows), total)

    score_mod, covariance_mod = placed(call.score_mod), placed(call.covariance_mod)
    return call._replace(
        key=key, value=value, spec=spec, score_mod=score_mod, covariance_mod=covariance_mod, block_mask=None
    )


def _bound(mod: Any, total: Tensor) -> Any:
    """``mod`` with the total lengths as its first captured tensor."""

    def bound(*arguments: Tensor) -> Tensor:
        return mod(*arguments, total)

    return bound


def _both(first: Any, second: Any) -> Any:
    """What two masks allow, of which the first may be None."""
    if first is None:
        return second

    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return first(b, h, q_idx, kv_idx) & second(b, h, q_idx, kv_idx)

    return both


def _mask(call: _Call, cached: _Cached) -> tuple:
    """The mask as the operator takes it: lists of blocks, keys of a block, and the predicate."""
    own = call.spec.mask_mod
    if call.block_mask is None:
        return None, None, None, None, 1, _everything if own is None else own
    query, total = call.query, _total(call, cached)
    found = visited_blocks(call.block_mask, total, query.size(2))
    q_heads, rows = query.size(1), query.size(2)
    kv_heads = call.key.size(1 if cached.page_table is None else 2)
    lists = decode_blocks.lists_of(found, kv_heads, total, rows, reach(own), asked_everywhere=own is not None)
    # The rows of a list that is theirs alone need not ask for their kind of block.
    one_list = found.kinds.size(2) == 1 and (found.kinds.size(1) == 1 or q_heads == kv_heads)
    mask_mod = found.mask_mod if own is None and one_list else _both(own, found.predicate())
    return (*lists, found.kv_block, mask_mod)


def _reference(call: _Call, cached: _Cached) -> tuple[Tensor, AuxOutput]:
    return _uncompiled(_dense(call, cached, statistics_dtype(call.query)))


def _fused(call: _Call, cached: _Cached) -> tuple[Tensor, AuxOutput]:
    query, spec = call.query, call.spec
    validation.check_compiled(query, call.value, spec, call="plx.decode")
    for tensor in (query, call.key, call.value):
        for dim in (-3, -2, -1):
            if dim != -2 or tensor is query or cached.page_table is not None:
                mark_static(tensor, dim)
    probe, stage = call.probe, None
    if isinstance(spec.probe, (Solved, Gradient)):
        stage = _probe_stage(call, cached)
        probe = stage.probe
    score_mod = _identity if call.score_mod is None else call.score_mod
    key_scale, value_scale, *factors = _apart([cached.key_scale, cached.value_scale])
    options = dict(call.kernel_options) if call.kernel_options is not None else {}
    options |= {"new_keys": cached.new_keys, "window": reach(spec.mask_mod), "cache_salt": CACHE_SALT}
    options |= {"key_factor": factors[0], "value_factor": factors[1]}
    statistics = call.request.lse or call.request.probe_mean
    out, lse, mean = lowered.attention_decode(
        query,
        call.key,
        call.value,
        probe,
        cached.lengths,
        cached.page_table,
        key_scale,
        value_scale,
        _uniform if spec.bandwidth.kind == "infinite" else score_mod,
        _identity if call.covariance_mod is None else call.covariance_mod,
        _mask(call, cached),
        1.0 / math.sqrt(query.size(3)) if call.scale is None else float(call.scale),
        spec.intercept,
        statistics,
        options,
    )
    aux = AuxOutput(lse=lse, probe_mean=mean, value_mean=out if probe is None else None)
    return out, aux if stage is None else aux._replace(iterations=stage.iterations, residual=stage.residual)


_SOLVED_KEYS = 128  # of a block that the stage in front visits or not


def _probe_stage(call: _Call, cached: _Cached) -> probes.ProbeStage:
    """The stage that finds the probe streams over gathered caches, of which it visits the blocks that hold keys."""
    dense = _dense(call, cached, call.query.dtype)
    capacity, rows = dense.key.size(2), call.query.size(2)
    blocks = (capacity + _SOLVED_KEYS - 1) // _SOLVED_KEYS
    counts = (_total(call, cached) + _SOLVED_KEYS - 1) // _SOLVED_KEYS
    batch = call.query.size(0)
    indices = torch.arange(blocks, dtype=torch.int32, device=call.query.device).expand(batch, 1, 1, blocks)
    q_block = (rows + 127) // 128 * 128
    lists = (counts.to(torch.int32)[:, None, None], indices.contiguous(), *(None,) * 6)
    block_mask = (*lists, q_block, _SOLVED_KEYS, dense.spec.mask_mod)
    score_mod = _identity if dense.score_mod is None else dense.score_mod
    weights = probes.Weights(
        _uniform if call.spec.bandwidth.kind == "infinite" else score_mod,
        block_mask,
        1.0 / math.sqrt(call.query.size(3)) if call.scale is None else float(call.scale),
        {"cache_salt": cache_salt()},
    )
    kind = call.spec.probe
    if isinstance(kind, Gradient):
        return _gradient_stage(dense, weights)
    assert isinstance(kind, Solved)
    lam = _ridge(dense, weights)
    return probes.solved(dense.query, dense.key, None, lam, weights, call.spec.intercept, kind.max_iterations).stage


def _empty(call: _Call, cached: _Cached) -> tuple[Tensor, AuxOutput]:
    """No rows or no room for keys."""
    out = call.query.new_zeros((*call.query.shape[:3], call.value.size(3)))
    rows = torch.zeros(call.query.shape[:3], dtype=statistics_dtype(call.query), device=call.query.device)
    none = rows.to(torch.int32)
    return out, AuxOutput(lse=rows - float("inf"), probe_mean=rows, value_mean=out, iterations=none, residual=rows)
