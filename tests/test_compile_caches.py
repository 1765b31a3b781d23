"""A second process compiles nothing that the first has compiled, and compiles whatever differs (support/compile_caches.py)."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parallax_compile.lowering import codegen, torch_compat_backward, torch_compat_launch, torch_compat_threads, tuned
from parallax_compile.lowering import torch_compat_codegen as compat
from parallax_compile.lowering.solve import attention_solve
from parallax_compile.lowering.store import Entry, Store
from parallax_compile.lowering.targets import resolve
from torch import Tensor

import parallax_compile as plx

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")

PROGRAM = Path(__file__).parent / "support" / "compile_caches.py"


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes that share empty caches said, one after the other."""
    caches = tmp_path_factory.mktemp("caches")
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PARALLAX_STORE": "off",
    }
    found = {}
    for state in ("cold", "warm"):
        done = subprocess.run([sys.executable, PROGRAM, state], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found[state] = json.loads(done.stdout.splitlines()[-1])
    return found


MISS = {"autograd_cache_hit": 0, "autograd_cache_miss": 1, "fxgraph_cache_hit": 0, "fxgraph_cache_miss": 2}
HIT = {"autograd_cache_hit": 1, "autograd_cache_miss": 0, "fxgraph_cache_hit": 2, "fxgraph_cache_miss": 0}


@pytest.mark.parametrize("device", ["cpu", "sm_90"])
def test_a_second_process_finds_forward_and_backward_in_torchs_caches(
    processes: dict[str, dict[str, Any]], device: str
) -> None:
    bypassed = {"autograd_cache_bypass": 0, "fxgraph_cache_bypass": 0}
    assert processes["cold"][device] == MISS | bypassed
    assert processes["warm"][device] == HIT | bypassed


def test_a_second_process_loads_the_kernels_and_compiles_none(processes: dict[str, dict[str, Any]]) -> None:
    """Kernels with scratch memory too, which Inductor itself would hand to Triton's compiler again in each process."""
    cold, warm = (processes[state]["loaded"] for state in ("cold", "warm"))
    assert len(cold) == 3  # the forward, and the backwards of the queries and of the keys
    assert warm == cold


@dataclass
class Assembler:
    """Runs of the assembler: each kernel, and the thread that it ran in. ``meeting``: where our kernels wait."""

    runs: list[tuple[str, str]] = field(default_factory=list)
    meeting: Any = None


@pytest.fixture
def assembler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Assembler]:
    """On empty caches."""
    from torch._functorch import config as functorch
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.nvidia.compiler import CUDABackend

    found, assemble = Assembler(), CUDABackend.make_cubin

    def make_cubin(self: Any, src: str, *arguments: Any) -> Any:
        name = re.findall(r"\.entry (\w+)", src)[0]
        if found.meeting is not None and name.startswith("parallax_"):
            found.meeting.wait()
        found.runs.append((name, threading.current_thread().name))
        return assemble(self, src, *arguments)

    monkeypatch.setattr(CUDABackend, "make_cubin", make_cubin)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    PyCodeCache.cache_clear()  # Inductor keeps what it compiled
    with functorch.patch(enable_autograd_cache=False):
        yield found


