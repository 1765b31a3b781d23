""":func:`autotune`: the best candidate of every stage on a GPU, searched once and kept in the store."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import validation
from .attention import attention
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering import tuned
from .lowering.space import EFFORTS
from .lowering.store import Entry, Store
from .shapes import Shape, dtype_of
from .spec import AttentionSpec

__all__ = ["TunedStage", "TuningReport", "autotune"]


@dataclass(frozen=True)
class TunedStage:
    """What was found for one use of a stage.

    Attributes:
        stage, shape, dtype: of what.
        candidate: the winner's fields; None where nothing could run.
        milliseconds, default_milliseconds: of the winner, and of what the package takes by itself; None unmeasured.
        tried: how many candidates; ``failed``: cause -> how many could not be taken.
        note: what came of the checks; ``kept`` entries were in the store already.
    """

    stage: str
    shape: Shape
    dtype: str
    candidate: dict[str, Any] | None
    milliseconds: float | None
    default_milliseconds: float | None
    tried: int
    failed: dict[str, int]
    note: str

    @property
    def speedup(self) -> float | None:
        """Of the winner over the default."""
        if not self.milliseconds or not self.default_milliseconds:
            return None
        return self.default_milliseconds / self.milliseconds


@dataclass
class TuningReport:
    """What :func:`autotune` found. ``str()`` of it is the table.

    Attributes:
        stages: one for each use of a stage.
        saved: whether the winners are on disk.
        seconds: how long it took.
        problems: what was wrong with the store.
        interrupted: whether the search was stopped before its end.
    """

    device: str
    effort: str
    stages: list[TunedStage] = field(default_factory=list)
    saved: bool = True
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def failed(self) -> Counter[str]:
        """Cause -> how many candidates of all stages."""
        return sum((Counter(stage.failed) for stage in self.stages), Counter())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        stages = [{**asdict(stage), "shape": stage.shape.sizes(), "speedup": stage.speedup} for stage in self.stages]
        return {**asdict(self), "stages": stages, "failed": dict(self.failed)}

    def __str__(self) -> str:
        from tabulate import tabulate

        headers = ["stage", "shape", "dtype", "winner", "ms", "default ms", "speed-up", "tried", "failed", ""]
        rows = [
            [
                stage.stage,
                str(stage.shape),
                stage.dtype,
                "-" if stage.candidate is None else candidate_text(stage.candidate),
                _number(stage.milliseconds, "{:.4f}"),
                _number(stage.default_milliseconds, "{:.4f}"),
                _number(stage.speedup, "{:.3f}"),
                stage.tried,
                sum(stage.failed.values()),
                stage.note,
            ]
            for stage in self.stages
        ]
        lines = [tabulate(rows, headers=headers, disable_numparse=True)]
        causes = ", ".join(f"{count} {cause}" for cause, count in self.failed.most_common())
        ended = "interrupted" if self.interrupted else "done"
        lines.append(
            f"{self.device}, effort {self.effort}, {ended} after {self.seconds:.0f} s; failed: {causes or 'none'}"
        )
        if not self.saved:
            lines.append("not saved: the winners hold for this process only")
        return "\n".join([*lines, *self.problems])


def autotune(
    spec: AttentionSpec,
    shapes: Any,
    dtypes: Any = torch.bfloat16,
    stages: Any = "all",
    effort: str = "normal",
    target: str = "auto",
    *,
    backward: bool = True,
    store: Store | None = None,
    measures: Any = None,
    workers: int | None = None,
    again: bool = False,
    progress: bool | None = None,
) -> TuningReport:
    """Search each stage of a call for its fastest candidate on this machine's GPU, and keep the winners in the store.

    The candidates of a stage's declared space that fit the target are compiled in parallel processes without the GPU, timed
    one after the other on it in interleaved rounds until the noise no longer hides who is behind, and the winner is checked:
    against what the default writes, and as part of the whole call against the float64 reference. Candidates that fail are
    counted, not fatal. Compiled calls then take the winners of their problem, or of lengths of the same bucket; what was
    compiled before keeps its kernels until ``torch.compiler.reset()``.

    Args:
        spec: the member.
        shapes: ``(B, H, L, D)`` or several; H, L and D may be pairs (query and key heads, query and key lengths, key and
            value widths); or text (``"4,16,4096,128"``).
        dtypes: one or several: ``torch.bfloat16``, ``"fp16"``, ...
        stages: names of stages, or ``"all"``.
        effort: ``"quick"`` (10 candidates a stage), ``"normal"`` (32) or ``"full"`` (all).
        target: ``"auto"``, this machine's GPU; another target needs ``measures="model"``.
        backward: tune the backward's stages too, and the forward as training has it.
        store: where winners go; None is the user's.
        measures: None times on the GPU. ``"model"`` ranks by the resource model, without a GPU; such winners are marked as
            untested. Or an object like :class:`~.lowering.search.Measures`.
        workers: compiling processes; None is as many as memory is free for, cores less one at most; 0 compiles in this one.
        again: search also what the store has already.
        progress: show progress on standard error; None does on a terminal, in the first process of a distributed job.

    Returns:
        a table of the winners.

    Raises:
        InputError, InputTypeError: (a ValueError, a TypeError) a wrong argument; a stage that no call has.
        UnsupportedError: the target is not this machine's GPU, and ``measures`` is None.
        KeyboardInterrupt: after what was found is stored; the same call goes on from there.
    """
    from .lowering.compile_pool import CompilePool, default_workers
    from .lowering.model import ModelTimer
    from .lowering.targets import resolve

    validation.check_spec(spec)
    if effort not in EFFORTS:
        raise InputError(f"effort must be one of {', '.join(EFFORTS)}, but got {effort!r}.")
    _check_options(store, measures, workers)
    for name, flag in (("backward", backward), ("again", again)):
        validation.check_flag(name, flag)
    problems = [(shape, dtype) for dtype in listed("dtypes", dtypes, dtype_of) for shape in listed_shapes(shapes)]
    wanted = None if stages == "all" else set(listed("stages", stages, _known_stage))
    for shape, dtype in problems:
        inputs = shape.tensors(spec, dtype)
        probe = inputs[3] if len(inputs) == 4 else None
        validation.check_tensors(inputs[0], inputs[1], inputs[2], probe, spec, enable_gqa=True)
        validation.check_compiled(inputs[0], inputs[2], spec, "cuda")
    resolved = resolve(target)
    if measures is None:
        _check_gpu(target, resolved)
        from .lowering.launching import Timer
    elif measures == "model":
        measures = ModelTimer(resolved)
    report = TuningReport(resolved.product, effort)
    start = time.perf_counter()
    report_resources = hasattr(measures, "resources")
    with (
        tuned.using(store or tuned.store()) as kept,
        CompilePool(default_workers() if workers is None else workers, resolved, report=report_resources) as pool,
        _progress(progress, len(problems)) as show,
    ):
        seen: set[str] = set()
        try:
            for shape, dtype in problems:
                timer = measures
                if measures is None:
                    timer = Timer()
                    timer.launches.compile = lambda kernels: pool.warm(kernels)
                seen |= _one(
                    spec, shape, dtype, wanted, effort, resolved, backward, timer, pool, kept, again, report, show
                )
        except KeyboardInterrupt:
            report.interrupted = True
            raise
        finally:
            report.seconds = time.perf_counter() - start
            report.problems = list(kept.problems)
            if report.interrupted:
                print(report, file=sys.stderr)
    if wanted is not None and wanted - seen:
        raise InputError(
            f"stages names {', '.join(sorted(wanted - seen))}, but the call has the stages {', '.join(sorted(seen))}."
        )
    return report


def _one(
    spec: AttentionSpec,
    shape: Shape,
    dtype: torch.dtype,
    wanted: set[str] | None,
    effort: str,
    target: Any,
    backward: bool,
    timer: Any,
    pool: Any,
    store: Store,
    again: bool,
    report: TuningReport,
    show: Any,
) -> set[str]:
    """Tune one shape; the stages that the call has."""
    from .lowering.candidates import stages
    from .lowering.search import Search
    from .lowering.space import explore

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, spec=spec, enable_gqa=True)

    def reference(*tensors: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="plx.attention was called without torch.compile")
            return attention(*tensors, spec=spec, enable_gqa=True)

    show(f"{shape} {_name(dtype)}: tracing", 0, 1)
    has_probe = spec.probe.kind != "zero"
    limit = EFFORTS[effort].candidates
    spaces = {
        # Some that are offered do not fit the mask's blocks or the tensors' layout.
        stage: explore(stage, shape.width, shape.value_width, dtype.itemsize, has_probe, target)[: limit and 2 * limit]
        for stage in stages()
        if wanted is None or stage in wanted
    }
    device = "meta" if timer.execute is None else "cuda"
    inputs = shape.tensors(spec, dtype, device, requires_grad=backward)
    search = Search(call, inputs, target, timer, spaces, effort, backward=backward)
    found = []
    try:
        for instance in search.instances():
            known = store.entries().get(Entry(instance.answer.question.key(), {}).digest)
            if known is not None and not again and _enough(known, effort, timer.tested):
                report.stages.append(_kept(known, shape, dtype))
                continue

            def event(what: str, done: int, of: int, stage: str = instance.stage) -> None:
                show(f"{shape} {_name(dtype)} {stage}: {what}", done, of)

            item = search.find(instance, pool, event)
            found.append(item)
            if not item.complete:
                raise KeyboardInterrupt
        search.verify(found, reference)
    finally:
        for item in found:
            stage = _stage(item, shape, dtype, timer.tested)
            report.stages.append(stage)
            if stage.candidate is not None:
                report.saved &= store.put([_entry(item, stage, effort, timer)])
        show("", 1, 1, advance=True)
    return {answer.question.stage for answer in search.code.answers}


def _enough(entry: Entry, effort: str, tested: bool) -> bool:
    """Whether a search of this effort has nothing to add to an entry."""
    done, names = entry.result.get("effort"), list(EFFORTS)
    tested = bool(entry.provenance.get("tested")) or not tested
    return done in names and names.index(done) >= names.index(effort) and tested


def _stage(item: Any, shape: Shape, dtype: torch.dtype, tested: bool) -> TunedStage:
    return TunedStage(
        stage=item.instance.stage,
        shape=shape,
        dtype=_name(dtype),
        candidate=None if item.winner is None else asdict(item.winner.candidate),
        milliseconds=item.milliseconds if tested and item.winner is not None else None,
        default_milliseconds=item.default_milliseconds if tested and item.winner is not None else None,
        tried=item.tried,
        failed=dict(item.failed),
        note=item.note or ("" if tested else "by the resource model, untested"),
    )


def _kept(entry: Entry, shape: Shape, dtype: torch.dtype) -> TunedStage:
    result = entry.result
    return TunedStage(
        stage=entry.key["stage"],
        shape=shape,
        dtype=_name(dtype),
        candidate=dict(entry.candidate),
        milliseconds=result.get("milliseconds"),
        default_milliseconds=result.get("default_milliseconds"),
        tried=0,
        failed={},
        note="kept from the store",
    )


def _entry(item: Any, stage: TunedStage, effort: str, timer: Any) -> Entry:
    question = item.instance.answer.question
    return Entry(
        key=question.key(),
        candidate=stage.candidate or {},
        result={
            "milliseconds": stage.milliseconds,
            "default_milliseconds": stage.default_milliseconds,
            "tried": item.tried,
            "failed": dict(item.failed),
            "effort": effort if item.complete else "interrupted",
            "shape": stage.shape.sizes(),
            **_takes(item, timer),
        },
        provenance={
            "source": f"plx.autotune, {timer.name}",
            "device": question.device,
            "versions": {"parallax_compile": question.package, "torch": question.torch, "triton": question.triton},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "tested": timer.tested,
        },
    )


def _takes(item: Any, timer: Any) -> dict[str, Any]:
    """What the winner's kernel takes, where that is what ranked it."""
    found = getattr(timer, "resources", {}).get(item.winner.source)
    if found is None:
        return {}
    taken = ("registers", "spill_stores", "spill_loads", "shared_memory", "tensor_memory")
    return {"resources": {name: getattr(found, name) for name in taken}}


