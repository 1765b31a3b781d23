"""Ahead of time: :func:`aot` compiles calls for a GPU that is not here; :func:`load_aot` runs them there without a compiler.

The file is a zip of cubins and JSON; nothing in it is code that Python runs, and it is bound to no release of torch or triton.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import masks, validation
from .attention import attention
from .errors import InputError, InputTypeError, StoreError, UnsupportedError
from .lowering import tuned
from .lowering.targets import resolve
from .shapes import Shape, dtype_of
from .spec import AttentionSpec, Solved

__all__ = ["AheadOfTime", "aot", "load_aot"]

_FORMAT = "parallax-compile ahead of time, 1"


@dataclass
class _Call:
    """One shape of one dtype: see :class:`~.lowering.ahead.Ahead`, of which this is the plain data."""

    shape: Shape
    dtype: str
    forward: dict[str, Any]
    backward: dict[str, Any] | None
    grads: list[int | None]
    launches: dict[str, dict[str, Any]]
    cubins: dict[str, bytes] = field(repr=False)
    constants: dict[str, Tensor] = field(repr=False)


@dataclass
class AheadOfTime:
    """Compiled calls. On a GPU of the target, call it: ``artifact(query, key, value[, probe]) -> out``, differentiable.

    Attributes:
        spec: the member, as text.
        target: for which GPU.
        versions: what it was compiled by.
        calls: one for each shape and dtype.
    """

    spec: str
    target: str
    capability: tuple[int, int]
    versions: dict[str, str]
    calls: list[_Call] = field(repr=False)
    _loaded: dict[int, Any] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the file that :func:`load_aot` reads.

        Raises:
            StoreError: it cannot be written.
        """
        path = Path(path)
        about: dict[str, Any] = {
            "format": _FORMAT, "spec": self.spec, "target": self.target, "capability": list(self.capability),
            "versions": self.versions, "calls": [],
        }  # fmt: skip
        try:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for number, call in enumerate(self.calls):
                    constants = {}
                    for name, tensor in call.constants.items():
                        dense = tensor.detach().cpu().contiguous()
                        constants[name] = {"size": list(dense.shape), "dtype": _dtype_name(dense.dtype)}
                        archive.writestr(f"{number}/{name}.bin", bytes(dense.flatten().view(torch.uint8).tolist()))
                    for name, cubin in call.cubins.items():
                        archive.writestr(f"{number}/{name}.cubin", cubin)
                    about["calls"].append(
                        {"shape": call.shape.sizes(), "dtype": call.dtype, "forward": call.forward, "backward": call.backward,
                         "grads": call.grads, "launches": call.launches, "constants": constants}
                    )  # fmt: skip
                archive.writestr("metadata.json", json.dumps(about, indent=1))
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}.") from error
        return path

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None = None) -> Tensor:
        """The attention, on the GPU. Gradients flow to the four tensors where the artifact has a backward.

        Raises:
            InputError: shapes or dtype that were not compiled; another GPU than the target.
            UnsupportedError: no GPU, or a gradient is needed and there is no backward.
        """
        inputs = [tensor for tensor in (query, key, value, probe) if tensor is not None]
        call = self._find(inputs)
        self._check_device(query)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs) and call.backward is None:
            raise UnsupportedError("a gradient is needed, but the artifact was compiled with backward=False.")
        return _Run.apply(self._runner(call, query.device), *inputs)

    def __str__(self) -> str:
        shapes = ", ".join(
            f"{call.shape} {call.dtype}{'' if call.backward else ' (no backward)'}" for call in self.calls
        )
        size = sum(len(cubin) for call in self.calls for cubin in call.cubins.values())
        count = sum(len(call.cubins) for call in self.calls)
        return f"{self.spec} for {self.target}: {shapes}; {count} kernels, {size / 1024:.0f} KiB"

    def _find(self, inputs: Sequence[Tensor]) -> _Call:
        for tensor in inputs:
            if not isinstance(tensor, Tensor) or tensor.dim() != 4:
                raise InputTypeError("query, key, value and probe must be 4-D tensors.")
        sizes = [tuple(tensor.shape) for tensor in inputs]
        for call in self.calls:
            s = call.shape
            query = (s.batch, s.q_heads, s.q_length, s.width)
            others = [(s.batch, s.kv_heads, s.kv_length, width) for width in (s.width, s.value_width)]
            expected = [query, *others, *([query] if len(call.grads) == 4 else [])]
            if sizes == expected and all(_dtype_name(tensor.dtype) == call.dtype for tensor in inputs):
                return call
        have = ", ".join(f"{call.shape} {call.dtype}" for call in self.calls)
        raise InputError(f"no call of shapes {sizes} and dtype {inputs[0].dtype} was compiled; there are {have}.")

    def _check_device(self, query: Tensor) -> None:
        if query.device.type != "cuda" or torch.version.hip is not None:
            raise UnsupportedError(
                f"kernels compiled ahead of time for {self.target} run on that GPU, but query is on {query.device}."
            )
        have = torch.cuda.get_device_capability(query.device)
        if have != tuple(self.capability):
            raise InputError(
                f"the artifact is for {self.target}, but query's GPU is sm_{have[0]}{have[1]}. Compile for it."
            )

    def _runner(self, call: _Call, device: torch.device) -> Any:
        known = self._loaded.get(id(call))
        if known is None or known.device != device:
            known = self._loaded[id(call)] = _Runner(call, device)
        return known


