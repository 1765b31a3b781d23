"""Peers' kernels compiled ahead, by a toy peer: what a real call looks up is what was compiled, also from a carried archive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

TOY = """
import torch, triton
import triton.language as tl

@triton.autotune(configs=[triton.Config({"BLOCK": b}, num_warps=w) for b in (16, 32) for w in (1, 2)], key=["n"])
@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < n), at < n)

def call(x):
    y = torch.empty_like(x)
    double[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y
"""

START = """
import json, os, sys
from pathlib import Path
import torch, peers, toypeer

peers.PEERS = ("toypeer",)
peers.calls = lambda: {"toy": lambda: toypeer.call(torch.empty(64, device="meta"))}

def command(*words):
    sys.argv = ["peers.py", *words, "--cache", CACHE, "--archive", "peers.tar.xz"]
    print("==", peers.main())
"""

COMPILE = (
    START.replace("CACHE", '"here"')
    + """
command("compile")
# One that took too long is named, and not carried.
told = sorted(Path("here/outcomes").iterdir())[0]
told.write_text(json.dumps(json.loads(told.read_text()) | {"outcome": "took over 60 s"}))
command("pack")
"""
)

# Everything but the launch is Triton's own: its autotuner, the specialisation of real tensors, its cache.
CALL = (
    START.replace("CACHE", '"there"')
    + """
import measure
from triton import knobs
from triton.compiler.compiler import CompiledKernel

hits = []
with peers.pretended():
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    CompiledKernel.run = property(lambda kernel: lambda *arguments: None)
    CompiledKernel.launch_metadata = lambda *arguments: None
    measure.Clock = lambda device: lambda call, count: (call(), [1.0] * count)[1]
    command("unpack")
    command("check")
    peers.prepare()
    for length in (64, 128, 72, 72):
        hits.clear()
        try:
            toypeer.call(torch.empty(length))
            print(json.dumps({"tuned": peers.tuned(), "hits": hits}))
        except RuntimeError as error:
            print(error, hits)
"""
)

ANOTHER = (
    "import triton.runtime.cache\ntriton.runtime.cache.triton_key = lambda: 'another build'\n"
    + START.replace("CACHE", '"another"')
    + """
command("check")
command("unpack")
command("check")
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
command("unpack")
"""
)

SLOW = """
import peers, triton.compiler
from unittest import mock

def endless(*arguments, **named):
    while True:
        pass

def wrong(*arguments, **named):
    raise ValueError("wrong")

for compile in (endless, wrong):
    triton.compiler.compile = compile
    print(peers._compiled_apart(mock.Mock(), 1))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Runs a script in a folder of its own, beside the toy peer and the benchmarks; gives the lines that it printed."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "toypeer.py").write_text(TOY)
    inherited = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = os.pathsep.join([str(folder), str(BENCHMARKS), *inherited])
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH" and "TRITON" not in name}

    def script(text: str) -> list[str]:
        (folder / "script.py").write_text(text)
        command = [sys.executable, "script.py"]
        environment = keep | {"PYTHONPATH": path}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return script


@pytest.fixture(scope="module")
def compiled(run: Callable[[str], list[str]]) -> list[str]:
    """What compiling and packing the toy peer printed."""
    return run(COMPILE)


def test_each_configuration_is_compiled_and_told_of(compiled: list[str]) -> None:
    assert sum(line.endswith(" s") and ": compiled, " in line for line in compiled) == 4
    assert "toypeer.double: 3 of 4 configurations" in compiled
    assert sum("took over 60 s" in line for line in compiled) == 1


def test_a_real_call_finds_what_was_compiled_ahead(run: Callable[[str], list[str]], compiled: list[str]) -> None:
    said = run(CALL)
    assert "export TRITON_CACHE_DIR=there" in said
    assert said[said.index("== 0") :].count("== 1") == 1 and "3 of 4 kernels are in there" in said
    tuned = [json.loads(line) for line in said if line.startswith("{")]
    assert [told["hits"] for told in tuned] == [
        [True] * 3,
        [],
    ]  # 128 divides by 16 as 64 does: the same kernels, tuned again
    for told in tuned:
        kernel = told["tuned"]["toypeer.double"]
        assert (kernel["configurations"], kernel["timed"], kernel["left_out"]) == (4, 3, 1)
        assert "BLOCK" in kernel["chosen"]
    # 72 has other kernels: refused, again when it comes again, in place of compiling them one by one.
    assert said[-2:] == ["no configuration of toypeer.double was compiled ahead for this call. []"] * 2


def test_another_build_of_triton_has_its_own_keys(run: Callable[[str], list[str]], compiled: list[str]) -> None:
    said = run(ANOTHER)
    assert [line for line in said if line.startswith("==")] == ["== 1", "== 0", "== 1", "== 1"]
    assert "0 of 4 kernels are in another" in said and "3 of 4 kernels are in another" in said
    assert any(line.startswith("triton_key differs") for line in said)
    # Whatever else differs changes the code: nothing is unpacked.
    assert any(line.startswith("environment differs") for line in said)


def test_a_configuration_may_take_so_long(run: Callable[[str], list[str]]) -> None:
    assert run(SLOW) == ["took over 1 s", "failed"]