def test_kernels_are_compiled_side_by_side_while_inductors_workers_start(
    assembler: Assembler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.compile_caches import on_a_gpu
    from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels

    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: False))
    # The forward's kernel waits until those of the backward are there: on a busy machine for minutes.
    assembler.meeting = threading.Barrier(3, timeout=300)
    lower, mods = torch_compat_backward._lower, []

    def lowered(node: torch.fx.Node) -> None:
        graph = node.graph.owning_module
        before = [module.code for module in graph.children()]
        lower(node)
        mods.append((before, [module.code for module in graph.children()]))

    monkeypatch.setattr(torch_compat_backward, "_lower", lowered)
    # Lowering multiplies the factors of this mod with one another; the store tells mods apart by what they were before.
    kernels = on_a_gpu(compile_threads=3, fx_graph_cache=False, covariance_mod=plx.mods.tanh_cap(20.0, approx=True))
    assert [before == after for before, after in mods] == [True] and len(mods[0][0]) == 5
    ours = {name: thread for name, thread in assembler.runs if name in kernels}
    assert len(kernels) == len(ours) == 3
    # Inductor found what the threads made; if one of these failed, which was seen once in a busy process, it helps itself.
    threads = [thread for thread in ours.values() if thread.startswith("parallax-compile")]
    assert len(threads) >= 2 and not assembler.meeting.broken
    made = [name for name, _ in assembler.runs if name in kernels]
    assert len(made) == 3
    assert not CompiledTritonKernels._cache
    # Another graph with the same kernels: this process has them.
    assert not on_a_gpu(compile_threads=3, fx_graph_cache=False, covariance_mod=plx.mods.tanh_cap(20.0, approx=True))
    assert [name for name, _ in assembler.runs if name in kernels] == made
    gc.collect()
    assert not torch_compat_threads._begun and not torch_compat_backward._backwards


@pytest.mark.parametrize("case", ["symbolic lengths", "an error"])
def test_a_backward_that_cannot_be_begun_early_is_compiled_when_it_is_lowered(
    assembler: Assembler, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    from support.compile_caches import on_a_gpu
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: False))
    begin, alone = torch_compat_threads._begin, []

    def recorded(*arguments: Any) -> Any:
        alone.append(torch_compat_threads.lowered_alone.get())
        return begin(*arguments)

    monkeypatch.setattr(torch_compat_threads, "_begin", recorded)
    if case == "an error":
        monkeypatch.setattr(torch_compat_backward, "_lower", mock.Mock(side_effect=RuntimeError))
    entered = mock.Mock(wraps=torch_compat_backward.lowered_alone)
    monkeypatch.setattr(torch_compat_backward, "lowered_alone", entered)
    assert len(on_a_gpu(compile_threads=3, fx_graph_cache=False, dynamic=case == "symbolic lengths")) == 3
    assert alone == [False] * 3
    assert not entered.set.called  # what is lowered with symbols adds to their guards, also where it fails


class UntilLowered:
    """Lets the forward's kernel, which comes first, go on when two others have begun, and these when they are lowered."""

    def __init__(self) -> None:
        self.others, self.lowered, self._arrivals = threading.Semaphore(0), threading.Semaphore(0), itertools.count()

    def wait(self) -> None:
        if next(self._arrivals) == 0:
            assert all(self.others.acquire(timeout=60) for _ in range(2))
        else:
            self.others.release()
            assert self.lowered.acquire(timeout=60)


def test_the_backward_finds_what_was_begun_though_the_workers_are_up_by_then(
    assembler: Assembler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.compile_caches import on_a_gpu
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.virtualized import V

    start, begin = torch_compat_threads._start, torch_compat_threads._begin
    assembler.meeting = meeting = UntilLowered()
    workers, begun, lowered = [False], [], []

    def started(name: str, source: str) -> None:
        workers[0] = V.graph.is_backward and not torch_compat_threads.lowered_alone.get()
        start(name, source)
        if workers[0]:
            lowered.append(name)
        if len(lowered) == 2:
            meeting.lowered.release(2)
        workers[0] = False

    def recorded(kernel: Any, threads: int) -> Any:
        found = begin(kernel, threads)
        if workers[0]:
            begun.append((threads, found is not None))
        return found

    monkeypatch.setattr(torch_compat_threads, "_start", started)
    monkeypatch.setattr(torch_compat_threads, "_begin", recorded)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: workers[0]))
    kernels = on_a_gpu(compile_threads=3, fx_graph_cache=False)
    assert len(kernels) == 3 and begun == [(0, True)] * 2
    assert sorted(name for name, _ in assembler.runs if name in kernels) == sorted(kernels)