class _Runner:
    """A call with its kernels on a device."""

    def __init__(self, call: _Call, device: torch.device) -> None:
        from .lowering import driver

        self.call, self.device, self._driver = call, device, driver
        with driver.on(device):
            self._kernels = {name: driver.Kernel(cubin, call.launches[name]) for name, cubin in call.cubins.items()}
        self._constants = {name: tensor.to(device) for name, tensor in call.constants.items()}
        # What the backward reads of the forward's memory lives on; the rest goes after its last use.
        kept = set() if call.backward is None else _names(call.backward)
        self.forward = _with_releases(call.forward, call.forward["results"][:1], kept)
        self.backward = call.backward and _with_releases(call.backward, call.backward["results"], set())

    def run(
        self, program: Mapping[str, Any], given: Mapping[str, Tensor]
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """The program's results, and the memory that it allocated."""
        memory: dict[str, Tensor] = {}

        def place(value: Any) -> Any:
            if not isinstance(value, (list, tuple)):
                return value
            name, offset = value
            return _base(name, memory, given, self._constants), offset

        with self._driver.on(self.device) as stream:
            for step in program["steps"]:
                if "allocate" in step:
                    memory[step["allocate"]] = torch.empty(step["bytes"], dtype=torch.uint8, device=self.device)
                elif "release" in step:
                    del memory[step["release"]]  # torch's allocator hands it out again on this stream only
                else:
                    self._kernels[step["launch"]]([*map(place, step["arguments"])], step["grid"], stream)
        return [_view(result, memory, given, self._constants) for result in program["results"]], memory


def _names(program: Mapping[str, Any]) -> set[str]:
    """Memory that a program reads or writes."""
    return {name for step in program["steps"] for name in _used(step)} | {
        result["of"][0] for result in program["results"] if result is not None
    }


def _used(step: Mapping[str, Any]) -> set[str]:
    return {value[0] for value in step.get("arguments", ()) if isinstance(value, (list, tuple))}


def _with_releases(program: Mapping[str, Any], results: Sequence[Any], kept: set[str]) -> dict[str, Any]:
    """A program for some of its results, that gives its own memory back after the last use, but what is ``kept``."""
    kept = kept | {result["of"][0] for result in results if result is not None}
    own = {step["allocate"] for step in program["steps"] if "allocate" in step} - kept
    steps: list[Any] = []
    for step in reversed(program["steps"]):
        last = sorted(_used(step) & own)
        own -= set(last)
        steps += [*({"release": name} for name in last), step]
    return {"steps": steps[::-1], "results": list(results)}


def _base(name: str, *places: Mapping[str, Tensor]) -> Tensor:
    return next(place[name] for place in places if name in place)


def _view(result: Mapping[str, Any] | None, *places: Mapping[str, Tensor]) -> Tensor | None:
    if result is None:
        return None
    name, offset = result["of"]
    base = _base(name, *places)
    if base.dtype != torch.uint8:
        return base  # an argument that is passed through
    typed = base[offset:].view(getattr(torch, result["dtype"]))
    return typed.as_strided(result["size"], result["stride"])


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runner: _Runner, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        dense = [_aligned(tensor) for tensor in inputs]
        given = {f"input{position}": tensor for position, tensor in enumerate(dense)}
        results, memory = runner.run(runner.forward, given)
        ctx.runner, ctx.memory = runner, memory if any(ctx.needs_input_grad) else {}
        ctx.save_for_backward(*dense)
        assert results[0] is not None
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        call = ctx.runner.call
        given = {f"input{position}": tensor for position, tensor in enumerate(ctx.saved_tensors)}
        results, _ = ctx.runner.run(ctx.runner.backward, {**given, **ctx.memory, "grad": _aligned(grad)})
        grads = [None if index is None else results[index] for index in call.grads]
        return (None, *(found if need else None for found, need in zip(grads, ctx.needs_input_grad[1:], strict=True)))


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes, as the kernels were compiled for."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def aot(
    spec: AttentionSpec,
    shapes: Any,
    dtypes: Any = torch.bfloat16,
    target: str = "sm_90",
    *,
    backward: bool = True,
    scale: float | None = None,
    path: str | Path | None = None,
) -> AheadOfTime:
    """Compile calls of a member for a GPU, on a machine that needs none.

    Each stage takes the candidate that the store, the shipped table or the heuristic gives for the target. Masks become lists
    of blocks inside the artifact; the values of tensors that mods capture become constants.

    Args:
        spec: the member, with its mods and mask.
        shapes, dtypes: as for :func:`~parallax_compile.autotune`: one or several.
        target: ``"sm_80"``, ``"sm_89"``, ``"sm_90"``, ``"sm_100"``, or ``"auto"``.
        backward: compile the gradients too.
        scale: as for :func:`~parallax_compile.attention`.
        path: where to write the artifact; None does not.

    Returns:
        the artifact; also what :func:`load_aot` gives back.

    Raises:
        InputError, InputTypeError: (a ValueError, a TypeError) a wrong argument.
        UnsupportedError: triton is not installed; the call does more than launch kernels; a captured tensor wants a gradient.
    """
    from .lowering.ahead import ahead_of_time
    from .tuning import listed, listed_shapes

    validation.check_spec(spec)
    validation.check_flag("backward", backward)
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise InputTypeError(f"path must be a path or None, but got {type(path).__name__}.")
    resolved = resolve(target)
    calls = []
    for dtype in listed("dtypes", dtypes, dtype_of):
        for shape in listed_shapes(shapes):
            inputs = shape.tensors(spec, dtype)
            probe = inputs[3] if len(inputs) == 4 else None
            validation.check_tensors(inputs[0], inputs[1], inputs[2], probe, spec, enable_gqa=True)
            validation.check_scale(scale, spec)
            validation.check_compiled(inputs[0], inputs[2], spec, "cuda")
            calls.append(_compiled(ahead_of_time, spec, shape, dtype, inputs, resolved, backward, scale))
    versions = tuned.versions()
    found = AheadOfTime(repr(spec), resolved.name, resolved.capability, versions, calls)
    if path is not None:
        found.save(path)
    return found


