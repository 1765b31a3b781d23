"""Which of several is fastest, with as few measurements as the noise allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Race", "race"]

K = TypeVar("K", bound=Hashable)

_LEAST_SAMPLES = 4
_SCALE_OF_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_CONFIDENT = 2.5  # standard errors that set two runners apart
_TIE = 0.005  # a runner must be this much faster than the one before it in the order to take its place


@dataclass(frozen=True)
class Race(Generic[K]):
    """The outcome.

    Attributes:
        winner: the fastest; None when every runner failed.
        medians: runner -> median of its samples, of those that ran.
        samples: runner -> how many samples it took.
        failures: runner -> why it could not run.
    """

    winner: K | None
    medians: Mapping[K, float]
    samples: Mapping[K, int]
    failures: Mapping[K, str]


def race(
    runners: Sequence[K],
    sample: Callable[[K, int], list[float]],
    *,
    rounds: int,
    repeats: int,
    on_round: Callable[[int, Race[K]], None] = lambda number, so_far: None,
) -> Race[K]:
    """Time ``runners`` in interleaved rounds; one that is behind the leader beyond its noise is not timed again.

    Interleaved, because a device that gets warm gets slow: what is compared was measured side by side.

    Args:
        runners: in the order of preference: of two that tie, the first wins.
        sample: ``(runner, repeats) -> times``; what it raises is that runner's failure.
        rounds, repeats: at most how many rounds, of how many samples.
        on_round: called after each round with the standing.
    """
    times: dict[K, list[float]] = {runner: [] for runner in runners}
    failures: dict[K, str] = {}
    running = list(runners)
    for number in range(rounds):
        for runner in running:
            try:
                times[runner] += sample(runner, repeats)
            except Exception as error:  # noqa: PERF203  (a candidate that cannot be launched is a result of the search)
                failures[runner] = f"{type(error).__name__}: {str(error)[:200]}"
        running = [runner for runner in running if runner not in failures]
        standing = _standing(runners, times, failures)
        on_round(number, standing)
        if standing.winner is None:
            break
        best = standing.winner
        limit = standing.medians[best] + _CONFIDENT * _error(times[best])
        running = [
            runner
            for runner in running
            if runner == best
            or len(times[runner]) < _LEAST_SAMPLES
            or standing.medians[runner] - _CONFIDENT * _error(times[runner]) <= limit
        ]
        if len(running) <= 1:
            break
    return _standing(runners, times, failures)


def _standing(runners: Sequence[K], times: Mapping[K, list[float]], failures: Mapping[K, str]) -> Race[K]:
    medians = {
        runner: statistics.median(times[runner]) for runner in runners if times[runner] and runner not in failures
    }
    winner: K | None = None
    for runner, median in medians.items():
        if winner is None or median < medians[winner] * (1 - _TIE):
            winner = runner
    return Race(winner, medians, {runner: len(taken) for runner, taken in times.items()}, dict(failures))


def _error(samples: Sequence[float]) -> float:
    """Standard error of a median, from the deviations' median, which a single slow sample does not move."""
    if len(samples) < 2:
        return math.inf
    middle = statistics.median(samples)
    deviation = _SCALE_OF_NORMAL * statistics.median(abs(value - middle) for value in samples)
    return 1.2533 * deviation / math.sqrt(len(samples))
