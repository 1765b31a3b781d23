"""Generated graphs run on this machine's GPU, with each kernel's launch kept, so that it can be timed and exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import torch_compat_codegen as compat
from .codegen import GeneratedGraph, GeneratedKernel, Trial

__all__ = ["Launches", "Timer"]


@dataclass
class Launches:
    """Executes generated graphs (a :class:`~.codegen.Recorder`'s ``execute``) and keeps the arguments of each kernel's launch.

    Attributes:
        arguments: source of a kernel -> what it was launched with last, the three sizes of the grid at the end.
        exchanged: source of a kernel -> the trial that is launched in its place.
        launched: names of the kernels that were launched.
        compile: called with the kernels of a graph before it runs for the first time.
    """

    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    exchanged: dict[str, Trial] = field(default_factory=dict)
    launched: list[str] = field(default_factory=list)
    compile: Callable[[Sequence[GeneratedKernel]], None] = lambda kernels: None
    _modules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, generated: GeneratedGraph, traced: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
        """Run one graph."""
        if generated.wrapper not in self._modules:
            self.compile(generated.kernels)
            module: dict[str, Any] = {"__name__": "generated_wrapper"}
            with compat.record_kernels(lambda name, source: _Kernel(self, name, source)):
                exec(compile(generated.wrapper, "<generated wrapper>", "exec"), module)
            self._modules[generated.wrapper] = module
        with torch.no_grad():
            return self._modules[generated.wrapper]["call"](list(arguments))


class _Kernel:
    """Stands in a wrapper for one kernel, which is loaded by its first launch."""

    def __init__(self, launches: Launches, name: str, source: str) -> None:
        self._launches, self._name, self._source = launches, name, source

    def run(self, *arguments: Any, **options: Any) -> Any:
        launches = self._launches
        launches.arguments[self._source] = arguments
        trial = launches.exchanged.get(self._source)
        if trial is None:
            launches.launched.append(self._name)
            return loaded(self._name, self._source).run(*arguments, **options)
        launches.launched.append(trial.name)
        return loaded(trial.name, trial.source).run(*with_grid(arguments, trial), **options)


_loaded: dict[tuple[str, str], Any] = {}


def loaded(name: str, source: str) -> Any:
    """The launcher of a generated kernel, compiled from Triton's cache where that has it."""
    if (name, source) not in _loaded:
        _loaded[name, source] = compat.load_kernel(name, source)
    return _loaded[name, source]


def with_grid(arguments: Sequence[Any], trial: Trial) -> tuple[Any, ...]:
    """A launch's arguments with the grid of another tile."""
    return (*arguments[: len(arguments) - len(trial.grid)], *trial.grid)


class Timer:
    """Times a stage's candidates by themselves on this machine's GPU: CUDA events around each launch, a cold L2 before it.

    Attributes:
        name: what measures, for the provenance.
        tested: whether times are measured.
    """

    name = "CUDA events"
    tested = True

    def __init__(self) -> None:
        self.launches = Launches()
        self._arguments: tuple[Any, ...] = ()
        self._flush: Tensor | None = None

    @property
    def execute(self) -> Callable[..., Sequence[Any]]:
        """What runs the graphs whose kernels are timed."""
        return self.launches

    def load(self, kernel: GeneratedKernel) -> None:
        """Take the launch of a graph's kernel as the one whose candidates are timed."""
        self._arguments = self.launches.arguments[kernel.source]

    def sample(self, trial: Trial, repeats: int) -> list[float]:
        """Milliseconds of some launches."""
        launch = self._launch(trial)
        if self._flush is None:
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(max(2 * size, 2**20), dtype=torch.int8, device="cuda")
        launch()
        torch.cuda.synchronize()
        # All is queued before anything is waited for, so that the host's time is not measured.
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    @torch.no_grad()
    def difference(self, trial: Trial, default: Trial) -> float:
        """Largest relative difference (in norm) between what two candidates write on the same operands."""
        tensors = [value for value in self._arguments if isinstance(value, Tensor)]
        before = [tensor.clone() for tensor in tensors]

        def written(of: Trial) -> list[Tensor]:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            self._launch(of)()
            torch.cuda.synchronize()
            return [tensor.clone() for tensor in tensors]

        worst = 0.0
        for ours, theirs in zip(written(trial), written(default), strict=True):
            if not ours.is_floating_point():
                worst = worst if torch.equal(ours, theirs) else float("inf")
                continue
            # Rows without a key have an LSE of -inf, and what no kernel writes may be NaN in both.
            a, b = (torch.nan_to_num(x.double(), nan=0.0, posinf=0.0, neginf=0.0) for x in (ours, theirs))
            if not torch.equal(ours.isfinite(), theirs.isfinite()):
                return float("inf")
            norm = float(b.norm())
            worst = max(worst, float((a - b).norm()) / norm if norm else float((a - b).norm()))
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        return worst

    def _launch(self, trial: Trial) -> Callable[[], Any]:
        kernel, arguments = loaded(trial.name, trial.source), with_grid(self._arguments, trial)
        stream = torch.cuda.current_stream().cuda_stream
        return lambda: kernel.run(*arguments, stream=stream)
