"""The decode kernels in the interpreter: splits, merges, pages, appends, 8 bits, against each sequence's own definition."""

from __future__ import annotations

import ast
import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
from parallax_compile.lowering import inductor_decode
from support import interpreter
from support.decoding import Call, random_blocks
from support.oracle import budget, relative_error
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

CAUSAL, WINDOW = plx.masks.causal(), plx.masks.sliding_window(21)
PARALLAX = plx.PARALLAX


def causal(row: Tensor, column: Tensor) -> Tensor:
    return column <= row


def window(row: Tensor, column: Tensor) -> Tensor:
    return (column <= row) & (row - column < 21)


def run(call: Call, **options: Any) -> tuple[Tensor, interpreter.Interpreted, dict[str, Any]]:
    compiled = interpreter.interpreted(call, **options)
    inputs = call.fresh()
    with torch.no_grad():
        return compiled(inputs), compiled, inputs


def check(call: Call, stages: list[str], **options: Any) -> tuple[Tensor, interpreter.Interpreted]:
    """Within the budget of an independent low-precision computation; the caches as they should be; these kernels."""
    got, compiled, inputs = run(call, **options)
    want = call.want()
    error = relative_error(got, want)
    assert error <= budget(relative_error(call.want(call.dtype), want), call.dtype)
    assert call.appended(inputs) if call.new else True
    kinds = {kernel.name: kernel.stage for kernel in compiled.code.kernels}
    assert [kinds[name] for name in compiled.launches if kinds[name]] == stages
    return got, compiled


