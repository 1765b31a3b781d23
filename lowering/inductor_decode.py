"""Inductor lowering of the decode operator: two templates (GPU), or the core's CPU path on gathered caches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import templates
from ..errors import InputError
from . import cpu
from .append import append  # noqa: F401  (its lowering is here)
from .candidates import padded
from .decode import as_core, attention_decode, empty_statistics
from .decode_candidates import decode_candidates
from .inductor_shared import (
    LN2,
    LOG2E,
    allocate,
    counters_at_zero,
    distinct,
    flat,
    forward_mod,
    has_counters,
    inline,
    node_layouts,
    precision,
    realized,
    shared_memory_limit,
    tma_possible,
)
from .mod_graphs import is_always_true
from .plan_split import MERGES, Cut, decode_cut
from .plan_stages import log_choice
from .torch_compat_inductor import inductor


@inductor.SymbolicGridFn
def _splits(programs: Any, heads: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (programs, heads, 1)


@inductor.SymbolicGridFn
def _rows(batch: Any, heads: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (batch, heads, cdiv(meta["ROWS_USED"], meta["MERGED_ROWS"]))


@inductor.SymbolicGridFn
def _new_keys(batch: Any, heads: Any, keys: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (batch, heads, cdiv(keys, meta["APPEND_BLOCK"]))


_TEMPLATES = {
    "cache_append": inductor.template("parallax_cache_append", _new_keys, templates.load("cache_append")),
    "decode_split": inductor.template("parallax_decode_split", _splits, templates.load("decode_split")),
    "decode_merge": inductor.template("parallax_decode_merge", _rows, templates.load("decode_merge")),
}
_APPENDED_AT_ONCE = 16  # new keys that a program writes at once
_APPENDED_ON_THE_WAY = 16  # new keys that a decode kernel writes itself, at most
_COLUMNS_WITH_LATE_SUMS = 32  # most columns of a tile whose sums are kept apart for each key: more leave no registers
_BATCH_BLOCK = 256  # sequences whose lengths a program reads at once, at most
_LEAST_PACKED = 32  # columns of values, so that half of them is a tile of the tensor cores
_MERGED_NUMBERS = 64  # of partial sums that a thread holds at once in a merge
_MERGING_PROGRAMS = 4  # of a multiprocessor, in a merging stage of one round
_STATE_NUMBERS = 8  # of a row's state (m, d1, d2) in memory: a whole sector of the L2 cache


def _int(size: Any) -> int | None:
    """A size that is known when the code is made; None for a symbol."""
    return int(size) if getattr(size, "is_number", isinstance(size, int)) else None


def _operand(node: Any) -> Any:
    (node,) = inductor.maybe_realize([node])
    inductor.freeze_irnodes([node])
    return node


def _choose(
    stage: str, inputs: dict[str, Any], layout: Any, choices: list[Any], captured: list[Any], subgraphs: list[Any]
) -> Any:
    tensors = [node for node in (*inputs.values(), *captured) if isinstance(node, inductor.ir.IRNode)]
    generators = {}
    unique = distinct(tensors)
    for name, node in inputs.items():
        position = next(i for i, other in enumerate(unique) if other is node)
        # What times candidates gets full caches, pages that exist, and counters at 0.
        if name == "LENGTHS":
            generators[position] = lambda node: _filled(node, 1 << 30)
        elif name in ("PAGES", "COUNTERS"):
            generators[position] = lambda node: _filled(node, 0)
        elif name in ("KV_NUM", "FULL_NUM") and name.replace("NUM", "IDX") in inputs:
            generators[position] = inductor.create_num_blocks_fake_generator(inputs[name.replace("NUM", "IDX")])
        elif name in ("KV_IDX", "FULL_IDX"):
            generators[position] = inductor.create_indices_fake
    out = inductor.autotune(f"parallax_{stage}", choices, unique, layout, generators)
    out.data.data.subgraph_inps = captured
    out.data.data.subgraph_outs = flat(subgraphs)
    return out


def _filled(node: Any, value: int) -> torch.Tensor:
    sizes = inductor.V.graph.sizevars.optimization_hints(node.get_size())
    return torch.full([int(size) for size in sizes], value, dtype=node.get_dtype(), device=node.get_device())


def _cache_switches(inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What a template must know of the caches ``K``, ``V``."""
    guard = inductor.V.graph.sizevars.guard_int
    key = inputs["K"]
    width, value_width = guard(key.get_size()[3]), guard(inputs["V"].get_size()[3])
    eight_bits = key.get_dtype().itemsize == 1
    return {
        "D": width,
        "DV": value_width,
        "D_PAD": padded(width),
        "DV_PAD": padded(value_width),
        "PAGED": "PAGES" in inputs,
        "PAGE_SIZE": guard(key.get_size()[1]) if "PAGES" in inputs else 0,
        "EIGHT_BITS": eight_bits,
        "LARGEST": torch.finfo(key.get_dtype()).max if eight_bits else 0.0,
        "HAS_KEY_SCALE": "KEY_SCALE" in inputs,
        "HAS_VALUE_SCALE": "VALUE_SCALE" in inputs,
        "KEY_FACTOR": options.get("key_factor", 1.0),
        "VALUE_FACTOR": options.get("value_factor", 1.0),
        "APPEND_BLOCK": _APPENDED_AT_ONCE,
    }


