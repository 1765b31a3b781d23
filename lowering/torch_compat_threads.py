"""Kernels of a graph compiled side by side while Inductor's worker processes are still starting.

A process that compiles its first graphs has no worker yet: these import torch before they compile, which takes longer than the
forward's and the backward's lowering. Until then Inductor (torch 2.11 to 2.13) compiles kernel after kernel in the process
itself, while it imports the wrapper. Ours are large, and Triton holds the interpreter's lock only in its front end, a fifth of
the time; so each of ours starts in a thread as soon as its text is there. All that the thread does is fill Triton's cache.
Inductor, when it asks for the kernel, waits for it where it would wait for a worker's, and then goes on as always. While it
waits, the kernels of the backward begin too (:mod:`.torch_compat_backward`).

The private symbols are fenced in :mod:`.torch_compat`.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .torch_compat import resolve
from .torch_compat_backward import begin_backward_of, lowered_alone
from .torch_compat_codegen import compile_arguments
from .torch_compat_gluon import source_type

__all__ = ["start_compiling"]

_log = logging.getLogger(__name__)


def start_compiling(name: str, source: str) -> None:
    """Begin to compile a kernel of the graph that is being lowered, where Inductor would begin only when it waits for it.

    Args:
        name: the kernel's function.
        source: its module, as the wrapper hands it to Inductor.
    """
    try:
        _start(name, source)
    except (AttributeError, TypeError) as error:  # another torch or Triton: it compiles the kernel itself, later
        _log.debug("%s is not compiled ahead: %r", name, error)


def _start(name: str, source: str) -> None:
    inductor = resolve("torch._inductor.async_compile")
    if (threads := inductor.get_compile_threads()) <= 1 or torch.version.hip:
        return  # the user wants one after the other
    if (workers := inductor.AsyncCompile.use_process_pool()) and not _begun:
        return  # Inductor gives it to a worker at once
    kernels, knobs = inductor.CompiledTritonKernels, resolve("triton:knobs")
    if kernels.get(source) is not None or knobs.compilation.always_compile or knobs.runtime.interpret:
        return
    for tool in ("_set_triton_ptxas_path", "_set_triton_libdevice_path"):  # the latter since 2.13
        getattr(inductor, tool, lambda: None)()  # both are part of Triton's key
    kernel = inductor._load_triton_kernel_from_source(name, source)
    if not kernel.configs:
        return  # the kernel of an earlier graph, compiled in this process
    graph = resolve("torch._inductor.virtualized:V").graph
    kernel.set_compile_info(
        resolve("torch._guards:CompileContext.current_compile_id")(), getattr(graph, "is_backward", False)
    )
    compiled = _begin(kernel, 0 if workers else threads)
    if compiled is None or lowered_alone.get():
        return
    forward = graph.module

    def result() -> Any:
        begin_backward_of(forward, until=compiled.done)
        compiled.result()
        kernels.remove_future(source)
        kernel.precompile(warm_cache_only=False, static_triton_bundle_key=kernels.key(source))
        return kernel

    kernels.save(source, resolve("torch._inductor.codecache:LambdaFuture")(result, future=compiled))


_begun: dict[str, Future[None]] = {}
"""What Triton is at work on, by its own keys."""


def _begin(kernel: Any, threads: int) -> Future[None] | None:
    """Triton at work on a kernel of :func:`.torch_compat_codegen.load_kernel`; with no threads, None unless it was begun."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    loaded = compile_arguments(kernel)
    kind = source_type(loaded.function, ASTSource)
    text = kind(loaded.function, loaded.signature, loaded.constants, loaded.attributes)
    key = f"{text.hash()} {loaded.arch} {sorted(loaded.options.items())}"
    if key in _begun or not threads:
        return _begun.get(key)

    def compile_kernel() -> None:
        try:
            triton.compile(text, target=GPUTarget("cuda", loaded.arch, 32), options=loaded.options)
        except Exception:  # what it means is Inductor's to say: it compiles the kernel itself
            _log.debug("%s was not compiled in a thread", loaded.function, exc_info=True)

    # Overrides of Triton's and Inductor's configuration belong to the context, which a thread does not inherit.
    future = _begun[key] = _threads(threads).submit(contextvars.copy_context().run, compile_kernel)
    future.add_done_callback(lambda _: _begun.pop(key, None))
    return future


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="parallax-compile")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of them
