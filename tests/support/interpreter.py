"""Run what was *generated*: whole Inductor wrappers for a GPU, executed on the CPU by Triton's interpreter.

The process must be started with ``TRITON_INTERPRET=1``. Use :func:`run_generated` for outputs and gradients in one call, or
:func:`interpreted` for a function that behaves like ``torch.compile``'s.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._pytree as pytree
from parallax_compile.lowering import torch_compat_codegen as compat
from parallax_compile.lowering.codegen import LOCK, GeneratedCode, GeneratedGraph, Recorder, fresh
from parallax_compile.lowering.targets import Target, resolve
from torch import Tensor, fx

from . import gluon_interpreter, triton_interpreter
from .memory import GuardedMemory

__all__ = ["Interpreted", "Run", "enabled", "interpreted", "run_generated"]

enabled = triton_interpreter.enabled


@dataclass
class Run:
    """Outcome of :func:`run_generated`.

    Attributes:
        outputs: what the function returned.
        grads: for each tensor among the arguments, in their order: its gradient, or None if it has none.
        captured_grads: the same for ``captured``.
        code: what was generated.
        launches: names of the kernels that ran, in order.
    """

    outputs: Any
    grads: list[Tensor | None]
    captured_grads: list[Tensor | None]
    code: GeneratedCode
    launches: list[str]

    @property
    def stages(self) -> list[str]:
        """The stages that ran, in order."""
        stages = {kernel.name: kernel.stage for kernel in self.code.kernels}
        return [stage for name in self.launches if (stage := stages[name]) is not None]


@dataclass
class Interpreted:
    """A function whose compiled graphs run in the interpreter; call it, and call ``backward`` on what it returns."""

    function: Callable[..., Any]
    recorder: Recorder
    launches: list[str] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with LOCK, compat.deterministic_tracing():
            return self.function(*args, **kwargs)

    @property
    def code(self) -> GeneratedCode:
        return self.recorder.code()


def interpreted(
    fn: Callable[..., Any],
    *,
    target: str | Target = "sm_90",
    candidate: int | Mapping[str, int] = 0,
    max_autotune: bool = False,
    dynamic: bool | None = None,
) -> Interpreted:
    """``torch.compile(fn, fullgraph=True)`` for ``target``, on CPU tensors, in the interpreter.

    Args: as :func:`parallax_compile.lowering.codegen.generate`.
    """
    triton_interpreter.install()
    launches: list[str] = []
    runner = _Runner(resolve(target), launches)
    recorder = Recorder(runner.target, candidate=candidate, max_autotune=max_autotune, execute=runner)
    compiled = torch.compile(fresh(fn), backend=recorder.backend, fullgraph=True, dynamic=dynamic)
    return Interpreted(compiled, recorder, launches)


def run_generated(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    captured: Sequence[Tensor] = (),
    grad_outputs: Sequence[Tensor | None] | None = None,
    target: str | Target = "sm_90",
    candidate: int | Mapping[str, int] = 0,
    max_autotune: bool = False,
    backward: bool = True,
    dynamic: bool | None = None,
) -> Run:
    """Outputs of ``fn(*args, **kwargs)`` and gradients of its tensors, computed by the generated kernels.

    Args:
        args, kwargs: CPU tensors (and anything else). With ``backward``, those that require a gradient get one; if none does,
            every floating tensor among them.
        captured: tensors that ``fn`` reaches by itself and whose gradients are wanted too.
        grad_outputs: gradients of the differentiable outputs, in their order (None: not used); standard normal numbers from a
            fixed seed without it.
        target, candidate, max_autotune, dynamic: as :func:`parallax_compile.lowering.codegen.generate`.
        backward: whether to compute gradients.
    """
    compiled = interpreted(fn, target=target, candidate=candidate, max_autotune=max_autotune, dynamic=dynamic)
    flat, structure = pytree.tree_flatten((list(args), dict(kwargs or {})))
    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    every = not any(tensor.requires_grad for tensor in tensors)

    def leaf_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wanted = backward and (value.requires_grad or (every and value.is_floating_point()))
        return value.detach().requires_grad_(wanted)

    flat = [leaf_of(value) for value in flat]
    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    args, kwargs = pytree.tree_unflatten(flat, structure)
    with torch.set_grad_enabled(backward):
        outputs = compiled(*args, **kwargs)
    grads: list[Tensor | None] = [None] * (len(tensors) + len(captured))
    if backward:
        grads = _gradients(outputs, [*tensors, *captured], grad_outputs)
    detached = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)
    return Run(detached, grads[: len(tensors)], grads[len(tensors) :], compiled.code, compiled.launches)


def default_grad_outputs(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that :func:`run_generated` takes for the differentiable outputs: for the reference to take too."""
    generator = torch.Generator().manual_seed(2718)
    return [torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output.dtype) for output in outputs]