# --- append ---------------------------------------------------------------------------------------------------------


def _pending() -> dict[Any, tuple[Any, Any]]:
    """New keys and values of the graph being lowered that a decode node still to come writes on its way, by that node."""
    return inductor.V.graph.__dict__.setdefault("parallax_pending_appends", {})


def _reader_on_the_way(node: torch.fx.Node, new_keys: Any) -> torch.fx.Node | None:
    """The decode node that may write what the append ``node`` does: the first to read its caches, and for the same append.

    Only of caches that are inputs of the graph is it known that nothing else sees their memory under another name.
    """
    key_cache, value_cache, _, _, lengths, *paging = node.args[:8]
    if not (isinstance(new_keys, int) and new_keys <= _APPENDED_ON_THE_WAY):
        return None
    caches: Any = (key_cache, value_cache)
    if any(cache.op != "placeholder" for cache in caches) or key_cache is value_cache:
        return None
    following = node.next
    while following.op != "root":
        if any(cache in following.all_input_nodes for cache in caches):
            break
        following = following.next
    if following.op == "root" or following.target is not attention_decode:
        return None
    given: Any = following.args
    same = (*given[1:3], given[4], *given[5:8]) == (*caches, lengths, *paging)
    # The tiles of a block mask's lists need not be those of the new keys.
    reads_only_there = given[10][0] is None and all(cache not in (given[0], given[3]) for cache in caches)
    return following if same and reads_only_there and given[14]["new_keys"] == new_keys else None


@inductor.register_lowering(torch.ops.parallax.append.default, type_promotion_kind=None)
def _lower_append(*arguments: Any) -> Any:
    """Inductor's lowering of :data:`~.append.append`."""
    key_cache, value_cache, key, value, lengths, pages, key_scale, value_scale, key_factor, value_factor, _ = arguments
    if key_cache.get_device().type == "cpu":
        # In plain torch, as an operator of its own: inlined, Inductor would make copies of the caches.
        return inductor.fallback_handler(torch.ops.parallax.append.default, add_to_fallback_set=False)(*arguments)
    node, new_keys = inductor.V.graph.current_node, _int(key.get_size()[2])
    reader = _reader_on_the_way(node, new_keys)
    if reader is not None:
        _pending()[reader] = (key, value)
        return None
    operands = {"KEY": key, "VALUE": value, "K": key_cache, "V": value_cache, "LENGTHS": lengths, "PAGES": pages}
    operands |= {"KEY_SCALE": key_scale, "VALUE_SCALE": value_scale}
    inputs = {name: _operand(operand) for name, operand in operands.items() if operand is not None}
    ir = inductor.ir
    layout = ir.FixedLayout(key_cache.get_device(), torch.int32, [1], [1])
    batch, heads, length, _ = key.get_size()
    choices: list[Any] = []
    error = _TEMPLATES["cache_append"].maybe_append_choice(
        choices,
        input_nodes=list(inputs.values()),
        layout=layout,
        mutated_inputs=[inputs["K"], inputs["V"]],
        call_sizes=[batch, heads, length],
        num_warps=4,
        num_stages=1,
        NEW_KEYS=length,
        **_cache_switches(inputs, {"key_factor": key_factor, "value_factor": value_factor}),
    )
    if error is not None:
        raise error
    _choose("cache_append", inputs, layout, choices, [], [])
    return None


