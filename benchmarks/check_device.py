"""Correctness of the compiled kernels on this machine's GPU.

    python benchmarks/check_device.py [--json results.json] [--quick] [--workers N]

Each case compiles one call, forward and backward, checks output and gradients against the float64 reference and against
a budget from an independent low-precision computation, runs the same inputs twice and compares the bits, and makes sure
that the generated kernels ran. Exits with 1 when a case fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from record import environment
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients

import parallax_compile as plx

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# --- cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One call. ``score``, ``covariance`` are made from captured tensors, so that float64 twins can be made of them."""

    name: str
    dtype: str = "bf16"
    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 4
    q_length: int = 512
    kv_length: int = 512
    width: int = 64
    value_width: int | None = None
    spec: plx.AttentionSpec = plx.PARALLAX
    mask: Any = None
    score: Callable[[dict[str, Tensor]], Any] | None = None
    covariance: Callable[[dict[str, Tensor]], Any] | None = None
    captured: dict[str, tuple[int, ...]] = field(default_factory=dict)
    key_offset: float = 0.0
    key_growth: float = 0.0
    probe_scale: float = 1.0
    layout: str = "bhld"
    requires_grad: tuple[bool, bool, bool, bool] = (True, True, True, True)
    dynamic: bool | None = None
    deterministic: bool = True
    options: dict[str, Any] | None = None


def _tanh(captured: dict[str, Tensor]) -> Any:
    return lambda s, b, h, q, k: torch.tanh(s) * captured["gain"][h] + 0.1


def _bias(captured: dict[str, Tensor]) -> Any:
    return lambda s, b, h, q, k: s + captured["slope"][h] * (q - k) * 0.02


_ALIBI, _CAP, _HALF = plx.mods.alibi(8), plx.mods.tanh_cap(20.0, approx=True), plx.mods.scale_by(0.5)


