"""A process that compiles kernels for a target, without a GPU (:mod:`.compile_pool` starts it).

One request a line on standard input, one answer a line on standard output, both JSON; what compilers print goes to standard
error. A process, because a compiler may crash, and because compiling holds the interpreter's lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from types import MappingProxyType
from typing import Any

__all__ = ["compiled", "main"]


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """Compile ``name`` of ``source`` for ``target`` into Triton's cache.

    Args:
        request: ``name``, ``source``, ``target`` (the fields of a :class:`~.targets.Target`), ``report``: whether to ask ptxas
            for registers and spills.

    Returns:
        ``seconds``, and ``resources``, or ``error`` (a sentence) with its ``cause`` (a class of failures).
    """
    from .codegen import GeneratedKernel
    from .cubin import compile_kernel
    from .targets import Target

    start = time.perf_counter()
    target = Target(**{**request["target"], "capability": tuple(request["target"]["capability"]), "rates": None})
    kernel = GeneratedKernel(request["name"], request["source"], "forward", None, MappingProxyType({}))
    try:
        found = compile_kernel(kernel, target, texts=False, report=request["report"])
    except Exception as error:  # whatever a compiler raises is a result of the search
        cause = "out of shared memory" if "shared memory" in str(error) else f"compile error ({type(error).__name__})"
        return {"seconds": time.perf_counter() - start, "error": str(error)[-500:], "cause": cause}
    answer = {"seconds": time.perf_counter() - start, "resources": dataclasses.asdict(found.resources)}
    needed = found.resources
    if needed.tensor_memory > target.tensor_memory_columns:
        answer |= {
            "error": f"it needs {needed.tensor_memory} columns of tensor memory",
            "cause": "out of tensor memory",
        }
    elif not found.fits:
        answer |= {"error": f"it needs {needed.shared_memory} bytes of shared memory", "cause": "out of shared memory"}
    return answer


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from . import cubin  # noqa: F401  (before the first request comes)
    from .torch_compat_inductor import inductor

    _ = inductor.SymbolicGridFn
    for line in sys.stdin:
        answers.write(json.dumps(compiled(json.loads(line))) + "\n")
        answers.flush()
