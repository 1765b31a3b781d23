"""How Inductor launches kernels that need scratch memory: as all others, from the cubin that its caches hold.

A kernel that makes tensor-map descriptors (TMA) needs a few hundred bytes of global memory for each of its programs. Inductor's
own launcher refuses such kernels ("Global scratch not yet supported", torch 2.11 to 2.13) and leaves them to Triton's, which
compiles a launcher in C for each kernel and, worse, is not part of what the caches of graphs hold: every process imports
Triton's compiler, hashes all of Triton and compiles each kernel again, if only out of Triton's cache. That took longer than
all the rest of a first call with warm caches (benchmarks/NOTES.md, "Compile time").

The private symbols are fenced in :mod:`.torch_compat`.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

__all__ = ["KernelWithScratch", "launch_from_cubin"]

_ALIGNMENT = 512  # bytes: what torch's allocator gives


class KernelWithScratch(StaticallyLaunchedCudaKernel):
    """Inductor's launcher of a cubin, which hands the kernel fresh scratch memory at each launch."""

    def __init__(self, kernel: Any) -> None:
        super().__init__(_WithoutScratch(kernel))
        self.scratch_bytes = int(kernel.metadata.global_scratch_size)
        self.device = torch.device("cuda", 0)
        # The scratch is the first of the pointers that follow a kernel's own arguments: here it is one of these.
        self.arg_tys += "O"
        self.has_global_scratch = False

    def load_kernel(self, device: int) -> None:
        """Load the cubin on a GPU, by its number."""
        self.device = torch.device("cuda", device)
        super().load_kernel(device)

    def run(self, grid_x: int, grid_y: int, grid_z: int, stream: int, *arguments: Any) -> None:
        """Launch ``grid_x x grid_y x grid_z`` programs on a stream, by its handle."""
        # Given back to torch's allocator on return, which hands it out again on this stream only.
        scratch = torch.empty(grid_x * grid_y * grid_z * self.scratch_bytes, dtype=torch.int8, device=self.device)
        super().run(grid_x, grid_y, grid_z, stream, *arguments, scratch.data_ptr())


class _WithoutScratch:
    """A compiled kernel that tells of no scratch memory, and else is ``kernel``."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.metadata = SimpleNamespace(**{**kernel.metadata._asdict(), "global_scratch_size": 0})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def launch_from_cubin() -> None:
    """Let Inductor launch the kernels of the module that calls this, which need scratch memory, from their cubins.

    The compiled kernel travels from worker processes and through caches as a :class:`KernelWithScratch`; other kernels are
    left as they are.
    """
    heuristics: Any = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    launched_by_device = heuristics.statically_launched_kernel_by_device
    if getattr(launched_by_device, "knows_scratch", False):
        return

    def by_device(kernel: Any, device_type: str = "cuda") -> Any:
        return KernelWithScratch(kernel) if _is_ours(kernel, device_type) else launched_by_device(kernel, device_type)

    by_device.knows_scratch = True  # type: ignore[attr-defined]
    heuristics.statically_launched_kernel_by_device = by_device


def _is_ours(kernel: Any, device_type: str) -> bool:
    metadata = kernel.metadata
    return (
        device_type == "cuda"
        and kernel.src.fn.__globals__.get(launch_from_cubin.__name__) is launch_from_cubin
        and getattr(metadata, "global_scratch_size", 0) > 0
        and getattr(metadata, "global_scratch_align", 1) <= _ALIGNMENT
    )
