"""What runs on a GPU of artifacts and of the search, run by Triton's interpreter: programs, exchanged kernels, checks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parallax_compile.lowering import ahead, driver, launching, tuned
from parallax_compile.lowering import torch_compat_codegen as compat
from parallax_compile.lowering.candidates import Candidate
from parallax_compile.lowering.codegen import GeneratedKernel, Trial
from parallax_compile.lowering.search import Found, Search, _errors
from parallax_compile.lowering.targets import resolve
from support import triton_interpreter
from support.oracle import leaves, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx
from parallax_compile import ahead_of_time

pytestmark = pytest.mark.skipif(not triton_interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

CAUSAL = plx.PARALLAX.replace(mask_mod=plx.masks.causal())


@pytest.fixture(autouse=True)
def _installed() -> None:
    triton_interpreter.install()


# --- artifacts ------------------------------------------------------------------------------------------------------


class InterpretedKernel:
    """In place of a cubin: the kernel's source, run on CPU memory."""

    def __init__(self, cubin: bytes, launch: dict[str, Any]) -> None:
        self.name, source = cubin.decode().split("\n", 1)
        with compat.pretend_gpu(resolve("sm_90")):
            self.kernel = compat.load_kernel(self.name, source)
        self.parameters = launch["parameters"]

    def __call__(self, arguments: Sequence[Any], grid: Sequence[int], stream: int) -> None:
        tile = {**self.kernel.triton_meta["constants"], **self.kernel.configs[0].kwargs}
        tile = {name: value for name, value in tile.items() if isinstance(name, str)}
        values = [view(*value, kind) if isinstance(value, tuple) else value
                  for value, kind in zip(arguments, self.parameters, strict=True)]  # fmt: skip
        names = [name for name in self.kernel.fn.arg_names if name not in tile]
        self.kernel.fn[tuple(grid)](**dict(zip(names, values, strict=False)), **tile)


def view(memory: Tensor, offset: int, kind: str) -> Tensor:
    """Memory as a pointer of the kernel's type."""
    dtypes = {
        "*fp16": torch.float16,
        "*bf16": torch.bfloat16,
        "*fp32": torch.float32,
        "*i32": torch.int32,
        "*i64": torch.int64,
    }
    if memory.dtype == torch.uint8:
        return memory[offset:].view(dtypes[kind])
    assert memory.dtype == dtypes[kind] and offset == 0
    return memory


@contextlib.contextmanager
def _no_stream(device: torch.device) -> Iterator[int]:
    yield 0


@pytest.mark.parametrize("spec", [CAUSAL, plx.LINEAR.replace(mask_mod=plx.masks.causal())], ids=["PARALLAX", "LINEAR"])
def test_an_artifacts_programs_compute_output_and_gradients(
    spec: plx.AttentionSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def source(kernel: GeneratedKernel, *_: Any, **__: Any) -> Any:
        with compat.pretend_gpu(resolve("sm_90")):
            loaded = compat.load_kernel(kernel.name, kernel.source)
        kinds = [kind for kind in loaded.triton_meta["signature"].values() if kind != "constexpr"]
        cubin = f"{kernel.name}\n{kernel.source}".encode()
        return mock.Mock(asm={"cubin": cubin}, launch={"parameters": kinds, "hidden": 0})

    monkeypatch.setattr(ahead, "compile_kernel", source)
    monkeypatch.setattr(driver, "Kernel", InterpretedKernel)
    monkeypatch.setattr(driver, "on", _no_stream)
    monkeypatch.setattr(ahead_of_time.AheadOfTime, "_check_device", lambda self, query: None)
    plx.aot(spec, "1,2:1,80,16", "fp16", path=tmp_path / "artifact")
    artifact = plx.load_aot(tmp_path / "artifact")
    inputs = [torch.randn(1, heads, 80, 16, dtype=torch.float16) for heads in (2, 1, 1, 2)]
    got = with_gradients(artifact, leaves(inputs, torch.float16))
    want = with_gradients(lambda *t: plx.attention(*t, spec=spec, enable_gqa=True), leaves(inputs, torch.float64))
    for ours, exact in zip(got, want, strict=True):
        assert relative_error(ours, exact) < 3e-3
    out = artifact(*leaves(inputs, torch.float16))
    grads = [
        torch.autograd.grad(out.sum(), out.grad_fn.next_functions[1][0].variable, retain_graph=True) for _ in range(2)
    ]
    assert torch.equal(grads[0][0], grads[1][0]), "the backward may run twice"


# --- the search -----------------------------------------------------------------------------------------------------


class InterpretedLaunches(launching.Launches):
    def __call__(self, generated: Any, traced: Any, arguments: list[Any]) -> Sequence[Any]:
        def empty(size: Any, stride: Any, dtype: torch.dtype, *_: Any) -> Tensor:
            return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)

        def kernel(name: str, source: str) -> Any:
            return launching._Kernel(self, name, source)

        with compat.wrapper_on_cpu(generated.wrapper, resolve("sm_90"), kernel, empty) as call:
            return call(list(arguments))


