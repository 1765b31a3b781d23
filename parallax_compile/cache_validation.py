"""What a call of :func:`~parallax_compile.decode` may be, as :mod:`.validation` has it for ``attention``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.decode import capacity_of
from .lowering.torch_compat_errors import raise_input
from .spec import AttentionSpec
from .validation import FLOATING, check_block_mask_of, check_power_of_two, check_strided

EIGHT_BITS = torch.float8_e4m3fn
INTEGERS = (torch.int32, torch.int64)
KERNEL_OPTIONS = ("BLOCK_N", "num_warps", "num_stages", "PROGRAMS_PER_SM", "USE_TMA", "MERGE")


def check_call(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    probe: Any,
    spec: AttentionSpec,
    key: Any,
    value: Any,
    cache_seqlens: Any,
    page_table: Any,
    k_scale: Any,
    v_scale: Any,
    kernel_options: Any,
) -> None:
    """Types, ranks, devices, dtypes and sizes of everything that a call names."""
    if callable(probe) and not isinstance(probe, Tensor):
        raise_input(
            InputTypeError, "probe must be a tensor, but got a callable. To pass a score mod write score_mod=..."
        )
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        _check_tensor(name, tensor)
    for name, tensor in (("probe", probe), ("key", key), ("value", value)):
        if tensor is not None:
            _check_tensor(name, tensor)
    named = (
        ("query", query),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("probe", probe),
        ("key", key),
        ("value", value),
        ("cache_seqlens", cache_seqlens),
        ("page_table", page_table),
        ("k_scale", k_scale),
        ("v_scale", v_scale),
    )
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != query.device:
            raise_input(
                InputError, f"{name} must be on query's device {query.device}, but got {tensor.device}. Move it first."
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise_input(
                UnsupportedError,
                f"decode has no gradient, but {name} requires one. Call it under torch.no_grad() or "
                "torch.inference_mode(), or train with plx.attention.",
            )
    _check_dtypes(query, key_cache, value_cache, probe, key, value)
    paged = page_table is not None
    kv_heads = _check_caches(query, key_cache, value_cache, page_table)
    _check_probe(query, probe, spec)
    _check_new(query, key_cache, value_cache, key, value, kv_heads)
    _check_lengths(query, key_cache, cache_seqlens, page_table, 0 if key is None else key.size(2))
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        _check_scale(name, factor, key_cache if name == "k_scale" else value_cache, (query.size(0), kv_heads))
    _check_options(kernel_options, paged)


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise_input(InputTypeError, f"{name} must be a tensor, but got {type(tensor).__name__}.")
    check_strided(name, tensor)
    if tensor.dim() != 4:
        raise_input(
            InputError,
            f"{name} must be 4-D, [batch, heads, length, width] (a cache of pages: [pages, page size, heads, width]), "
            f"but got shape {tuple(tensor.shape)}.",
        )


def _check_dtypes(query: Tensor, key_cache: Tensor, value_cache: Tensor, probe: Any, key: Any, value: Any) -> None:
    if query.dtype not in FLOATING:
        raise_input(
            InputTypeError,
            f"query must be bfloat16, float16, float32 or float64, but got {query.dtype}. Cast it first.",
        )
    for name, tensor in (("probe", probe), ("key", key), ("value", value)):
        if tensor is not None and tensor.dtype != query.dtype:
            raise_input(
                InputTypeError, f"{name} must have query's dtype {query.dtype}, but got {tensor.dtype}. Cast it."
            )
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.dtype not in (query.dtype, EIGHT_BITS):
            raise_input(
                InputTypeError,
                f"{name} must have query's dtype {query.dtype} or float8_e4m3fn, but got {tensor.dtype}.",
            )
    if key_cache.dtype != value_cache.dtype:
        raise_input(
            InputTypeError,
            f"value_cache must have key_cache's dtype {key_cache.dtype}, but got {value_cache.dtype}.",
        )


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Any) -> int:
    """The number of key heads."""
    paged = page_table is not None
    if paged:
        if not isinstance(page_table, Tensor) or page_table.dtype not in INTEGERS:
            found = page_table.dtype if isinstance(page_table, Tensor) else type(page_table).__name__
            raise_input(InputTypeError, f"page_table must be an int32 or int64 tensor or None, but got {found}.")
        if page_table.dim() != 2 or page_table.size(0) != query.size(0):
            raise_input(
                InputError,
                f"page_table must be [batch = {query.size(0)}, pages of a sequence], but got {tuple(page_table.shape)}.",
            )
        if key_cache.size(1) < 16 or key_cache.size(1) % 16:
            raise_input(
                InputError,
                "key_cache must have a page size (its second dimension, with a page_table) that is a multiple of 16, "
                f"but got {key_cache.size(1)}.",
            )
    elif key_cache.size(0) != query.size(0):
        raise_input(
            InputError,
            f"key_cache must have query's batch size {query.size(0)}, but got {key_cache.size(0)}. "
            "For a cache of pages pass page_table.",
        )
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise_input(
            InputError,
            f"value_cache must have key_cache's first dimensions {tuple(key_cache.shape[:3])}, "
            f"but got {tuple(value_cache.shape[:3])}.",
        )
    if key_cache.size(3) != query.size(3):
        raise_input(
            InputError,
            f"key_cache must have query's width D = {query.size(3)}, but got {key_cache.size(3)} (the last dimension).",
        )
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.stride(3) != 1 and tensor.size(3) > 1:
            raise_input(
                InputError,
                f"{name} must be contiguous in its last dimension, but has strides {tuple(tensor.stride())}. "
                "Lay the cache out so that the numbers of a key lie side by side.",
            )
    kv_heads = key_cache.size(2 if paged else 1)
    if kv_heads == 0 or query.size(1) % kv_heads:
        raise_input(
            InputError, f"query's heads must be a multiple of key_cache's, but got {query.size(1)} and {kv_heads}."
        )
    return kv_heads


def _check_probe(query: Tensor, probe: Any, spec: AttentionSpec) -> None:
    if spec.probe.kind == "learned" and probe is None:
        raise_input(
            InputError,
            "the spec has a learned probe, so probe must be a tensor of query's shape; got None. "
            "Pass it, or use plx.SOFTMAX.",
        )
    if spec.probe.kind != "learned" and probe is not None:
        raise_input(
            InputError,
            f"the spec's probe is {spec.probe.kind}, which takes no probe tensor, but one was given. "
            "Drop it, or use a spec with plx.Learned().",
        )
    if probe is not None and probe.shape != query.shape:
        raise_input(InputError, f"probe must have query's shape {tuple(query.shape)}, but got {tuple(probe.shape)}.")


def _check_new(query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Any, value: Any, kv_heads: int) -> None:
    if (key is None) != (value is None):
        raise_input(InputError, f"key and value go together, but only {'value' if key is None else 'key'} was given.")
    if key is None:
        return
    for name, tensor, width in (("key", key, key_cache.size(3)), ("value", value, value_cache.size(3))):
        wanted = (query.size(0), kv_heads, key.size(2), width)
        if tuple(tensor.shape) != wanted:
            raise_input(
                InputError,
                f"{name} must be {wanted}, [batch, key heads, new keys, width], but got {tuple(tensor.shape)}.",
            )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        for dim in range(3):
            if cache.stride(dim) == 0 and cache.size(dim) > 1:
                raise_input(
                    InputError,
                    f"{name} is expanded (stride 0), so that nothing can be appended to it. Allocate it in full.",
                )


def _check_lengths(query: Tensor, key_cache: Tensor, lengths: Any, page_table: Any, new_keys: int) -> None:
    capacity = capacity_of(key_cache, page_table)
    if new_keys > capacity:
        raise_input(
            InputError,
            f"key has {new_keys} new keys, but the cache has a capacity of {capacity} for a sequence. Allocate a longer one.",
        )
    if isinstance(lengths, Tensor):
        if lengths.dtype not in INTEGERS:
            raise_input(InputTypeError, f"cache_seqlens must be int32 or int64, but got {lengths.dtype}.")
        if lengths.dim() != 1 or lengths.size(0) != query.size(0):
            raise_input(
                InputError, f"cache_seqlens must be [batch = {query.size(0)}], but got shape {tuple(lengths.shape)}."
            )
        return
    if isinstance(lengths, bool) or not isinstance(lengths, (int, torch.SymInt)):
        raise_input(
            InputTypeError,
            f"cache_seqlens must be an int32 or int64 tensor [batch], or one int for all, but got {type(lengths).__name__}.",
        )
    if lengths < 0 or lengths + new_keys > capacity:
        raise_input(InputError, f"cache_seqlens must be {_range_text(capacity, new_keys)}, but got {lengths}.")


def _range_text(capacity: Any, new_keys: int) -> str:
    """What a length may be."""
    if not new_keys:
        return f"from 0 to the capacity {capacity}"
    return f"from 0 to {capacity - new_keys} (the capacity {capacity} less {new_keys} new keys)"


def _check_scale(name: str, factor: Any, cache: Tensor, shape: tuple[int, int]) -> None:
    if factor is None:
        return
    if cache.dtype != EIGHT_BITS:
        raise_input(InputError, f"{name} goes with a float8_e4m3fn cache, but the cache is {cache.dtype}. Drop it.")
    if isinstance(factor, Tensor):
        if not factor.is_floating_point():
            raise_input(InputTypeError, f"{name} must be a floating tensor or a number, but got {factor.dtype}.")
        if factor.dim() > 2 or any(
            have not in (1, want) for have, want in zip(reversed(factor.shape), reversed(shape), strict=False)
        ):
            raise_input(
                InputError,
                f"{name} must broadcast to [batch, key heads] = {shape}, but got shape {tuple(factor.shape)}.",
            )
        return
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise_input(InputTypeError, f"{name} must be a tensor or a number, but got {type(factor).__name__}.")
    if not 0 < factor < float("inf"):
        raise_input(InputError, f"{name} must be positive and finite, but got {factor}.")


def check_positions(block_mask: Any, query: Tensor, capacity: Any) -> None:
    """A ``BlockMask`` over the positions of a sequence: at least as long as the caches, with blocks that kernels take."""
    if block_mask is None:
        return
    check_block_mask_of(block_mask, query)
    q_length, kv_length = block_mask.seq_lengths
    if q_length < capacity or kv_length < capacity:
        raise_input(
            InputError,
            f"block_mask must be for lengths of at least the capacity {capacity}, rows and keys both at their positions in the "
            f"sequence, but was made for (q, kv) = ({q_length}, {kv_length}). A mask of rows numbered from 0 goes to "
            "plx.attention.",
        )
    if block_mask.BLOCK_SIZE[1] % 16:
        raise_input(
            InputError, f"block_mask must have blocks of a multiple of 16 keys, but got {block_mask.BLOCK_SIZE[1]}."
        )


def _check_options(options: Any, paged: bool) -> None:
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise_input(InputTypeError, f"kernel_options must be a dict or None, but got {type(options).__name__}.")
    for name, option in options.items():
        if name not in KERNEL_OPTIONS:
            raise_input(
                InputError,
                f"kernel_options has an unknown name {name}. Known for decode: {', '.join(KERNEL_OPTIONS)}.",
            )
        if name == "MERGE":
            if option not in ("kernel", "stage"):
                raise_input(InputError, f"kernel_options[MERGE] must be 'kernel' or 'stage', but got {option}.")
            continue
        if name == "USE_TMA":
            if not isinstance(option, bool):
                raise_input(InputTypeError, f"kernel_options[{name}] must be a bool, but got {option}.")
            continue
        if isinstance(option, bool) or not isinstance(option, int) or option < 1:
            raise_input(InputError, f"kernel_options[{name}] must be an integer of at least 1, but got {option}.")
        check_power_of_two(name, option)


def check_values(compiled: bool, key_cache: Tensor, lengths: Any, page_table: Any, new_keys: int) -> None:
    """Lengths and page table by their values, for which the host waits for the device."""
    if compiled:
        raise_input(
            UnsupportedError,
            "check=True reads lengths and page table on the host, which compiled code does not. Check in an uncompiled call.",
        )
    lengths = lengths.cpu() if isinstance(lengths, Tensor) else torch.tensor([lengths])
    check_length_values(lengths, capacity_of(key_cache, page_table), new_keys)
    if page_table is None:
        return
    size = key_cache.size(1)
    needed = torch.arange(page_table.size(1)) * size < (lengths + new_keys)[:, None]
    table = page_table.cpu()
    outside = (needed & ((table < 0) | (table >= key_cache.size(0)))).nonzero().tolist()
    if outside:
        row, column = outside[0]
        raise_input(
            InputError,
            f"page_table[{row}, {column}] must name one of the {key_cache.size(0)} pages of the cache, "
            f"but got {int(table[row, column])}.",
        )


def check_length_values(lengths: Tensor, capacity: int, new_keys: int) -> None:
    """Each sequence's keys fit into the capacity."""
    wrong = ((lengths < 0) | (lengths + new_keys > capacity)).nonzero().flatten().tolist()
    if wrong:
        raise_input(
            InputError,
            f"cache_seqlens[{wrong[0]}] must be {_range_text(capacity, new_keys)}, but got {int(lengths[wrong[0]])}.",
        )
