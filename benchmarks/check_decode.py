"""Correctness of the compiled decode kernels on this machine's GPU.

    python benchmarks/check_decode.py [--json results.json] [--workers N] [--match NAME]

Each case decodes several steps from caches whose unused memory is NaN, within a CUDA graph that is replayed while the
lengths on the device grow: output and caches against each sequence by itself in float64, with the budget of an independent
low-precision computation; the same bits when a step is repeated. Exits with 1 when a case fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import environment
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.decoding import Call
from support.oracle import budget, relative_error

import parallax_compile as plx

STEPS = 3
CAUSAL, WINDOW = plx.masks.causal(), plx.masks.sliding_window(300)


def causal(row: Tensor, column: Tensor) -> Tensor:
    return column <= row


def window(row: Tensor, column: Tensor) -> Tensor:
    return (column <= row) & (row - column < 300)


def cases() -> dict[str, Call]:
    """Members, sizes, layouts: everything odd."""
    base: dict[str, Any] = {"capacity": 3000, "q_heads": 8, "kv_heads": 8, "width": 128, "value_width": 128, "new": 1}
    lengths = (2000, 0, 2990, 17, 1234)
    parallax = plx.PARALLAX.replace(mask_mod=CAUSAL)
    return {
        "plain": Call(lengths, **base),
        "one long sequence": Call((2900,), **base),
        "one kernel more": Call(lengths, **base, options={"MERGE": "stage"}),
        "descriptors": Call(lengths, **base | {"new": 0}, options={"USE_TMA": True}),
        "GQA": Call(lengths, **base | {"q_heads": 32}),
        "MQA, odd widths": Call(lengths, **base | {"q_heads": 6, "kv_heads": 1, "width": 80, "value_width": 36}),
        "D=64": Call(lengths, **base | {"width": 64, "value_width": 64}),
        "D=256": Call(lengths, **base | {"width": 256, "value_width": 256}),
        "softmax": Call(lengths, **base, spec=plx.SOFTMAX),
        "no intercept": Call(lengths, **base, spec=plx.PARALLAX.replace(intercept=False)),
        "4 queries": Call(lengths, **base | {"new": 4}, queries=4, spec=parallax, keep=causal),
        "16 queries, GQA": Call(lengths, **base | {"new": 16, "q_heads": 32}, queries=16, spec=parallax, keep=causal),
        "40 queries": Call(lengths, **base | {"new": 40}, queries=40, spec=parallax, keep=causal),
        "window": Call(lengths, **base, spec=plx.PARALLAX.replace(mask_mod=WINDOW), keep=window),
        "pages of 16": Call(lengths, **base, page=16),
        "pages of 48": Call(lengths, **base, page=48),
        "pages of 256": Call(lengths, **base, page=256),
        "offset of 10 sigma": Call(lengths, **base, offset=10.0),
        "fp16": Call(lengths, **base, dtype=torch.float16),
        "fp32": Call(lengths, **base, dtype=torch.float32),
        "mods": Call(lengths, **base, score=plx.mods.alibi(8), covariance=plx.mods.tanh_cap(5.0)),
        "300 sequences": Call(tuple(range(0, 900, 3)), **base | {"capacity": 1000, "q_heads": 1, "kv_heads": 1}),
    }


def run(name: str) -> dict[str, Any]:
    """One case: its worst error over its budget."""
    call = cases()[name]
    started = time.perf_counter()
    given = {key: x.cuda() if isinstance(x, Tensor) else x for key, x in call.fresh().items()}
    compiled = torch.compile(lambda x: call(x), fullgraph=True, dynamic=False)
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
                    call.inputs[key] = torch.randn_like(call.inputs[key]) + (0.0 if key != "probe" else 0.1)
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
    names = [name for name in cases() if arguments.match in name]
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
