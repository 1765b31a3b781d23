""":func:`explain`: the plan of a call, what it must cost, and how fast the target could be at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import masks, validation
from .block_masks import combined_block_mask
from .cache_validation import check_call
from .lowering.candidates import decode_candidates
from .lowering.plan import EXPECTED_ITERATIONS, Cost, Plan, Problem, Stage, decode_cut, make_decode_plan, make_plan
from .lowering.targets import Target, resolve
from .spec import AttentionSpec, Gradient, Solved

__all__ = ["Explanation", "StageExplanation", "explain", "explain_decode"]


@dataclass(frozen=True)
class StageExplanation:
    """One stage: its least cost and, on a GPU target, the time under which it cannot go."""

    stage: Stage
    cost: Cost
    floor_seconds: float | None
    bound: str | None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` of it is the text; the fields are for programs."""

    spec: AttentionSpec
    plan: Plan
    target: Target | None
    stages: tuple[StageExplanation, ...]

    @property
    def floor_seconds(self) -> float | None:
        """Sum of the stages' floors; None where the target's rates are unknown."""
        floors = [stage.floor_seconds for stage in self.stages]
        return None if any(floor is None for floor in floors) else sum(filter(None, floors))

    def __str__(self) -> str:
        from tabulate import tabulate

        problem = self.plan.problem
        lines = [
            f"{self.spec.name or 'variant'}: {self.spec!r}",
            f"query [{problem.batch}, {problem.q_heads}, {problem.q_length}, {problem.width}], "
            f"key [{problem.batch}, {problem.kv_heads}, {problem.kv_length}, {problem.width}], "
            f"value width {problem.value_width}, {problem.dtype}, "
            f"{'gradients' if problem.needs_grad else 'no gradients'}",
            f"mask: {_mask_text(problem)}",
            f"target: {_target_text(self.target)}",
            "",
        ]
        headers = ["stage", "direction", "algorithm", "GFLOP", "MB", "FLOP/byte", "floor", "bound by"]
        rows = [
            [
                item.stage.name,
                item.stage.direction,
                item.stage.algorithm,
                f"{item.cost.flops / 1e9:.3f}",
                f"{item.cost.bytes / 1e6:.2f}",
                f"{item.cost.intensity:.0f}",
                "-" if item.floor_seconds is None else _time(item.floor_seconds),
                item.bound or "-",
            ]
            for item in self.stages
        ]
        lines.append(tabulate(rows, headers=headers, disable_numparse=True))
        lines.append("")
        lines += [f"{item.stage.name}: {item.stage.reason}" for item in self.stages]
        if self.floor_seconds is not None:
            lines.append(f"floor of all stages: {_time(self.floor_seconds)} (data-sheet rates; no kernel reaches them)")
        return "\n".join(lines)


def explain(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    score_mod: Any = None,
    covariance_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    target: str = "auto",
    backward: bool | None = None,
) -> Explanation:
    """The plan of ``attention(query, key, value, probe, spec=spec, ...)``, without running or compiling it.

    Args:
        spec, query, key, value, probe, score_mod, covariance_mod, block_mask, scale: as for
            :func:`~parallax_compile.attention`; of tensors only shapes, dtypes and devices are read.
        target: a GPU target (``"sm_80"``, ``"sm_90"``, ``"sm_100"``), ``"auto"`` for the tensors' own device (on a
            machine without a GPU: sm_90), or ``"cpu"``.
        backward: include the backward; None includes it when an input requires a gradient.

    Raises:
        InputError, InputTypeError, UnsupportedError: as the call itself would.
        ValueError: an unknown target.
    """
    validation.check_tensors(query, key, value, probe, spec, enable_gqa=True)
    validation.check_scale(scale, spec)
    validation.check_mods(spec, score_mod, covariance_mod)
    validation.check_block_mask(block_mask, query, key)
    validation.check_compiled(query, value, spec)
    # A probe that a stage finds is differentiated like the query that it comes from.
    tensors = (query, key, value, query if spec.probe.kind in ("solved", "gradient") else probe)
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in tensors)
    if backward is None:
        backward = any(needs)
    elif backward and not any(needs):
        needs = tuple(tensor is not None for tensor in tensors)
    resolved = None if target == "cpu" else resolve(target)
    mask = combined_block_mask(spec.mask_mod, block_mask, query, key)
    prefix = masks.prefix(spec.mask_mod, query.size(2), key.size(2)) if block_mask is None else None
    problem = Problem(
        batch=query.size(0),
        q_heads=query.size(1),
        kv_heads=key.size(1),
        q_length=query.size(2),
        kv_length=key.size(2),
        width=query.size(3),
        value_width=value.size(3),
        dtype=str(query.dtype).removeprefix("torch."),
        itemsize=query.dtype.itemsize,
        device="cpu" if resolved is None else "cuda",
        has_probe=spec.probe.kind != "zero",
        intercept=spec.intercept,
        score_mod=score_mod is not None or spec.score_mod is not None,
        covariance_mod=covariance_mod is not None or spec.covariance_mod is not None,
        mask=mask is not None,
        block_sparse=mask is not None,
        visited=1.0 if mask is None else _visited(mask),
        needs_grad=needs if backward else None,  # type: ignore[arg-type]
        uniform=spec.bandwidth.kind == "infinite",
        prefix=prefix is not None,
        probe_steps=_probe_steps(spec),
        solved=isinstance(spec.probe, Solved),
    )
    plan = make_plan(problem)
    return Explanation(spec, plan, resolved, tuple(_explain_stage(plan, stage, resolved) for stage in plan.stages))


