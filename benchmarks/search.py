"""Search the candidates of each kernel on this machine's GPU: ``python benchmarks/search.py --json PATH``.

Compiles every candidate of the grid in parallel processes, then times each kernel by itself under the profiler, on the shapes
of ``SHAPES``, and prints the best of each (member, shape, stage). ``lowering/candidates.py`` holds what was found so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import parallax_compile as plx

STAGES = ("core_forward", "core_backward_query", "core_backward_key")
PREFIXES = ("fwd_", "bwd_query_", "bwd_key_")
SHAPES = {
    "d128": (4, 16, 16, 4096, 128),
    "d64": (8, 16, 16, 2048, 64),
    "gqa": (2, 32, 8, 8192, 128),
}
MEMBERS = {"parallax": plx.PARALLAX, "softmax": plx.SOFTMAX}
Tile = tuple[int, int, int, int, bool, int]


def tiles(stage: str, width: int, probe: bool) -> list[Tile]:
    """The grid of one stage: (BLOCK_M, BLOCK_N, warps, stages, tensor descriptors, held tiles), without what cannot be good."""
    found = []
    grid = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (True, False), (0, 1, 2, 3))
    for m, n, warps, stages, tma, held in grid:
        stay = n if stage == "core_backward_key" else m
        tiles_that_stay = {"core_forward": 1, "core_backward_query": 2, "core_backward_key": 2}[stage]
        tiles_that_stay += probe and stage != "core_backward_key"
        # A warp group's tile has 64 rows; accumulators and scores of more than two tiles of 64 x 128 do not fit registers.
        if stay == 32 or (warps == 8) != (stay == 128) or m * n < 2048 or m * n > 64 * 128 * (1 if probe else 2):
            continue
        if held > tiles_that_stay or (held and width * held > 128) or (stages == 4 and m * n > 4096):
            continue
        found.append((m, n, warps, stages, tma, held))
    return found


def options(prefix: str, tile: Tile) -> dict[str, Any]:
    """``tile`` as kernel options of one stage."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "USE_TMA", "HELD_TILES")
    return {prefix + name: value for name, value in zip(names, tile, strict=True)}


def trials(member: str, width: int, only: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kernel options, each with one tile of every stage: three kernels are tried in one compile."""
    grids = [only.get(f"{member} {width} {stage}") or tiles(stage, width, member == "parallax") for stage in STAGES]
    for row in itertools.zip_longest(*grids):
        yield {
            name: value
            for prefix, tile, grid in zip(PREFIXES, row, grids, strict=True)
            for name, value in options(prefix, tile or grid[0]).items()
        }


def problem(shape: str, member: str) -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """A compiled call with given kernel options, its inputs and a gradient."""
    batch, heads, kv_heads, length, width = SHAPES[shape]
    torch.manual_seed(0)

    def tensor(count: int) -> torch.Tensor:
        return torch.randn(batch, count, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    inputs = [tensor(heads), tensor(kv_heads), tensor(kv_heads)] + [tensor(heads)] * (member == "parallax")
    mask = plx.masks.block_mask(plx.masks.causal(), 1, 1, length, length, "cuda")

    def call(*tensors: torch.Tensor, kernel_options: dict[str, Any]) -> torch.Tensor:
        return plx.attention(
            *tensors, spec=MEMBERS[member], block_mask=mask, enable_gqa=kv_heads != heads, kernel_options=kernel_options
        )

    return call, inputs, torch.randn_like(inputs[0])


def step(call: Any, inputs: list[torch.Tensor], grad: torch.Tensor, trial: dict[str, Any]) -> Any:
    """Compile one trial; a call is forward and backward."""
    compiled = torch.compile(call, fullgraph=True)

    def run() -> None:
        torch.autograd.grad(compiled(*inputs, kernel_options=trial), inputs, grad)

    run()
    return run


def kernel_times(run: Any, repeat: int = 8) -> list[float]:
    """Median milliseconds of each template kernel, in the order of their launch."""
    for _ in range(2):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeat):
            run()
        torch.cuda.synchronize()
    events = sorted(
        (event for event in profile.events() if "triton_tem_" in event.name), key=lambda event: event.time_range.start
    )
    durations = [event.time_range.elapsed_us() / 1e3 for event in events]
    return [statistics.median(durations[i :: len(STAGES)]) for i in range(len(STAGES))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--member", nargs="*", default=list(MEMBERS), choices=list(MEMBERS))
    parser.add_argument(
        "--tiles", help='JSON file {"MEMBER WIDTH STAGE": [tile, ...]} with what to try instead of the grid'
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often to time each trial; the median counts")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--json", help="where to write all times")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = json.loads(Path(arguments.tiles).read_text()) if arguments.tiles else {}
    cases = [
        (shape, member, trial)
        for shape, member in itertools.product(arguments.shape, arguments.member)
        for trial in trials(member, SHAPES[shape][-1], only)
    ]
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = len(cases) + 1
    if arguments.part is not None:
        for _ in _compiled(cases[int(arguments.part) :: arguments.workers]):
            pass
        return
    began = time.time()
    command = [sys.executable, __file__, *sys.argv[1:], "--part"]
    workers = [
        subprocess.Popen([*command, str(part)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for part in range(arguments.workers)
    ]
    for worker in workers:
        worker.wait()
    print(f"compiled {len(cases)} trials in {time.time() - began:.0f} s", flush=True)
    runs = list(_compiled(cases))
    print(f"loaded after {time.time() - began:.0f} s", flush=True)
    times: dict[tuple[str, str, str, str], list[float]] = {}
    for _ in range(arguments.rounds):  # interleaved, because a GPU that gets warm gets slow
        for (shape, member, trial), run in runs:
            for stage, prefix, ms in zip(STAGES, PREFIXES, kernel_times(run), strict=True):
                tile = json.dumps([value for name, value in trial.items() if name.startswith(prefix)])
                times.setdefault((shape, member, stage, tile), []).append(ms)
    found = [
        {"shape": shape, "member": member, "stage": stage, "tile": json.loads(tile), "ms": statistics.median(each)}
        for (shape, member, stage, tile), each in times.items()
    ]
    for shape, member, stage in itertools.product(arguments.shape, arguments.member, STAGES):
        rows = [row for row in found if (row["shape"], row["member"], row["stage"]) == (shape, member, stage)]
        print(shape, member, stage)
        for row in sorted(rows, key=lambda row: row["ms"])[:6]:
            print(f"  {row['tile']} {row['ms']:.3f} ms", flush=True)
    print(f"{time.time() - began:.0f} s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "times": found}, file)


def _compiled(cases: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Each case with its compiled call; a candidate that does not compile or fit is what a search has to live with."""
    problems: dict[Any, Any] = {}
    for shape, member, trial in cases:
        if (shape, member) not in problems:
            problems[shape, member] = problem(shape, member)
        try:
            yield (shape, member, trial), step(*problems[shape, member], trial)
        except Exception as error:
            print(shape, member, trial, type(error).__name__, str(error)[-120:].replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
