"""A call compiled ahead of time: its kernels as cubins, and what its graphs do as plain data.

A graph for fixed shapes is a straight line: allocate, launch, allocate, launch. It is run once on CPU memory that nobody reads,
with every allocation and launch written down (:class:`Program`). What is left is data, bound to no release of torch or triton.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import UnsupportedError
from . import torch_compat_codegen as compat
from .codegen import LOCK, GeneratedGraph, GeneratedKernel, Recorder, fresh, prepared
from .counters import no_counters
from .cubin import CompiledKernel, compile_kernel
from .targets import Target

__all__ = ["Ahead", "Program", "ahead_of_time"]

# What a wrapper's call may do beside launching kernels: nothing that computes.
_HARMLESS = {
    "_DeviceGuard", "as_strided", "assert_alignment", "assert_size_stride", "clear", "copy_if_misaligned", "empty_strided_cuda",
    "get_raw_stream", "reinterpret_tensor", "run", "set_device",
}  # fmt: skip


@dataclass
class Program:
    """What one graph does. References to memory are ``[name, byte offset]``.

    Attributes:
        steps: ``{"allocate": name, "bytes": n}`` or ``{"launch": kernel, "arguments": [...], "grid": [x, y, z]}``, whose
            arguments are references or numbers.
        results: for each of the graph's results None, or a view: ``{"of": reference, "size", "stride", "dtype"}``.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any] | None] = field(default_factory=list)


@dataclass
class Ahead:
    """A call compiled ahead of time.

    Attributes:
        kernels: name -> the compiled kernel.
        constants: name -> a tensor that the call reads beside its arguments: lists of blocks, tensors captured by mods.
        forward, backward: what runs; ``backward`` is None where it was not asked for. The memory names ``input0``, ... are the
            call's arguments, ``saved0``, ... what the forward allocates, ``grad`` the gradient of out. The forward's first
            result is the call's; the others are what the backward reads.
        grads: for each argument, which of the backward's results is its gradient; None for none.
    """

    kernels: dict[str, CompiledKernel]
    constants: dict[str, Tensor]
    forward: Program
    backward: Program | None
    grads: list[int | None]


def ahead_of_time(
    call: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    target: Target,
    *,
    backward: bool,
    on_kernel: Callable[[int, int], None] = lambda done, of: None,
) -> Ahead:
    """Compile ``call(*inputs)``, and with ``backward`` its gradients, for ``target``. No GPU is needed.

    Raises:
        UnsupportedError: a graph does more than launch generated kernels, or differentiates a captured tensor.
    """
    leaves = prepared(list(inputs), backward)
    tape = _Tape(target, leaves)
    recorder = Recorder(target, execute=tape)
    with (
        LOCK,
        compat.deterministic_tracing(),
        compat.nothing_donated(),
        no_counters(),
        torch.set_grad_enabled(backward),
    ):
        compiled = torch.compile(fresh(call), backend=recorder.backend, fullgraph=True, dynamic=False)
        out = compiled(*leaves)
        if backward:
            grad = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype)
            tape.name("grad", grad)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            torch.autograd.grad(out, wanted, grad, allow_unused=True)
    programs = tape.programs
    if len(programs) != 1 + backward:
        raise UnsupportedError(f"a call of {len(programs)} graphs cannot be compiled ahead of time.")
    kernels = {}
    for position, (name, kernel) in enumerate(tape.kernels.items()):
        kernels[name] = compile_kernel(kernel, target, texts=False, report=False)
        on_kernel(position + 1, len(tape.kernels))
    return Ahead(
        kernels=kernels,
        constants=tape.constants,
        forward=programs[0],
        backward=programs[1] if backward else None,
        grads=tape.grads(leaves),
    )