def explain_decode(
    spec: AttentionSpec,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    probe: Tensor | None = None,
    *,
    cache_seqlens: int | None = None,
    page_table: Tensor | None = None,
    target: str = "auto",
) -> Explanation:
    """The plan of ``decode(query, key_cache, value_cache, probe, spec=spec, ...)``, without running or compiling it.

    Args:
        spec, query, key_cache, value_cache, probe, page_table: as for :func:`~parallax_compile.decode`; only shapes, dtypes and
            devices are read.
        cache_seqlens: keys of each sequence, for the costs; None is the capacity.
        target: as for :func:`explain`.

    Raises:
        InputError, InputTypeError, UnsupportedError: as the call itself would.
    """
    paged = page_table is not None
    capacity = key_cache.size(2) if page_table is None else key_cache.size(1) * page_table.size(1)
    length = capacity if cache_seqlens is None else cache_seqlens
    check_call(query, key_cache, value_cache, probe, spec, None, None, length, page_table, None, None, None)
    validation.check_compiled(query, value_cache, spec)
    resolved = None if target == "cpu" else resolve(target)
    behind = masks.reach(spec.mask_mod)
    most_keys = capacity if behind is None else min(capacity, behind + query.size(2))
    problem = Problem(
        batch=query.size(0),
        q_heads=query.size(1),
        kv_heads=key_cache.size(2 if paged else 1),
        q_length=query.size(2),
        kv_length=min(length, most_keys),
        width=query.size(3),
        value_width=value_cache.size(3),
        dtype=str(query.dtype).removeprefix("torch."),
        itemsize=query.dtype.itemsize,
        device="cpu" if resolved is None else "cuda",
        has_probe=spec.probe.kind != "zero",
        intercept=spec.intercept,
        score_mod=spec.score_mod is not None,
        covariance_mod=spec.covariance_mod is not None,
        mask=spec.mask_mod is not None,
        uniform=spec.bandwidth.kind == "infinite",
        probe_steps=_probe_steps(spec),
        solved=isinstance(spec.probe, Solved),
        cache_itemsize=key_cache.dtype.itemsize,
    )
    sm_count, limit = (1, 1 << 20) if resolved is None else (resolved.sm_count, resolved.shared_memory_per_block)
    sizes = {"width": problem.width, "value_width": problem.value_width, "itemsize": problem.itemsize}
    candidate = decode_candidates(
        rows=16, **sizes, cache_itemsize=key_cache.dtype.itemsize, shared_memory_limit=limit, tma=False, options={}
    )[0]
    cut = decode_cut(
        batch=problem.batch,
        kv_heads=problem.kv_heads,
        rows_of_head=problem.q_length * problem.q_heads // problem.kv_heads,
        most_keys=most_keys,
        has_probe=problem.has_probe,
        block_n=candidate.block_n,
        programs=candidate.programs * sm_count,
    )
    plan = make_decode_plan(problem, cut)
    return Explanation(spec, plan, resolved, tuple(_explain_stage(plan, stage, resolved) for stage in plan.stages))


def _probe_steps(spec: AttentionSpec) -> int:
    if isinstance(spec.probe, Solved):
        return EXPECTED_ITERATIONS
    return spec.probe.steps if isinstance(spec.probe, Gradient) else 0


def _visited(mask: BlockMask) -> float:
    visited = mask.kv_num_blocks.sum()
    if mask.full_kv_num_blocks is not None:
        visited = visited + mask.full_kv_num_blocks.sum()
    blocks = mask.kv_num_blocks.numel() * mask.kv_indices.size(-1)
    return float(visited) / blocks if blocks else 0.0


def _explain_stage(plan: Plan, stage: Stage, target: Target | None) -> StageExplanation:
    cost = plan.cost(stage)
    if target is None or target.rates is None:
        return StageExplanation(stage, cost, None, None)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    arithmetic = cost.flops / (target.rates.tflops(plan.problem.dtype, tf32=tf32) * 1e12)
    memory = cost.bytes / target.rates.bandwidth
    return StageExplanation(
        stage, cost, max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory bandwidth"
    )


def _mask_text(problem: Problem) -> str:
    if not problem.mask:
        return "none"
    if not problem.block_sparse:
        return "on every key that is read"
    return f"{problem.visited:.1%} of the blocks visited"


def _target_text(target: Target | None) -> str:
    if target is None:
        return "cpu"
    return f"{target.name} ({target.product})"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