def test_one_thread_compiles_one_kernel_after_the_other(assembler: Assembler) -> None:
    from support.compile_caches import on_a_gpu

    on_a_gpu(compile_threads=1, fx_graph_cache=False)
    assert {thread for _, thread in assembler.runs} == {threading.current_thread().name}


def test_what_changes_the_code_is_compiled_anew(processes: dict[str, dict[str, Any]]) -> None:
    assert processes["warm"]["variants"] == {
        "nothing": False,
        "values of a captured tensor": False,
        "an empty store": False,
        "a mod's constant": True,
        "covariance_mod": True,
        "mask_mod": True,
        "scale": True,
        "spec": True,
        "kernel_options": True,
        "a tuned candidate": True,
        "the package's version": True,
    }


def test_a_solve_in_front_of_a_decode_call_follows_the_store() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    rows, cache = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 64, 16)
    with tuned.using(Store(None)) as store, torch.no_grad():
        store.put([Entry({"stage": "core_solve"}, {"block_m": 64})])
        decode = torch.compile(lambda: plx.decode(rows, cache, cache, spec=plx.LLA, cache_seqlens=60), backend=backend)
        decode()
        nodes = [str(node.args) for node in graphs[0].graph.nodes if node.target is attention_solve]
        assert nodes and all(store.fingerprint() in arguments for arguments in nodes)


def test_a_launch_hands_the_kernel_scratch_memory_of_its_grid() -> None:
    from support.compile_caches import loaded_by_stand_ins
    from torch._inductor.runtime import triton_heuristics

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plx.attention(q, k, v, kernel_options={"USE_TMA": True})

    inputs = [torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="meta")] * 3
    generated = codegen.generate(call, inputs, target="sm_90", backward=False).stage("core_forward")
    launches: list[tuple[Any, ...]] = []
    empty = mock.Mock(side_effect=lambda size, dtype, device: torch.empty(size, dtype=dtype))
    stand_in = mock.Mock(empty=empty, device=torch.device, int8=torch.int8)
    with (
        compat.pretend_gpu(resolve("sm_90")),
        loaded_by_stand_ins(launches),
        mock.patch.object(torch_compat_launch, "torch", stand_in),
    ):
        kernel = copy.copy(compat.load_kernel(generated.name, generated.source))  # Inductor keeps the loaded one
        kernel.precompile()
        (result,) = kernel.compile_results
        assert isinstance(result.kernel, torch_compat_launch.KernelWithScratch)
        # Other modules' kernels are left to Inductor, which refuses them.
        with mock.patch.object(triton_heuristics.StaticTritonCompileResult, "can_statically_launch", return_value=None):
            compiled = kernel._precompile_config(result.config).kernel
        compiled._cubin_path = "unread"
        with mock.patch.dict(kernel.fn.__globals__, launch_from_cubin=None), pytest.raises(NotImplementedError):
            triton_heuristics.statically_launched_kernel_by_device(compiled)
        arguments = [0] * (len(result.kernel.arg_tys) - 1)
        result.kernel.run(3, 2, 5, 7, *arguments)
    ((_, *grid, _, shared, types, handed, stream),) = launches
    assert grid == [3, 2, 5] and stream == 7 and shared == result.kernel.shared
    entry = re.search(r"\.entry[^(]*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    assert entry is not None and entry.group(1).count(".param") == len(types)
    # Behind the kernel's own arguments stand its scratch memory and that of a profiler, which nobody uses.
    assert len(handed) == len(types) == len(arguments) + 2 and handed[-1] is None and types.endswith("OO")
    assert handed[-2] != 0
    bytes_of_program = compiled.metadata.global_scratch_size
    assert bytes_of_program > 0 and empty.call_args.args == (30 * bytes_of_program,)
    assert empty.call_args.kwargs["device"] == torch.device("cuda", 0)
