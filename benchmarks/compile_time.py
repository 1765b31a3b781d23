"""How long the first call takes, forward and backward: ours beside compiled flex_attention, with cold and with warm caches.

    python benchmarks/compile_time.py [--contender NAME ...] [--json PATH] [--device cpu] [--length 2048] [--rounds 1]

Each measurement is a process of its own, which imports its own attention only; "process" is its time until it has its result.
"cold" begins with empty caches of Inductor and Triton; "warm" is the next process with the same caches. "start" is a compiled
function that doubles a tensor: what torch itself takes. One such process goes before all others and is not counted: it brings
torch, Triton and ptxas from the disk. The record also holds what torch's caches said and where the time went, by torch's own
clocks (seconds; phases lie within one another); a torch that does not tell has neither.

The goals need three contenders: ``--contender "parallax, ours" "softmax, flex_attention" start``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# torch's counters of what came out of its caches; "static_autotuner": kernels that were loaded without Triton's compiler.
COUNTERS = {
    "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"),
    "inductor": (
        "fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass", "triton_bundler_load_static_autotuner",
        "async_compile_cache_miss",
    ),
}  # fmt: skip
CONTENDERS = ("start", "parallax, ours", "softmax, ours", "softmax, flex_attention")


def child(contender: str, device: str, length: int) -> dict[str, Any]:
    """Seconds of one process: imports, and the first forward and backward of a layer; what the caches said, and the phases."""
    start = time.perf_counter()
    import torch
    from torch import nn
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    imported = time.perf_counter() - start
    start = time.perf_counter()
    if contender.endswith(", ours"):
        import parallax_compile as plx

    ours = time.perf_counter() - start
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, width = (16, 128) if device == "cuda" else (2, 32)
    x = torch.randn(1, length, heads * width, device=device, dtype=dtype)
    if device == "cuda":
        torch.cuda.synchronize()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = 4 if contender.startswith("parallax") else 3
            self.project = nn.Linear(heads * width, self.parts * heads * width, bias=False)

        def forward(self, x: torch.Tensor, block_mask: Any) -> torch.Tensor:
            parts = self.project(x).unflatten(-1, (self.parts, heads, width)).permute(2, 0, 3, 1, 4)
            if contender == "softmax, flex_attention":
                out = flex_attention(*parts, block_mask=block_mask)
            else:
                out = plx.attention(*parts, block_mask=block_mask)
            return out.transpose(1, 2).flatten(2)

    if contender == "start":
        start = time.perf_counter()
        torch.compile(lambda x: x * 2)(x)
    else:
        layer = Layer().to(device, dtype)
        block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
        if device == "cuda":
            layer.project(x).sum().backward()  # cuBLAS starts
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.compile(layer, fullgraph=True)(x, block_mask).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    return {"import_torch": imported, "import_ours": ours, "first_call": first_call, **told_by_torch()}


def told_by_torch() -> dict[str, Any]:
    """What torch's caches said in this process, and its clocks: nothing of what this torch does not tell."""
    from torch._dynamo import utils

    told: dict[str, Any] = {}
    counters = getattr(utils, "counters", None)
    if counters is not None:
        said = {name: counters[group][name] for group in COUNTERS for name in COUNTERS[group]}
        told["caches"] = {name: count for name, count in said.items() if count}
    compile_times = getattr(utils, "compile_times", None)  # "torch.compile, profiling" in torch's documentation
    if compile_times is not None:
        phases = zip(*compile_times(repr="csv", aggregate=True), strict=True)
        told["phases"] = {name: round(float(seconds), 2) for name, seconds in phases if float(seconds) >= 0.05}
    return told


def measured(contender: str, arguments: argparse.Namespace, caches: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--child",
        contender,
        "--device",
        arguments.device,
        "--length",
        str(arguments.length),
    ]
    env = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton"),
    }  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        # Inductor's workers, which may still be starting, write there too. They end with the process, whose session they are,
        # and do not share the next one's cores.
        process = subprocess.Popen(command, env=env, stdout=out, stderr=errors, start_new_session=True)
        try:
            process.wait()
            seconds = time.perf_counter() - start
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for file in (out, errors):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{contender}: {errors.read()[-2000:]}")
        (result,) = (line for line in out.read().splitlines() if line.startswith('{"import_torch"'))
        return {**json.loads(result), "process": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="the least of so many counts")
    parser.add_argument("--contender", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.device, arguments.length)), flush=True)
        os._exit(0)  # torch's exit waits until its workers have started
    import torch
    from record import environment
    from tabulate import tabulate

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as caches:
        measured("start", arguments, Path(caches))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for contender in arguments.contender:
        rounds: list[dict[str, dict[str, Any]]] = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as caches:
                rounds.append({state: measured(contender, arguments, Path(caches)) for state in ("cold", "warm")})
        found[contender] = {
            state: min((one[state] for one in rounds), key=lambda times: times["first_call"])
            for state in ("cold", "warm")
        }
    rows = [
        [name, *(f"{found[name][state][key]:.2f}" for state in ("cold", "warm") for key in ("first_call", "process"))]
        for name in found
    ]
    headers = ["seconds", "cold first call", "cold process", "warm first call", "warm process"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    flex = found.get("softmax, flex_attention")
    if flex is not None and "parallax, ours" in found:
        ratio = found["parallax, ours"]["cold"]["first_call"] / flex["cold"]["first_call"]
        print(f"parallax / flex_attention, cold: {ratio:.2f} (goal <= 1.5)")
    if "start" in found and "parallax, ours" in found:
        over = found["parallax, ours"]["warm"]["first_call"] - found["start"]["warm"]["first_call"]
        print(f"parallax over torch's start, warm: {over:.2f} s (goal <= 3)")
    if arguments.json:
        record = {"environment": environment(arguments.device), "length": arguments.length, "seconds": found}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
