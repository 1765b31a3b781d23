"""Instances of the core's templates: which one computes a stage, with which candidates, switches and grid."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import templates
from .candidates import SPECIALIZED_GROUPS, SPECIALIZED_ROWS, SPECIALIZED_STAGES, padded
from .inductor_call import Call
from .inductor_shared import (
    LN2,
    LOG2E,
    Mod,
    allocate,
    counters_at_zero,
    distinct,
    flat,
    precision,
    realized,
    shared_memory_limit,
    tma_possible,
)
from .mod_graphs import is_elementary_mask
from .plan_stages import Problem
from .torch_compat_gluon import has_gluon
from .torch_compat_inductor import inductor
from .tuned import ask, offered

__all__ = ["instantiate"]

# Groups of heads of persistent kernels: larger ones balance better, and past the cache still gain (benchmarks/NOTES.md).
_CACHED_BYTES = 64 * 2**20
_HEADS_IN_CACHE = 16


@inductor.SymbolicGridFn
def _tiles_of_rows(batch: Any, heads: Any, length: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(length, meta["BLOCK_M"]), batch, heads)


@inductor.SymbolicGridFn
def _tiles_of_keys(batch: Any, heads: Any, length: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(length, meta["BLOCK_N"]), batch, heads)


@inductor.SymbolicGridFn
def _persistent(batch: Any, heads: Any, length: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (meta["PROGRAMS"], 1, 1)


_SPECIALIZED = "_specialized"
_TEMPLATES = {
    name: inductor.template(f"parallax_{name}", grid, templates.load(name), gluon=name.endswith(_SPECIALIZED))
    for name, grid in (
        ("core_forward", _tiles_of_rows),
        ("core_forward" + _SPECIALIZED, _persistent),
        ("core_backward_query", _tiles_of_rows),
        ("core_backward_query" + _SPECIALIZED, _persistent),
        ("core_backward_key", _tiles_of_keys),
        ("core_backward_key" + _SPECIALIZED, _persistent),
        ("core_solve", _tiles_of_rows),
        ("core_solve" + _SPECIALIZED, _tiles_of_rows),
        ("core_solve_direct", _tiles_of_rows),
    )
}


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _zeros_like(node: Any) -> torch.Tensor:
    return torch.zeros([int(size) for size in node.get_size()], dtype=node.get_dtype(), device=node.get_device())


_STREAMED = ("Q", "K", "V", "R", "R_LOW", "ADJOINT", "ADJOINT_LOW", "GRAD_OUT")


def _specialized_possible(stage: str, call: Call, problem: Problem, switches: dict[str, Any]) -> bool:
    """Whether a warp-specialised kernel can compute the stage: see the head of its template."""
    blocks = call.block_mask
    rows = blocks.kv_block if SPECIALIZED_STAGES.get(stage) == "block_n" else blocks.q_block
    whole, dtypes = SPECIALIZED_GROUPS * SPECIALIZED_ROWS, {"bfloat16"}
    if stage == "core_solve":
        # Queries and keys are float16 there; a program has the rows of one group, and takes as many keys at a time.
        rows, whole, dtypes = math.gcd(blocks.q_block, blocks.kv_block), SPECIALIZED_ROWS, {"float16"}
    elif stage == "core_forward" and not problem.has_probe:
        dtypes.add("float16")
    absent = {name for name, value in switches.items() if name.startswith("NEEDS_") and not value}
    return (
        stage in SPECIALIZED_STAGES
        and has_gluon()
        and torch.cuda.get_device_capability(call.device)[0] == 9
        and problem.dtype in dtypes
        and call.probe_low is None
        and call.adjoint is None
        and absent <= ({"NEEDS_PROBE"} if not problem.has_probe else set())
        and all(map(_specialized_takes, (call.score_mod, call.covariance_mod)))
        and call.scale > 0
        and (not problem.mask or is_elementary_mask(blocks.mask_mod.graph_module))
        and not (call.block_sparse and rows % whole)
    )


# A warp-specialised backward keeps the slope of a mod in float16, which ends at 65504.
_LARGEST_SLOPE = 1024.0


def _specialized_takes(mod: Mod) -> bool:
    return mod.elementary and not mod.mutated and mod.largest_slope <= _LARGEST_SLOPE


def _head_group(problem: Problem) -> int:
    """How many heads a persistent kernel takes at a time: as many as have keys and values that the L2 cache about holds."""
    try:
        length = int(problem.kv_length)
    except TypeError:  # a dynamic length
        return _HEADS_IN_CACHE
    bytes_of_head = length * (problem.width + problem.value_width) * problem.itemsize
    shared = problem.q_heads // problem.kv_heads
    return max(1, _CACHED_BYTES // max(1, bytes_of_head)) * shared


def instantiate(
    stage: str,
    call: Call,
    problem: Problem,
    inputs: dict[str, Any],
    layout: Any,
    mutated: list[Any],
    subgraphs: list[Any],
    switches: dict[str, Any],
    *,
    grid: tuple[Any, Any, Any],
    sparse: tuple[str, str],
) -> Any:
    """One kernel: the stage's template with each feasible candidate, of which Inductor takes or times the best.

    ``inputs`` are in the order of the template's ``def_kernel``; ``sparse`` names the two pairs of block lists.
    """
    blocks = call.block_mask
    sizevars = inductor.V.graph.sizevars
    shape: dict[str, Any] = {"width": problem.width, "value_width": problem.value_width, "itemsize": problem.itemsize}
    sparse_sizes: dict[str, Any] = {"q_block": blocks.q_block, "kv_block": blocks.kv_block} if call.block_sparse else {}
    has_full = call.block_sparse and blocks.full_kv_num_blocks is not None
    lists = []
    if call.block_sparse:
        lists += [getattr(blocks, f"{sparse[0]}_num_blocks"), getattr(blocks, f"{sparse[0]}_indices")]
    if has_full:
        lists += [getattr(blocks, f"{sparse[1]}_num_blocks"), getattr(blocks, f"{sparse[1]}_indices")]

    def even(length: Any, block: int, sparse_block: int) -> bool:
        whole = max(block, sparse_block if call.block_sparse else 1)
        return bool(sizevars.statically_known_multiple_of(length, whole))

    common: dict[str, Any] = {
        "SCALE": call.scale,
        "GQA": problem.q_heads // problem.kv_heads,
        "D": problem.width,
        "DV": problem.value_width,
        "D_PAD": padded(problem.width),
        "DV_PAD": padded(problem.value_width),
        "HAS_PROBE": problem.has_probe,
        "PROBE_SPLIT": call.probe_low is not None,
        "HAS_ADJOINT": call.adjoint is not None,
        "INTERCEPT": problem.intercept,
        "SCORE_MOD": problem.score_mod,
        "COVARIANCE_MOD": problem.has_probe and problem.covariance_mod,
        "HAS_MASK": problem.mask,
        "BLOCK_SPARSE": call.block_sparse,
        "HAS_FULL_BLOCKS": has_full,
        "Q_BLOCK": blocks.q_block,
        "KV_BLOCK": blocks.kv_block,
        "PRECISION": precision(),
        "LOG2E": LOG2E,
        "LN2": LN2,
        **switches,
    }
    found = offered(
        ask(
            stage,
            device=call.device,
            dtype=call.query.get_dtype(),
            constants=common,
            lengths=(problem.q_length, problem.kv_length),
            mods=call.digests,
        ),
        **shape,
        row_tiles=len(call.row_tiles),
        shared_memory_limit=shared_memory_limit(call.device),
        tma=tma_possible(call.device, [inputs[name] for name in _STREAMED if name in inputs]),
        specialized=_specialized_possible(stage, call, problem, switches),
        tensor_memory=torch.cuda.get_device_capability(call.device)[0] == 10,
        options=call.options,
        **sparse_sizes,
    )
    if not inductor.config.max_autotune:
        found = found[:1]
    generators = {}
    any_specialized = any(candidate.specialized for candidate in found)
    common["HAS_COUNTER"] = any_specialized and stage != "core_solve"
    common["HAS_SCRATCH"] = any_specialized and stage == "core_solve"
    if common["HAS_SCRATCH"]:
        # The rows' mean keys.
        inputs = inputs | {"MEAN": allocate(layout)}
        mutated = [*mutated, inputs["MEAN"]]
    if common["HAS_COUNTER"]:
        # Persistent programs draw their items from it, and leave it at 0.
        generators[len(inputs)] = _zeros_like
        inputs = inputs | {"COUNTER": realized([counters_at_zero(call.device, 2)])[0]}
    nodes = [*inputs.values(), *lists]
    specialized = {
        "PROGRAMS": _multiprocessors(call.device),
        "HEAD_GROUP": _head_group(problem),
        # Whether the score mod adds multiples of the row and of the key.
        "AFFINE": problem.score_mod and call.score_mod.affine,
        # Whether the derivative of a mod is something else than 1.
        "SCORE_SLOPE": problem.score_mod and not call.score_mod.additive,
        "COVARIANCE_SLOPE": problem.has_probe and problem.covariance_mod and not call.covariance_mod.additive,
    }
    choices: list[Any] = []
    for candidate in found:
        error = _TEMPLATES[stage + _SPECIALIZED * candidate.specialized].maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            subgraphs=subgraphs,
            mutated_inputs=mutated,
            call_sizes=list(grid),
            BLOCK_M=candidate.block_m,
            BLOCK_N=candidate.block_n,
            num_warps=candidate.num_warps,
            num_stages=candidate.num_stages,
            USE_TMA=candidate.tma,
            HELD_TILES=candidate.held,
            **(specialized | {"STAGES": candidate.num_stages} if candidate.specialized else {}),
            EVEN_M=even(problem.q_length, candidate.block_m, blocks.q_block),
            EVEN_N=even(problem.kv_length, candidate.block_n, blocks.kv_block),
            **common,
        )
        if error is not None:
            raise error
    for position in range(len(inputs), len(nodes), 2):
        generators[position] = inductor.create_num_blocks_fake_generator(nodes[position + 1])
        generators[position + 1] = inductor.create_indices_fake
    tensors = [node for node in (*nodes, *call.captured, *mutated) if isinstance(node, inductor.ir.IRNode)]
    out = inductor.autotune(f"parallax_{stage}", choices, distinct(tensors), layout, generators)
    # Inductor looks here for the symbols that a kernel's mods use.
    out.data.data.subgraph_inps = call.captured
    out.data.data.subgraph_outs = flat(subgraphs)
    return out
