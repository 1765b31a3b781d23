"""Plans and explanations, as text."""

from __future__ import annotations

import itertools
import re

import pytest
import sympy
import torch
from expecttest import assert_expected_inline
from parallax_compile.lowering.candidates import Candidate, candidates, shared_memory
from parallax_compile.lowering.plan import make_plan
from parallax_compile.lowering.plan_solve import solve_method
from parallax_compile.lowering.plan_stages import Problem
from parallax_compile.lowering.targets import TARGETS

import parallax_compile as plx


def problem(**changes: object) -> Problem:
    sizes = {"batch": 2, "q_heads": 8, "kv_heads": 2, "q_length": 4096, "kv_length": 4096, "width": 128}
    kind = {"value_width": 128, "dtype": "bfloat16", "itemsize": 2, "device": "cuda"}
    return Problem(**{**sizes, **kind, **changes})  # type: ignore[arg-type]


def text(plan: object) -> str:
    return "\n".join(
        f"{s.direction} {s.name} [{s.algorithm}] {s.products} reads {' '.join(s.reads)} writes {' '.join(s.writes)}"
        for s in plan.stages  # type: ignore[attr-defined]
    )


def test_inference() -> None:
    assert_expected_inline(
        text(make_plan(problem())),
        """forward core_forward [streaming] (2, 2) reads query key value probe writes out lse probe_mean""",
    )


def test_few_rows() -> None:
    """Which calls split their keys, and how it reads."""
    assert_expected_inline(
        text(make_plan(problem(q_length=4))),
        """forward decode_split [split keys] (2, 2) reads query key value probe writes out""",
    )
    splits = lambda **changes: make_plan(problem(**{"q_length": 4, **changes})).stages[-1].name == "decode_split"
    assert splits(q_length=16, kv_length=512) and splits(kv_length=sympy.Symbol("s"))
    for kept in (
        {"q_length": 17},
        {"q_length": sympy.Symbol("s")},
        {"kv_length": 511},
        {"needs_grad": (True, False, False, False)},
        {"device": "cpu"},
        {"own_lists": True},
        {"split_keys": False},
        {"solved": True, "probe_steps": 4},
        {"uniform": True, "prefix": True},
    ):
        assert not splits(**kept), kept
    assert splits(q_length=40, kv_length=9, split_keys=True) and not splits(own_lists=True, split_keys=True)
    names = [s.name for s in make_plan(problem(q_length=4, solved=True, covariance_mod=True)).stages]
    assert names == ["core_solve", "decode_split"]
    query, key = torch.empty(1, 8, 1, 64), torch.empty(1, 8, 4096, 64)
    found = plx.explain(plx.SOFTMAX, query.bfloat16(), key.bfloat16(), key.bfloat16(), target="sm_90")
    assert "decode_split: few rows: keys are split to fill the device; the program of a head" in str(found)
    assert (
        plx.explain(plx.SOFTMAX, query.requires_grad_(), key, key, target="sm_90").plan.stages[0].name == "core_forward"
    )


def test_training() -> None:
    assert_expected_inline(
        text(make_plan(problem(needs_grad=(True,) * 4))),
        """\
forward core_forward [streaming] (2, 2) reads query key value probe writes out lse probe_mean value_mean
backward row_terms [pointwise] (0, 0) reads grad_out out value_mean writes tau beta
backward core_backward_query [streaming] (4, 1) reads query key value probe grad_out lse tau probe_mean beta writes grad_query grad_probe
backward core_backward_key [streaming] (4, 2) reads query key value probe grad_out lse tau probe_mean beta writes grad_key grad_value""",  # noqa: E501
    )


def test_softmax_costs_what_softmax_costs() -> None:
    plan = make_plan(problem(has_probe=False, needs_grad=(True, True, True, False)))
    assert [stage.products for stage in plan.stages] == [(1, 1), (0, 0), (2, 1), (2, 2)]
    assert "probe" not in text(plan)


