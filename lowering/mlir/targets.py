"""What IREE compiles for, and what it does not: decided here, before anything is compiled.

Every entry was tried with the pinned release (``python benchmarks/portable.py``); ``docs/portable.md`` shows the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ...errors import InputError, InputTypeError, UnsupportedError

__all__ = ["TARGETS", "PortableTarget", "resolve"]


@dataclass(frozen=True)
class PortableTarget:
    """One kind of machine.

    Attributes:
        name: as it is asked for.
        product: what it is.
        flags: of ``iree-compile``.
        runs_here: whether the artifact can be run by :meth:`~parallax_compile.PortableArtifact.run`.
        refused: dtype -> why IREE cannot compile it for the target.
    """

    name: str
    product: str
    flags: tuple[str, ...]
    runs_here: bool = False
    refused: Mapping[torch.dtype, str] = field(default_factory=dict, hash=False)


def _cpu(name: str, product: str, triple: str | None, cpu: str, *more: str) -> PortableTarget:
    flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    flags += [f"--iree-llvmcpu-target-triple={triple}"] if triple is not None else []
    flags += [f"--iree-llvmcpu-target-cpu={cpu}", *more]
    return PortableTarget(name, product, tuple(flags), runs_here=triple is None)


def _hip(chip: str, product: str) -> PortableTarget:
    return PortableTarget(f"rocm:{chip}", product, ("--iree-hal-target-device=hip", f"--iree-rocm-target={chip}"))


def _cuda(arch: str, product: str) -> PortableTarget:
    return PortableTarget(f"cuda:{arch}", product, ("--iree-hal-target-device=cuda", f"--iree-cuda-target={arch}"))


def _spirv(name: str, product: str, *flags: str, refused: Mapping[torch.dtype, str]) -> PortableTarget:
    # Shaders have no float64; what torch-mlir leaves of it in a float32 call are constants.
    demoted = "--iree-input-demote-f64-to-f32=true"
    refused = {torch.float64: "it has no float64. Compile for cpu, rocm or cuda", **refused}
    return PortableTarget(
        name, product, (f"--iree-hal-target-device={name.partition(':')[0]}", *flags, demoted), refused=refused
    )


def _vulkan(chip: str, product: str) -> PortableTarget:
    return _spirv(f"vulkan:{chip}", product, f"--iree-vulkan-target={chip}", refused=_NO_BFLOAT16)


_NO_BFLOAT16 = {torch.bfloat16: "IREE 3.13 does not translate bfloat16 to SPIR-V. Take float16 or float32"}
_NO_16_BITS = {torch.float16: "the baseline has no float16. Take float32, or name a GPU (vulkan:rdna3)", **_NO_BFLOAT16}
_RISCV = ("--iree-llvmcpu-target-abi=lp64d", "--iree-llvmcpu-target-cpu-features=+m,+a,+f,+d,+c")

_TARGETS = (
    _cpu("cpu", "this machine's CPU", None, "host"),
    _cpu("cpu:x86_64", "x86-64 Linux", "x86_64-unknown-linux-gnu", "generic"),
    _cpu("cpu:aarch64", "64-bit Arm Linux", "aarch64-unknown-linux-gnu", "generic"),
    _cpu("cpu:riscv64", "64-bit RISC-V Linux", "riscv64-unknown-linux-gnu", "generic-rv64", *_RISCV),
    _hip("gfx90a", "AMD Instinct MI200"),
    _hip("gfx942", "AMD Instinct MI300"),
    _hip("gfx950", "AMD Instinct MI350"),
    _hip("gfx1100", "AMD Radeon RX 7900"),
    _hip("gfx1201", "AMD Radeon RX 9070"),
    _spirv("vulkan", "Vulkan 1.1, the Android baseline of 2022", refused=_NO_16_BITS),
    _vulkan("rdna3", "AMD RDNA3 through Vulkan"),
    _vulkan("ampere", "NVIDIA Ampere through Vulkan"),
    _vulkan("valhall4", "Arm Mali Valhall through Vulkan"),
    _spirv("metal", "Apple GPUs, as Metal source", "--iree-metal-compile-to-metallib=false", refused=_NO_BFLOAT16),
    _cuda("sm_60", "NVIDIA P100"),
    _cuda("sm_70", "NVIDIA V100"),
    _cuda("sm_75", "NVIDIA T4"),
    _cuda("sm_80", "NVIDIA A100"),
    _cuda("sm_86", "NVIDIA RTX 30"),
    _cuda("sm_89", "NVIDIA L40, RTX 40"),
)
TARGETS: Mapping[str, PortableTarget] = MappingProxyType({target.name: target for target in _TARGETS})
"""Name -> target, for every target that artifacts are made for."""


def resolve(target: Any, dtype: torch.dtype) -> PortableTarget:
    """The target called ``target``, for tensors of ``dtype``.

    Raises:
        InputTypeError: not a string.
        InputError: no such target.
        UnsupportedError: a target, or a dtype on it, that IREE does not compile for.
    """
    if not isinstance(target, str):
        raise InputTypeError(
            f"target must be a string such as 'cpu' or 'rocm:gfx942', but got {type(target).__name__}."
        )
    newer = re.fullmatch(r"(?:cuda:)?sm_(\d+)a?", target)
    if newer is not None and int(newer[1]) >= 90:
        raise UnsupportedError(
            f"target {target} is newer than IREE 3.13 knows (sm_89: 'missing GPU target'). "
            "Use cuda:sm_89 or older here; on this GPU torch.compile takes the Triton path, "
            'and plx.inspect(..., target="sm_90") shows it.'
        )
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, but got {target!r}.")
    found = TARGETS[target]
    if dtype in found.refused:
        raise UnsupportedError(f"target {target} does not take {dtype}: {found.refused[dtype]}.")
    return found