class InterpretedTimer(launching.Timer):
    """The timer for a GPU, without its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = InterpretedLaunches()

    def sample(self, trial: Trial, repeats: int) -> list[float]:
        self._launch(trial)()
        return [1.0 if trial.candidate.num_stages == 1 else 2.0] * repeats

    def _launch(self, trial: Trial) -> Any:
        arguments = launching.with_grid(self._arguments, trial)

        def launch() -> None:
            with compat.pretend_gpu(resolve("sm_90")):
                launching.loaded(trial.name, trial.source).run(*arguments, stream=0)

        return launch


class Pool:
    def compile(self, kernels: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        for tag, _, _ in kernels:
            yield tag, {"seconds": 0.0}


def test_a_search_times_on_the_calls_operands_and_checks_what_its_winners_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    inputs = [torch.randn(1, 2, 48, 16, dtype=torch.float16, requires_grad=True) for _ in range(4)]
    spaces = {
        stage: [Candidate(32, 32, 4, 1)] for stage in ("core_forward", "core_backward_query", "core_backward_key")
    }

    def call(*tensors: Tensor) -> Tensor:
        return plx.attention(*tensors, spec=plx.PARALLAX)

    timer = InterpretedTimer()
    search = Search(call, inputs, resolve("sm_90"), timer, spaces, "quick")
    before = [result.clone() for result in search._first]
    found: list[Found] = [search.find(instance, Pool()) for instance in search.instances()]  # type: ignore[arg-type]
    assert [item.instance.stage for item in found] == list(spaces)
    assert all(item.winner is not None and item.winner.candidate == Candidate(32, 32, 4, 1) for item in found)
    # Timing launched every candidate on the call's own memory: the results that it compares with must have survived.
    # So must the operands: launched once more on them, the defaults write the gradients of the call.
    for position, stage in ((1, "core_backward_query"), (2, "core_backward_key")):
        item = next(item for item in found if item.instance.stage == stage)
        timer.load(next(kernel for kernel in search.code.kernels if item.instance.is_of(kernel)))
        timer._launch(item.instance.trials[0])()
        assert torch.equal(timer._arguments[-4], before[position]), stage
    reference = search._reference(call)
    assert reference is not None
    assert all(torch.equal(a, b) for a, b in zip(before, search._first, strict=True))
    assert max(_errors(search._first, reference)) < 3e-3
    search.verify(found, call)
    assert [item.note for item in found] == ["checked against the reference"] * 3
    assert all(item.winner.candidate == Candidate(32, 32, 4, 1) for item in found)  # type: ignore[union-attr]

    # A winner that computes something else: by itself it differs from the default, and in the call from the reference.
    (forward, *_) = found
    assert forward.winner is not None
    source = forward.winner.source.replace("0.25", "0.26")  # the scale of the scores
    assert source != forward.winner.source
    forward.winner = dataclasses.replace(forward.winner, source=source)
    timer.load(next(kernel for kernel in search.code.kernels if forward.instance.is_of(kernel)))
    assert timer.difference(forward.winner, forward.instance.trials[0]) > 1e-2
    search.verify(found, call)
    assert forward.winner == forward.instance.trials[0] and forward.failed["wrong result"] == 1
    assert found[1].note == "checked against the reference"
    assert {answer.level for answer in search.code.answers} == {"explored"}
    assert tuned.shipped() is not None