CASES = {
    # The last program of a head merges; keys appended on the way; an empty sequence, and one that fills its cache.
    "append": (Call((40, 0, 99, 17), new=1, options={"BLOCK_N": 16}), ["decode_split"]),
    "stage, float32": (
        Call((40, 3, 98), queries=2, new=2, spec=PARALLAX.replace(mask_mod=CAUSAL), keep=causal, dtype=torch.float32,
             options={"BLOCK_N": 16, "MERGE": "stage"}),
        ["decode_split", "decode_merge"],
    ),
    # More rows than one tile holds, more new keys than a decode kernel writes itself.
    "many rows": (
        Call((0, 55), queries=20, new=20, spec=PARALLAX.replace(mask_mod=CAUSAL), keep=causal, dtype=torch.float16,
             options={"BLOCK_N": 32}),
        ["cache_append", "decode_split", "decode_merge"],
    ),
    "window, no intercept": (
        Call((70, 9), queries=3, spec=PARALLAX.replace(mask_mod=WINDOW, intercept=False), keep=window,
             options={"BLOCK_N": 16, "MERGE": "stage"}),
        ["decode_split", "decode_merge"],
    ),
    "window, append": (
        Call((70, 9), new=2, spec=PARALLAX.replace(mask_mod=WINDOW), keep=window, options={"BLOCK_N": 16}),
        ["decode_split"],
    ),
    "softmax, one split": (Call((64, 0, 5), capacity=64, spec=plx.SOFTMAX, q_heads=6), ["decode_split"]),
    "past the capacity": (Call((99, 100), new=2, options={"BLOCK_N": 16}), ["decode_split"]),
    "offset": (Call((97, 50), offset=10.0, options={"BLOCK_N": 16}), ["decode_split"]),
    "pages": (Call((40, 0, 99), new=1, page=48, options={"BLOCK_N": 64}), ["decode_split"]),
    "whole pages": (Call((40, 0, 99), page=32, q_heads=2, options={"BLOCK_N": 16}), ["decode_split"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decode(name: str) -> None:
    call, stages = CASES[name]
    check(call, stages)


def test_pages_give_the_bits_of_a_contiguous_cache() -> None:
    options = {"BLOCK_N": 32}
    plain = run(Call((40, 0, 90), options=options))[0]
    for page in (16, 48):
        assert torch.equal(run(Call((40, 0, 90), page=page, options=options))[0], plain)


def test_mods_at_positions_with_captured_tensors() -> None:
    slope, gain = torch.rand(4), torch.rand(4, 100)

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + slope[h] * (q - k) * 0.02 + 0.1 * b

    def covariance(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(s) * gain[h, k] + 0.01 * q

    spec = PARALLAX.replace(mask_mod=lambda b, h, q, k: (k % 3 != 1) & (k <= q))
    keep = lambda row, column: (column % 3 != 1) & (column <= row)
    call = Call((70, 1), queries=2, spec=spec, keep=keep, score=score, covariance=covariance, dtype=torch.float32)
    check(call, ["decode_split"])


def test_more_sequences_than_a_program_reads_at_once() -> None:
    lengths = tuple(torch.randint(0, 40, (19,)).tolist())
    sizes = {"capacity": 40, "q_heads": 1, "kv_heads": 1, "width": 16, "value_width": 16}
    with mock.patch.object(inductor_decode, "_BATCH_BLOCK", 16):
        check(Call(lengths, options={"BLOCK_N": 16}, **sizes), ["decode_split"])


def test_few_keys_of_the_width_that_has_tiles_for_them() -> None:
    sizes = {"capacity": 200, "q_heads": 2, "kv_heads": 2, "width": 128, "value_width": 128}
    _, compiled = check(Call((199, 70), **sizes), ["decode_split"])
    assert compiled.code.stage("decode_split").parameters["BLOCK_N"] == 32


def test_more_rows_and_splits_than_one_program_merges() -> None:
    sizes = {"capacity": 700, "q_heads": 4, "kv_heads": 1, "width": 16, "value_width": 16}
    _, compiled = check(Call((699,), options={"BLOCK_N": 16}, **sizes), ["decode_split", "decode_merge"])
    merging = compiled.code.stage("decode_merge").parameters
    assert (merging["MERGED_ROWS"], merging["MERGED_ABREAST"]) == (1, merging["MERGED_AT_ONCE"]) != (1, 1)


def test_programs_of_the_merging_stage_take_rows_until_they_run_in_one_round() -> None:
    spec = PARALLAX.replace(mask_mod=CAUSAL)
    sizes = {"capacity": 40, "q_heads": 2, "kv_heads": 2, "width": 16, "value_width": 16, "spec": spec, "keep": causal}
    call = Call((40, 9, 23), queries=7, options={"BLOCK_N": 16, "MERGE": "stage"}, **sizes)
    with mock.patch.object(inductor_decode, "_MERGING_PROGRAMS", 0.2):  # 26 for 48 rows
        _, compiled = check(call, ["decode_split", "decode_merge"])
    merging = compiled.code.stage("decode_merge").parameters
    # Splits of several rows are tensors of their own: an axis of them triton 3.6 sums through shared memory.
    assert (merging["MERGED_ROWS"], merging["MERGED_AT_ONCE"], merging["MERGED_ABREAST"]) == (2, 16, 1)


@pytest.mark.parametrize("queries", [7, 16])
def test_the_last_program_merges_many_rows(queries: int) -> None:
    spec = PARALLAX.replace(mask_mod=CAUSAL)
    sizes = {"capacity": 90, "q_heads": 2, "kv_heads": 2, "width": 16, "value_width": 16, "spec": spec, "keep": causal}
    _, compiled = check(
        Call((90, 20, 61), queries=queries, options={"BLOCK_N": 16, "MERGE": "kernel"}, **sizes), ["decode_split"]
    )
    assert compiled.code.stage("decode_split").parameters["MERGED_ROWS"] == 1 << (queries - 1).bit_length()


@pytest.mark.parametrize("merge", ["kernel", "stage"])
def test_more_splits_than_a_merge_holds_at_once(merge: str) -> None:
    call = Call((97,), options={"BLOCK_N": 16, "MERGE": merge})
    with mock.patch.object(inductor_decode, "_MERGED_NUMBERS", 256):
        check(call, ["decode_split", *(["decode_merge"] if merge == "stage" else [])])


def test_a_batch_that_is_a_symbol() -> None:
    call = Call((40, 0, 99), new=1, options={"BLOCK_N": 16})
    check(call, ["decode_split", "decode_merge"], dynamic=True)


@pytest.mark.parametrize("page, value_width, size", [(0, 24, 1.0), (16, 48, 1.0), (0, 32, 3.0e5)])
@pytest.mark.parametrize("mods", [False, True])
def test_eight_bits(page: int, value_width: int, size: float, mods: bool) -> None:
    """Values by themselves and by pairs; probes beyond what float16 holds; probe scores that a mod makes."""
    sizes: Any = {"new": 1, "page": page, "value_width": value_width}
    if mods:
        sizes["covariance"] = lambda s, b, h, q, k: s * (1.0 + 0.01 * (k % 7)) + 0.1
    call = Call((40, 0, 98), options={"BLOCK_N": 32}, **sizes)
    scales = {"k_scale": torch.tensor([[0.5, 0.25]]), "v_scale": 0.125}
    eight = torch.float8_e4m3fn
    inputs = call.fresh()
    inputs["probe"] *= size
    for name, factor in (("key_cache", 0.5), ("value_cache", 0.125)):
        inputs[name] = (inputs[name] / factor).to(eight)
    other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    compiled = interpreter.interpreted(lambda given: call(given, **scales))
    with torch.no_grad():
        got = compiled(inputs)
        exact = {
            name: x.double() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for name, x in other.items()
        }
        want = call(exact, **scales)
    for name in ("key_cache", "value_cache"):  # the same bytes as the reference's append
        assert torch.equal(inputs[name].view(torch.uint8), exact[name].view(torch.uint8))
    assert relative_error(got, want) <= budget(2e-3, torch.bfloat16)


def test_blocks_at_positions() -> None:
    """Lists of one row of blocks: full blocks are not asked, blocks in no list are not read; pages, and keys appended."""
    block_mask, keep = random_blocks(96, 1, (16, 32), lambda b, h, q, k: (k % 3 != 0) & (h < 9))
    call = Call((40, 0, 94, 17), capacity=96, new=1, page=16, keep=keep, dtype=torch.float32, options={"BLOCK_N": 16})
    want = call.want()
    assert call.order is not None
    for sequence, total in enumerate(call.totals):
        allowed = keep(torch.tensor([[total - 1]]), torch.arange(96))[0, 0].view(3, 2, 16)
        for place in torch.arange(6).view(3, 2)[~allowed.any(2).any(1)].flatten():
            for name in ("key_cache", "value_cache"):
                call.inputs[name][call.order[sequence, place]] = float("nan")
    got, compiled, inputs = run_with(call, block_mask)
    assert relative_error(got, want) < 1e-6
    assert call.appended(inputs)
    assert stages(compiled) == ["cache_append", "decode_split"]


def test_blocks_of_every_head_and_of_rows_in_two_blocks() -> None:
    block_mask, keep = random_blocks(100, 4, (16, 48), lambda b, h, q, k: (q + k + h) % 4 != 0)
    both = lambda row, column: keep(row, column) & (column <= row)
    spec = PARALLAX.replace(mask_mod=CAUSAL)
    call = Call((70, 3, 17, 36), queries=5, spec=spec, keep=both, dtype=torch.float32)
    got, compiled, _ = run_with(call, block_mask)
    assert relative_error(got, call.want()) < 1e-6
    assert stages(compiled) == ["decode_split", "decode_merge"]


def run_with(call: Call, block_mask: Any) -> tuple[Tensor, interpreter.Interpreted, dict[str, Any]]:
    compiled = interpreter.interpreted(lambda given: call(given, block_mask=block_mask))
    inputs = call.fresh()
    with torch.no_grad():
        return compiled(inputs), compiled, inputs


def stages(compiled: interpreter.Interpreted) -> list[str]:
    kinds = {kernel.name: kernel.stage for kernel in compiled.code.kernels}
    return [stage for name in compiled.launches if (stage := kinds[name])]


def test_statistics_and_a_solved_probe() -> None:
    sizes = {"capacity": 32, "q_heads": 2, "kv_heads": 1, "width": 16, "value_width": 16}
    call = Call((25, 2), spec=plx.LLA, dtype=torch.float32, options={"BLOCK_N": 16}, **sizes)
    request = plx.AuxRequest(lse=True, probe_mean=True, iterations=True, residual=True, value_mean=True)
    compiled = interpreter.interpreted(lambda given: call(given, return_aux=request))
    with torch.no_grad():
        out, aux = compiled(call.fresh())
        want, expected = call(call.fresh(torch.float64), return_aux=request)
    assert relative_error(out, want) < 1e-4
    assert relative_error(aux.lse, expected.lse) < 1e-6
    assert relative_error(aux.value_mean, expected.value_mean) < 1e-6
    assert relative_error(aux.probe_mean, expected.probe_mean) < 1e-3
    assert aux.iterations.max() > 1


def test_caches_of_all_layers_in_one_tensor_are_not_copied() -> None:
    """Views of one tensor, appended to: their memory is known to nobody by one name, so that a kernel of its own appends."""
    caches = torch.randn(3, 2, 2, 2, 64, 16)
    query, probe = torch.randn(2, 2, 4, 1, 16).unbind(0)
    key, value = torch.randn(2, 2, 2, 1, 16).unbind(0)
    lengths = torch.tensor([5, 60])

    def step(held: Tensor, *x: Tensor) -> Tensor:
        q, k, v, r = x
        layers = [plx.decode(q, *pair, r, key=k, value=v, cache_seqlens=lengths) for pair in (held[0], held[1])]
        return layers[0] + layers[1]

    mine, exact = caches.clone(), caches.double()
    compiled = interpreter.interpreted(step)
    with torch.inference_mode():
        got = compiled(mine, query, key, value, probe)
        want = step(exact, *(x.double() for x in (query, key, value, probe)))
    assert relative_error(got, want) < 1e-6
    assert torch.equal(mine, exact.float())
    sizes = re.findall(r"empty_strided_cuda\((\([^)]*\))", compiled.code.graphs[0].wrapper)
    assert sizes and all(math.prod(ast.literal_eval(size)) < caches[0, 0].numel() for size in sizes)


def test_a_page_that_does_not_exist_is_no_fault() -> None:
    call = Call((40, 30), page=16, new=1, q_heads=2, options={"BLOCK_N": 16})
    inputs = call.fresh()
    inputs["page_table"][1] = torch.tensor([-1, 1 << 30, -7, 99, -1, -1, -1])
    compiled = interpreter.interpreted(call)
    with torch.no_grad():
        got = compiled(inputs)  # reads and writes nothing outside: the memory is guarded
    assert relative_error(got[:1], call.want()[:1]) < 1e-2


@pytest.mark.parametrize("spec", [plx.AFFINE_LINEAR, plx.LINEAR], ids=["affine linear", "linear"])
def test_a_state_of_constant_size(spec: plx.AttentionSpec) -> None:
    query, key, value, probe = (
        torch.randn(2, heads, 5, width) for heads, width in ((4, 20), (2, 20), (2, 12), (4, 20))
    )
    state = plx.empty_state(spec, 2, 2, 20, 12)

    def step(held: plx.State, *x: Tensor) -> Tensor:
        return plx.decode_state(*x, state=held, spec=spec)

    compiled = interpreter.interpreted(step)
    parts = [[x[:, :, rows] for x in (query, key, value, probe)] for rows in (slice(0, 1), slice(1, 5))]
    with torch.no_grad():
        found = [compiled(state, *part) for part in parts]
    exact = spec.replace(mask_mod=CAUSAL)
    want = plx.attention(*(x.double() for x in (query, key, value, probe)), spec=exact, enable_gqa=True)
    assert relative_error(torch.cat(found, 2), want) < 1e-5
    assert (state.count == 5).all()
    ran = [kernel.stage for kernel in compiled.code.kernels if kernel.stage]
    assert ran == ["scan_step", "scan_step"]