def test_narrow_solves_are_direct_where_that_is_cheaper() -> None:
    narrow = {"width": 16, "value_width": 16, "probe_steps": 16, "solved": True}
    plan = make_plan(problem(**narrow, needs_grad=(True,) * 4))
    assert_expected_inline(
        "\n".join(f"{s.direction} {s.name} [{s.algorithm}] {s.products}: {s.reason}" for s in plan.stages[:2]),
        """\
forward core_solve_direct [direct solve] (60, 1): the probe of each row by its ridge system (a direct solve costs about 0.4 times 16 steps of conjugate gradients); then its output: one product, because LSE and t are known
backward core_solve_direct [direct solve] (60, 1): implicit differentiation: the same systems for the probe's gradient, and the exact row terms""",  # noqa: E501
    )
    chosen = {
        (width, length): make_plan(problem(**narrow | {"width": width}, kv_length=length)).stages[0].name
        for width, length in ((16, 4096), (16, 256), (16, 64), (8, 4096), (20, 4096), (32, 1 << 20), (64, 4096))
    }
    assert_expected_inline(
        "\n".join(f"{sizes}: {stage}" for sizes, stage in chosen.items()),
        """\
(16, 4096): core_solve_direct
(16, 256): core_solve_direct
(16, 64): core_solve
(8, 4096): core_solve
(20, 4096): core_solve
(32, 1048576): core_solve
(64, 4096): core_solve""",
    )
    assert solve_method(32, 64, asked=True).stage == "core_solve_direct"
    assert solve_method(16, 1 << 20, asked=False).reason == "kernel_options ask for it"
    # Wider matrices do not fit, a CPU has no registers to hold them, and a symbolic length is taken for a long one.
    assert "up to D = 32" in solve_method(33, 4096).reason and solve_method(16, object()).direct
    assert make_plan(problem(**narrow, device="cpu")).stages[0].algorithm == "conjugate gradients"
    kernels = candidates(
        "core_solve_direct", width=32, value_width=128, itemsize=2, row_tiles=0, shared_memory_limit=227 * 1024
    )
    assert kernels and all(kernel.block_m * 32 * 32 <= 128 * 32 * kernel.num_warps for kernel in kernels)


def test_gradients_that_nobody_needs_take_no_kernel() -> None:
    names = lambda *needs: [s.name for s in make_plan(problem(needs_grad=needs)).direction("backward")]
    assert names(True, False, False, False) == ["row_terms", "core_backward_query"]
    assert names(False, False, True, False) == ["row_terms", "core_backward_key"]
    only_captured = make_plan(problem(needs_grad=(False,) * 4, captured_grads=True))
    assert [s.name for s in only_captured.direction("backward")] == ["row_terms", "core_backward_key"]


def test_costs() -> None:
    plan = make_plan(problem(visited=0.5))
    (stage,) = plan.stages
    cost = plan.cost(stage)
    assert cost.flops == 4 * 2 * 2 * 8 * 4096 * 4096 * 128 / 2
    rows, keys = 2 * 8 * 4096, 2 * 2 * 4096
    assert cost.bytes == 2 * 128 * (rows * 3 + keys * 2) + 4 * 2 * rows


def test_cpu_takes_row_chunks() -> None:
    plan = make_plan(problem(device="cpu", needs_grad=(True,) * 4))
    assert [s.algorithm for s in plan.stages] == ["row chunks", "pointwise", "row chunks"]