def _gradients(outputs: Any, inputs: list[Tensor], grad_outputs: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    differentiable = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    given = default_grad_outputs(differentiable) if grad_outputs is None else list(grad_outputs)
    used = [(output, grad) for output, grad in zip(differentiable, given, strict=True) if grad is not None]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad([output for output, _ in used], wanted, [grad for _, grad in used], allow_unused=True)
    grads = dict(zip(map(id, wanted), found, strict=True))
    return [grads.get(id(tensor)) for tensor in inputs]


# --- wrappers -------------------------------------------------------------------------------------------------------


class _Runner:
    """Executes generated graphs: the :class:`Recorder`'s ``execute``."""

    def __init__(self, target: Target, launches: list[str]) -> None:
        self.target = target
        self._launches = launches
        self._modules: dict[str, dict[str, Any]] = {}

    def __call__(self, generated: GeneratedGraph, traced: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
        if generated.wrapper not in self._modules:
            self._modules[generated.wrapper] = self._load(generated.wrapper)
        module = self._modules[generated.wrapper]
        memory = GuardedMemory()
        module["empty_strided_cuda"] = module["empty_strided_cpu"] = memory.empty_strided
        originals: dict[int, Tensor] = {}
        guarded: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                copied = memory.copy(argument.detach())
                originals[id(copied)] = argument
                argument = copied
            guarded.append(argument)
        kept = list(guarded)  # the wrapper empties its list
        with _no_device(), np.errstate(all="ignore"), torch.no_grad():
            results = module["call"](guarded)
        memory.check()
        for copied in kept:
            _write_back(copied, originals)
        return [originals.get(id(result), result) for result in results]

    def _load(self, wrapper: str) -> dict[str, Any]:
        """Import a wrapper with its kernels in the interpreter, and what it says of the GPU turned to the CPU."""
        source = re.sub(r"device='cuda:\d+'", "device='cpu'", wrapper)
        source = re.sub(r"device\(type='cuda', index=\d+\)", "device(type='cpu')", source)
        module: dict[str, Any] = {"__name__": "generated_wrapper"}
        with compat.pretend_gpu(self.target), compat.record_kernels(self._kernel):
            exec(compile(source, "<generated wrapper>", "exec"), module)
        module["get_raw_stream"] = lambda device: 0
        return module

    def _kernel(self, name: str, source: str) -> Any:
        if gluon_interpreter.is_gluon(source):
            return gluon_interpreter.GluonKernel(name, source, self._launches)
        kernel = compat.load_kernel(name, source)
        tile = kernel.configs[0].kwargs
        if "XBLOCK" in tile:
            # A block costs the interpreter the same whatever its size: give Inductor's own kernels few large ones.
            tile["XBLOCK"] = max(tile["XBLOCK"], min(256, kernel.size_hints["x"]))
        return _Kernel(name, kernel, self._launches)


@dataclass
class _Kernel:
    name: str
    autotuner: Any
    launches: list[str]

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.launches.append(self.name)
        self.autotuner.run(*args, **kwargs)


def _write_back(copied: Any, originals: dict[int, Tensor]) -> None:
    """Bring what a graph wrote into one of its inputs back to that input."""
    original = originals.get(id(copied))
    if original is None or _same(copied, original.detach()):
        return
    with torch.no_grad():
        original.copy_(copied)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype.itemsize == 1 and a.dtype.is_floating_point:  # 8-bit numbers know few operations
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return torch.equal(a.nan_to_num(), b.nan_to_num())


@contextlib.contextmanager
def _no_device() -> Iterator[None]:
    """Device guards of wrappers do nothing."""
    with (
        mock.patch.object(torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device", lambda device: None),
    ):
        yield