def _check_gpu(target: str, resolved: Any) -> None:
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "autotune times on a GPU, and this machine has none. Pass measures='model' to rank by the resource model "
            "(marked as untested), or tune on a machine with the GPU and import its store."
        )
    if target != "auto" and tuple(resolved.capability) != torch.cuda.get_device_capability():
        raise UnsupportedError(
            f"autotune times on this machine's GPU, which is not {target}. Use target='auto', or measures='model'."
        )


def _check_options(store: Any, measures: Any, workers: Any) -> None:
    if store is not None and not isinstance(store, Store):
        raise InputTypeError(
            f"store must be a parallax_compile.lowering.store.Store or None, but got {type(store).__name__}. "
            "PARALLAX_STORE names the user's folder."
        )
    if measures not in (None, "model") and not all(hasattr(measures, name) for name in ("execute", "load", "sample")):
        raise InputError(f"measures must be None, 'model' or an object like search.Measures, but got {measures!r}.")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise InputError(f"workers must be an integer of at least 0 or None, but got {workers!r}.")


def _known_stage(name: Any) -> str:
    from .lowering.candidates import stages

    if name not in stages():
        raise InputError(f"stages must be of {', '.join(stages())}, or 'all', but got {name!r}.")
    return str(name)


def listed(name: str, given: Any, convert: Callable[[Any], Any]) -> list[Any]:
    """One or several of an argument, each converted.

    Raises:
        InputError: none.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if several and not given:
        raise InputError(f"{name} must name at least one, but got none.")
    return [convert(item) for item in (given if several else [given])]


def listed_shapes(given: Any) -> list[Shape]:
    """One shape or several: a tuple whose first item is an int is one.

    Raises:
        InputError, InputTypeError: none, or not shapes.
    """
    one = not isinstance(given, Sequence) or isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    return listed("shapes", [given] if one else given, Shape.of)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or value != value else form.format(value)


def candidate_text(candidate: Mapping[str, Any]) -> str:
    """A candidate's fields in a line, as the tables of reports and of the store have it."""
    sizes = "{block_m}x{block_n}, {num_warps} warps, {num_stages} stages"
    try:
        text = [sizes.format_map(candidate)]
    except KeyError:
        return ", ".join(f"{name} {value}" for name, value in candidate.items())  # of another version's making
    switches = {"tma": "TMA", "specialized": "specialised"}
    text += [word for name, word in switches.items() if candidate.get(name)]
    return ", ".join([*text, *([f"{candidate['held']} held"] if candidate.get("held") else [])])


@contextlib.contextmanager
def _progress(wanted: bool | None, problems: int) -> Iterator[Any]:
    """A function ``(text, done, of, advance=False)`` that shows how far the search is."""
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" if wanted is None else wanted
    if not shown:
        yield lambda *args, **kwargs: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        every = bars.add_task("problems", total=problems)
        current = bars.add_task("", total=1)

        def show(text: str, done: int, of: int, advance: bool = False) -> None:
            if advance:
                bars.advance(every)
                return
            bars.update(current, description=text, completed=done, total=of)

        yield show
