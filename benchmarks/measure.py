"""How it is measured: interleaved rounds, the L2 cleared before each run, medians; memory, compile seconds, accuracy."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import peers
import torch
from contenders import Case, Contender
from together import Alone
from torch import Tensor

import parallax_compile as plx
from parallax_compile import reference

DIRECTIONS = ("forward", "both")


def summary(samples: list[float]) -> dict[str, float]:
    """Median and 20% and 80% quantiles of milliseconds."""
    ordered = sorted(samples)
    low, high = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.2, 0.8))
    return {"ms": statistics.median(ordered), "ms_20": low, "ms_80": high}


class Clock:
    """Times a call on ``device``: CUDA events around it, a cold L2 before it; wall time on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(max(2 * size, 2**20), dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if self.device != "cuda":
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                samples.append((time.perf_counter() - start) * 1e3)
            return samples
        # Everything is queued before anything is waited for: the host queues ahead in real use, and its time is not measured.
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start_event, end_event in events:
            self._flush.zero_()
            start_event.record()
            call()
            end_event.record()
        torch.cuda.synchronize()
        return [start_event.elapsed_time(end_event) for start_event, end_event in events]


class Replay:
    """``call`` as a CUDA graph, so that its time holds nothing of the host; the call itself where it cannot be captured.

    Attributes:
        kind: ``graph`` or ``call``.
        reason: what was said where a graph was tried and could not be captured.
    """

    def __init__(self, call: Callable[[], Any], device: str) -> None:
        self._run, self.kind, self.reason = call, "call", ""
        self._call = call  # holds the tensors that the graph reads and nobody else might keep, as a block mask's
        if device != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        # Triton's autotuner leaves cycles, of the errors of what does not fit the GPU, that hold its arguments, and by them an
        # autograd graph of an earlier call: its leaves belong to that call's stream, which a capture must not touch.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._held = call()
            self._run, self.kind = graph.replay, "graph"
        except RuntimeError as error:  # it waits for the device or allocates on the host: timed as it is
            torch.cuda.synchronize()
            self.reason = str(error)[:300]

    @property
    def clock(self) -> dict[str, str]:
        """How it is timed, for a record."""
        return {"clock": self.kind, **({"not_captured": self.reason} if self.reason else {})}

    def __call__(self) -> None:
        self._run()


def operands(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, probe that require gradients, and a gradient of out; normal, from one seed."""
    torch.manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(case.batch, heads, case.length, case.width, device=device, dtype=dtype)

    inputs = [normal(heads).requires_grad_() for heads in (case.q_heads, case.kv_heads, case.kv_heads, case.q_heads)]
    return inputs, normal(case.q_heads)


def directions(call: Any, inputs: list[Tensor], grad: Tensor, method: str) -> dict[str, Callable[[], Any]]:
    """The two things that are timed: forward without a graph, and forward with backward."""
    wanted = inputs[:3] if method == "softmax" else inputs

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    return {"forward": forward, "both": lambda: torch.autograd.grad(call(*inputs), wanted, grad)}


@contextlib.contextmanager
def _peak_memory(device: str) -> Iterator[dict[str, float]]:
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield found
    if device == "cuda":
        torch.cuda.synchronize()
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6


def matrix_product(device: str) -> tuple[Callable[[], Tensor], float]:
    """A large bf16 matrix product, of whose rate every share is taken (8192 cubed), and its operations."""
    size = 8192 if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


def measure(
    case: Case,
    contenders: list[Contender],
    device: str,
    rounds: int,
    repeats: int,
    alone: Alone = contextlib.nullcontext,
) -> dict[str, Any]:
    """Measure ``contenders`` on one case, round by round in turn; one that fails is named with the reason.

    Args:
        alone: what the timed part runs within.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs, grad = operands(case, device, dtype)
    clock, (product, product_flops) = Clock(device), matrix_product(device)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Replay] = {}
    torch._dynamo.reset()
    peers.prepare()
    for contender in contenders:
        row = rows[contender.name] = {"method": contender.method}
        reason = contender.absent(case, device)
        if reason is not None:
            row["absent"] = reason
            continue
        try:
            built = directions(contender.build(case, device), inputs, grad, contender.method)
            for direction, call in built.items():
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                with _peak_memory(device) as peak:
                    call()
                replay = calls[contender.name, direction] = Replay(call, device)
                row[direction] = {"first_call_s": seconds, **peak, **replay.clock}
        except Exception as error:  # a contender that cannot run is a result, not a failure of the run
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            calls = {key: call for key, call in calls.items() if key[0] != contender.name}
        if told := peers.tuned():
            row["tuned"] = told
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    product_samples: list[float] = []
    order = random.Random(0)
    with alone():
        for _ in range(rounds):
            product_samples += clock(product, repeats)
            # In another order each round: a GPU at its power limit runs faster after a contender that draws less.
            for key in order.sample(list(calls), len(calls)):
                calls[key]()  # what the contender before left in caches is not this one's
                samples[key] += clock(calls[key], repeats)
    rate = product_flops / summary(product_samples)["ms"] / 1e9
    for (name, direction), times in samples.items():
        found = summary(times)
        tflops = case.flops(rows[name]["method"], direction) / found["ms"] / 1e9
        rows[name][direction] |= {**found, "tflops": tflops, "share_of_matmul": tflops / rate}
        if direction == "forward":
            bytes_moved = case.forward_bytes(rows[name]["method"])
            rows[name][direction]["intensity"] = case.flops(rows[name]["method"], direction) / bytes_moved
    cudnn = rows.get("softmax, cuDNN", {})
    for row in rows.values():
        for direction in DIRECTIONS:
            if direction in row and "ms" in row[direction] and "ms" in cudnn.get(direction, {}):
                row[direction]["of_cudnn"] = row[direction]["ms"] / cudnn[direction]["ms"]
    shape = [case.batch, case.q_heads, case.kv_heads, case.length, case.width]
    return {"case": case.name, "shape": shape, "matmul_tflops": rate, "contenders": rows}


def accuracy(contender: Contender, width: int, device: str, key_offset: float = 0.0) -> dict[str, float]:
    """Relative error (norm) of out and gradients against the float64 reference at (1, 2, 1024, width), causal."""
    case = Case("accuracy", 1, 2, 2, 1024 if device == "cuda" else 128, width)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs, grad = operands(case, device, dtype)
    with torch.no_grad():
        inputs[1] += key_offset * torch.randn(width, device=device, dtype=dtype)
    used = inputs[:3] if contender.method == "softmax" else inputs
    peers.prepare()
    got = contender.build(case, device)(*inputs)
    grads = torch.autograd.grad(got, used, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    spec = plx.SOFTMAX if contender.method == "softmax" else plx.PARALLAX
    allowed = torch.ones(case.length, case.length, dtype=torch.bool, device=device).tril()
    probe = None if contender.method == "softmax" else exact[3]
    want = reference.attention(*exact[:3], probe, spec=spec, mask=allowed).out
    wanted = torch.autograd.grad(want, exact[: len(used)], grad.double())
    pairs = zip(("out", "dq", "dk", "dv", "dr"), (got, *grads), (want, *wanted), strict=False)  # softmax has no dr
    return {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}
