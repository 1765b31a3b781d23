"""Correctness of the compiled decode kernels on this machine's GPU.

    python benchmarks/check_decode.py [--json results.json] [--workers N] [--match NAME]

Each case decodes several steps from caches whose unused memory is NaN, within a CUDA graph that is replayed while the
lengths on the device grow: output and caches against each sequence by itself in float64, with the budget of an independent
low-precision computation; the same bits when a step is repeated. Then calls of ``plx.attention`` with few rows, whose keys the
plan splits, and decode calls on two streams at once, in graphs and without. Exits with 1 when a case fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import environment
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.decoding import Call, random_blocks
from support.oracle import budget, low_precision, relative_error

import parallax_compile as plx

STEPS = 3
CAUSAL, WINDOW = plx.masks.causal(), plx.masks.sliding_window(300)


def causal(row: Tensor, column: Tensor) -> Tensor:
    return column <= row


def window(row: Tensor, column: Tensor) -> Tensor:
    return (column <= row) & (row - column < 300)


def cases() -> dict[str, Callable[[], Call]]:
    """Members, sizes, layouts, everything odd; what makes each case, whose caches take a second to fill."""
    base: dict[str, Any] = {"capacity": 3000, "q_heads": 8, "kv_heads": 8, "width": 128, "value_width": 128, "new": 1}
    lengths = (2000, 0, 2990, 17, 1234)
    parallax = plx.PARALLAX.replace(mask_mod=CAUSAL)
    return {
        "plain": partial(Call, lengths, **base),
        "one long sequence": partial(Call, (2900,), **base),
        "one kernel more": partial(Call, lengths, **base, options={"MERGE": "stage"}),
        "descriptors": partial(Call, lengths, **base | {"new": 0}, options={"USE_TMA": True}),
        "GQA": partial(Call, lengths, **base | {"q_heads": 32}),
        "MQA, odd widths": partial(
            Call, lengths, **base | {"q_heads": 6, "kv_heads": 1, "width": 80, "value_width": 36}
        ),
        "D=64": partial(Call, lengths, **base | {"width": 64, "value_width": 64}),
        "D=256": partial(Call, lengths, **base | {"width": 256, "value_width": 256}),
        "softmax": partial(Call, lengths, **base, spec=plx.SOFTMAX),
        "no intercept": partial(Call, lengths, **base, spec=plx.PARALLAX.replace(intercept=False)),
        "4 queries": partial(Call, lengths, **base | {"new": 4}, queries=4, spec=parallax, keep=causal),
        "16 queries, GQA": partial(
            Call, lengths, **base | {"new": 16, "q_heads": 32}, queries=16, spec=parallax, keep=causal
        ),
        "40 queries": partial(Call, lengths, **base | {"new": 40}, queries=40, spec=parallax, keep=causal),
        "window": partial(Call, lengths, **base, spec=plx.PARALLAX.replace(mask_mod=WINDOW), keep=window),
        "pages of 16": partial(Call, lengths, **base, page=16),
        "pages of 48": partial(Call, lengths, **base, page=48),
        "pages of 256": partial(Call, lengths, **base, page=256),
        "offset of 10 sigma": partial(Call, lengths, **base, offset=10.0),
        "fp16": partial(Call, lengths, **base, dtype=torch.float16),
        "fp32": partial(Call, lengths, **base, dtype=torch.float32),
        "mods": partial(Call, lengths, **base, score=plx.mods.alibi(8), covariance=plx.mods.tanh_cap(5.0)),
        "blocks of a mask": partial(Call, lengths, **base, **blocks(1, 8)),
        "blocks of every head, GQA, pages": partial(
            Call, lengths, **base | {"capacity": 3008, "q_heads": 32, "new": 4}, queries=4, page=16, **blocks(32, 32)
        ),
        "300 sequences": partial(
            Call, tuple(range(0, 900, 3)), **base | {"capacity": 1000, "q_heads": 1, "kv_heads": 1}
        ),
    }


def blocks(lists: int, q_heads: int) -> dict[str, Any]:
    """A random block mask over positions, and what it allows."""
    block_mask, keep = random_blocks(3072, lists, (128, 128), lambda b, h, q, k: (q + k + h) % 4 != 0, q_heads)
    return {"block_mask": block_mask, "keep": keep}


def few_rows(rows: int, q_heads: int, spec: plx.AttentionSpec, behind: int = 5000) -> dict[str, Any]:
    """``plx.attention`` with few rows and no gradient, against the definition."""
    torch.manual_seed(0)
    shapes = [(q_heads, rows), (8, 5000), (8, 5000), (q_heads, rows)][: 3 + (spec.probe.kind == "learned")]
    given = [torch.randn(2, *shape, 128).bfloat16() for shape in shapes]
    compiled = torch.compile(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True), dynamic=False)
    with torch.no_grad():
        out = compiled(*(x.cuda() for x in given)).cpu()
    distance = torch.arange(rows)[:, None] + 5000 - rows - torch.arange(5000)
    mask = (distance >= 0) & (distance < behind) if spec.mask_mod is not None else distance == distance
    pieces = [*given, None][:4]
    want, rounded = (
        low_precision(*(None if x is None else x.to(dtype) for x in pieces), mask=mask)  # type: ignore[arg-type]
        for dtype in (torch.float64, torch.bfloat16)
    )
    error = relative_error(out, want)
    over = error / budget(relative_error(rounded, want), torch.bfloat16)
    return {"error": error, "over_budget": over, "same": True}


def two_streams() -> dict[str, Any]:
    """Calls at the same time on two streams, compiled and in graphs, give the bits of calls one after the other."""
    calls = [Call((2900 - 500 * i, 70 + i), capacity=3000, q_heads=8, kv_heads=8, width=128) for i in range(2)]
    given = [{k: x.cuda() if isinstance(x, Tensor) else x for k, x in call.fresh().items()} for call in calls]
    compiled = torch.compile(lambda x: calls[0](x), fullgraph=True, dynamic=False)
    streams = [torch.cuda.Stream() for _ in range(2)]
    same = True
    with torch.no_grad():
        wanted = [compiled(x).clone() for x in given]
        graphs, held = [], []
        for x in given:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                for _ in range(20):
                    out = compiled(x)
            held.append(out)
        for replayed in (False, True):
            found: list[Tensor] = []
            for _ in range(200):
                found = []
                for stream, x, graph in zip(streams, given, graphs, strict=True):
                    with torch.cuda.stream(stream):
                        if replayed:
                            graph.replay()
                        else:
                            found.append(compiled(x))
            torch.cuda.synchronize()
            same &= all(torch.equal(a, b) for a, b in zip(held if replayed else found, wanted, strict=True))
    return {"error": 0.0, "over_budget": 0.0, "same": same}


APART: dict[str, Callable[[], dict[str, Any]]] = {
    "two streams": two_streams,
    "a row of plx.attention": lambda: few_rows(1, 8, plx.PARALLAX),
    "a row of plx.attention, GQA, softmax": lambda: few_rows(1, 32, plx.SOFTMAX),
    "16 causal rows of plx.attention": lambda: few_rows(16, 8, plx.PARALLAX.replace(mask_mod=plx.masks.causal(4984))),
    "4 rows of plx.attention, window": lambda: few_rows(
        4, 8, plx.PARALLAX.replace(mask_mod=plx.masks.sliding_window(300, 4996)), 300
    ),
}


def run(name: str) -> dict[str, Any]:
    """One case: its worst error over its budget."""
    started = time.perf_counter()
    if name in APART:
        found = {"case": name, **APART[name]()}
        passed = found["same"] and found["over_budget"] <= 1
        return found | {"passed": bool(passed), "s": time.perf_counter() - started}
    call = cases()[name]()
    block_mask = None if call.block_mask is None else call.block_mask.to("cuda")
    given = {key: x.cuda() if isinstance(x, Tensor) else x for key, x in call.fresh().items()}
    compiled = torch.compile(lambda x: call(x, block_mask=block_mask), fullgraph=True, dynamic=False)
    found: dict[str, Any] = {"case": name}
    with torch.no_grad():
        before = {key: given[key].clone() for key in ("key_cache", "value_cache")}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                compiled(given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compiled(given)
        for key, cache in before.items():
            given[key].copy_(cache)
        worst, same = 0.0, True
        for step in range(STEPS):
            # Another length for every sequence: keys that are there already, or those of the last step.
            lengths = call.lengths if step == 0 else tuple(min(n, call.capacity) for n in call.totals)
            if step:
                keys, values = (x.cpu() for x in (given["key_cache"], given["value_cache"]))
                call = replace(call, lengths=lengths)
                call.inputs |= {"key_cache": keys, "value_cache": values}
            given["cache_seqlens"].copy_(call.inputs["cache_seqlens"])
            for key in ("query", "probe", "key", "value"):
                if given[key] is not None:
                    call.inputs[key] = call.inputs[key].roll((1, 1), (0, 1))  # other numbers, as far from 0
                    given[key].copy_(call.inputs[key])
            graph.replay()
            first = out.clone()
            graph.replay()  # appends the same keys to the same places
            same &= torch.equal(first, out)
            want = call.want()
            error = relative_error(first.cpu(), want)
            worst = max(worst, error / budget(relative_error(call.want(call.dtype), want), call.dtype))
            found["error"] = error
            if call.new:
                held = call.inputs | {key: given[key].cpu() for key in before}
                same &= call.appended(held)
    return found | {
        "over_budget": worst,
        "same": bool(same),
        "passed": bool(same and worst <= 1),
        "s": time.perf_counter() - started,
    }


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--match", default="")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("check_decode.py needs a CUDA GPU.")
        return 2
    names = [name for name in (*APART, *cases()) if arguments.match in name]
    results = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        for name, future in [(name, pool.submit(run, name)) for name in names]:
            error = future.exception()
            if error is None:
                results.append(future.result())
            else:
                results.append(
                    {"case": name, "passed": False, "failed": f"{type(error).__name__}: {str(error)[-300:]}"}
                )
            print(f"{name}: {'passed' if results[-1]['passed'] else 'FAILED'}", flush=True)
    rows = []
    for row in results:
        numbers = [f"{row[key]:.2e}" if key in row else "" for key in ("error", "over_budget")]
        verdict = "ok" if row["passed"] else "FAILED"
        rows.append([row["case"], verdict, *numbers, row.get("same", ""), row.get("failed", "")[-160:]])
    print(tabulate(rows, headers=["case", "", "error", "of budget", "same bits, caches", ""], disable_numparse=True))
    passed = sum(row["passed"] for row in results)
    print(f"{passed} of {len(results)} cases passed")
    if arguments.json:
        record = {"schema": 1, "environment": environment("cuda"), "cases": results}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
