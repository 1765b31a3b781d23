"""Kernels compiled by several processes at once, none of which sees the GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from .compile_worker import compiled
from .targets import Target

__all__ = ["CompilePool", "default_workers"]

_TIMEOUT = 180.0  # seconds of one kernel; those that spill without end are no candidates
_MEMORY_OF_A_WORKER = 1.5 * 2**30


def default_workers() -> int:
    """As many processes as there are cores for and memory is left for, one core left free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        memory = 4 * 2**30
    return max(1, min(cores - 1, int(memory / _MEMORY_OF_A_WORKER), 32))


class CompilePool:
    """Compiles kernels in worker processes; a context.

    Args:
        workers: how many processes; 0 compiles in this one.
        target: the GPU that is compiled for.
        report: whether to ask for registers and spills, which costs the assembler a second time.
    """

    def __init__(self, workers: int, target: Target, *, report: bool = False) -> None:
        self._workers, self._report = workers, report
        self._target = {**dataclasses.asdict(target), "rates": None}
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []

    def __enter__(self) -> CompilePool:
        for _ in range(self._workers):
            worker = _Worker()
            worker.start()  # importing takes seconds, in which there is a call to trace
            self._all.append(worker)
            self._idle.put(worker)
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._all:
            worker.stop()

    def compile(self, kernels: Iterable[tuple[Any, str, str]]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Compile ``(tag, name, source)``; yields ``(tag, answer)`` (:func:`.compile_worker.compiled`) as they are done."""
        requests = [
            (tag, {"name": name, "source": source, "target": self._target, "report": self._report})
            for tag, name, source in kernels
        ]
        if not self._workers:
            for tag, request in requests:
                yield tag, compiled(request)
            return
        with ThreadPoolExecutor(self._workers) as threads:
            pending: dict[Future[dict[str, Any]], Any] = {
                threads.submit(self._ask, request): tag for tag, request in requests
            }
            try:
                while pending:
                    for done in wait(pending, return_when=FIRST_COMPLETED).done:
                        yield pending.pop(done), done.result()
            except BaseException:
                for future in pending:
                    future.cancel()
                self.__exit__()  # what runs cannot be waited for
                raise

    def warm(self, kernels: Iterable[Any]) -> None:
        """Compile kernels (with ``name`` and ``source``) into Triton's cache, whatever comes of it."""
        for _ in self.compile((kernel.name, kernel.name, kernel.source) for kernel in kernels):
            pass

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started again after it crashed or hung."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def start(self) -> None:
        if self._process is None:
            self._process = _started()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._stopped:
            return {"seconds": 0.0, "error": "the search was stopped", "cause": "stopped"}
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(_TIMEOUT, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
        if line:
            return json.loads(line)
        self.stop()
        self._stopped = False
        if timed_out:
            return {"seconds": _TIMEOUT, "error": f"not compiled after {_TIMEOUT:.0f} s", "cause": "compile timeout"}
        code = process.poll()
        return {"seconds": 0.0, "error": f"the compiler ended with {code}", "cause": "compiler crashed"}

    def stop(self) -> None:
        self._stopped = True
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _started() -> subprocess.Popen[str]:
    # No GPU: a context on it for each worker would take its memory. The package as this process found it.
    root = str(Path(__file__).absolute().parents[2])
    paths = [root, *(path for path in sys.path if path)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # Not by -m, which would look in the current folder first.
    command = f"import sys; sys.path = [*filter(None, sys.path)]; from {__package__}.compile_worker import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", command],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
