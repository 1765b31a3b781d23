"""What a bug report needs: versions, devices, tools, folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from .lowering import tuned
from .version import __version__

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Name -> value, plain data; what is not there is None."""
    found: dict[str, Any] = {
        "parallax_compile": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy", "click", "filelock", "platformdirs"):
        found[package] = _version(package)
    found |= {
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "executable": sys.executable,
        "cuda of torch": torch.version.cuda,
        "gpus": _gpus(),
        "default target": _target(),
        **_tools(),
        "store": str(tuned.store().directory or "off"),
        "store entries": len(tuned.store().entries()),
        "shipped entries": len(tuned.shipped()),
    }
    for name in ("PARALLAX_STORE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_LOGS", "TRITON_INTERPRET"):
        found[name] = os.environ.get(name)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _target() -> str:
    from .errors import ParallaxError
    from .lowering.targets import resolve

    try:
        return resolve("auto").name
    except ParallaxError as error:
        return str(error)


def _tools() -> dict[str, str | None]:
    """Where the CUDA tools are that compile and take apart."""
    names = ("ptxas", "ptxas-blackwell", "nvdisasm", "cuobjdump")
    try:
        from .lowering.cubin import tool

        return {name: None if tool(name) is None else str(tool(name)) for name in names}
    except Exception:  # without triton
        return dict.fromkeys(names)
