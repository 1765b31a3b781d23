"""The second half of :func:`~parallax_compile.explain`: what the kernels of a plan's stages take, and how long they should."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from . import masks
from .attention import attention
from .explanation import Explanation, KernelExplanation, StageExplanation
from .lowering.codegen import GeneratedKernel, generate
from .lowering.cubin import compile_kernel
from .lowering.model import efficiency
from .lowering.plan_stages import Plan
from .lowering.space import staying
from .lowering.targets import Target
from .lowering.tuned import Answer
from .shapes import Shape

__all__ = ["explained_kernels"]

_SHARE_OF_BANDWIDTH = 0.85  # of the data sheet's, that a kernel bound by memory reaches


def explained_kernels(
    explanation: Explanation,
    tensors: Sequence[Tensor | None],
    target: Target,
    backward: bool,
    options: dict[str, Any],
) -> tuple[KernelExplanation, ...]:
    """Generate and compile the kernels of an explained call.

    Args:
        tensors: query, key, value, probe.
        options: arguments of the call beside them.
    """
    spec = explanation.spec

    def call(query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None) -> Tensor:
        return attention(query, key, value, probe, spec=spec, enable_gqa=True, **options)

    code = generate(call, tuple(tensors), target=target, backward=backward)
    kernels = [kernel for kernel in code.kernels if kernel.stage is not None]
    return tuple(_explained(explanation, *pair, target) for pair in _with_answers(kernels, list(code.answers)))


def _with_answers(
    kernels: Sequence[GeneratedKernel], answers: list[Answer]
) -> Iterator[tuple[GeneratedKernel, Answer]]:
    """Each kernel with the answer that its stage got: uses of a stage come in one order in both."""
    for kernel in kernels:
        for answer in answers:
            if answer.question.stage == kernel.stage:
                answers.remove(answer)
                yield kernel, answer
                break


def _explained(explanation: Explanation, kernel: GeneratedKernel, answer: Answer, target: Target) -> KernelExplanation:
    compiled = compile_kernel(kernel, target, texts=False)
    stage = next(
        (s for s in explanation.stages if s.stage.name == kernel.stage and s.stage.direction == kernel.direction), None
    )
    advice: list[str] = []
    if answer.level in ("shipped", "heuristic"):
        advice.append(f"tune it: parallax-compile tune {_tune_arguments(explanation)}")
    problem = explanation.plan.problem
    tile = (answer.candidate.block_m, answer.candidate.block_n)
    stays = staying(str(kernel.stage), answer.candidate)
    length, heads = (
        (problem.kv_length, problem.kv_heads)
        if kernel.stage == "core_backward_key"
        else (problem.q_length, problem.q_heads)
    )
    blocks = math.ceil(length / stays) * problem.batch * heads
    share, losses = efficiency(tile, compiled.resources, target, blocks, stays)
    predicted, basis = _predicted(explanation.plan, stage, answer, share, target)
    return KernelExplanation(
        stage=str(kernel.stage),
        direction=kernel.direction,
        level=answer.level,
        why=answer.why(),
        candidate=asdict(answer.candidate),
        resources=asdict(compiled.resources),
        predicted_seconds=predicted,
        basis=basis,
        advice=(*advice, *losses),
    )


def _predicted(
    plan: Plan, stage: StageExplanation | None, answer: Answer, share: float, target: Target
) -> tuple[float | None, str]:
    """Seconds, and what says so."""
    if stage is None or target.rates is None or stage.floor_seconds is None:
        return None, "-"
    result = {} if answer.entry is None else answer.entry.result
    if result.get("milliseconds") and result.get("shape"):
        batch, q_heads, kv_heads, q_length, kv_length, width, value_width = result["shape"]
        there = replace(
            plan.problem, batch=batch, q_heads=q_heads, kv_heads=kv_heads, q_length=q_length, kv_length=kv_length,
            width=width, value_width=value_width,
        )  # fmt: skip
        measured = Plan(there, plan.stages).cost(stage.stage)
        flops = stage.cost.flops / measured.flops if measured.flops else stage.cost.bytes / measured.bytes
        return result["milliseconds"] * 1e-3 * flops, "measurement, scaled" if flops != 1 else "measurement"
    if not share:
        return None, "resource model"
    if stage.bound == "arithmetic":
        return stage.floor_seconds / share, "resource model"
    return stage.floor_seconds / _SHARE_OF_BANDWIDTH, "resource model"


def _tune_arguments(explanation: Explanation) -> str:
    """The call, as the command line takes it."""
    p, mask = explanation.plan.problem, explanation.spec.mask_mod
    shape = Shape(p.batch, p.q_heads, p.kv_heads, p.q_length, p.kv_length, p.width, p.value_width)
    words = [explanation.spec.name or "SPEC", "--shape", str(shape)]
    if isinstance(mask, masks.SlidingWindow) and mask.offset == 0:
        words += ["--mask", f"window:{mask.window}"]
    elif isinstance(mask, masks.PrefixLM):
        words += ["--mask", f"prefix:{mask.prefix_length}"]
    elif isinstance(mask, masks.Causal) and mask.offset == 0:
        words += ["--mask", "causal"]
    if p.dtype != "bfloat16":
        words += ["--dtype", p.dtype]
    return " ".join(words)
