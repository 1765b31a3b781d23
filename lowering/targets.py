"""The GPUs that code is generated for, and what each can hold and do.

Sizes decide which candidates fit and are exact; rates are the vendor's dense peak figures and serve floors and
intensities only, never a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from ..errors import InputError, InputTypeError

__all__ = ["DEFAULT", "TARGETS", "Rates", "Target", "resolve"]

DEFAULT = "sm_90"
"""The target of ``"auto"`` on a machine without a GPU."""


@dataclass(frozen=True)
class Rates:
    """Peak rates of one product, from its data sheet, without structured sparsity.

    Attributes:
        product: what the sheet is of.
        bfloat16, float16, tf32: TFLOP/s of matrix products in tensor cores with float32 accumulation.
        float32: TFLOP/s outside of tensor cores.
        bandwidth: bytes per second of device memory.
        source: the sheet.
    """

    product: str
    bfloat16: float
    float16: float
    tf32: float
    float32: float
    bandwidth: float
    source: str

    def tflops(self, dtype: str, *, tf32: bool = False) -> float:
        """TFLOP/s of matrix products of ``dtype`` (``"bfloat16"``, ``"float16"``, ``"float32"``).

        Args:
            tf32: whether float32 products may be rounded to TF32.

        Raises:
            InputError: no kernel of ours takes the dtype.
        """
        if dtype not in ("bfloat16", "float16", "float32"):
            raise InputError(f"dtype must be bfloat16, float16 or float32, but got {dtype!r}.")
        return self.tf32 if tf32 and dtype == "float32" else getattr(self, dtype)


@dataclass(frozen=True)
class Target:
    """One kind of GPU.

    Attributes:
        name: ``sm_<major><minor>``.
        product: the device.
        capability: compute capability, (major, minor).
        sm_count: streaming multiprocessors.
        shared_memory_per_block: bytes that one block may use when it asks for them (opt-in).
        shared_memory_per_sm: bytes of one multiprocessor.
        registers_per_sm: 32-bit registers of one multiprocessor.
        threads_per_sm: threads that one multiprocessor holds at once.
        l2_bytes, memory_bytes: sizes of the L2 cache and of the device memory.
        rates: peak rates; None where we know no data sheet of the product.
    """

    name: str
    product: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory_per_block: int
    shared_memory_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    memory_bytes: int
    rates: Rates | None = field(repr=False)

    @property
    def arch(self) -> int:
        """Compute capability as Triton writes it: 80, 90, 100."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def tensor_memory_columns(self) -> int:
        """Columns of the tensor memory of one multiprocessor, where accumulators of datacenter Blackwell lie."""
        return 512 if self.capability[0] == 10 else 0

    @property
    def matrix_rows(self) -> int:
        """Rows that its largest matrix instruction takes from one block's tile (mma, wgmma, tcgen05)."""
        return {9: 64, 10: 128}.get(self.capability[0], 16)

    @property
    def ptx_arch(self) -> str:
        """What ptxas is told: the architecture-specific instructions (wgmma, tcgen05) need the suffix."""
        return f"{self.name}a" if self.capability >= (9, 0) else self.name


_A100 = Rates("A100 SXM 80GB", 312.0, 312.0, 156.0, 19.5, 2.039e12, "NVIDIA A100 data sheet, SXM 80GB")
_L4 = Rates("L4", 121.0, 121.0, 60.0, 30.3, 3.0e11, "NVIDIA L4 data sheet; half of the sparse figures")
_L40S = Rates("L40S", 362.0, 362.0, 183.0, 91.6, 8.64e11, "NVIDIA L40S data sheet")
_RTX_4090 = Rates(
    "RTX 4090", 165.2, 165.2, 82.6, 82.6, 1.008e12, "NVIDIA Ada architecture white paper; float32 accumulation"
)
_H100 = Rates("H100 SXM", 989.4, 989.4, 494.7, 66.9, 3.35e12, "NVIDIA H100 data sheet, SXM; half of the sparse figures")
_H200 = replace(
    _H100, product="H200 SXM", bandwidth=4.8e12, source="NVIDIA H200 data sheet, SXM; half of the sparse figures"
)
_B200 = Rates(
    "B200", 2250.0, 2250.0, 1125.0, 75.0, 8.0e12, "NVIDIA HGX/DGX B200 data sheet; half of the sparse figures"
)

