"""Warp-specialised kernels (Gluon, Hopper): what takes them, and what they compile to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallax_compile.lowering import candidates, codegen, cubin
from parallax_compile.lowering.counters import no_counters
from parallax_compile.lowering.targets import TARGETS
from parallax_compile.lowering.torch_compat_gluon import has_gluon
from support.steps import spills_in_a_step
from torch import Tensor

import parallax_compile as plx

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here, not interpreted"),
    pytest.mark.skipif(not has_gluon(), reason="this Triton has no Gluon for Hopper"),
]


def generate(fn: Callable[..., Any], length: int, width: int, **options: Any) -> codegen.GeneratedCode:
    inputs = [torch.empty(1, heads, length, width, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2, 4)]
    return codegen.generate(fn, inputs, target="sm_90", **options)


def test_the_solver_for_hopper_leaves_tiles_that_are_asked_for_to_triton() -> None:
    def offered(**options: Any) -> list[bool]:
        shape = {"width": 128, "value_width": 128, "itemsize": 2, "row_tiles": 0, "shared_memory_limit": 232448}
        found = candidates.candidates("core_solve", **shape, tma=True, specialized=True, options=options)
        return [candidate.specialized for candidate in found]

    assert offered()[0] and not all(offered())
    assert offered(solve_WARP_SPECIALIZED=True) == [True]
    assert not any(offered(solve_WARP_SPECIALIZED=False))
    assert not any(offered(solve_BLOCK_N=32))


def test_a_specialised_core_is_never_taken_unasked() -> None:
    offered = candidates.candidates(
        "core_forward",
        width=64,
        value_width=64,
        itemsize=2,
        row_tiles=1,
        shared_memory_limit=232448,
        tma=True,
        specialized=True,
    )
    assert offered
    assert not any(candidate.specialized for candidate in offered)


def test_the_specialised_forward_is_the_default_where_the_shipped_table_says_so() -> None:
    causal = plx.SOFTMAX.replace(mask_mod=plx.masks.causal())

    def forward(width: int, score_mod: Any = None) -> str:
        call = lambda q, k, v, r: plx.attention(q, k, v, spec=causal, enable_gqa=True, score_mod=score_mod)
        return generate(call, 4096, width, backward=False).stage("core_forward").source

    sources = [forward(128), forward(64), forward(128, plx.mods.tanh_cap(9.0))]  # tanh is not elementary
    assert ["@gluon.jit" in source for source in sources] == [True, False, False]


@pytest.mark.parametrize(
    "mod, takes",
    [
        (lambda s, b, h, q, k: s + 0.1 * (k - q), True),
        (plx.mods.scale_by(1e6), False),  # past what a slope is kept in
        (lambda s, b, h, q, k: s * s, False),  # without a bound
        (plx.mods.tanh_cap(30.0, approx=True), True),
    ],
)
def test_which_mods_the_specialised_backward_takes(mod: Any, takes: bool) -> None:
    options = {"bwd_WARP_SPECIALIZED": True}
    call = lambda q, k, v, r: plx.attention(q, k, v, r, score_mod=mod, enable_gqa=True, kernel_options=options)
    with contextlib.nullcontext() if takes else pytest.raises(Exception, match="mods that are arithmetic"):
        code = generate(call, 256, 64)
        assert "@gluon.jit" in code.stage("core_backward_key").source


@pytest.mark.skipif(not has_gluon(), reason="needs Gluon")
def test_specialized_kernels_count_in_counters_that_stay() -> None:
    # Where the code will run without this package, each kernel's two are filled for the call.
    def attend(*x: Tensor) -> Tensor:
        return plx.attention(
            *x,
            spec=plx.PARALLAX.replace(mask_mod=plx.masks.causal()),
            enable_gqa=True,
            kernel_options={"WARP_SPECIALIZED": True},
        )

    def others(code: codegen.GeneratedCode) -> int:
        return sum(not kernel.is_template for kernel in code.kernels)

    with_ours = generate(attend, 256, 64)
    with no_counters():
        without = generate(attend, 256, 64)
    assert [graph.wrapper.count(" = counters(") for graph in with_ours.graphs] == [1, 2]
    assert [graph.wrapper.count(" = counters(") for graph in without.graphs] == [0, 0]
    assert others(with_ours) < others(without)


@pytest.mark.parametrize(
    "spec, width",
    [(plx.PARALLAX, 64), (plx.PARALLAX, 128), (plx.SOFTMAX, 64), (plx.SOFTMAX, 128)],
)
def test_the_specialised_forward_compiles_and_spills_in_no_step(spec: plx.AttentionSpec, width: int) -> None:
    causal = spec.replace(mask_mod=plx.masks.causal())

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        probe = r if spec is plx.PARALLAX else None
        return plx.attention(
            q, k, v, probe, spec=causal, enable_gqa=True, kernel_options={"fwd_WARP_SPECIALIZED": True}
        )

    kernel = generate(call, 1000, width, backward=False).stage("core_forward")
    compiled = cubin.compile_kernel(kernel, "sm_90")
    assert compiled.instructions == {"wgmma"}
    # Two groups of four warps, and a third whose first warp copies.
    assert compiled.resources.num_warps == 12
    assert spills_in_a_step(compiled)[0] == 0
    # The vote of a group is one instruction in each warp, and one more exchange.
    assert compiled.asm["sass"].count("REDUX") == 2
    tile = candidates.Candidate(
        *(kernel.parameters[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")),
        tma=True,
        specialized=True,
    )
    # Groups take turns where the products of a step cover the other group's weights.
    assert ("turns" in kernel.source) is (spec is plx.PARALLAX)
    estimate = candidates.shared_memory("core_forward", tile, width, width, 2, int(spec is plx.PARALLAX))
    assert compiled.resources.shared_memory <= estimate <= TARGETS["sm_90"].shared_memory_per_block


def test_the_specialised_backward_compiles_and_spills_in_no_step() -> None:
    causal = plx.PARALLAX.replace(mask_mod=plx.masks.causal())
    call = lambda q, k, v, r: plx.attention(
        q, k, v, r, spec=causal, enable_gqa=True, kernel_options={"WARP_SPECIALIZED": True}
    )
    code = generate(call, 1000, 128)
    for stage in ("core_backward_query", "core_backward_key"):
        kernel = code.stage(stage)
        compiled = cubin.compile_kernel(kernel, "sm_90")
        assert compiled.resources.num_warps == 12
        # Three tiles of scores and two accumulators are more than there are registers: kept whole they spill in every step.
        assert spills_in_a_step(compiled)[0] == 0
        # The groups take turns where that is faster, which is not so in the key kernel.
        assert ("turns" in kernel.source) is (stage == "core_backward_query")
        tile = candidates.Candidate(
            *(kernel.parameters[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")),
            tma=True,
            specialized=True,
        )
        estimate = candidates.shared_memory(stage, tile, 128, 128, 2, 1)
        assert compiled.resources.shared_memory <= estimate <= TARGETS["sm_90"].shared_memory_per_block


@pytest.mark.parametrize("width", [64, 128])
def test_two_programs_of_the_solver_share_a_multiprocessor(width: int) -> None:
    """They hide each other's latency: a kilobyte more would leave one; and no step's state is in spills."""
    causal = plx.LLA.replace(mask_mod=plx.masks.causal())
    call = lambda q, k, v, r: plx.attention(q, k, v, spec=causal, enable_gqa=True)
    kernels = [k for k in generate(call, 1000, width).kernels if k.stage == "core_solve"]
    assert len(kernels) == 2
    for kernel in kernels:
        assert "@gluon.jit" in kernel.source
        compiled = cubin.compile_kernel(kernel, "sm_90")
        assert compiled.instructions == {"wgmma"}
        assert 2 * (compiled.resources.shared_memory + 1024) <= 228 * 1024
        # The adjoint's right side waits outside of the loops.
        assert (compiled.resources.spills or 0) <= (1280 if width == 128 and kernel.direction == "backward" else 256)
        fields = (kernel.parameters[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
        tile = candidates.Candidate(*fields, tma=True, specialized=True)
        estimate = candidates.shared_memory("core_solve", tile, width, width, 2, 0)
        assert compiled.resources.shared_memory <= estimate <= TARGETS["sm_90"].shared_memory_per_block
