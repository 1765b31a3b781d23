"""Decode speed beside everything else that is installed, in one process, by CUDA-graph replay over rotating caches.

    python benchmarks/decode.py [--case B1-512 ...] [--contender NAME ...] [--json PATH] [--workers N] [--sweep]

A time is one call's share of the replay of a graph that calls on several caches in turn, more of them than the L2 cache holds,
so that no call finds its keys there ("hot" repeats one cache). Errors are against float64. Two floors stand beside each time:
bytes of keys and values over the peak bandwidth, and over that of a copy in this run. ``--sweep`` times our candidates.
Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parallax_compile.lowering.codegen import fresh
from parallax_compile.lowering.targets import resolve
from record import environment
from tabulate import tabulate
from together import Alone, outcomes
from torch import Tensor

import parallax_compile as plx

L2_TIMES = 4  # rotating caches hold at least this many times the L2 cache


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        goal: microseconds, or a factor of the best contender's time, as ``kind`` says.
        kind: ``"of best"``, ``"us"``, or the name of the case that the factor is of.
        dtype: of the caches.
        page: keys of a page, in a pool of shuffled pages; 0 for a contiguous cache.
        hot: one cache only, where it fits the L2 cache.
    """

    name: str
    batch: int
    length: int
    goal: float
    kind: str = "of best"
    q_heads: int = 8
    kv_heads: int = 8
    queries: int = 1
    width: int = 128
    dtype: torch.dtype = torch.bfloat16
    page: int = 0
    hot: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def bytes(self) -> float:
        """Bytes of keys and values that a call reads at least."""
        keys = sum(self.lengths) if self.lengths else self.batch * self.length
        return 2.0 * keys * self.kv_heads * self.width * self.dtype.itemsize

    @property
    def plain(self) -> bool:
        """Whether it is what every contender can do."""
        return self.queries == 1 and not self.page and self.dtype == torch.bfloat16 and not self.lengths


def cases() -> dict[str, Case]:
    """Every case of the goals by name."""
    found = [Case(f"B32-{n}", 32, n, 1.02) for n in (512, 1024, 4096, 16384)]
    found += [Case(f"B1-{n}", 1, n, 0.90) for n in (512, 1024, 4096, 16384)]
    found += [Case(f"B1-{n}-hot", 1, n, 0.90, hot=True) for n in (512, 1024, 4096)]
    found += [Case("GQA", 8, 8192, 95.0, "us", q_heads=32)]
    found += [Case(f"B32-4096-page{size}", 32, 4096, 1.10, "B32-4096", page=size) for size in (16, 64, 256)]
    found += [Case(f"B1-16384-page{size}", 1, 16384, 1.10, "B1-16384", page=size) for size in (16, 64)]
    eight = torch.float8_e4m3fn
    found += [Case("B32-16384-fp8", 32, 16384, 1 / 1.6, "B32-16384", dtype=eight)]
    for n in (4, 8, 16):
        found += [Case(f"B32-4096-q{n}", 32, 4096, 1.15, "B32-4096", queries=n)]
        found += [Case(f"B1-16384-q{n}", 1, 16384, 1.15, "B1-16384", queries=n)]
    ragged = (16384, *(512,) * 15)
    found += [Case("ragged", 16, 16384, 1.3, "ragged floor", lengths=ragged)]
    return {case.name: case for case in found}


@dataclass
class Set:
    """The tensors of one call. Caches ``[B, H, L, D]``; ``cache_of`` other layouts are made from them by who needs them."""

    query: Tensor
    probe: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor
    table: Tensor | None
    other: dict[str, Any]


