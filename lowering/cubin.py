"""Generated kernels compiled for a target, on any machine: every intermediate text, and the resources that a kernel takes.

Nothing is loaded on a device. The tools (ptxas, nvdisasm, cuobjdump) are those of the triton wheel.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UnsupportedError
from . import torch_compat_codegen as compat
from .codegen import LOCK, GeneratedKernel, require_triton
from .targets import Target, resolve
from .torch_compat_gluon import source_type

__all__ = ["STAGES", "CompiledKernel", "Resources", "compile_kernel", "tool"]

STAGES = ("ttir", "ttgir", "llir", "ptx", "cubin", "sass")
"""What a kernel passes through on its way to the GPU, in order. All are text but ``cubin``."""

_TIMEOUT = 600.0  # seconds; ptxas takes seconds, minutes for kernels that spill much


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it.

    Attributes:
        registers: 32-bit registers of each thread.
        spill_stores, spill_loads: bytes of each thread that did not fit in registers; local memory, hence slow.
        stack: bytes of each thread's stack frame.
        shared_memory: bytes of one block, static and dynamic.
        num_warps, num_stages: warps of one block; depth of the software pipeline.
        tensor_memory: columns of tensor memory of one block (Blackwell).
    """

    registers: int | None
    spill_stores: int | None
    spill_loads: int | None
    stack: int | None
    shared_memory: int
    num_warps: int
    num_stages: int
    tensor_memory: int = 0

    @property
    def spills(self) -> int | None:
        """Bytes spilled, stores and loads; None where ptxas did not say."""
        if self.spill_stores is None or self.spill_loads is None:
            return None
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for a target.

    Attributes:
        kernel: what was compiled.
        target: what for.
        asm: entry of :data:`STAGES` -> its text (``cubin``: bytes). Entries that could not be made are absent.
        missing: entry of :data:`STAGES`, or ``"resources"`` -> why it is absent.
        resources: registers, spills, shared memory.
        launch: what a launch of the cubin needs to know: ``symbol``, ``parameters`` (types of the arguments, in order),
            ``hidden`` (pointers that follow them), ``threads``, ``shared_memory`` and ``scratch`` (bytes of global memory for
            each block, for the first of the hidden pointers).
    """

    kernel: GeneratedKernel
    target: Target
    asm: Mapping[str, str | bytes] = field(repr=False, hash=False)
    missing: Mapping[str, str] = field(hash=False)
    resources: Resources
    launch: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.name

    @property
    def fits(self) -> bool:
        """Whether the target has the shared and tensor memory that a block needs; a launch fails otherwise."""
        needed, target = self.resources, self.target
        return (
            needed.shared_memory <= target.shared_memory_per_block
            and needed.tensor_memory <= target.tensor_memory_columns
        )

    @property
    def instructions(self) -> frozenset[str]:
        """Families of matrix instructions in the PTX: ``mma``, ``wgmma``, ``tcgen05``."""
        families = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
        ptx = str(self.asm.get("ptx", ""))
        return frozenset(family for family, mnemonic in families.items() if mnemonic in ptx)


def compile_kernel(
    kernel: GeneratedKernel, target: str | Target | None = None, *, texts: bool = True, report: bool = True
) -> CompiledKernel:
    """Compile ``kernel`` as Inductor would on ``target``; results are kept by Triton's own cache.

    Args:
        kernel: of :func:`.codegen.generate`, for the same target.
        target: see :func:`.targets.resolve`.
        texts: whether to disassemble, for the SASS.
        report: whether to ask ptxas for registers and spills; it assembles once more for that.

    Raises:
        InputError: unknown target.
        UnsupportedError: triton is not installed, or this process runs Triton's interpreter (``TRITON_INTERPRET=1``).
    """
    resolved = resolve(target)
    triton = require_triton()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise UnsupportedError(
            "kernels cannot be compiled in a process of Triton's interpreter: unset TRITON_INTERPRET."
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Parts of Triton's front end ask the active driver for its target, which must then be ours.
    with LOCK, compat.pretend_gpu(resolved):
        loaded = compat.compile_arguments(compat.load_kernel(kernel.name, kernel.source))
        kind = source_type(loaded.function, ASTSource)
        source = kind(loaded.function, loaded.signature, loaded.constants, loaded.attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", resolved.arch, 32), options=loaded.options)
    asm: dict[str, str | bytes] = {stage: binary.asm[stage] for stage in STAGES if stage in binary.asm}
    missing = {stage: "triton did not make it" for stage in STAGES[:-1] if stage not in asm}
    if "ttir" in missing and "ttgir" in asm:
        missing["ttir"] = (
            "the kernel is Gluon, whose first text is ttgir (kernel_options WARP_SPECIALIZED=False has Triton's)"
        )
    sass, reason = _disassemble(asm.get("cubin")) if texts else (None, "not asked for")
    if sass is None:
        missing["sass"] = reason
    else:
        asm["sass"] = sass
    said, reason = None, "not asked for"
    if report:
        said, reason = _assemble(str(asm.get("ptx", "")), resolved, loaded.options)
    if said is None:
        missing["resources"] = reason
    shared = int(binary.metadata.shared)
    return CompiledKernel(
        kernel=kernel,
        target=resolved,
        asm=MappingProxyType(asm),
        missing=MappingProxyType(missing),
        resources=Resources(
            registers=_number(r"Used (\d+) registers", said),
            spill_stores=_number(r"(\d+) bytes spill stores", said),
            spill_loads=_number(r"(\d+) bytes spill loads", said),
            stack=_number(r"(\d+) bytes stack frame", said),
            shared_memory=shared,
            num_warps=int(binary.metadata.num_warps),
            num_stages=int(loaded.options["num_stages"]),
            tensor_memory=int(getattr(binary.metadata, "tmem_size", 0) or 0),
        ),
        launch=MappingProxyType(_launch(binary.metadata, str(asm.get("ptx", "")), loaded.signature)),
    )


def _launch(metadata: Any, ptx: str, signature: Mapping[str, str]) -> dict[str, Any]:
    """What a launch of the kernel needs to know."""
    parameters = [kind for kind in signature.values() if kind != "constexpr"]
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    declared = len(re.findall(r"\.param", entry.group(2))) if entry else len(parameters)
    return {
        "symbol": entry.group(1) if entry else str(metadata.name),
        "parameters": parameters,
        "hidden": declared - len(parameters),
        "threads": 32 * int(metadata.num_warps),
        "shared_memory": int(metadata.shared),
        "scratch": int(getattr(metadata, "global_scratch_size", 0) or 0),
    }


def tool(name: str) -> Path | None:
    """Path of a CUDA tool as Triton finds it (``TRITON_<NAME>_PATH``, else the one in its wheel), or None.

    Args:
        name: ``ptxas``, ``ptxas-blackwell``, ``nvdisasm``, ``cuobjdump``.
    """
    try:
        return Path(getattr(require_triton().knobs.nvidia, name.replace("-", "_")).path)
    except (AttributeError, RuntimeError):
        return None


def _assemble(ptx: str, target: Target, options: Mapping[str, Any]) -> tuple[str | None, str]:
    """What ptxas reports on the kernel, or None and why.

    Triton keeps no report with what it caches, so its last step is repeated, with the flags that it passes.
    """
    if not ptx:
        return None, "there is no PTX"
    # As in Triton: its second ptxas knows the architectures that its first one is too old for.
    name = "ptxas-blackwell" if target.arch >= 100 else "ptxas"
    if tool(name) is None:
        return None, f"{name} is not in the triton wheel"
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", target.arch, 32))
    report = io.StringIO()
    try:
        with LOCK, knobs.nvidia.scope(), contextlib.redirect_stdout(report):
            knobs.nvidia.dump_ptxas_log = True
            backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), target.arch)
    except Exception as error:  # whatever a private step of another triton release raises: the texts are still there
        return None, f"{name}: {error}"[:300]
    return report.getvalue(), ""


def _disassemble(cubin: str | bytes | None) -> tuple[str | None, str]:
    """The SASS of a cubin, or None and why."""
    if not isinstance(cubin, bytes):
        return None, "there is no cubin"
    reasons = []
    for name, options in (("nvdisasm", ("-c",)), ("cuobjdump", ("-sass",))):
        path = tool(name)
        if path is None:
            reasons.append(f"{name} is not in the triton wheel")
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            text, reason = _run([str(path), *options, file.name])
        if text is not None:
            return text, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


def _run(command: list[str]) -> tuple[str | None, str]:
    """Standard output of a tool, or None and why."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{name}: {error}"
    if done.returncode != 0:
        return None, f"{name} failed: {done.stderr.strip()[-300:]}"
    return done.stdout, ""


def _number(pattern: str, text: str | None) -> int | None:
    found = re.search(pattern, text or "")
    return int(found.group(1)) if found else None