class _Tape:
    """Executes graphs by writing down what they do."""

    def __init__(self, target: Target, inputs: Sequence[Tensor]) -> None:
        self._target = target
        self._named: dict[int, tuple[str, Tensor]] = {}
        self._inputs = list(inputs)
        self.programs: list[Program] = []
        self.kernels: dict[str, GeneratedKernel] = {}
        self._sources: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self._order: list[list[int | None]] = []
        for position, tensor in enumerate(inputs):
            self.name(f"input{position}", tensor)

    def name(self, name: str, tensor: Tensor) -> None:
        """Let references to a tensor's memory be ``name``."""
        self._named[tensor.untyped_storage().data_ptr()] = (name, tensor)

    def grads(self, leaves: Sequence[Tensor]) -> list[int | None]:
        """Where each input's gradient is among the backward's results, which are in the order of the forward's arguments."""
        if len(self._order) < 2:
            return [None] * len(leaves)
        order = self._order[0]
        found = [order.index(position) if position in order else None for position in range(len(leaves))]
        results = self.programs[1].results
        return [None if index is None or results[index] is None else index for index in found]

    def __call__(self, generated: GeneratedGraph, traced: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
        _check(generated.wrapper)
        backward = bool(self.programs)
        program = Program()
        self.programs.append(program)
        order: list[int | None] = []
        for argument in arguments:
            if not isinstance(argument, Tensor):
                order.append(None)
                continue
            pointer = argument.untyped_storage().data_ptr()
            if pointer not in self._named:
                constant = f"constant{len(self.constants)}"
                self.constants[constant] = argument.detach()
                self.name(constant, argument)
            name = self._named[pointer][0]
            order.append(int(name.removeprefix("input")) if name.startswith("input") else None)
        self._order.append(order)

        def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, *_: Any) -> Tensor:
            tensor = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
            prefix = "work" if backward else "saved"
            name = f"{prefix}{sum(step.get('allocate') is not None for step in program.steps)}"
            self.name(name, tensor)
            program.steps.append({"allocate": name, "bytes": tensor.untyped_storage().nbytes()})
            return tensor

        def kernel(name: str, source: str) -> _Written:
            return _Written(self, program, name, source)

        with compat.wrapper_on_cpu(generated.wrapper, self._target, kernel, empty) as call:
            results = call(list(arguments))
        program.results = [None if result is None else self._view(result) for result in results]
        if backward:
            extra = [
                result
                for result, source in zip(program.results, self._order[0], strict=False)
                if result is not None and source is None
            ]
            if extra:
                raise UnsupportedError(
                    "a call that differentiates a captured tensor cannot be compiled ahead of time: detach what mods capture."
                )
        return list(results)

    def launch(self, program: Program, name: str, source: str, arguments: Sequence[Any]) -> None:
        """Write a launch down."""
        kernel = compat.load_kernel(name, source)
        handed, grid = compat.launch_arguments(kernel, arguments)
        unique = next((known for known, text in self._sources.items() if text == source), None)
        if unique is None:
            unique = f"kernel{len(self._sources)}_{name}"
            self._sources[unique] = source
            self.kernels[unique] = GeneratedKernel(name, source, "forward", None, {})
        written = [self._reference(value) if isinstance(value, Tensor) else value for value in handed]
        program.steps.append({"launch": unique, "arguments": written, "grid": list(grid)})

    def _reference(self, tensor: Tensor) -> list[Any]:
        storage = tensor.untyped_storage().data_ptr()
        name, _ = self._named[storage]
        return [name, tensor.data_ptr() - storage]

    def _view(self, result: Any) -> dict[str, Any]:
        if not isinstance(result, Tensor):
            raise UnsupportedError("a graph whose results are no tensors cannot be compiled ahead of time.")
        return {
            "of": self._reference(result),
            "size": list(result.shape),
            "stride": list(result.stride()),
            "dtype": str(result.dtype).removeprefix("torch."),
        }


class _Written:
    """Stands in a wrapper for a kernel."""

    def __init__(self, tape: _Tape, program: Program, name: str, source: str) -> None:
        self._tape, self._program, self._name, self._source = tape, program, name, source

    def run(self, *arguments: Any, stream: int) -> None:
        self._tape.launch(self._program, self._name, self._source, arguments)


def _check(wrapper: str) -> None:
    """Refuse a wrapper that calls what is no generated kernel: it would run here once, and never again."""
    calls = [node for node in ast.walk(ast.parse(wrapper)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    for body in calls:
        for node in ast.walk(body):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", None) or getattr(node.func, "id", "?")
                if name not in _HARMLESS:
                    raise UnsupportedError(
                        f"a call whose graph runs {ast.unparse(node.func)} beside generated kernels cannot be compiled ahead "
                        "of time. Pass masks as block_mask=, and inputs as they are needed."
                    )