def make_sets(case: Case, count: int) -> list[Set]:
    """Caches of normal numbers, from one seed."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16).to(dtype)

    found = []
    for _ in range(count):
        shape = (case.batch, case.kv_heads, case.length, case.width)
        table = None
        if case.page:
            pages = case.batch * case.length // case.page
            shape = (pages, case.page, case.kv_heads, case.width)
            order = torch.randperm(pages, device="cuda", generator=generator)
            table = order.view(case.batch, -1).to(torch.int32)
        rows = (case.batch, case.q_heads, case.queries, case.width)
        lengths = torch.tensor(case.lengths or (case.length,) * case.batch, dtype=torch.int32, device="cuda")
        key, value = normal(*shape, dtype=case.dtype), normal(*shape, dtype=case.dtype)
        found.append(Set(normal(*rows), 0.1 * normal(*rows), key, value, lengths, table, {}))
    return found


def sets_needed(case: Case) -> int:
    """How many caches no L2 cache can hold."""
    if case.hot:
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-L2_TIMES * l2 // int(case.bytes)) if case.bytes < L2_TIMES * l2 else 1))


# --- contenders -----------------------------------------------------------------------------------------------------

Call = Callable[[Set], Tensor]


def ours(spec: plx.AttentionSpec, options: dict[str, Any] | None = None) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        chosen = spec.replace(mask_mod=plx.masks.causal()) if case.queries > 1 else spec

        def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor | None, lengths: Tensor, table: Tensor | None) -> Tensor:
            return plx.decode(q, k, v, r, spec=chosen, cache_seqlens=lengths, page_table=table, kernel_options=options)

        compiled = torch.compile(fresh(call), fullgraph=True, dynamic=False)
        probe = spec.probe.kind == "learned"
        return lambda s: compiled(s.query, s.key, s.value, s.probe if probe else None, s.lengths, s.table)

    return build


def _sdpa(backend: str) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen, gqa = getattr(SDPBackend, backend), case.q_heads != case.kv_heads

        def call(s: Set) -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(s.query, s.key, s.value, enable_gqa=gqa)

        return call

    return build


def _flex(case: Case) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    gqa = case.q_heads != case.kv_heads
    compiled = torch.compile(lambda q, k, v: flex_attention(q, k, v, enable_gqa=gqa), fullgraph=True, dynamic=False)
    return lambda s: compiled(s.query, s.key, s.value)


def _peer(module: str, name: str, extra: tuple[Any, ...] = ()) -> Callable[[Case], Call]:
    """A kernel of the paper's authors or of fla: ``(q, r, k, v)`` in the layout ``[B, L, H, D]``."""

    def build(case: Case) -> Call:
        function = getattr(importlib.import_module(module), name)

        def call(s: Set) -> Tensor:
            if "blhd" not in s.other:
                s.other["blhd"] = [x.transpose(1, 2).contiguous() for x in (s.query, s.probe, s.key, s.value)]
            return function(*s.other["blhd"], *extra)

        return call

    return build


CONTENDERS: dict[str, tuple[str, str | None, Callable[[Case], Call]]] = {
    "parallax, ours": ("parallax", None, ours(plx.PARALLAX)),
    "softmax, ours": ("softmax", None, ours(plx.SOFTMAX)),
    "softmax, cuDNN": ("softmax", None, _sdpa("CUDNN_ATTENTION")),
    "softmax, FA2": ("softmax", None, _sdpa("FLASH_ATTENTION")),
    "softmax, flex_attention": ("softmax", None, _flex),
    "parallax, official CuTeDSL": (
        "parallax",
        "cutlass",
        _peer("parallax.cute.parallax_decode", "parallax_decode", (128**-0.5,)),
    ),
    "parallax, official Helion": ("parallax", "helion", _peer("parallax.helion.parallax_decode", "parallax_decode")),
    "parallax, official Triton": ("parallax", "parallax", _peer("parallax.triton.parallax_decode", "parallax_decode")),
    "parallax, fla": ("parallax", "fla", _peer("fla.ops.parallax.decode", "parallax_decode_one_step")),
}


# --- measuring ------------------------------------------------------------------------------------------------------


def capture(call: Call, sets: list[Set], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of ``calls`` calls, on the sets in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for s in sets[:2]:
            call(s)
        call(sets[0])
        for s in sets:  # whatever a contender makes of a set
            call(s)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for _, s in zip(range(calls), itertools.cycle(sets), strict=False):
            call(s)
    return graph


def replays(graph: torch.cuda.CUDAGraph, calls: int, repeats: int) -> list[float]:
    """Microseconds of a call, one for each replay."""
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / calls for start, end in events]


