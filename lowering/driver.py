"""Cubins loaded and launched through the CUDA driver, without any compiler: a few calls of its stable C interface."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ParallaxError, UnsupportedError

__all__ = ["Kernel", "on"]

_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, cuda.h
_DEFAULT_SHARED_MEMORY = 48 * 1024
_NUMBERS: dict[str, Any] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "f32": ctypes.c_float, "fp64": ctypes.c_double, "f64": ctypes.c_double,
}  # fmt: skip


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(
            "kernels compiled ahead of time need an NVIDIA driver, and this machine has none."
        ) from error


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise ParallaxError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[int]:
    """Let ``device`` be the current one meanwhile; gives its current stream's handle."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


class Kernel:
    """A cubin on the current device.

    Args:
        cubin: its bytes.
        launch: of :class:`~.cubin.CompiledKernel`.
    """

    def __init__(self, cubin: bytes, launch: Mapping[str, Any]) -> None:
        torch.cuda.current_stream()  # the device's context is torch's
        torch.cuda.synchronize()
        self._launch = dict(launch)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._context = ctypes.c_void_p()
        _call("cuCtxGetCurrent", ctypes.byref(self._context))
        _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
        _call("cuModuleGetFunction", ctypes.byref(self._function), module, ctypes.c_char_p(launch["symbol"].encode()))
        if launch["shared_memory"] > _DEFAULT_SHARED_MEMORY:
            _call("cuFuncSetAttribute", self._function, _DYNAMIC_SHARED_MEMORY, ctypes.c_int(launch["shared_memory"]))

    def __call__(self, arguments: Sequence[tuple[Tensor, int] | float], grid: Sequence[int], stream: int) -> None:
        """Launch.

        Args:
            arguments: memory with an offset in bytes, and numbers, in the order of ``launch["parameters"]``.
            grid: blocks.
            stream: the current CUDA stream's handle.
        """
        launch = self._launch
        if 0 in grid:
            return
        values: list[Any] = [
            ctypes.c_uint64(value[0].data_ptr() + value[1]) if isinstance(value, tuple) else _NUMBERS[kind](value)
            for value, kind in zip(arguments, launch["parameters"], strict=True)
        ]
        for position in range(launch["hidden"]):
            pointer = 0
            if position == 0 and launch["scratch"]:
                blocks = grid[0] * grid[1] * grid[2]
                # Given back to torch's allocator on return, which hands it out again on this stream only.
                scratch = torch.empty(launch["scratch"] * blocks, dtype=torch.int8, device="cuda")
                pointer = scratch.data_ptr()
            values.append(ctypes.c_uint64(pointer))
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        sizes = (*map(ctypes.c_uint, grid), ctypes.c_uint(launch["threads"]), ctypes.c_uint(1), ctypes.c_uint(1))
        shared = ctypes.c_uint(launch["shared_memory"])
        _call("cuCtxSetCurrent", self._context)  # a thread of autograd's may have none yet
        _call("cuLaunchKernel", self._function, *sizes, shared, ctypes.c_void_p(stream), addresses, None)