# Whole words of the device names that CUDA reports -> their sheets; the first that matches.
_SHEETS: tuple[tuple[str, Rates], ...] = (
    ("A100-SXM4-80GB", _A100),
    ("H200", _H200),
    ("H100 80GB HBM3", _H100),
    ("B200", _B200),
    ("L40S", _L40S),
    ("L4", _L4),
    ("RTX 4090", _RTX_4090),
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                name="sm_80",
                product="NVIDIA A100-SXM4-80GB",
                capability=(8, 0),
                sm_count=108,
                shared_memory_per_block=163 * 1024,
                shared_memory_per_sm=164 * 1024,
                registers_per_sm=65536,
                threads_per_sm=2048,
                l2_bytes=40 * 2**20,
                memory_bytes=80 * 2**30,
                rates=_A100,
            ),
            Target(
                name="sm_89",
                product="NVIDIA L4",
                capability=(8, 9),
                sm_count=58,
                shared_memory_per_block=99 * 1024,
                shared_memory_per_sm=100 * 1024,
                registers_per_sm=65536,
                threads_per_sm=1536,
                l2_bytes=48 * 2**20,
                memory_bytes=24 * 2**30,
                rates=_L4,
            ),
            Target(
                name="sm_90",
                product="NVIDIA H100 80GB HBM3",
                capability=(9, 0),
                sm_count=132,
                shared_memory_per_block=227 * 1024,
                shared_memory_per_sm=228 * 1024,
                registers_per_sm=65536,
                threads_per_sm=2048,
                l2_bytes=50 * 2**20,
                memory_bytes=80 * 2**30,
                rates=_H100,
            ),
            Target(
                name="sm_100",
                product="NVIDIA B200",
                capability=(10, 0),
                sm_count=148,
                shared_memory_per_block=227 * 1024,
                shared_memory_per_sm=228 * 1024,
                registers_per_sm=65536,
                threads_per_sm=2048,
                l2_bytes=126 * 2**20,
                memory_bytes=180 * 2**30,
                rates=_B200,
            ),
        )
    }
)
"""The targets that code can be generated for without the device."""


def resolve(target: str | Target | None = None) -> Target:
    """The target called ``target``.

    Args:
        target: ``"sm_80"`` (A100), ``"sm_89"`` (L4; an RTX 4090 differs in the number of multiprocessors and in rates),
            ``"sm_90"`` (H100), ``"sm_100"`` (B200); ``"auto"`` or None for the machine's first GPU as it reports itself, or
            sm_90 on a machine without one; a :class:`Target` passes through.

    Raises:
        InputError: no such target, or the machine's GPU is older than Triton's matrix products support (sm_80).
        InputTypeError: neither a string nor a target.
    """
    if isinstance(target, Target):
        return target
    if target is None or target == "auto":
        return _local() if torch.cuda.is_available() and torch.version.hip is None else TARGETS[DEFAULT]
    if not isinstance(target, str):
        raise InputTypeError(f"target must be a string such as 'sm_90', or 'auto', but got {type(target).__name__}.")
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)} or 'auto', but got {target!r}.")
    return TARGETS[target]


def _local() -> Target:
    """The first GPU of this machine: its own sizes, and its product's sheet if we have it."""
    properties: Any = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        raise InputError(
            f"target 'auto' must be a GPU of compute capability 8.0 or newer, but this machine has {properties.name} "
            f"({capability[0]}.{capability[1]}). Name a target: {', '.join(TARGETS)}."
        )
    return Target(
        name=f"sm_{capability[0]}{capability[1]}",
        product=properties.name,
        capability=capability,
        sm_count=properties.multi_processor_count,
        shared_memory_per_block=properties.shared_memory_per_block_optin,
        shared_memory_per_sm=properties.shared_memory_per_multiprocessor,
        registers_per_sm=properties.regs_per_multiprocessor,
        threads_per_sm=properties.max_threads_per_multi_processor,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        rates=next((rates for words, rates in _SHEETS if f" {words} " in f" {properties.name} "), None),
    )