# --- decode ---------------------------------------------------------------------------------------------------------


@inductor.register_lowering(attention_decode, type_promotion_kind=None)
def _lower_decode(*arguments: Any) -> Any:
    """Inductor's lowering of :data:`~.decode.attention_decode`."""
    query, key, value, probe, lengths, pages, key_scale, value_scale = arguments[:8]
    score, covariance, mask, scale, intercept, save_statistics, options, *buffers = arguments[8:]
    device = query.get_device()
    if device.type == "cpu":
        return cpu.lower(_on_cpu, arguments, "decode")
    operands = {"Q": query, "K": key, "V": value, "R": probe, "LENGTHS": lengths, "PAGES": pages}
    operands |= {"KEY_SCALE": key_scale, "VALUE_SCALE": value_scale, **_lists(mask[:4])}
    rows = _Rows(
        operands=operands,
        mods=(forward_mod(score, buffers[0], device), forward_mod(covariance, buffers[1], device)),
        mask=mask[-1],
        mask_buffers=buffers[2],
        scale=scale,
        intercept=intercept,
        options=options,
        kv_block=mask[4],
    )
    new = _pending().pop(inductor.V.graph.current_node, None)
    return split_keys(rows, node_layouts(), save_statistics, new)


def forward_of_core(
    operands: dict[str, Any],
    block_mask: Any,
    mods: tuple[Any, Any],
    mask_buffers: Any,
    scale: float,
    intercept: bool,
    options: dict[str, Any],
) -> tuple[Any, Any, Any]:
    """Output, LSE and probe mean of a call of the core whose keys are split (:func:`.plan_split.splits_keys`).

    Args:
        operands: ``Q, K, V`` and ``R`` (None without a probe).
        block_mask: the call's, a :class:`~.operator.BlockMaskOperands`.
        mods, mask_buffers: inlined mods; tensors that the mask captures.
        scale, intercept: as for the operator.
        options: its kernel options; ``keys``, where it is there, bounds the keys that a row sees, by its own number.
    """
    own = {name: options[given] for name in ("BLOCK_N", "num_warps", "num_stages", "USE_TMA") for given in (name, "fwd_" + name)
           if given in options}  # fmt: skip
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    rows = _Rows(
        operands=operands | _lists(lists),
        mods=mods,
        mask=block_mask.mask_mod,
        mask_buffers=mask_buffers,
        scale=scale,
        intercept=intercept,
        options=own | {"keys": options.get("keys")},
        kv_block=block_mask.kv_block,
    )
    out, _, lse, mean = node_layouts()
    return split_keys(rows, [out, lse, mean], True)


def _lists(tensors: Any) -> dict[str, Any]:
    return dict(zip(("KV_NUM", "KV_IDX", "FULL_NUM", "FULL_IDX"), tensors, strict=True))


@dataclass(frozen=True)
class _Rows:
    """A call: few rows, and where their keys lie.

    Attributes:
        operands: by their names in the templates, those that the call lacks None. Without ``LENGTHS`` every key of ``K`` is
            there, and the rows are numbered from 0.
        mods: inlined; mask, mask_buffers: the predicate's graph, and what it captures.
        options: the user's, with the operator's own.
        kv_block: keys of a block of the lists.
    """

    operands: dict[str, Any]
    mods: tuple[Any, Any]
    mask: Any
    mask_buffers: Any
    scale: float
    intercept: bool
    options: dict[str, Any]
    kv_block: Any


def _key_bounds(rows: _Rows, q_length: int) -> tuple[int, int | None]:
    """The first key that rows numbered from 0 see, and the end of what they see; None is the end of all keys."""
    behind, ahead = rows.options.get("keys") or (None, None)
    return max(0, behind or 0), None if ahead is None else max(0, q_length + ahead)


