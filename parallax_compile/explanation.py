""":func:`explain`: the plan of a call, what it must cost, the target's best, and what its kernels make of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import mask_pictures, masks, validation
from .block_masks import block_kinds, combined_block_mask, own_lists, visited_blocks
from .cache_validation import check_call, check_length_values, check_positions
from .errors import UnsupportedError
from .lowering.candidates import padded
from .lowering.decode import capacity_of
from .lowering.decode_blocks import lists_of
from .lowering.decode_candidates import decode_candidates
from .lowering.plan import make_decode_plan, make_plan
from .lowering.plan_solve import EXPECTED_ITERATIONS
from .lowering.plan_split import Cut, decode_cut, splits_keys
from .lowering.plan_stages import Cost, Plan, Problem, Stage
from .lowering.targets import Target, resolve
from .spec import AttentionSpec, Gradient, Solved

__all__ = ["Explanation", "KernelExplanation", "StageExplanation", "explain", "explain_decode"]


@dataclass(frozen=True)
class StageExplanation:
    """One stage: its least cost and, on a GPU target, the time under which it cannot go."""

    stage: Stage
    cost: Cost
    floor_seconds: float | None
    bound: str | None


@dataclass(frozen=True)
class KernelExplanation:
    """The kernel of one stage on the target.

    Attributes:
        stage, direction: which.
        level: which level of the lookup gave its candidate: ``exact``, ``bucket``, ``shipped`` or ``heuristic``.
        why: that in a sentence, with where it was measured.
        candidate: tile sizes and launch parameters.
        resources: registers, spills, shared memory, as the assembler reports them.
        predicted_seconds, basis: how long it should take, and what says so: a measurement scaled to this call, or the resource
            model.
        advice: what would make it faster.
    """

    stage: str
    direction: str
    level: str
    why: str
    candidate: dict[str, Any]
    resources: dict[str, Any]
    predicted_seconds: float | None
    basis: str
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` of it is the text; the fields are for programs.

    Attributes:
        kernels: of the stages that are kernels, where they were asked for.
        advice: what would make the whole call faster.
        blocks: the mask's blocks, 0 empty, 1 partial, 2 full, of the first batch entry and head; None without a mask.
    """

    spec: AttentionSpec
    plan: Plan
    target: Target | None
    stages: tuple[StageExplanation, ...]
    kernels: tuple[KernelExplanation, ...] = ()
    advice: tuple[str, ...] = ()
    blocks: Tensor | None = field(default=None, repr=False, compare=False)

    def mask_text(self, width: int = 64) -> str:
        """The mask as a picture of characters: full, partial and empty blocks; at most ``width`` wide."""
        return mask_pictures.text(self.blocks, width)

    def save_mask(self, path: str | Path) -> Path:
        """Write the mask's picture as PNG (needs matplotlib, the extra ``viz``).

        Raises:
            InputError: the call has no mask; the file cannot be written.
            UnsupportedError: matplotlib is not installed.
        """
        return mask_pictures.save(self.blocks, path, self.spec.name or "variant")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what the command line prints with ``--json``."""
        return {
            "spec": repr(self.spec),
            "member": self.spec.name,
            "target": None if self.target is None else self.target.name,
            "problem": asdict(self.plan.problem),
            "floor_seconds": self.floor_seconds,
            "stages": [
                {
                    "stage": item.stage.name,
                    "direction": item.stage.direction,
                    "algorithm": item.stage.algorithm,
                    "flops": item.cost.flops,
                    "bytes": item.cost.bytes,
                    "floor_seconds": item.floor_seconds,
                    "bound": item.bound,
                    "reason": item.stage.reason,
                }
                for item in self.stages
            ],
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "advice": list(self.advice),
        }

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
        if self.kernels:
            lines += ["", self._kernel_table(), ""]
            lines += [f"{kernel.stage}: {kernel.level}: {kernel.why}" for kernel in self.kernels]
        advice = [f"{kernel.stage}: {text}" for kernel in self.kernels for text in kernel.advice] + list(self.advice)
        if advice:
            lines += ["", "what would make it faster:", *(f"- {text}" for text in advice)]
        if self.blocks is not None:
            lines += ["", self.mask_text()]
        return "\n".join(lines)

    def _kernel_table(self) -> str:
        from tabulate import tabulate

        floors: dict[tuple[str, str], float | None] = {
            (item.stage.name, item.stage.direction): item.floor_seconds for item in self.stages
        }
        headers = [
            "stage",
            "tile",
            "warps",
            "stages",
            "registers",
            "spills",
            "shared memory",
            "floor",
            "predicted",
            "by",
        ]
        rows = []
        for kernel in self.kernels:
            floor, resources, candidate = (
                floors.get((kernel.stage, kernel.direction)),
                kernel.resources,
                kernel.candidate,
            )
            spilled = (resources["spill_stores"] or 0) + (resources["spill_loads"] or 0)
            rows.append(
                [
                    kernel.stage,
                    f"{candidate['block_m']}x{candidate['block_n']}{' TMA' if candidate['tma'] else ''}",
                    resources["num_warps"],
                    resources["num_stages"],
                    "-" if resources["registers"] is None else resources["registers"],
                    spilled,
                    resources["shared_memory"],
                    "-" if floor is None else _time(floor),
                    "-" if kernel.predicted_seconds is None else _time(kernel.predicted_seconds),
                    kernel.basis,
                ]
            )
        return tabulate(rows, headers=headers, disable_numparse=True)


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
    kernels: bool = False,
) -> Explanation:
    """The plan of ``attention(query, key, value, probe, spec=spec, ...)``, without running it.

    Args:
        spec, query, key, value, probe, score_mod, covariance_mod, block_mask, scale: as for
            :func:`~parallax_compile.attention`; of tensors only shapes, dtypes and devices are read.
        target: a GPU target (``"sm_80"``, ``"sm_89"``, ``"sm_90"``, ``"sm_100"``), ``"auto"`` for the tensors' own device (on a
            machine without a GPU: sm_90), or ``"cpu"``.
        backward: include the backward; None includes it when an input requires a gradient.
        kernels: also generate and compile the stages' kernels for the target (on any machine; seconds for each kernel): which
            level of the lookup of tuned candidates answered, resources, predicted time, and what would make it faster.

    Raises:
        InputError, InputTypeError, UnsupportedError: as the call itself would; ``kernels`` without triton, or for a CPU.
        ValueError: an unknown target.
    """
    validation.check_spec(spec)
    validation.check_tensors(query, key, value, probe, spec, enable_gqa=True)
    validation.check_scale(scale, spec)
    validation.check_mods(spec, score_mod, covariance_mod)
    validation.check_block_mask(block_mask, query, key)
    validation.check_compiled(query, value, spec, "cpu" if target == "cpu" else "cuda")
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
        own_lists=block_mask is not None and own_lists(block_mask, query, key),
    )
    behind, ahead = masks.band(spec.mask_mod) if block_mask is None else (None, None)
    end = problem.kv_length if ahead is None else min(problem.kv_length, problem.q_length + ahead)
    cut = _cut(problem, resolved, max(1, end - max(0, behind or 0))) if splits_keys(problem) else None
    plan = make_plan(problem, cut)
    explanation = Explanation(
        spec,
        plan,
        resolved,
        tuple(_explain_stage(plan, stage, resolved) for stage in plan.stages),
        advice=tuple(_advice(plan, spec, block_mask)),
        blocks=None if mask is None else block_kinds(mask)[0, 0],
    )
    if not kernels:
        return explanation
    if resolved is None:
        raise UnsupportedError("kernels=True needs a GPU target, but target is 'cpu': its code is Inductor's C++.")
    from .kernel_explanations import explained_kernels

    found = explained_kernels(
        explanation, (query, key, value, probe), resolved, backward,
        {"score_mod": score_mod, "covariance_mod": covariance_mod, "block_mask": block_mask, "scale": scale},
    )  # fmt: skip
    return replace(explanation, kernels=found)


def _advice(plan: Plan, spec: AttentionSpec, block_mask: BlockMask | None) -> list[str]:
    """What the caller could change, whatever the kernels are."""
    problem, found = plan.problem, []
    for name, width in (("D", problem.width), ("Dv", problem.value_width)):
        if padded(width) != width:
            found.append(f"{name} = {width} is computed as {padded(width)}: a power of two wastes nothing")
    if problem.dtype == "float32" and problem.device != "cpu":
        found.append("float32 products are slow: bfloat16 inputs, or torch.set_float32_matmul_precision('high')")
    if block_mask is None and spec.mask_mod is not None and not isinstance(spec.mask_mod, masks.LibraryMask):
        found.append("the mask is a function of yours: one of plx.masks makes its blocks without asking for every pair")
    if problem.uniform and not problem.prefix:
        found.append(
            "infinite bandwidth takes linear time only under a causal mask, or none, and without a covariance_mod"
        )
    if problem.solved and any(stage.algorithm == "conjugate gradients" for stage in plan.stages):
        found.append("each step of the solver is as long as a forward: a larger ridge takes fewer")
    return found


def explain_decode(
    spec: AttentionSpec,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    probe: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    page_table: Tensor | None = None,
    score_mod: Any = None,
    covariance_mod: Any = None,
    block_mask: BlockMask | None = None,
    target: str = "auto",
) -> Explanation:
    """The plan of ``decode(query, key_cache, value_cache, probe, spec=spec, ...)``, without running or compiling it.

    Args:
        spec, query, key_cache, value_cache, probe, page_table, score_mod, covariance_mod, block_mask: as for
            :func:`~parallax_compile.decode`; of tensors only shapes, dtypes and devices are read, of a block mask its lists.
        cache_seqlens: keys of each sequence with those that the call appends, for the costs; None is the capacity.
        target: as for :func:`explain`.

    Returns:
        the plan; its ``kv_length`` is the keys that a head reads, of sequences of different lengths the mean. Its picture is
        the row of a block mask's blocks that the first sequence visits.

    Raises:
        InputError, InputTypeError, UnsupportedError: as the call itself would.
    """
    validation.check_spec(spec)
    length = 0 if cache_seqlens is None else cache_seqlens
    check_call(query, key_cache, value_cache, probe, spec, None, None, length, page_table, None, None, None)
    validation.check_mods(spec, score_mod, covariance_mod)
    validation.check_compiled(query, value_cache, spec, "cpu" if target == "cpu" else "cuda", call="plx.decode")
    capacity = capacity_of(key_cache, page_table)
    check_positions(block_mask, query, capacity)
    if isinstance(cache_seqlens, Tensor):
        check_length_values(cache_seqlens, capacity, 0)
    resolved = None if target == "cpu" else resolve(target)
    kv_heads, rows = key_cache.size(1 if page_table is None else 2), query.size(2)
    total = torch.as_tensor(capacity if cache_seqlens is None else cache_seqlens, dtype=torch.int64)
    total = total.to("cpu" if block_mask is None else block_mask.kv_indices.device).expand(query.size(0))
    behind, blocks = masks.reach(spec.mask_mod), None
    if block_mask is not None:
        found = visited_blocks(block_mask, total, rows)
        some, _, whole, _ = lists_of(found, kv_heads, total, rows, behind, asked_everywhere=spec.mask_mod is not None)
        count = some if whole is None else some + whole
        keys_read = torch.minimum(count * found.kv_block, total[:, None, None])
        most_keys = -(-capacity // found.kv_block) * found.kv_block
        blocks = found.kinds[0, 0, :, : most_keys // found.kv_block] if total.numel() else None
    else:
        most_keys = capacity if behind is None else min(capacity, behind + rows)
        keys_read = total.clamp(max=most_keys)
    problem = Problem(
        batch=query.size(0),
        q_heads=query.size(1),
        kv_heads=kv_heads,
        q_length=rows,
        kv_length=math.ceil(keys_read.double().mean()) if keys_read.numel() else 0,
        width=query.size(3),
        value_width=value_cache.size(3),
        dtype=str(query.dtype).removeprefix("torch."),
        itemsize=query.dtype.itemsize,
        device="cpu" if resolved is None else "cuda",
        has_probe=spec.probe.kind != "zero",
        intercept=spec.intercept,
        score_mod=score_mod is not None or spec.score_mod is not None,
        covariance_mod=covariance_mod is not None or spec.covariance_mod is not None,
        mask=spec.mask_mod is not None or block_mask is not None,
        uniform=spec.bandwidth.kind == "infinite",
        probe_steps=_probe_steps(spec),
        solved=isinstance(spec.probe, Solved),
        cache_itemsize=key_cache.dtype.itemsize,
    )
    plan = make_decode_plan(problem, _cut(problem, resolved, most_keys))
    stages = tuple(_explain_stage(plan, stage, resolved) for stage in plan.stages)
    return Explanation(spec, plan, resolved, stages, blocks=blocks)


def _cut(problem: Problem, target: Target | None, most_keys: int) -> Cut:
    """How the keys of a call are split on a target, of which a row sees so many at most."""
    sm_count, limit = (1, 1 << 20) if target is None else (target.sm_count, target.shared_memory_per_block)
    candidate = decode_candidates(
        rows=8,
        width=problem.width,
        value_width=problem.value_width,
        itemsize=problem.itemsize,
        cache_itemsize=problem.cache_itemsize or problem.itemsize,
        shared_memory_limit=limit,
        tma=False,
        options={},
        keys=problem.batch * problem.kv_heads * most_keys / sm_count,
        heads=problem.batch * problem.kv_heads / sm_count,
    )[0]
    return decode_cut(
        batch=problem.batch,
        kv_heads=problem.kv_heads,
        rows_of_head=problem.q_length * problem.q_heads // problem.kv_heads,
        most_keys=most_keys,
        has_probe=problem.has_probe,
        block_n=candidate.block_n,
        programs=candidate.programs * sm_count,
    )


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
