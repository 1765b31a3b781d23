"""IREE: modules compiled for a target in a process of their own, and run on this machine's CPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .targets import PortableTarget
from .toolchain import Limits, run_tool

__all__ = ["Loaded", "compile_module", "peak_memory"]

_FLAGS = (
    "--iree-input-demote-f64-to-f32=false",  # float64 stays float64 (a target may say otherwise)
    "--iree-opt-const-eval=false",  # no constant is computed by the compiler's own machine
)
# Extensions of what IREE leaves on its way -> what they are called here.
_READABLE = {".ll": "llvm", ".s": "assembly", ".ptx": "ptx", ".rocmasm": "amdgcn", ".metal": "metal"}


def compile_module(source: Path, target: PortableTarget, limits: Limits) -> tuple[bytes, dict[str, str]]:
    """The module in ``source`` compiled for ``target``, and the readable texts of its way there.

    Args:
        source: an MLIR file, whose folder takes the files of the run.

    Returns:
        the artifact (a ``.vmfb``), and file name -> text: one MLIR file for each dispatch, and what the target has of LLVM,
        assembly, PTX, AMDGCN and Metal.

    Raises:
        ToolError: IREE failed, crashed or ran into a limit.
    """
    result, dumped = source.parent / "artifact.vmfb", source.parent / "dispatches"
    dumped.mkdir()
    run_tool(
        "iree-compile",
        [source, "-o", result, *_flags(target), f"--iree-hal-dump-executable-files-to={dumped}"],
        limits,
    )
    texts = {}
    for path in sorted(dumped.iterdir()):
        if path.suffix in _READABLE or (path.suffix == ".mlir" and path.name.startswith("configured_")):
            texts[path.name] = path.read_text(encoding="utf-8", errors="replace")
    return result.read_bytes(), texts


def _flags(target: PortableTarget) -> list[str]:
    """Ours, where the target has no other value for them, and the target's."""
    named = {flag.partition("=")[0] for flag in target.flags}
    return [*(flag for flag in _FLAGS if flag.partition("=")[0] not in named), *target.flags]


class Loaded:
    """An artifact for this CPU, loaded into IREE's runtime."""

    def __init__(self, binary: bytes, function: str) -> None:
        from iree import runtime

        self._runtime = runtime
        self._config = runtime.Config("local-task")
        context = runtime.SystemContext(config=self._config)
        module = runtime.VmModule.copy_buffer(context.instance, binary)
        context.add_vm_module(module)
        self._function = context.modules[module.name][function]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The function's results, as tensors of their own."""
        device = self._config.device
        arrays = [self._runtime.asdevicearray(device, _as_numpy(tensor)) for tensor in tensors]
        results = self._function(*arrays)
        if not isinstance(results, (tuple, list)):
            results = [results]
        return [_as_tensor(result.to_host()) for result in results]


# Memory is measured in a process without torch, by the high-water mark of its resident set: what IREE allocates in a run is
# not in its allocator's own statistics.
_MEASURED = """
import re, sys
import numpy
from iree import runtime
path, function, dtype, *shapes = sys.argv[1:]
config = runtime.Config("local-task")
context = runtime.SystemContext(config=config)
module = runtime.VmModule.mmap(context.instance, path)
context.add_vm_module(module)
shapes = [tuple(map(int, shape.split("x"))) for shape in shapes]
if dtype == "bfloat16":
    import ml_dtypes
    dtype = ml_dtypes.bfloat16
arrays = [runtime.asdevicearray(config.device, numpy.ones(shape, dtype)) for shape in shapes]
context.modules[module.name][function](*arrays).to_host()
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(binary: bytes, function: str, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that a process which runs ``function`` once on ones holds at most, Python and the runtime included (Linux)."""
    with tempfile.TemporaryDirectory(prefix="parallax-mlir-") as folder:
        path = Path(folder, "artifact.vmfb")
        path.write_bytes(binary)
        given = ["x".join(map(str, shape)) for shape in shapes]
        command = [sys.executable, "-c", _MEASURED, str(path), function, str(dtype).removeprefix("torch."), *given]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return int(done.stdout) * 1024


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _as_tensor(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