def exact(case: Case, s: Set, method: str) -> Tensor:
    """The float64 reference of the first two sequences."""
    n = min(2, case.batch)
    spec = plx.PARALLAX if method == "parallax" else plx.SOFTMAX
    if case.queries > 1:
        spec = spec.replace(mask_mod=plx.masks.causal())
    key, value = (x if case.page else x[:n] for x in (s.key, s.value))
    return plx.decode(
        s.query[:n].double(),
        key.double(),
        value.double(),
        s.probe[:n].double() if method == "parallax" else None,
        spec=spec,
        cache_seqlens=s.lengths[:n],
        page_table=None if s.table is None else s.table[:n],
    )


def host_time(call: Call, s: Set, repeats: int = 200) -> float:
    """Microseconds of the host for one call, uncaptured: queued without waiting."""
    with torch.no_grad():
        for _ in range(20):
            call(s)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call(s)
        spent = (time.perf_counter() - start) / repeats * 1e6
        torch.cuda.synchronize()
    return spent


@dataclass(frozen=True)
class Job:
    """A case, the names of who takes part, and the rounds."""

    case: str
    contenders: tuple[str, ...]
    rounds: int


def measure(job: Job, alone: Alone) -> dict[str, Any]:
    """Times of the contenders on one case, in interleaved rounds."""
    case, names = cases()[job.case], {name: CONTENDERS[name] for name in job.contenders}
    count = sets_needed(case)
    sets = make_sets(case, count)
    calls = max(count, min(40, int(4e9 / case.bytes) // count * count or count))
    rows: dict[str, Any] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    built: dict[str, Call] = {}
    torch._dynamo.reset()
    for name, (method, module, build) in names.items():
        row = rows[name] = {"method": method}
        if module is not None and importlib.util.find_spec(module) is None:
            row["absent"] = f"{module} is not installed"
            continue
        if not case.plain and "ours" not in name:
            row["absent"] = "plain cases only"
            continue
        try:
            started = time.perf_counter()
            call = build(case)
            with torch.no_grad():
                got = call(sets[0])
                again = call(sets[0])
            torch.cuda.synchronize()
            row["first_call_s"] = time.perf_counter() - started
            if got.shape != sets[0].query.shape:
                got, again = got.transpose(1, 2), again.transpose(1, 2)
            want = exact(case, sets[0], method)
            row["error"] = float((got[: want.size(0)].double() - want).norm() / want.norm())
            row["same_bits"] = bool(torch.equal(got, again))
            graphs[name] = capture(call, sets, calls)
            built[name] = call
        except Exception as error:  # a contender that cannot run is a result, not a failure of the run
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    with alone():
        for _ in range(job.rounds):
            for name, graph in graphs.items():
                samples[name] += replays(graph, calls, 5)
        for name in graphs:
            rows[name]["host_us"] = host_time(built[name], sets[0])
    for name, found in samples.items():
        rows[name]["us"] = statistics.median(found)
        rows[name]["us_least"] = min(found)
    del graphs, sets, built
    torch.cuda.empty_cache()
    return {"case": case.name, "bytes": case.bytes, "caches": count, "contenders": rows}


def copy_bandwidth() -> float:
    """Bytes per second of a large copy by a kernel, read and written."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    torch.mul(source, 2.0, out=target)
    with torch.cuda.graph(graph):
        torch.mul(source, 2.0, out=target)
    return 2 * source.nbytes / (statistics.median(replays(graph, 1, 10)) * 1e-6)


def launch_floor() -> float:
    """Microseconds that a kernel with next to nothing to do takes in a graph."""
    x = torch.zeros(1, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            x.add_(1)
    return statistics.median(replays(graph, 50, 10))


# --- goals ----------------------------------------------------------------------------------------------------------


def goals(record: dict[str, Any]) -> list[list[Any]]:
    """Rows of the goals table: case, ours, what it is compared with, ratio, goal, met."""
    found = {entry["case"]: entry["contenders"] for entry in record["cases"]}
    rows = []
    for name, entry in found.items():
        case, mine = cases()[name], entry.get("parallax, ours", {}).get("us")
        if mine is None:
            continue
        others = {other: row["us"] for other, row in entry.items() if "us" in row and "ours" not in other}
        if case.kind == "us":
            compared, base = "us", 1.0
        elif case.kind == "of best":
            if not others:
                continue
            compared = min(others, key=lambda other: others[other])
            base = others[compared]
        elif case.kind == "ragged floor":
            compared, base = "copy bandwidth", case.bytes / record["copy_bytes_s"] * 1e6
        else:
            compared, base = case.kind, found.get(case.kind, {}).get("parallax, ours", {}).get("us")
            if base is None:
                continue
        ratio = mine / base
        numbers = [f"{mine:.2f}", compared, f"{base:.2f}", f"{ratio:.3f}", f"{case.goal:.3f}"]
        rows.append([name, *numbers, "met" if ratio <= case.goal else "short"])
    return rows


def case_row(name: str, row: dict[str, Any]) -> list[Any]:
    """A contender's line of the table of a case."""
    cells = [
        f"{row[key]:{form}}" if key in row else ""
        for key, form in (("us", ".2f"), ("host_us", ".1f"), ("error", ".1e"))
    ]
    return [name, *cells, row.get("same_bits", ""), row.get("failed", row.get("absent", ""))[:80]]


# --- sweep ----------------------------------------------------------------------------------------------------------

SWEEP: list[dict[str, Any]] = [
    {"BLOCK_N": n, "num_warps": warps, "num_stages": stages, "PROGRAMS_PER_SM": programs, "USE_TMA": tma}
    for n, warps, stages, programs, tma in (
        (64, 4, 4, 2, False), (64, 4, 3, 2, False), (64, 4, 3, 2, True), (64, 4, 6, 1, True), (64, 4, 5, 1, False),
        (128, 4, 3, 1, True), (128, 4, 3, 2, False), (128, 8, 3, 1, False), (32, 4, 6, 2, False), (32, 4, 4, 4, False),
        (32, 2, 4, 4, False), (64, 8, 3, 2, True), (64, 4, 3, 4, False), (64, 4, 3, 4, True), (128, 8, 3, 1, True),
        (32, 4, 4, 2, False), (32, 4, 4, 4, True), (32, 2, 4, 4, True), (32, 2, 6, 2, True), (16, 2, 6, 4, False),
        (32, 1, 4, 8, False), (64, 2, 4, 2, True), (64, 4, 4, 3, False), (64, 4, 3, 3, False), (64, 8, 4, 2, False),
        (32, 4, 4, 3, False), (128, 8, 3, 2, False), (32, 2, 4, 6, False),
    )
]  # fmt: skip


def label(options: dict[str, Any]) -> str:
    return " ".join(str(int(value)) for value in options.values())


def _tensors(case: Case, device: str) -> list[Tensor | None]:
    """The arguments of a decode call without values."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    shape = (case.batch, case.kv_heads, case.length, case.width)
    if case.page:
        shape = (case.batch * case.length // case.page, case.page, case.kv_heads, case.width)
    rows = (case.batch, case.q_heads, case.queries, case.width)
    table = empty(case.batch, case.length // case.page, dtype=torch.int32) if case.page else None
    keys = [empty(*shape, dtype=case.dtype) for _ in range(2)]
    return [empty(*rows), *keys, empty(*rows), empty(case.batch, dtype=torch.int32), table]


def _generated(task: tuple[str, dict[str, Any]]) -> str:
    """The wrapper that Inductor generates for a candidate; its kernels are compiled into Triton's cache on the way."""
    from parallax_compile.lowering import codegen, cubin

    name, options = task
    case = cases()[name]
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal()) if case.queries > 1 else plx.PARALLAX

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor, lengths: Tensor, table: Tensor | None) -> Tensor:
        return plx.decode(q, k, v, r, spec=spec, cache_seqlens=lengths, page_table=table, kernel_options=options)

    code = codegen.generate(call, _tensors(case, "meta"), target="auto", backward=False)
    for kernel in code.kernels:
        cubin.compile_kernel(kernel)
    return code.wrappers[0]


