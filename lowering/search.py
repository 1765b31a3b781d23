"""The search for the best candidates of one call's stages: generate all, compile in processes, time, check.

What is timed is each stage's kernel by itself, on the operands that the call gave it. A winner counts only when it writes what
the default wrote, and when the whole call with the winners is as near to the reference as it was with the defaults.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import torch_compat_codegen as compat
from . import tuned
from .candidates import Candidate
from .codegen import LOCK, GeneratedCode, GeneratedKernel, Instance, Recorder, Trial, fresh, prepared
from .compile_pool import CompilePool
from .cubin import Resources
from .race import Race, race
from .space import EFFORTS
from .targets import Target

__all__ = ["Found", "Measures", "Search"]

_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-12}  # float32 products may be TF32
_REFERENCE_BYTES = 24 * 2**30  # what the dense reference of one group of heads may take

_log = logging.getLogger(__name__)

Event = Callable[[str, int, int], None]


class Measures(Protocol):
    """What tells candidates apart: :class:`~.launching.Timer`, :class:`~.model.ModelTimer`, or a test's own."""

    name: str
    tested: bool

    @property
    def execute(self) -> Callable[..., Sequence[Any]] | None:
        """What runs generated graphs; None where nothing runs."""

    def load(self, kernel: GeneratedKernel) -> None:
        """Take the launch of a graph's kernel as the one whose candidates are measured."""

    def sample(self, trial: Trial, repeats: int) -> Sequence[float]:
        """Measurements, less is better."""

    def difference(self, trial: Trial, default: Trial) -> float:
        """Relative difference between what two candidates write."""


@dataclass
class Found:
    """What a search found for one use of a stage.

    Attributes:
        instance: the use.
        winner: the candidate; None where nothing ran.
        milliseconds, default_milliseconds: medians, of the winner and of what the package takes by itself.
        tried: candidates that were compiled or timed.
        failed: cause -> how many.
        complete: False when the search was interrupted.
        note: what came of the checks.
    """

    instance: Instance
    winner: Trial | None = None
    milliseconds: float = float("nan")
    default_milliseconds: float = float("nan")
    tried: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    complete: bool = True
    note: str = ""


