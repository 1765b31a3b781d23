"""Jobs of a benchmark in processes of their own: built all at once, their timed parts one after the other.

Compiling is most of a benchmark's time and needs no GPU. A job's process builds and runs whatever it times once, then waits
within ``alone()`` until every job of its wave has come so far, and times when no other does. Milliseconds are those of a
benchmark that runs by itself; seconds of first calls are not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Alone = Callable[[], contextlib.AbstractContextManager[None]]
"""What a job runs each of its timed parts within; ``contextlib.nullcontext`` for one that is by itself."""

T = TypeVar("T")


def outcomes(
    run: Callable[[T, Alone], Any], jobs: Sequence[T], at_once: int = 0, patience: float = 300.0
) -> Iterator[tuple[T, Any]]:
    """Each job with what ``run`` made of it, in the order of the jobs; where it failed, the reason as a string.

    Args:
        run: a function of a module, which its process imports.
        at_once: jobs of a wave; 0 runs them in this process, one by one.
        patience: seconds that a built job waits for the others of its wave.
    """
    for first in range(0, len(jobs), at_once or 1):
        wave = jobs[first : first + (at_once or 1)]
        yield from zip(wave, _wave(run, wave, patience) if at_once else [_guarded(run, wave[0])], strict=True)


def _guarded(run: Callable[[T, Alone], Any], job: T, alone: Alone = contextlib.nullcontext) -> Any:
    try:
        return run(job, alone)
    except Exception as error:  # a job that fails is a result, not a failure of the run
        return f"{type(error).__name__}: {str(error)[:300]}"


def _wave(run: Callable[[T, Alone], Any], jobs: Sequence[T], patience: float) -> Iterator[Any]:
    spawn = multiprocessing.get_context("spawn")
    built, turn, results = spawn.Barrier(len(jobs), timeout=patience), spawn.Lock(), spawn.Queue()
    arguments = [(run, job, i, built, turn, results) for i, job in enumerate(jobs)]
    workers = [spawn.Process(target=_in_process, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    held: dict[int, Any] = {}
    for index, worker in enumerate(workers):
        while index not in held:
            ended = [i for i in range(index, len(workers)) if i not in held and not workers[i].is_alive()]
            try:
                number, found = results.get(timeout=2)
                held[number] = found
            except queue.Empty:
                if ended:  # nothing comes from these any more, and nobody must wait for them
                    built.abort()
                if index in ended:
                    held[index] = f"its process ended with {worker.exitcode}"
        yield held.pop(index)


def _in_process(run: Callable[[T, Alone], Any], job: T, index: int, built: Any, turn: Any, results: Any) -> None:
    waited = False

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        nonlocal waited
        if not waited:
            waited = True
            with contextlib.suppress(threading.BrokenBarrierError):  # one is late or gone: no reason to wait
                built.wait()
        with turn:
            yield

    found = _guarded(run, job, alone)
    if not waited:
        with alone():  # it times nothing, but none computes while another is timing
            pass
    results.put((index, found))