def cases(quick: bool) -> list[Case]:
    """The matrix: shapes, dtypes, members, masks, mods, layouts."""
    causal = plx.masks.causal()
    window = plx.masks.sliding_window(100)
    documents = causal & plx.masks.document((torch.arange(1000) // 300).to("cuda"))
    found = [
        Case("plain"),
        Case("causal", mask=causal),
        Case("causal D=128", mask=causal, width=128),
        Case("odd L=777 D=80 Dv=48", mask=causal, q_length=777, kv_length=777, width=80, value_width=48),
        Case("odd dense L=333 D=128", q_length=333, kv_length=333, width=128),
        Case("cross 65 x 1000", q_length=65, kv_length=1000, width=128),
        Case("one query", q_length=1, kv_length=700, width=128),
        Case("D=256", mask=causal, width=256, q_length=300, kv_length=300),
        Case("D=1 Dv=3", mask=causal, width=1, value_width=3, q_length=200, kv_length=200),
        Case("GQA 8/2", mask=causal, q_heads=8, kv_heads=2, width=128, q_length=515, kv_length=515),
        Case("MQA 6/1", mask=causal, q_heads=6, kv_heads=1),
        Case("sliding window 100", mask=window, q_length=700, kv_length=700),
        Case("window & causal GQA D=128", mask=window & causal, q_heads=8, kv_heads=2, width=128),
        Case("empty rows", mask=plx.masks.causal(offset=-70)),
        Case("softmax", spec=plx.SOFTMAX, mask=causal, width=128),
        Case("no intercept", spec=plx.PARALLAX.replace(intercept=False), mask=causal),
        Case("mods, captured", mask=causal, score=_bias, covariance=_tanh,
             captured={"slope": (4,), "gain": (4,)}, deterministic=False),
        Case("mods, GQA, odd", mask=window, score=_bias, covariance=_tanh, q_heads=8, kv_heads=2, q_length=311,
             kv_length=311, width=96, captured={"slope": (8,), "gain": (8,)}, deterministic=False),
        Case("keys offset 10 sigma", mask=causal, key_offset=10.0),
        Case("keys offset 10 sigma D=128", mask=causal, key_offset=10.0, width=128),
        Case("[B, L, H, D] layout", mask=causal, layout="blhd", q_heads=8, kv_heads=2, width=128),
        Case("only query", requires_grad=(True, False, False, False)),
        Case("only key", requires_grad=(False, True, False, False)),
        Case("only value", requires_grad=(False, False, True, False)),
        Case("only probe", requires_grad=(False, False, False, True)),
        Case("dynamic lengths", mask=causal, q_length=333, kv_length=333, dynamic=True),
    ]  # fmt: skip
    found += [
        # float16 has no specialised backward.
        replace(
            case, name=f"specialised, {case.name}", options={"fwd_" * (case.dtype == "fp16") + "WARP_SPECIALIZED": True}
        )
        for case in (
            Case("causal"),
            Case("causal D=128 L=1000", mask=causal, width=128, q_length=1000, kv_length=1000),
            Case("odd D=80 Dv=48", mask=causal, q_length=777, kv_length=777, width=80, value_width=48),
            Case("cross 65 x 1000", q_length=65, kv_length=1000, width=128),
            Case("GQA window", mask=window, q_heads=8, kv_heads=2, width=128, q_length=515, kv_length=515),
            Case("empty rows", mask=plx.masks.causal(offset=-70)),
            Case("softmax D=128", spec=plx.SOFTMAX, mask=causal, width=128, q_length=1111, kv_length=1111),
            Case("softmax D=128", "fp16", spec=plx.SOFTMAX, mask=causal, width=128, q_length=1111, kv_length=1111),
            Case("softmax", spec=plx.SOFTMAX, mask=causal, q_heads=8, kv_heads=2, layout="blhd"),
            Case("no intercept", spec=plx.PARALLAX.replace(intercept=False), mask=causal),
            Case("keys offset 10 sigma D=128", mask=causal, key_offset=10.0, width=128),
            Case("growing scores", mask=causal, key_growth=0.5, q_length=1000, kv_length=1000),
            Case("growing scores D=128", mask=causal, key_growth=0.5, width=128, q_length=1000, kv_length=1000),
            Case("growing", "fp16", spec=plx.SOFTMAX, mask=causal, key_growth=0.5, width=128),
            # Without a mask the keys come in their order, so that weights grow past what the first block's level allows.
            Case("growing, no mask", key_growth=2.0, q_length=901, kv_length=901),
            Case("growing, no mask D=128", key_growth=2.0, width=128, q_length=901, kv_length=901),
            Case("growing, no mask", "fp16", spec=plx.SOFTMAX, key_growth=2.0, q_length=901, kv_length=901),
            Case("dynamic lengths", mask=causal, q_length=333, kv_length=333, dynamic=True),
            Case("documents", spec=plx.SOFTMAX, mask=documents, width=128, q_length=1000, kv_length=1000),
            Case(
                "mods",
                mask=causal,
                score=lambda captured: _ALIBI,
                covariance=lambda captured: _CAP,
                q_length=777,
                kv_length=777,
            ),
            Case(
                "mods D=128 GQA",
                mask=causal,
                score=lambda captured: _ALIBI,
                covariance=lambda captured: _CAP,
                q_heads=8,
                kv_heads=2,
                width=128,
                q_length=515,
                kv_length=515,
            ),
            Case(
                "other mods D=128",
                score=lambda captured: _CAP,
                covariance=lambda captured: _HALF,
                width=128,
                q_length=300,
                kv_length=300,
            ),
            Case("softmax, capped", spec=plx.SOFTMAX, mask=causal, score=lambda captured: _CAP, width=128),
        )
    ]
    # Where the default is the specialised kernel.
    found += [
        replace(case, name=f"Triton, {case.name}", options={"WARP_SPECIALIZED": False})
        for case in (
            Case("causal", mask=causal, q_length=1500, kv_length=1500),
            Case("softmax D=128", spec=plx.SOFTMAX, mask=causal, width=128, q_length=1111, kv_length=1111),
            Case("documents", spec=plx.SOFTMAX, mask=documents, width=128, q_length=1000, kv_length=1000),
        )
    ]
    for dtype in ("fp16", "fp32"):
        found += [
            Case("causal", dtype, mask=causal),
            Case("causal D=128", dtype, mask=causal, width=128),
            Case("odd L=333 D=80", dtype, q_length=333, kv_length=333, width=80),
            Case("GQA window", dtype, mask=window, q_heads=8, kv_heads=2, q_length=400, kv_length=400),
            Case("softmax", dtype, spec=plx.SOFTMAX, mask=causal),
            Case("no intercept", dtype, spec=plx.PARALLAX.replace(intercept=False), mask=causal),
            Case("keys offset 10 sigma", dtype, mask=causal, key_offset=10.0),
            Case("D=256", dtype, mask=causal, width=256, q_length=200, kv_length=200),
        ]
    found.append(Case("p s2 past 65504", "fp16", probe_scale=3000.0))
    return found[:6] if quick else found


def _inputs(case: Case) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def operand(heads: int, length: int, width: int) -> Tensor:
        if case.layout == "blhd":
            return normal(case.batch, length, heads, width).transpose(1, 2)
        return normal(case.batch, heads, length, width)

    value_width = case.value_width or case.width
    query = operand(case.q_heads, case.q_length, case.width)
    key = operand(case.kv_heads, case.kv_length, case.width) + case.key_offset * normal(1, 1, 1, case.width)
    if case.key_growth:  # scores grow along the keys, so that rows' levels move at different blocks
        key = key * (1.0 + case.key_growth * torch.arange(case.kv_length)[:, None] / 64)
    value = operand(case.kv_heads, case.kv_length, value_width)
    probe = operand(case.q_heads, case.q_length, case.width) * case.probe_scale
    dtype = DTYPES[case.dtype]
    inputs = [tensor.to(dtype).cuda() for tensor in (query, key, value, probe)]
    if case.spec.probe.kind == "zero":
        return [*inputs[:3], None], {}
    return [*inputs], {name: normal(*shape).float().cuda() for name, shape in case.captured.items()}


@contextlib.contextmanager
def _counting_kernels() -> Iterator[list[str]]:
    """Names of our generated kernels that were launched."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        launched: list[str] = []
        yield launched
        torch.cuda.synchronize()
    launched += [event.name for event in profile.events() if "parallax" in event.name]


@dataclass
class Result:
    """What a case gave: the largest ratio of error to budget, and the errors by name."""

    case: Case
    errors: dict[str, float]
    budgets: dict[str, float]
    repeatable: bool
    kernels: int
    seconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        within = all(self.errors[name] <= self.budgets[name] for name in self.errors)
        return not self.failure and within and (self.repeatable or not self.case.deterministic)


def check(case: Case) -> Result:
    """Compile and run one case."""
    start = time.perf_counter()
    torch._dynamo.reset()
    inputs, captured = _inputs(case)
    dtype = DTYPES[case.dtype]
    block_mask = None
    if case.mask is not None:
        block_mask = plx.masks.block_mask(case.mask, None, None, case.q_length, case.kv_length, "cuda")

    def call(tensors: dict[str, Tensor], mask: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, r: plx.attention(
            q, k, v, r, spec=case.spec, block_mask=mask, enable_gqa=True, kernel_options=case.options,
            score_mod=case.score and case.score(tensors), covariance_mod=case.covariance and case.covariance(tensors),
        )  # fmt: skip

    def run(function: Any, dtype: torch.dtype, tensors: dict[str, Tensor]) -> list[Tensor]:
        fresh = leaves(inputs, dtype)
        for tensor, needed in zip(fresh, case.requires_grad, strict=True):
            if tensor is not None:
                tensor.requires_grad_(needed)
        return with_gradients(function, fresh, list(tensors.values()))

    trained = {name: tensor.requires_grad_() for name, tensor in captured.items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in captured.items()}
    want = run(call(wide, block_mask), torch.float64, wide)
    compiled = torch.compile(call(trained, block_mask), fullgraph=True, dynamic=case.dynamic)
    got = run(compiled, dtype, trained)
    with _counting_kernels() as launched:
        again = run(compiled, dtype, trained)
    repeatable = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

    mask = None
    if case.mask is not None:
        rows = torch.arange(case.q_length, device="cuda")[:, None]
        mask = case.mask(rows * 0, rows * 0, rows, torch.arange(case.kv_length, device="cuda"))

    def independent(q: Tensor, k: Tensor, v: Tensor, r: Tensor | None) -> Tensor:
        return low_precision(
            q, k, v, r, intercept=case.spec.intercept, mask=mask,
            score=case.score and case.score(trained), covariance=case.covariance and case.covariance(trained),
        )  # fmt: skip

    # At a large key offset 16-bit products are far off in the independent computation: there the budget is that without one.
    plain = case if dtype == torch.float32 else replace(case, key_offset=0.0, probe_scale=1.0)
    inputs, _ = _inputs(plain)
    want_plain = want if plain is case else run(call(wide, block_mask), torch.float64, wide)
    with torch.autocast("cuda", enabled=False):
        low = run(independent, dtype, trained)
    wanted = [tensor for tensor, needed in zip("qkvr", case.requires_grad, strict=True) if needed]
    if case.spec.probe.kind == "zero":
        wanted = [name for name in wanted if name != "r"]
    names = ["out", *(f"d{name}" for name in wanted), *(f"d{name}" for name in captured)]
    errors = dict(zip(names, map(relative_error, got, want), strict=True))
    budgets = {name: budget(relative_error(a, b), dtype) for name, a, b in zip(names, low, want_plain, strict=True)}
    return Result(case, errors, budgets, repeatable, len(launched), time.perf_counter() - start)


# --- main -----------------------------------------------------------------------------------------------------------


def _checked(quick: bool, index: int) -> tuple[Any, ...]:
    """What a case of the matrix gave, without the case itself, whose mods do not travel between processes."""
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        result = check(cases(quick)[index])
    except Exception as error:
        return {}, {}, False, 0, 0.0, f"{type(error).__name__}: {str(error)[:300]}"
    return result.errors, result.budgets, result.repeatable, result.kernels, result.seconds, result.failure


def _print(result: Result) -> None:
    worst = " ".join(f"{name} {result.errors[name]:.1e}/{result.budgets[name]:.1e}" for name in result.errors)
    print(
        f"{'ok  ' if result.passed else 'FAIL'} {result.case.dtype} {result.case.name}: {worst} "
        f"{'same bits' if result.repeatable else 'bits differ'} kernels {result.kernels} "
        f"{result.seconds:.1f}s {result.failure}",
        flush=True,
    )


def main() -> int:
    """Run the matrix; print a line for each case; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--quick", action="store_true", help="only the first cases")
    parser.add_argument("--match", default="", help="only cases whose dtype and name contain this")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that share the GPU; compiling is most of the work"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "check_device needs a CUDA GPU; on a machine without one, `make test` runs the kernels in the interpreter."
        )
        return 2
    print(environment("cuda"))
    results = []
    matrix = [
        (index, case)
        for index, case in enumerate(cases(arguments.quick))
        if arguments.match in f"{case.dtype} {case.name}"
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        outcomes = pool.map(_checked, [arguments.quick] * len(matrix), [index for index, _ in matrix])
        for (_, case), outcome in zip(matrix, outcomes, strict=True):
            results.append(Result(case, *outcome))
            _print(results[-1])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "environment": environment("cuda"),
            "cases": [
                {"name": r.case.name, "dtype": r.case.dtype, "passed": r.passed, "errors": r.errors,
                 "budgets": r.budgets, "repeatable": r.repeatable, "kernels": r.kernels, "failure": r.failure}
                for r in results
            ],
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1))
    failed = [result for result in results if not result.passed]
    print(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