class Search:
    """The search of one call.

    Args:
        call: ``call(*inputs)`` is the attention; traceable without a graph break.
        inputs: its tensors; without data where ``measures`` runs nothing.
        target: the GPU.
        measures: what tells candidates apart.
        spaces: stage -> candidates, the best guesses first; other stages take what they take.
        effort: a name of :data:`~.space.EFFORTS`.
        backward: whether the backward's stages are there too.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        target: Target,
        measures: Measures,
        spaces: Mapping[str, Sequence[Candidate]],
        effort: str,
        *,
        backward: bool = True,
    ) -> None:
        self._measures, self._target, self._backward = measures, target, backward
        self._limit, self._rounds, self._repeats = EFFORTS[effort]
        self._inputs = list(inputs) if measures.execute is not None else prepared(list(inputs), backward)
        self._recorder = Recorder(target, max_autotune=True, execute=measures.execute, isolated=True)
        self._compiled = torch.compile(fresh(call), backend=self._recorder.backend, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        with tuned.exploring(spaces):
            # Copies: what the kernels wrote is written again when they are timed.
            self._first = [result.clone() for result in self.results()]
        self.code: GeneratedCode = self._recorder.code()
        _log.info("traced, and ran once: %.1f s", time.perf_counter() - start)

    def instances(self) -> list[Instance]:
        """The uses of stages, each question once."""
        once = {instance.answer.question: instance for instance in self.code.instances}
        return [instance for instance in once.values() if instance.answer.level == "explored"]

    def results(self) -> list[Tensor]:
        """Output and gradients of the call, by the kernels that are in place now."""
        with LOCK, compat.deterministic_tracing(), torch.set_grad_enabled(self._backward):
            out = self._compiled(*self._inputs)
            if not self._backward:
                return [out]
            torch.manual_seed(1)
            wanted = [tensor for tensor in self._inputs if tensor.requires_grad]
            return [out.detach(), *torch.autograd.grad(out, wanted, torch.randn_like(out))]

    # --- one stage --------------------------------------------------------------------------------------------------

    def find(self, instance: Instance, pool: CompilePool, on_event: Event = lambda what, done, of: None) -> Found:
        """The best candidate of one use of a stage; on an interrupt, the best so far (``complete`` is False)."""
        found = Found(instance)
        trials = list(instance.trials[: self._limit])
        with _interruptible(found):
            compiled = self._compile(trials, pool, found, on_event)
            if not compiled:
                found.note = "no candidate compiles"
                return found
            self._measures.load(next(kernel for kernel in self.code.kernels if instance.is_of(kernel)))
            default = instance.trials[0]

            def on_round(number: int, standing: Race[Trial]) -> None:
                on_event("time", number + 1, self._rounds)
                self._settle(found, standing)

            start = time.perf_counter()
            outcome = race(compiled, self._sample, rounds=self._rounds, repeats=self._repeats, on_round=on_round)
            self._settle(found, outcome)
            found.failed.update(_cause(reason) for reason in outcome.failures.values())
            _log.info("%s: raced in %.1f s", instance.stage, time.perf_counter() - start)
            on_event("check", 0, 1)
            self._accept(found, outcome, default)
        return found

    def _compile(self, trials: list[Trial], pool: CompilePool, found: Found, on_event: Event) -> list[Trial]:
        good: set[str] = set()
        done, start = 0, time.perf_counter()
        on_event("compile", 0, len(trials))
        for trial, answer in pool.compile((trial, trial.name, trial.source) for trial in trials):
            found.tried = done = done + 1
            on_event("compile", done, len(trials))
            if "error" in answer:
                found.failed[answer["cause"]] += 1
                continue
            good.add(trial.source)
            if hasattr(self._measures, "resources"):
                self._measures.resources[trial.source] = Resources(**answer["resources"])
        _log.info("%s: %d kernels compiled in %.1f s", found.instance.stage, done, time.perf_counter() - start)
        return [trial for trial in trials if trial.source in good]

    def _sample(self, trial: Trial, repeats: int) -> list[float]:
        return list(self._measures.sample(trial, repeats))

    @staticmethod
    def _settle(found: Found, standing: Race[Trial]) -> None:
        if standing.winner is None:
            return
        found.winner = standing.winner
        found.milliseconds = standing.medians[standing.winner]
        found.default_milliseconds = standing.medians.get(found.instance.trials[0], float("nan"))

    def _accept(self, found: Found, outcome: Race[Trial], default: Trial) -> None:
        """Let the fastest candidate win that writes what the default writes."""
        dtype = getattr(torch, found.instance.answer.question.dtype)
        for trial in sorted(outcome.medians, key=lambda trial: (trial != found.winner, outcome.medians[trial])):
            if trial == default or self._measures.difference(trial, default) <= 4 * _ROUNDING[dtype]:
                found.winner, found.milliseconds = trial, outcome.medians[trial]
                return
            found.failed["wrong result"] += 1

    # --- the whole call ---------------------------------------------------------------------------------------------

    def verify(self, found: Sequence[Found], reference: Callable[..., Tensor]) -> None:
        """Compare the call with the winners against ``reference`` in float64; winners that make it worse lose their place.

        Args:
            reference: the same call, uncompiled, on float64 tensors of one batch entry and one group of heads.
        """
        launches = self._measures.execute
        exchanged = getattr(launches, "exchanged", None)
        winners = [item for item in found if item.winner is not None and item.winner != item.instance.trials[0]]
        if exchanged is None or not winners:
            return
        wanted = self._reference(reference)
        if wanted is None:
            for item in winners:
                item.note = "checked against the default only: the reference is too large"
            return
        allowed = [2 * max(error, _ROUNDING[self._inputs[0].dtype]) for error in _errors(self._first, wanted)]

        def fine(of: Sequence[Found]) -> bool:
            exchanged.clear()
            for item in of:
                kernel = next(kernel for kernel in self.code.kernels if item.instance.is_of(kernel))
                exchanged[kernel.source] = item.winner
            try:
                return all(a <= b for a, b in zip(_errors(self.results(), wanted), allowed, strict=True))
            finally:
                exchanged.clear()

        guilty = [] if fine(winners) else [item for item in winners if not fine([item])] or winners
        for item in winners:
            item.note = "checked against the reference"
            if item in guilty:
                item.failed["wrong result"] += 1
                item.winner, item.milliseconds = item.instance.trials[0], item.default_milliseconds
                item.note = "the default: the winner was further from the reference"

    def _reference(self, reference: Callable[..., Tensor]) -> list[Tensor] | None:
        """Output and gradients of the first batch entry and group of heads in float64, or None if that is too large."""
        query, key = self._inputs[:2]
        group = query.size(1) // key.size(1)
        if 24 * 8 * group * query.size(2) * key.size(2) > _REFERENCE_BYTES:
            return None
        parts = [_part(tensor, key.size(1)).detach().double().requires_grad_() for tensor in self._inputs]
        out = reference(*parts)
        if not self._backward:
            return [out.detach()]
        torch.manual_seed(1)
        grad = _part(torch.randn_like(self._first[0]), key.size(1)).double()
        wanted = [part for part, tensor in zip(parts, self._inputs, strict=True) if tensor.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def _part(tensor: Tensor, kv_heads: int) -> Tensor:
    """The first batch entry and the heads of the first key head."""
    return tensor[:1, : tensor.size(1) // kv_heads]


def _errors(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """Relative errors in norm, of the part that the reference computed."""
    found = []
    for result, want in zip(results, wanted, strict=True):
        part = result[: want.size(0), : want.size(1)].double()
        error = float((part - want).norm() / want.norm().clamp_min(1e-30))
        found.append(error if error == error else float("inf"))
    return found


def _cause(reason: str) -> str:
    if "OutOfResources" in reason or "shared memory" in reason:
        return "out of shared memory"
    return f"launch failed ({reason.partition(':')[0]})"


@contextlib.contextmanager
def _interruptible(found: Found) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        found.complete = False
        found.note = "interrupted"