def split_keys(
    rows: _Rows, layouts: list[Any], save_statistics: bool, new: tuple[Any, Any] | None = None
) -> tuple[Any, Any, Any]:
    """``(out, lse, probe_mean)`` by the decoding kernels.

    Args:
        layouts: of the three results.
        save_statistics: whether the last two are wanted.
        new: keys and values that the kernel appends on its way.
    """
    guard = inductor.V.graph.sizevars.guard_int
    options = rows.options
    inputs = {name: _operand(node) for name, node in rows.operands.items() if node is not None}
    query, key, value = inputs["Q"], inputs["K"], inputs["V"]
    probe: Any = inputs.get("R")
    device = query.get_device()
    mods, mask = rows.mods, inline(rows.mask, rows.mask_buffers, device, score=False)
    captured = [*mods[0].buffers, *mods[1].buffers, *realized(rows.mask_buffers)]
    subgraphs = [mods[0].value, mods[1].value, mask]

    batch, q_heads, q_length, width = query.get_size()
    q_heads, q_length, width, value_width = map(guard, (q_heads, q_length, width, value.get_size()[3]))
    paged, sparse = "PAGES" in inputs, "KV_NUM" in inputs
    cache = _cache_switches(inputs, options)
    kv_heads, page_size = guard(key.get_size()[2 if paged else 1]), cache["PAGE_SIZE"]
    capacity = _int(key.get_size()[2]) if not paged else _int(inputs["PAGES"].get_size()[1])
    if paged and capacity is not None:
        capacity *= page_size
    window = None if sparse else options.get("window")
    first_key, end_key = _key_bounds(rows, q_length)
    most_keys = capacity
    if window is not None:
        most_keys = window + q_length if capacity is None else min(capacity, window + q_length)
    if end_key is not None:
        most_keys = end_key if capacity is None else min(capacity, end_key)
    if most_keys is not None:
        most_keys = max(1, most_keys - first_key)
    kv_block = guard(rows.kv_block) if sparse else 1
    if sparse and capacity is not None:
        # The tiles of a list are those of whole blocks; of one block that is longer than all keys, those of the keys.
        kv_block = min(kv_block, padded(capacity)) if kv_block > capacity else kv_block
        most_keys = -(-capacity // kv_block) * kv_block
    group = q_heads // kv_heads
    batch = batch if _int(batch) is None else int(batch)
    has_probe = probe is not None
    half = cache["EIGHT_BITS"] and query.get_dtype().itemsize == 2
    covariance_mod = has_probe and not mods[1].identity
    common = {
        "SCALE": rows.scale,
        "GQA": group,
        "Q_LEN": q_length,
        **cache,
        "HAS_PROBE": has_probe,
        "HAS_ADJOINT": False,
        "PROBE_SPLIT": has_probe and probe.get_dtype().itemsize > query.get_dtype().itemsize,
        "INTERCEPT": rows.intercept,
        "SCORE_MOD": not mods[0].identity,
        "COVARIANCE_MOD": covariance_mod,
        "HALF": half,
        "PACKED": half and not covariance_mod and value_width >= _LEAST_PACKED and _in_pairs(inputs["V"]),
        "UNIT_OF_SCORES": _unit_of_scores(width, key) if half else 1.0,
        "HAS_MASK": not is_always_true(rows.mask.graph_module),
        "HAS_LENGTHS": "LENGTHS" in inputs,
        "FROM_START": "LENGTHS" not in inputs,
        "FIRST_KEY": first_key,
        "END_KEY": end_key,
        "BLOCK_SPARSE": sparse,
        "HAS_FULL_BLOCKS": "FULL_NUM" in inputs,
        "KV_BLOCK": kv_block,
        "HAS_WINDOW": window is not None,
        "BEHIND": window or 0,
        "NEW_KEYS": options.get("new_keys", 0),
        "SAVE_STATISTICS": save_statistics,
        "PRECISION": precision(),
        "LOG2E": LOG2E,
        "LN2": LN2,
        "ONE_SEQUENCE": batch == 1,
        "BATCH_BLOCK": _BATCH_BLOCK if not isinstance(batch, int) else max(16, min(_BATCH_BLOCK, padded(batch))),
    }

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def cut(block_n: int, programs: int) -> Cut:
        return decode_cut(
            batch=batch,
            kv_heads=kv_heads,
            rows_of_head=q_length * group,
            most_keys=most_keys,
            has_probe=has_probe,
            block_n=block_n,
            programs=programs * multiprocessors,
            merge=options.get("MERGE") if has_counters() else "stage",
        )

    known = isinstance(batch, int) and most_keys is not None
    stacked = cut(64, 1).rows * (2 if has_probe else 1)
    found = decode_candidates(
        rows=stacked,
        width=width,
        value_width=value_width,
        itemsize=query.get_dtype().itemsize,
        cache_itemsize=key.get_dtype().itemsize,
        shared_memory_limit=shared_memory_limit(device),
        # The copy engine would not see what the program itself has just written.
        tma=not paged and new is None and tma_possible(device, [key, value]),
        options=options,
        keys=batch * kv_heads * most_keys / multiprocessors if known else math.inf,
        heads=batch * kv_heads / multiprocessors if isinstance(batch, int) else math.inf,
    )
    if sparse:
        found = _within_blocks(found, kv_block, options)
    cuts = [cut(candidate.block_n, candidate.programs) for candidate in found]
    # The buffers of the states are made for one way to merge and one number of programs: those of the first candidate.
    if not inductor.config.max_autotune:
        found, cuts = found[:1], cuts[:1]
    merge = cuts[0].merge
    log_choice("decode_split", "forward", "split keys", f"{MERGES[merge]}; {found[0]}, {cuts[0].programs} programs")
    pairs = [(candidate, own) for candidate, own in zip(found, cuts, strict=True) if own.merge == merge]
    if merge == "stage" or not all(isinstance(own.programs, int) for own in cuts):
        # The stage that merges works the cut out again; and of symbols there is no largest.
        pairs = pairs[:1]
    programs = pairs[0][1].programs if len(pairs) == 1 else max(own.programs for _, own in pairs)
    tile_rows, heads = cuts[0].rows, kv_heads * cuts[0].row_tiles
    used = min(tile_rows, q_length * group)
    parts = 2 if has_probe else 1
    out_layout, *statistics_layouts = layouts
    statistics = dict(zip(("LSE", "PROBE_MEAN"), map(allocate, statistics_layouts), strict=True))
    partial = {"PARTIAL": _scratch(device, [programs, heads, tile_rows, parts * value_width])}
    state_size = [programs, heads, tile_rows, _STATE_NUMBERS]
    split_inputs, written = dict(inputs), {}
    if merge == "kernel":
        split_inputs["COUNTERS"] = _operand(counters_at_zero(device, batch * heads))
        written = partial | {"STATE": _scratch(device, state_size)}
    elif merge == "stage":
        written = dict(partial)
    if save_statistics and merge != "stage":
        written |= statistics
    if new is not None:
        split_inputs |= {name: _operand(node) for name, node in zip(("KEY", "VALUE"), new, strict=True)}
    split_inputs |= written
    mutated = [*written.values(), *((inputs["K"], inputs["V"]) if new is not None else ())]
    layout = out_layout
    if merge == "stage":
        ir = inductor.ir
        layout = ir.FixedLayout(device, torch.float32, state_size, ir.FlexibleLayout.contiguous_strides(state_size))
    # Of the merging stage: more rows a program where programs of one row would run in more than one round.
    merged_rows, most_merging = 1, _MERGING_PROGRAMS * multiprocessors
    while isinstance(batch, int) and merged_rows < used and batch * heads * (used // merged_rows) > most_merging:
        merged_rows *= 2
    choices: list[Any] = []
    for candidate, own in pairs:
        held = (used, candidate.num_warps) if merge == "kernel" else (merged_rows, 4)
        groups = candidate.groups(stacked, query.get_dtype().itemsize)
        shape = {
            "ROWS": tile_rows,
            "HEAD_TILES": own.row_tiles,
            "ROWS_USED": used,
            "PARTS": parts,
            "COLUMNS": stacked,
            "BLOCK_N": candidate.block_n,
            "GROUPS": groups,
            "KEYS": candidate.block_n // groups,
            "STATE_NUMBERS": _STATE_NUMBERS,
            "SUMS_AT_THE_END": stacked <= _COLUMNS_WITH_LATE_SUMS,
            "SLOTS": own.slots,
            "LEAST_TILES": own.least_tiles,
            "USE_TMA": candidate.tma,
            "APPENDS": new is not None,
            "SPLIT": merge != "none",
            "MERGE_HERE": merge == "kernel",
            "ONE_PAGE": paged and page_size % candidate.block_n == 0,
            **_merged_at_once(value_width, parts, own, *held),
        }
        error = _TEMPLATES["decode_split"].maybe_append_choice(
            choices,
            input_nodes=list(split_inputs.values()),
            layout=layout,
            subgraphs=subgraphs,
            mutated_inputs=mutated,
            call_sizes=[own.programs, heads],
            num_warps=candidate.num_warps,
            num_stages=candidate.num_stages,
            **shape,
            **common,
        )
        if error is not None:
            raise error
    first = _choose("decode_split", split_inputs, layout, choices, captured, subgraphs)
    if merge != "stage":
        return first, statistics["LSE"], statistics["PROBE_MEAN"]
    merge_inputs = {"STATE": first, "PARTIAL": partial["PARTIAL"]}
    names = ("LENGTHS", "KV_NUM", "FULL_NUM", "PAGES" if paged else "K", "VALUE_SCALE")
    merge_inputs |= {name: inputs[name] for name in names if name in inputs}
    if save_statistics:
        merge_inputs |= statistics
    choices = []
    error = _TEMPLATES["decode_merge"].maybe_append_choice(
        choices,
        input_nodes=list(merge_inputs.values()),
        layout=out_layout,
        mutated_inputs=list(statistics.values()) if save_statistics else [],
        call_sizes=[batch, heads],
        num_warps=4,
        num_stages=1,
        **shape,
        **common,
    )
    if error is not None:
        raise error
    out = _choose("decode_merge", merge_inputs, out_layout, choices, [], [])
    return out, statistics["LSE"], statistics["PROBE_MEAN"]


def _within_blocks(found: list[Any], kv_block: int, options: dict[str, Any]) -> list[Any]:
    """Candidates whose tiles of keys lie within blocks of ``kv_block`` keys."""
    if kv_block % 16:
        raise InputError(f"block_mask must have blocks of a multiple of 16 keys, but got {kv_block}.")
    if kv_block % options.get("BLOCK_N", 16):
        raise InputError(
            f"kernel_options[BLOCK_N] must divide the block_mask's blocks of {kv_block} keys, but got {options['BLOCK_N']}."
        )
    largest = kv_block & -kv_block  # the largest power of two that divides it
    fitting = [replace(candidate, block_n=min(candidate.block_n, largest)) for candidate in found]
    return list(dict.fromkeys(fitting))


def _in_pairs(values: Any) -> bool:
    """Whether 8-bit values can be read two columns at a time, as 16-bit numbers."""
    graph = inductor.V.graph
    *strides, innermost = values.get_stride()
    even = [*strides, values.get_layout().offset, values.get_size()[3]]
    multiple = graph.sizevars.statically_known_multiple_of
    return (
        innermost == 1 and values.get_name() not in graph.unaligned_buffers and all(multiple(size, 2) for size in even)
    )


def _unit_of_scores(width: int, key: Any) -> float:
    """A power of two in whose units no difference of two probe scores passes float16, for a probe whose numbers are below 2."""
    largest = 2 * 2 * width * torch.finfo(key.get_dtype()).max
    return 2.0 ** max(0, math.ceil(math.log2(largest / torch.finfo(torch.float16).max)))


def _merged_at_once(value_width: int, parts: int, own: Cut, rows: int, num_warps: int) -> dict[str, int]:
    """How many rows, of how many splits, a merge holds at once, and how many of these abreast: powers of two."""
    merged_rows = 1 << max(0, rows - 1).bit_length()
    most = max(1, 32 * num_warps * _MERGED_NUMBERS // (merged_rows * padded(value_width) * parts))
    wanted = own.programs if isinstance(own.programs, int) else own.slots + 1
    at_once = min(most, 1 << max(0, wanted - 1).bit_length())
    # Splits of one row are the threads' only work to share. Those of several rows abreast would only be summed through shared
    # memory: 24 us for 16 rows of 32 sequences on an H200, where a program has 8 rows and one split.
    return {"MERGED_ROWS": merged_rows, "MERGED_AT_ONCE": at_once, "MERGED_ABREAST": at_once if merged_rows == 1 else 1}


def _scratch(device: torch.device, sizes: list[Any]) -> Any:
    strides = inductor.ir.FlexibleLayout.contiguous_strides(sizes)
    return inductor.empty_strided(sizes, strides, dtype=torch.float32, device=device)


def _on_cpu(*arguments: Any) -> Any:
    out, _, lse, mean = cpu.forward(*as_core(arguments))
    return (out, lse, mean) if arguments[13] else (out, *empty_statistics(lse))
