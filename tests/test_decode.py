"""Decoding: the reference and the CPU path against each sequence by itself, wrong calls, the cut, the kernels' resources."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallax_compile.lowering import counters
from parallax_compile.lowering.plan_split import decode_cut
from support.decoding import Call, random_blocks
from support.oracle import budget, relative_error
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import parallax_compile as plx
from parallax_compile import masks
from parallax_compile.block_masks import block_kinds
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
CAUSAL, WINDOW = plx.masks.causal(), plx.masks.sliding_window(21)


def causal(row: Tensor, column: Tensor) -> Tensor:
    return column <= row


def window(row: Tensor, column: Tensor) -> Tensor:
    return (column <= row) & (row - column < 21)


def bias(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s + 0.02 * h * (q - k) + 0.1 * b


CASES = {
    "append": Call((40, 0, 99, 17), new=1),
    "pages, causal": Call(
        (40, 0, 98), new=2, queries=2, page=48, spec=plx.PARALLAX.replace(mask_mod=CAUSAL), keep=causal
    ),
    "window": Call((70, 9), queries=3, spec=plx.PARALLAX.replace(mask_mod=WINDOW, intercept=False), keep=window),
    "softmax": Call((64, 0, 5), spec=plx.SOFTMAX, q_heads=6),
    "past the capacity": Call((99, 100), new=2),
    "rows before the first key": Call((1, 2), queries=4, spec=plx.PARALLAX.replace(mask_mod=CAUSAL), keep=causal),
    "mods": Call((40, 7), queries=2, score=bias, covariance=plx.mods.tanh_cap(3.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reference(name: str) -> None:
    call = replace(CASES[name], dtype=torch.float64)
    inputs = call.fresh()
    assert relative_error(call(inputs), call.want()) < 1e-12
    assert not call.new or call.appended(inputs)


@pytest.mark.parametrize("name", ["pages, causal"])
def test_compiled_on_cpu(name: str) -> None:
    call = CASES[name]
    compiled = torch.compile(call, fullgraph=True)
    for lengths in (call.lengths, tuple(n // 2 for n in call.lengths)):  # lengths are data: nothing is compiled again
        call.__dict__.update(replace(call, lengths=lengths).__dict__)
        inputs = call.fresh()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=lengths != CASES[name].lengths):
            got, want = compiled(inputs), call.want()
        assert relative_error(got, want) <= budget(relative_error(call.want(call.dtype), want), call.dtype)
        assert call.appended(inputs)


def test_members_whose_probe_is_found_and_infinite_bandwidth() -> None:
    sizes = {"capacity": 24, "q_heads": 2, "kv_heads": 1, "width": 8, "value_width": 8}
    for spec in (plx.LLA, plx.AFFINE_LINEAR, plx.MESA, plx.AttentionSpec(probe=plx.Gradient(steps=2))):
        call = Call((20, 3), spec=spec, dtype=torch.float64, **sizes)  # type: ignore[arg-type]
        got = call(call.fresh())
        for b, n in enumerate(call.totals):
            x = call.inputs
            probe = None if x["probe"] is None else x["probe"][b : b + 1]
            key, value = (x[name][b : b + 1, :, :n] for name in ("key_cache", "value_cache"))
            want = plx.attention(x["query"][b : b + 1], key, value, probe, spec=spec, enable_gqa=True)
            assert relative_error(got[b : b + 1], want) < 1e-9


def test_what_is_returned_beside_the_output() -> None:
    call = Call((5, 0), dtype=torch.float64)
    out, lse = call(call.fresh(), return_lse=True)
    assert (lse[1] == -float("inf")).all() and not out[1].any()
    same, aux = call(call.fresh(), return_aux=plx.AuxRequest(probe_mean=True, value_mean=True))
    assert torch.equal(same, out) and aux.lse is None and aux.probe_mean.shape == lse.shape
    assert relative_error(aux.value_mean, replace(call, spec=plx.SOFTMAX).want()) < 1e-12


def test_no_rows_no_room_no_new_keys() -> None:
    query, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 16, 8)
    decode = lambda *x, **more: plx.decode(*x, cache_seqlens=torch.tensor([3, 0]), **more)
    assert decode(query[:, :, :0], cache, cache).shape == (2, 4, 0, 8)
    assert not decode(query, cache[:, :, :0], cache[:, :, :0]).any()
    pages, table = torch.randn(3, 16, 4, 8), torch.empty(2, 0, dtype=torch.int32)
    assert not decode(query, pages, pages, page_table=table).any()
    with pytest.raises(InputError, match=r"key has 1 new keys, .* capacity of 0"):
        decode(query, pages, pages, page_table=table, key=query, value=query)
    none = query[:, :, :0]
    assert torch.equal(decode(query, cache, cache, key=none, value=none), decode(query, cache, cache))
    assert torch.equal(plx.decode(query, cache, cache, cache_seqlens=3)[:1], decode(query, cache, cache)[:1])


def test_the_layout_of_flex_paged_attention() -> None:
    from torch.nn.attention.experimental._paged_attention import PagedAttention

    paged = PagedAttention(n_pages=12, page_size=16, max_batch_size=3, device="cpu")
    key_cache, value_cache = torch.zeros(2, 1, 2, 12 * 16, 8).unbind(0)
    key, value = torch.randn(2, 2, 2, 40, 8).unbind(0)
    rows, index = torch.arange(40).expand(2, 40), torch.tensor([2, 0])
    for row in index:
        paged.reserve(row, torch.tensor(40))
    paged.assign(index, rows, key, value, key_cache, value_cache)
    got = plx.decode(
        query := torch.randn(2, 2, 1, 8),
        plx.caches.flex_pages(key_cache, 16),
        plx.caches.flex_pages(value_cache, 16),
        page_table=plx.caches.flex_page_table(paged, index),
        cache_seqlens=40,
    )
    assert relative_error(got, plx.attention(query, key, value)) < 1e-6
    with pytest.raises(InputError, match="page_size"):
        plx.caches.flex_pages(key_cache, 7)


# --- block masks ----------------------------------------------------------------------------------------------------


def test_block_masks_at_positions() -> None:
    """Its lists and its mask by the definition: full blocks are not asked, blocks in no list are not seen."""
    pattern = lambda b, h, q, k: (q + k + h) % 4 != 0
    for heads, queries, page, causal in ((1, 1, 0, False), (4, 18, 0, False), (1, 3, 16, True)):
        block_mask, keep = random_blocks(112, heads, (16, 48), pattern)
        both = lambda row, column, keep=keep, causal=causal: keep(row, column) & ((column <= row) | (not causal))
        spec = plx.PARALLAX.replace(mask_mod=CAUSAL) if causal else plx.PARALLAX
        call = Call(
            (70, 3, 17, 36), capacity=112, queries=queries, page=page, spec=spec, keep=both, dtype=torch.float64
        )
        assert relative_error(call(call.fresh(), block_mask=block_mask), call.want()) < 1e-12
    compiled = torch.compile(lambda given: call(given, block_mask=block_mask), fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(call.fresh()), call.want()) < 1e-12


def test_a_block_mask_reaches_the_stage_of_a_solved_probe_and_the_value_mean() -> None:
    block_mask, keep = random_blocks(32, 1, (16, 16), lambda b, h, q, k: q + k >= 0)
    call = Call((25, 9), capacity=32, width=8, value_width=8, spec=plx.LLA, dtype=torch.float64)
    out, aux = call(call.fresh(), block_mask=block_mask, return_aux=plx.AuxRequest(value_mean=True))
    for b, n in enumerate(call.totals):
        x = call.inputs
        row = keep(torch.tensor([[n - 1]]), torch.arange(n))[0, 0].nonzero().flatten()
        key, value = (x[name][b : b + 1, :, row] for name in ("key_cache", "value_cache"))
        for spec, got in ((plx.LLA, out), (plx.SOFTMAX, aux.value_mean)):
            want = plx.attention(x["query"][b : b + 1], key, value, spec=spec, enable_gqa=True)
            assert relative_error(got[b : b + 1], want) < 1e-9


def test_wrong_block_masks() -> None:
    call = Call((40, 3), capacity=96, dtype=torch.float32)
    causal = lambda *sizes, **more: plx.masks.block_mask(CAUSAL, None, None, *sizes, **more)
    for block_mask, error, message in (
        (CAUSAL, InputTypeError, "BlockMask"),
        (causal(1, 96), InputError, "at least the capacity 96.*plx.attention"),
        (
            masks.from_kinds(block_kinds(causal(96, 96)).expand(3, -1, -1, -1), (96, 96), (128, 128), CAUSAL),
            InputError,
            "batch size 1 or 2",
        ),
        (
            create_block_mask(CAUSAL, None, None, 96, 96, device="cpu", BLOCK_SIZE=(16, 24)),
            InputError,
            "multiple of 16",
        ),
    ):
        with pytest.raises(error, match=message):
            call(call.fresh(), block_mask=block_mask)


def test_splitting_keys_where_they_cannot_be_split() -> None:
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 64, 8)
    several = plx.masks.block_mask(CAUSAL, None, 4, 2, 64, BLOCK_SIZE=16)
    several = masks.from_kinds(block_kinds(several).expand(1, 4, -1, -1), (2, 64), (16, 16), CAUSAL)
    wanted: dict[str, tuple[dict[str, Any], str]] = {
        "gradient": ({"query": query.clone().requires_grad_()}, "requires a gradient"),
        "solved": ({"spec": plx.LLA}, "comes with the solve"),
        "lists": ({"block_mask": several}, "H=None"),
    }
    for change, message in wanted.values():
        given = {"query": query, "key": key, "value": key, "enable_gqa": True, **change}
        given["kernel_options"] = {"SPLIT_KEYS": True}
        with pytest.raises(UnsupportedError, match=message):
            torch.compile(lambda x: plx.attention(**x), fullgraph=True)(given)
    for options, error in (({"SPLIT_KEYS": 1}, InputTypeError), ({"SPLIT_KEYS": True, "BLOCK_M": 16}, InputError)):
        with pytest.raises(error, match="SPLIT_KEYS"):
            plx.attention(query, key, key, enable_gqa=True, kernel_options=options)


# --- counters -------------------------------------------------------------------------------------------------------


def test_streams_and_graphs_count_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_reserves", {})
    monkeypatch.setattr(counters, "_RESERVED", 4096)
    device, capturing = torch.device("cpu"), False
    monkeypatch.setattr(counters, "_capturing", lambda device: capturing)
    taken: list[range] = []

    def region(stream: int, count: int) -> range | None:
        """Which counters of the reserve a call gets; None where it got others."""
        found = counters.counters(device, stream, count)
        assert found.numel() >= count and not found.any()
        whole = counters._reserves[device].counters
        start = (found.data_ptr() - whole.data_ptr()) // 4
        return range(start, start + found.numel()) if 0 <= start < whole.numel() else None

    first = region(7, 40)
    assert first is not None and region(7, 100) == first  # no new ones for a call after
    larger = region(7, 1500)
    assert larger is not None and region(7, 40) == larger
    capturing = True
    taken = [first, larger, region(7, 40), region(7, 40), region(8, 40)]  # type: ignore[list-item]
    capturing = False
    assert region(7, 40) == larger
    numbers = [number for some in taken for number in some]
    assert len(numbers) == len(set(numbers))
    assert region(8, 4000) is None and region(9, 4000) is None  # nothing is left: made for the call


# --- a state of constant size ---------------------------------------------------------------------------------------

STATES = {
    "value average": plx.VALUE_AVERAGE,
    "affine linear": plx.AFFINE_LINEAR,
    "linear": plx.LINEAR,
    "affine mesa": plx.AFFINE_MESA,
    "mesa, summed ridge": plx.MESA.replace(probe=plx.Solved(0.3, ridge_scale="sum")),
    "gradient": plx.AFFINE_LINEAR.replace(probe=plx.Gradient(steps=3)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_gives_what_all_keys_give(name: str) -> None:
    spec = STATES[name]
    query, key, value, probe = (torch.randn(2, heads, 9, 6, dtype=torch.float64) for heads in (4, 2, 2, 4))
    probe = probe if spec.probe.kind == "learned" else None
    want = plx.attention(query, key, value, probe, spec=spec.replace(mask_mod=CAUSAL), enable_gqa=True)
    state = plx.empty_state(spec, 2, 2, 6, dtype=torch.float64)
    found, start = [], 0
    for count in (1, 3, 5):
        rows = slice(start, start + count)
        parts = (None if x is None else x[:, :, rows] for x in (query, key, value, probe))
        found.append(plx.decode_state(*parts, state=state, spec=spec))  # type: ignore[arg-type]
        start += count
    assert relative_error(torch.cat(found, 2), want) < 1e-9
    assert (state.count == 9).all()


def test_a_compiled_state_is_written_in_place() -> None:
    spec, parts = plx.AFFINE_LINEAR, [torch.randn(2, heads, 1, 6) for heads in (4, 2, 2, 4)]
    mine, theirs = (plx.empty_state(spec, 2, 2, 6) for _ in range(2))
    step = torch.compile(lambda state, *x: plx.decode_state(*x, state=state, spec=spec), fullgraph=True)
    for _ in range(2):
        got, want = step(mine, *parts), plx.decode_state(*parts, state=theirs, spec=spec)
    assert relative_error(got, want) < 1e-6
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(mine[:4], theirs[:4], strict=True))


def test_wrong_states() -> None:
    x = torch.randn(1, 2, 1, 6)
    for spec, message in ((plx.SOFTMAX, "infinite bandwidth"), (plx.LINEAR.replace(mask_mod=WINDOW), "causal")):
        with pytest.raises(InputError, match=message):
            plx.empty_state(spec, 1, 2, 6)
    state = plx.empty_state(plx.LINEAR, 1, 2, 6)
    with pytest.raises(InputError, match=r"state.key_key"):
        plx.decode_state(x, x, x, state=state, spec=plx.MESA)
    with pytest.raises(InputError, match="from 1 to 64"):
        plx.decode_state(x.expand(1, 2, 65, 6), *[x.expand(1, 2, 65, 6)] * 3, state=state, spec=plx.LINEAR)
    with pytest.raises(UnsupportedError, match="no gradient"):
        plx.decode_state(x.requires_grad_(), x.detach(), x.detach(), x.detach(), state=state, spec=plx.LINEAR)


def test_the_generation_example() -> None:
    """Requests that share rows and pages make the tokens of the model without a cache (uncompiled: compiling takes a while)."""
    program = Path(__file__).parents[1] / "examples" / "generate.py"
    command = [
        sys.executable,
        str(program),
        "--device",
        "cpu",
        "--quick",
        "--no-compile",
        "--requests",
        "4",
        "--tokens",
        "9",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # as a user starts it
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tokens equal those of the uncached reference" in run.stdout and "tokens/s" in run.stdout


# --- wrong calls ----------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key_cache": None}, InputTypeError, "key_cache must be a tensor"),
    ({"query": torch.randn(2, 4, 32)}, InputError, "query must be 4-D"),
    ({"probe": lambda s: s}, InputTypeError, "score_mod="),
    ({"probe": None, "spec": plx.PARALLAX}, InputError, "learned probe"),
    ({"spec": plx.SOFTMAX}, InputError, "takes no probe"),
    ({"cache_seqlens": torch.tensor([1.0, 2.0])}, InputTypeError, "int32 or int64"),
    ({"cache_seqlens": torch.tensor([1])}, InputError, r"cache_seqlens must be \[batch = 2\]"),
    ({"cache_seqlens": 101}, InputError, "capacity 100"),
    ({"cache_seqlens": "3"}, InputTypeError, "cache_seqlens"),
    ({"cache_seqlens": torch.tensor([1, 101]), "check": True}, InputError, r"cache_seqlens\[1\].*100"),
    ({"key": torch.randn(2, 2, 1, 32)}, InputError, "key and value go together"),
    ({"key": torch.randn(2, 2, 1, 32), "value": torch.randn(2, 2, 2, 24)}, InputError, "value must be"),
    ({"query": torch.randn(2, 3, 1, 32), "probe": torch.randn(2, 3, 1, 32)}, InputError, "multiple of key_cache's"),
    ({"value_cache": torch.randn(2, 2, 99, 24)}, InputError, "value_cache must have key_cache's first"),
    ({"key_cache": torch.randn(2, 2, 100, 32).bfloat16()}, InputTypeError, "key_cache must have query's dtype"),
    ({"key_cache": torch.randn(2, 2, 32, 100).mT}, InputError, "contiguous in its last dimension"),
    ({"key_cache": torch.randn(2, 2, 100, 16)}, InputError, "width D = 32"),
    ({"k_scale": 2.0}, InputError, "float8_e4m3fn"),
    ({"query": torch.randn(2, 4, 1, 32, requires_grad=True)}, UnsupportedError, "no gradient"),
    ({"query": torch.empty(2, 4, 1, 32, device="meta")}, InputError, "on query's device"),
    ({"kernel_options": {"BLOCK_M": 64}}, InputError, "BLOCK_N"),
    ({"kernel_options": {"BLOCK_N": 24}}, InputError, "power of two"),
    ({"kernel_options": {"MERGE": "later"}}, InputError, "'stage'"),
    ({"page_table": torch.zeros(2, 3, dtype=torch.int32)}, InputError, "multiple of 16"),
    ({"page_table": torch.zeros(2, 3)}, InputTypeError, "int32 or int64"),
    ({"query": torch.randn(2, 4, 1, 32).to_sparse()}, InputTypeError, "query must be a dense, strided tensor"),
    ({"cache_seqlens": [1, 2]}, InputTypeError, r"tensor \[batch\], or one int for all, but got list"),
    ({"cache_seqlens": -1}, InputError, "from 0 to the capacity 100, but got -1"),
    (
        {"cache_seqlens": 99, "key": torch.randn(2, 2, 2, 32), "value": torch.randn(2, 2, 2, 24)},
        InputError,
        "from 0 to 98",
    ),
    ({"key": torch.randn(2, 2, 101, 32), "value": torch.randn(2, 2, 101, 24)}, InputError, "key has 101 new keys"),
    ({"check": "yes"}, InputTypeError, "check must be a bool, but got str"),
    ({"return_lse": 1}, InputTypeError, "return_lse must be a bool"),
    ({"return_aux": "lse"}, InputTypeError, "return_aux must be a plx.AuxRequest or None, but got str"),
    ({"return_aux": plx.AuxRequest(state=True)}, InputError, "plx.decode_state"),
    ({"scale": True}, InputTypeError, "scale must be a number"),
    ({"kernel_options": {"num_warps": 3}}, InputError, "power of two of at most 32"),
    ({"kernel_options": {"num_stages": True}}, InputError, "an integer of at least 1"),
    ({"score_mod": lambda s, b, h, q, k: s + torch.zeros(3)}, InputTypeError, r"one number .* shape \[3\]"),
]


@pytest.mark.parametrize(
    "change, error, message", WRONG, ids=[f"{next(iter(c))}-{i}" for i, (c, _, _) in enumerate(WRONG)]
)
def test_wrong_calls(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = Call((40, 3), dtype=torch.float32).fresh() | change
    with pytest.raises(error, match=message):
        plx.decode(**inputs)


def test_wrong_calls_read_the_same_compiled() -> None:
    inputs = Call((40, 3), dtype=torch.float32).fresh()
    with torch.no_grad(), pytest.raises(InputError, match="capacity 100"):
        torch.compile(lambda x: plx.decode(**x), fullgraph=True)(inputs | {"cache_seqlens": 101})
    with torch.no_grad(), pytest.raises(UnsupportedError, match="uncompiled call"):
        torch.compile(lambda x: plx.decode(**x, check=True), fullgraph=True)(inputs)


def test_pages_are_checked_on_demand() -> None:
    call = Call((40, 3), page=16, dtype=torch.float32)
    inputs = call.fresh()
    call(inputs, check=True)
    inputs["page_table"][1, 1:] = -1  # not needed by three keys
    call(inputs, check=True)
    inputs["page_table"][0, 2] = 99
    with pytest.raises(InputError, match=r"page_table\[0, 2\]"):
        call(inputs, check=True)
    inputs["key_cache"] = inputs["key_cache"][:1].expand(15, -1, -1, -1)
    with pytest.raises(InputError, match="expanded"):
        plx.decode(**inputs | {"key": torch.randn(2, 2, 1, 32), "value": torch.randn(2, 2, 1, 24)})


# --- the cut --------------------------------------------------------------------------------------------------------


def sizes(**changes: Any) -> dict[str, Any]:
    return {
        "batch": 1,
        "kv_heads": 8,
        "rows_of_head": 1,
        "most_keys": 4096,
        "has_probe": True,
        "block_n": 64,
        "programs": 264,
    } | changes


def test_how_calls_are_cut() -> None:
    one = decode_cut(**sizes())
    assert (one.rows, one.row_tiles, one.slots, one.programs, one.merge) == (4, 1, 33, 34, "kernel")
    assert decode_cut(**sizes(most_keys=64)).merge == "none"
    assert decode_cut(**sizes(most_keys=500)).programs == 9  # 8 tiles, and one in which a window may begin
    assert decode_cut(**sizes(rows_of_head=16)).merge == "stage"
    # Four rows of 34 splits are too much for one program, four of the 5 of each of 8 sequences are not.
    assert decode_cut(**sizes(rows_of_head=4)).merge == "stage"
    assert decode_cut(**sizes(rows_of_head=4, merge="kernel")).merge == "kernel"
    assert decode_cut(**sizes(rows_of_head=4, batch=8)).merge == "kernel"
    # Sixteen where the sequences fill enough of the device that most of them have few splits.
    assert [decode_cut(**sizes(rows_of_head=16, batch=batch)).merge for batch in (4, 8, 32)] == [
        "stage",
        "kernel",
        "kernel",
    ]
    assert decode_cut(**sizes(rows_of_head=17, batch=32)).merge == "stage"
    assert decode_cut(**sizes(merge="stage")).merge == "stage"
    many = decode_cut(**sizes(rows_of_head=100, has_probe=False))
    assert (many.rows, many.row_tiles, many.merge) == (32, 4, "stage")
    assert decode_cut(**sizes(most_keys=None)).programs == 34


def test_the_plan_reads_as_text() -> None:
    query, cache = torch.empty(8, 32, 1, 128, dtype=torch.bfloat16), torch.empty(8, 8, 8192, 128, dtype=torch.bfloat16)
    found = plx.explain_decode(plx.PARALLAX, query, cache, cache, query, target="sm_90")
    (stage,) = found.plan.stages
    assert (stage.name, stage.algorithm, stage.products) == ("decode_split", "split keys", (2, 2))
    assert found.stages[0].bound == "memory bandwidth" and 80e-6 < found.stages[0].floor_seconds < 82e-6
    assert "the program of a head that arrives last merges" in str(found)
    eight = cache.to(torch.float8_e4m3fn)
    assert plx.explain_decode(plx.PARALLAX, query, eight, eight, query, target="sm_90").floor_seconds < 42e-6
    window = plx.PARALLAX.replace(mask_mod=plx.masks.sliding_window(1024))
    assert plx.explain_decode(window, query, cache, cache, query, target="sm_90").floor_seconds < 12e-6
    rows, keys = query[:2].expand(-1, -1, 4, -1), cache[:2]
    names = [stage.name for stage in plx.explain_decode(plx.LLA, rows, keys, keys, target="sm_90").plan.stages]
    assert names == ["core_solve", "decode_split", "decode_merge"]
    assert plx.explain_decode(plx.SOFTMAX, query, cache, cache, target="cpu").plan.stages[0].algorithm == "row chunks"


def test_the_plan_of_a_block_mask_reads_the_blocks_in_its_lists() -> None:
    query, cache = torch.empty(2, 8, 1, 64, dtype=torch.bfloat16), torch.empty(2, 4, 1000, 64, dtype=torch.bfloat16)
    every_other = lambda b, h, q, k: (k // 64 % 2 == 0) & (k <= q)
    block_mask = create_block_mask(every_other, None, None, 1024, 1024, device="cpu", BLOCK_SIZE=64)

    def keys(**given: Any) -> int:
        return plx.explain_decode(
            plx.PARALLAX, query, cache, cache, query, block_mask=block_mask, target="sm_90", **given
        ).plan.problem.kv_length

    assert keys() == 8 * 64  # the last row is 999: blocks 0, 2 .. 14
    assert keys(cache_seqlens=70) == 64 and keys(cache_seqlens=130) == 128
    assert keys(cache_seqlens=torch.tensor([70, 130])) == 96
    found = plx.explain_decode(
        plx.SOFTMAX, query, cache, cache, cache_seqlens=200, block_mask=block_mask, target="sm_90"
    )
    assert found.blocks is not None and found.blocks.tolist() == [[2, 0, 2, 0, *[0] * 12]] and "█·█·" in str(found)
    window = plx.SOFTMAX.replace(mask_mod=plx.masks.sliding_window(100))
    inside = plx.explain_decode(window, query, cache, cache, block_mask=block_mask, target="sm_90")
    assert inside.plan.problem.kv_length == 64  # of the two blocks in the window one is listed
    with pytest.raises(InputError, match=r"cache_seqlens\[1\] must be from 0 to the capacity 1000, but got 1001"):
        keys(cache_seqlens=torch.tensor([70, 1001]))
    with pytest.raises(InputTypeError, match="spec must be an AttentionSpec"):
        plx.explain_decode("SOFTMAX", query, cache, cache)  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    programs=st.integers(1, 600),
    heads=st.integers(1, 16),
)
def test_there_are_always_programs_enough(lengths: list[int], programs: int, heads: int) -> None:
    """The arithmetic of templates/decode_shared, on which every program relies."""
    cut = decode_cut(**sizes(batch=len(lengths), kv_heads=heads, most_keys=5000, programs=programs))
    tiles = [-(-n // 64) for n in lengths]
    share = max(-(-sum(tiles) // cut.slots), cut.least_tiles)
    wanted = sum(max(-(-n // share), 1) for n in tiles)
    if wanted > cut.slots:
        share = -(-share * wanted // cut.slots)
    splits = [max(-(-n // share), 1) for n in tiles]
    assert sum(splits) <= cut.programs
    for n, count in zip(tiles, splits, strict=True):
        parts = [n * (i + 1) // count - n * i // count for i in range(count)]
        assert sum(parts) == n and max(parts) <= share and (n == 0 or min(parts) > 0)


# --- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize(
    "cache, queries", [(torch.bfloat16, 1), (torch.float8_e4m3fn, 1), (torch.bfloat16, 16)], ids=str
)
def test_nothing_spills(cache: torch.dtype, queries: int) -> None:
    pytest.importorskip("triton")
    from parallax_compile.lowering import codegen, cubin

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, keys = empty(4, 8, queries, 128), empty(100, 16, 8, 128, dtype=cache)
    table, lengths = empty(4, 64, dtype=torch.int32), empty(4, dtype=torch.int32)
    call = lambda q, k, v, r, n, t: plx.decode(q, k, v, r, cache_seqlens=n, page_table=t)
    code = codegen.generate(call, (query, keys, keys, query, lengths, table), target="sm_90", backward=False)
    if queries == 1 and cache == torch.bfloat16:
        counts, indices = empty(1, 1, 8, dtype=torch.int32), empty(1, 1, 8, 8, dtype=torch.int32)

        def blocks(*x: Tensor) -> Tensor:
            lists = dict(zip(LISTS, x[6:], strict=True))
            mask = BlockMask.from_kv_blocks(**lists, mask_mod=CAUSAL, seq_lengths=(1024, 1024))
            return plx.decode(*x[:4], cache_seqlens=x[4], page_table=x[5], block_mask=mask)

        given = (query, keys, keys, query, lengths, table, counts, indices, counts, indices)
        found = codegen.generate(blocks, given, target="sm_90", backward=False)
        (kernel,) = [kernel for kernel in found.kernels if kernel.stage is not None]
        assert cubin.compile_kernel(kernel, "sm_90").resources.spills == 0
    for kernel in code.kernels:
        compiled = cubin.compile_kernel(kernel, "sm_90")
        assert compiled.fits and compiled.resources.spills == 0
        # As many programs as there are splits run at once: two on each multiprocessor, of 228 kB.
        assert 2 * (compiled.resources.shared_memory + 1024) <= 228 * 1024
    assert [kernel.stage for kernel in code.kernels] == ["decode_split", *(["decode_merge"] if queries > 1 else [])]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are generated here, not interpreted")
@pytest.mark.parametrize(
    ("length", "options", "block"), [(512, {}, 32), (1024, {}, 64), (512, {"BLOCK_N": 64}, 64)], ids=str
)
def test_few_keys_are_cut_into_more_splits(length: int, options: dict[str, int], block: int) -> None:
    pytest.importorskip("triton")
    from parallax_compile.lowering import codegen

    query, cache = (torch.empty(1, 8, n, 128, dtype=torch.bfloat16, device="meta") for n in (1, length))
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    call = lambda q, k, v, r, n: plx.decode(q, k, v, r, cache_seqlens=n, kernel_options=options)
    code = codegen.generate(call, (query, cache, cache, query, lengths), target="sm_90", backward=False)
    assert code.stage("decode_split").parameters["BLOCK_N"] == block
