"""What every test gets: a fixed seed, a fresh Dynamo, poisoned memory, and compile caches that begin empty with the run.

torch is imported inside of the fixtures, after the environment is set, and not at all in xdist's controller.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_M_PERTURB = -6  # glibc's malloc.h
# glibc fills a fresh block with the low byte of (value ^ 0xff). 0x100 makes that 0xff, which 0 (= off) cannot: NaN in
# every floating dtype, -1 in every integer. Freed blocks become 0.
_FILL_WITH_NAN = 0x100

_own_caches: list[str] = []

# How fast examples are made says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("parallax", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("parallax")


def _prepare_environment() -> None:
    # torch fails to import when the variable is set and empty.
    if not os.environ.get("TORCH_LOGS", "unset"):
        del os.environ["TORCH_LOGS"]
    if not any(name in os.environ for name in _CACHES):
        # xdist's workers inherit the directory, so that the C++ headers are compiled once in a run.
        root = tempfile.mkdtemp(prefix="parallax-tests-")
        _own_caches.append(root)
        for name in _CACHES:
            os.environ[name] = str(Path(root, name.split("_")[0].lower()))
    if "PARALLAX_STORE" not in os.environ:  # what a developer has tuned must not decide what is tested
        os.environ["PARALLAX_STORE"] = "off"
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))


_prepare_environment()


def pytest_unconfigure() -> None:
    for root in _own_caches:
        shutil.rmtree(root, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def _kernels_compiled_together() -> Iterator[None]:
    from support.cpp_kernels import compiled_together

    with compiled_together():
        yield


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """The same random numbers in every test, and nothing compiled by the test before."""
    import torch

    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Fresh CPU memory holds NaN (-1 in integers), so that nothing unwritten passes. True where that is so.

    Reaches ``torch.empty`` and what compiled code allocates, unlike torch's own deterministic fill; glibc only. Tests
    that measure time or memory opt out with ``@pytest.mark.unpoisoned``, since filling touches every page.
    """
    mallopt = None
    if sys.platform == "linux" and "unpoisoned" not in request.keywords:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
    if mallopt is None:
        yield False
        return
    active = bool(mallopt(_M_PERTURB, _FILL_WITH_NAN))
    try:
        yield active
    finally:
        mallopt(_M_PERTURB, 0)