def test_explain_reads_as_text() -> None:
    q, k, v, r = (torch.empty(1, 4, 1024, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    found = plx.explain(plx.PARALLAX.replace(mask_mod=plx.masks.causal()), q, k, v, r, target="sm_90")
    assert_expected_inline(
        re.sub(r" {3,}", "  ", re.sub(r"^[ -]*\n", "", str(found), flags=re.MULTILINE)),
        """\
PARALLAX: AttentionSpec(Finite(), Learned(), mask_mod=Causal(offset=0))
query [1, 4, 1024, 64], key [1, 4, 1024, 64], value width 64, bfloat16, gradients
mask: 56.2% of the blocks visited
target: sm_90 (NVIDIA H100 80GB HBM3)
stage  direction  algorithm  GFLOP  MB  FLOP/byte  floor  bound by
core_forward  forward  streaming  1.208  3.18  380  1.2 us  arithmetic
row_terms  backward  pointwise  0.000  1.61  0  0.5 us  memory bandwidth
core_backward_query  backward  streaming  1.510  3.74  404  1.5 us  arithmetic
core_backward_key  backward  streaming  1.812  3.74  485  1.8 us  arithmetic
core_forward: finite bandwidth: the weights need every allowed key, one pass keeps no score
row_terms: two row sums, fused by Inductor
core_backward_query: query or probe needs a gradient: rows stay, keys stream
core_backward_key: key, value or a captured tensor needs a gradient: keys stay, rows stream, the query heads of a group are summed in registers
floor of all stages: 5.1 us (data-sheet rates; no kernel reaches them)
▒·······
█▒······
██▒·····
███▒····
████▒···
█████▒··
██████▒·
███████▒
queries down, keys across: · empty 44%, ▒ partial 12%, █ full 44%""",  # noqa: E501
    )


STAGES = ("core_forward", "core_backward_query", "core_backward_key")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("width", [1, 16, 40, 64, 80, 128, 200, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("row_tiles", [0, 1, 4])
def test_candidates_fit_every_target(stage: str, width: int, itemsize: int, row_tiles: int) -> None:
    for target, tma in itertools.product(TARGETS.values(), (True, False)):
        limit = target.shared_memory_per_block
        sizes = {"width": width, "value_width": width, "itemsize": itemsize, "row_tiles": row_tiles}
        if shared_memory(stage, Candidate(16, 16, 4, 1), width, width, itemsize, row_tiles) > limit:
            assert itemsize == 4 and width > 128 and target.name == "sm_89"  # 99 kB do not hold the smallest tile
            continue
        found = candidates(stage, **sizes, shared_memory_limit=limit, tma=tma)
        assert found and (tma or not any(candidate.tma for candidate in found))
        assert all(shared_memory(stage, c, width, width, itemsize, row_tiles) <= limit for c in found)


def test_candidates_divide_the_masks_blocks_and_obey_options() -> None:
    given = {"width": 128, "value_width": 128, "itemsize": 2, "row_tiles": 1, "shared_memory_limit": 232448}
    for candidate in candidates("core_forward", **given, q_block=48, kv_block=32):
        assert 48 % candidate.block_m == 0
        assert 32 % candidate.block_n == 0
    options = {"BLOCK_M": 32, "bwd_BLOCK_M": 64, "bwd_key_num_warps": 8, "num_stages": 1}
    assert candidates("core_forward", **given, options=options)[0] == Candidate(32, 64, 8, 1)
    assert candidates("core_backward_query", **given, options=options)[0] == Candidate(64, 32, 4, 1, held=1)
    assert candidates("core_backward_key", **given, options=options)[0] == Candidate(64, 64, 8, 1, held=1)
    assert not any(candidate.tma for candidate in candidates("core_forward", **given))
    assert candidates("core_forward", **given, tma=True)[0].tma
    assert not candidates("core_forward", **given, tma=True, options={"USE_TMA": False})[0].tma
    with pytest.raises(ValueError, match="USE_TMA"):
        candidates("core_forward", **given, options={"fwd_USE_TMA": True})
    with pytest.raises(ValueError, match="must divide"):
        candidates("core_forward", **given, q_block=32, options={"BLOCK_M": 64})
    with pytest.raises(ValueError, match="shared memory"):
        candidates("core_forward", **given, options={"BLOCK_M": 512, "BLOCK_N": 512})


def test_a_scan() -> None:
    """Infinite bandwidth over a prefix: stages whose work does not grow with the number of keys."""
    plans = [
        make_plan(problem(uniform=True, prefix=True, needs_grad=(True,) * 4, kv_length=n, q_length=n))
        for n in (4096, 8192)
    ]
    assert_expected_inline(
        text(plans[0]),
        """\
forward scan_totals [chunked scan] (0, 1) reads key value writes \n\
forward scan_product [chunked scan] (1, 1) reads key value probe writes out
backward scan_totals [chunked scan] (0, 1) reads key value writes \n\
backward scan_product [chunked scan] (1, 1) reads key value probe grad_out writes grad_probe
backward scan_totals [chunked scan] (0, 1) reads grad_out probe writes \n\
backward scan_product [chunked scan] (1, 1) reads key value probe grad_out writes grad_value
backward scan_product [chunked scan] (1, 1) reads key value probe grad_out writes grad_key""",
    )
    short, long = (sum(plan.cost(stage).flops for stage in plan.stages) for plan in plans)
    assert long == 2 * short
    streamed = make_plan(problem(uniform=True, prefix=True, covariance_mod=True))
    assert [stage.name for stage in streamed.stages] == ["core_forward"]


def test_explain_tells_of_the_scan() -> None:
    q, k, v, r = (torch.empty(1, 2, 256, 16) for _ in range(4))
    causal = plx.AFFINE_LINEAR.replace(mask_mod=plx.masks.causal())
    assert "chunked scan" in str(plx.explain(causal, q, k, v, r, target="sm_90"))
    windowed = causal.replace(mask_mod=plx.masks.sliding_window(8))
    assert "chunked scan" not in str(plx.explain(windowed, q, k, v, r, target="sm_90"))