def _runnable(wrapper: str) -> Call:
    """The call of a generated wrapper, whose arguments it tells apart by shape."""
    module: dict[str, Any] = {"__name__": "generated_wrapper"}
    exec(compile(wrapper, "<generated wrapper>", "exec"), module)
    found = re.findall(r"(arg\d+_1) = rand_strided\((\([^)]*\)), ", wrapper)
    shapes = {name: ast.literal_eval(shape) for name, shape in found}
    order = re.search(r"^ +((?:arg\d+_1, )*arg\d+_1),? = args$", wrapper, re.MULTILINE)
    assert order is not None
    names = order.group(1).split(", ")

    def call(s: Set) -> Tensor:
        given = [s.query, s.key, s.value, s.probe, s.lengths, s.table]
        rest = [tensor for tensor in given if tensor is not None]
        arguments = []
        for name in names:
            position = next(i for i, tensor in enumerate(rest) if tuple(tensor.shape) == tuple(shapes[name]))
            arguments.append(rest.pop(position))
        return module["call"](arguments)[0]

    return call


def sweep(names: list[str], chosen: list[dict[str, Any]], rounds: int, workers: int) -> dict[str, dict[str, Any]]:
    """Microseconds of each candidate on each case, generated and compiled in other processes first."""
    tasks = [(name, options) for name in names for options in chosen]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, workers), mp_context=context) as pool:
        made = {(name, label(options)): pool.submit(_generated, (name, options)) for name, options in tasks}
    table: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        case = cases()[name]
        count = sets_needed(case)
        sets = make_sets(case, count)
        calls = max(count, min(40, int(2e9 / case.bytes) // count * count or count))
        graphs = {}
        for key in map(label, chosen):
            try:
                graphs[key] = capture(_runnable(made[name, key].result()), sets, calls)
            except Exception as error:  # noqa: PERF203  (what cannot run is a result)
                table[name][key] = f"{type(error).__name__}: {str(error)[:60]}"
        samples: dict[str, list[float]] = {key: [] for key in graphs}
        for _ in range(rounds):
            for key, graph in graphs.items():
                samples[key] += replays(graph, calls, 3)
        table[name] |= {key: round(statistics.median(found), 2) for key, found in samples.items()}
        del graphs, sets
        torch.cuda.empty_cache()
    return table


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", help="default: all")
    parser.add_argument("--contender", nargs="*", choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every number here, after each case")
    parser.add_argument("--workers", type=int, default=0, help="build so many cases, or candidates of a sweep, at once")
    parser.add_argument("--sweep", nargs="*", type=int, help="time our candidates (all, or those of these numbers)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode.py needs a CUDA GPU.")
        return 2
    known = cases()
    names = arguments.case or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    record: dict[str, Any] = {
        "schema": 1,
        "environment": environment("cuda"),
        "copy_bytes_s": copy_bandwidth(),
        "launch_us": launch_floor(),
        "cases": [],
    }

    def write() -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    print(f"copy {record['copy_bytes_s'] / 1e12:.3f} TB/s, launch {record['launch_us']:.2f} us", flush=True)
    if arguments.sweep is not None:
        chosen = [SWEEP[i] for i in arguments.sweep] if arguments.sweep else SWEEP
        record["sweep"] = sweep(names, chosen, arguments.rounds, arguments.workers)
        rows = [[key, *(record["sweep"][name].get(key, "") for name in names)] for key in map(label, chosen)]
        print(tabulate(rows, headers=["N warps stages programs TMA", *names], disable_numparse=True))
        write()
        return 0
    contenders = tuple(arguments.contender or CONTENDERS)
    peak = resolve("auto").rates
    jobs = [Job(name, contenders, arguments.rounds) for name in names]
    for job, found in outcomes(measure, jobs, arguments.workers):
        if isinstance(found, str):
            print(f"{job.case} failed: {found}", flush=True)
            continue
        case = known[job.case]
        found["floor_copy_us"] = case.bytes / record["copy_bytes_s"] * 1e6
        found["floor_peak_us"] = case.bytes / peak.bandwidth * 1e6 if peak else None
        record["cases"].append(found)
        write()
        rows = [case_row(other, row) for other, row in found["contenders"].items()]
        peak_us, copy_us = found["floor_peak_us"] or 0.0, found["floor_copy_us"]
        print(f"\n{job.case}: floors {peak_us:.1f} us (peak), {copy_us:.1f} us (copy), {found['caches']} caches")
        headers = ["contender", "us", "host us", "error", "same bits", ""]
        print(tabulate(rows, headers=headers, disable_numparse=True), flush=True)
    record["goals"] = goals(record)
    write()
    headers = ["case", "ours us", "compared with", "its us", "ratio", "goal", ""]
    print("\n" + tabulate(record["goals"], headers=headers, disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