def _compiled(
    compiler: Any, spec: AttentionSpec, shape: Shape, dtype: torch.dtype, inputs: list[Tensor], target: Any, backward: bool,
    scale: float | None,
) -> _Call:  # fmt: skip
    block_mask = None
    if spec.mask_mod is not None and (spec.bandwidth.kind == "finite" or isinstance(spec.probe, Solved)):
        # Made here, so that the graph has no list to make.
        block_mask = masks.block_mask(spec.mask_mod, None, None, shape.q_length, shape.kv_length, "cpu")
        spec = spec.replace(mask_mod=None)

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, spec=spec, block_mask=block_mask, scale=scale, enable_gqa=True)

    found = compiler(call, inputs, target, backward=backward)
    cubins = {name: kernel.asm.get("cubin") for name, kernel in found.kernels.items()}
    missing = [name for name, cubin in cubins.items() if not isinstance(cubin, bytes)]
    if missing:
        raise UnsupportedError(f"triton made no cubin of {', '.join(missing)}.")
    return _Call(
        shape=shape,
        dtype=_dtype_name(dtype),
        forward=asdict(found.forward),
        backward=None if found.backward is None else asdict(found.backward),
        grads=found.grads,
        launches={name: dict(kernel.launch) for name, kernel in found.kernels.items()},
        cubins=cubins,
        constants=found.constants,
    )


def load_aot(path: str | Path) -> AheadOfTime:
    """The artifact of :func:`aot`. Nothing is compiled, then or when it is called; kernels are loaded by the first call.

    Raises:
        StoreError: the file cannot be read, or is no such artifact.
        InputTypeError: ``path`` is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputTypeError(f"path must be a path, but got {type(path).__name__}.")
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("metadata.json"))
            if about.get("format") != _FORMAT:
                raise StoreError(f"{path} does not say {_FORMAT!r}.")
            calls = [_read(archive, number, data) for number, data in enumerate(about["calls"])]
    except FileNotFoundError as error:
        raise StoreError(f"there is no file {path}.") from error
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is no artifact of plx.aot: {error}.") from error
    return AheadOfTime(about["spec"], about["target"], tuple(about["capability"]), about["versions"], calls)


def _read(archive: zipfile.ZipFile, number: int, data: Mapping[str, Any]) -> _Call:
    constants = {}
    for name, item in data["constants"].items():
        raw = torch.frombuffer(bytearray(archive.read(f"{number}/{name}.bin") or b"\0"), dtype=torch.uint8)
        dtype = getattr(torch, item["dtype"])
        count = 1
        for size in item["size"]:
            count *= size
        constants[name] = raw[: count * dtype.itemsize].clone().view(dtype).reshape(item["size"])
    return _Call(
        shape=Shape(*data["shape"]),
        dtype=data["dtype"],
        forward=data["forward"],
        backward=data["backward"],
        grads=data["grads"],
        launches=data["launches"],
        cubins={name: archive.read(f"{number}/{name}.cubin") for name in data["launches"]},
        constants=constants,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
