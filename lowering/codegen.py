"""The code that Inductor generates for a target, obtained on any machine: with the target's GPU, another one, or none.

The function is traced and differentiated for real (Dynamo, AOTAutograd); each graph is then copied onto a pretended GPU of the
target's kind and handed to Inductor, whose kernels are recorded instead of compiled. No value is ever computed: the compiled
function gets results of the right shapes, so that long sequences cost nothing.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..errors import InputError, InputTypeError, ParallaxError, UnsupportedError
from . import torch_compat_codegen as compat
from . import tuned
from .candidates import Candidate
from .targets import Target, resolve

__all__ = [
    "Argument",
    "GeneratedCode",
    "GeneratedGraph",
    "GeneratedKernel",
    "Instance",
    "Recorder",
    "Trial",
    "fresh",
    "generate",
    "prepared",
    "require_triton",
]

Direction = Literal["forward", "backward"]
Execute = Callable[["GeneratedGraph", fx.GraphModule, list[Any]], Sequence[Any]]

_TEMPLATE_KERNELS = "triton_tem_"  # how Inductor names the kernels that it makes from templates
_OUR_TEMPLATES = "triton_parallax_"  # how Inductor names the candidates made from ours

LOCK = threading.RLock()
"""Held while Inductor is told of another device, which the whole process sees."""


@dataclass(frozen=True)
class GeneratedKernel:
    """One Triton kernel of a graph.

    Attributes:
        name: by which Inductor's wrapper asks for it. The function of a kernel of ours is called after its template.
        source: the module that Inductor would compile.
        direction: the graph that it belongs to.
        stage: the stage of the plan whose template it was made from; None for kernels that Inductor fused by itself.
        parameters: what the template was filled with (tiles, switches), with ``num_warps`` and ``num_stages``; empty for
            kernels that Inductor fused by itself.
    """

    name: str
    source: str = field(repr=False)
    direction: Direction
    stage: str | None
    parameters: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def is_template(self) -> bool:
        """Whether the kernel was made from a template (and not from Inductor's pointwise and reduction code)."""
        return self.name.startswith(_TEMPLATE_KERNELS)


@dataclass(frozen=True)
class Argument:
    """A tensor that a graph takes at run time."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class GeneratedGraph:
    """One graph: the forward, or the backward.

    Attributes:
        direction: which.
        wrapper: the Python module that allocates, launches the kernels and returns.
        kernels: in the order in which the wrapper defines them.
        arguments: what the graph was called with; sizes that vary are ints among them. None if it was not called.
    """

    direction: Direction
    wrapper: str = field(repr=False)
    kernels: tuple[GeneratedKernel, ...]
    arguments: tuple[Argument | int | None, ...] | None = None


@dataclass(frozen=True)
class Trial:
    """A stage's kernel filled with one of the candidates that were offered, by itself.

    Attributes:
        candidate: which.
        name, source: by which Inductor would ask for the kernel, and the module that holds it.
        parameters: what the template was filled with.
        grid: the blocks of a launch.
    """

    candidate: Candidate
    name: str
    source: str = field(repr=False)
    parameters: Mapping[str, Any] = field(repr=False, hash=False)
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Instance:
    """One use of a stage in a call, with the kernel of every candidate; its first trial is what the graph was given."""

    answer: tuned.Answer
    trials: tuple[Trial, ...] = field(repr=False)

    @property
    def stage(self) -> str:
        """The stage."""
        return self.answer.question.stage

    def is_of(self, kernel: GeneratedKernel) -> bool:
        """Whether a graph's kernel is this use of the stage."""
        return kernel.stage == self.stage and kernel.parameters.items() >= self.trials[0].parameters.items()


@dataclass(frozen=True)
class GeneratedCode:
    """All code that Inductor generates for a call.

    Attributes:
        target: the GPU that it is for.
        graphs: forward first.
        offered: for each stage, the candidates that Inductor could choose from, best first.
        answers: what each use of a stage was offered and which level of the lookup answered (:mod:`.tuned`), in order.
        instances: each use of a stage with the kernels of all its candidates, where every candidate was asked for.
    """

    target: Target
    graphs: tuple[GeneratedGraph, ...]
    offered: Mapping[str, tuple[Mapping[str, Any], ...]] = field(hash=False)
    answers: tuple[tuned.Answer, ...] = field(default=(), repr=False)
    instances: tuple[Instance, ...] = field(default=(), repr=False)

    @property
    def kernels(self) -> tuple[GeneratedKernel, ...]:
        """The kernels of every graph."""
        return tuple(kernel for graph in self.graphs for kernel in graph.kernels)

    @property
    def wrappers(self) -> tuple[str, ...]:
        """The wrappers of every graph."""
        return tuple(graph.wrapper for graph in self.graphs)

    def stage(self, name: str) -> GeneratedKernel:
        """The kernel of the stage called ``name``.

        Raises:
            KeyError: no kernel, or several, were generated for the stage.
        """
        found = [kernel for kernel in self.kernels if kernel.stage == name]
        if len(found) != 1:
            raise KeyError(f"{len(found)} kernels of stage {name!r}; stages: {sorted(self.offered)}")
        return found[0]


def generate(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | Target | None,
    candidate: int | Mapping[str, int] = 0,
    max_autotune: bool = False,
    backward: bool = True,
    dynamic: bool | None = None,
) -> GeneratedCode:
    """The code that ``torch.compile(fn, fullgraph=True)(*args, **kwargs)`` would run on ``target``.

    Args:
        fn: a function or module, traceable without a graph break. It is not executed.
        args, kwargs: its arguments; tensors on the CPU, on a GPU, or without data (``device="meta"``).
        target: see :func:`.targets.resolve`.
        candidate: which candidate each stage takes, of those that Inductor would time: an index for all stages (a stage
            with fewer takes its last), or stage name -> index.
        max_autotune: offer every candidate, as ``mode="max-autotune"`` does, even where ``candidate`` is 0.
        backward: generate the backward too: of the tensors that require a gradient, or of every floating tensor among
            the arguments where none does.
        dynamic: as for ``torch.compile``: whether lengths are symbols of the generated code.

    Raises:
        InputError: the target is unknown, or no stage has the candidate.
        InputTypeError: ``candidate`` is neither an int nor a mapping.
        UnsupportedError: triton is not installed.
        ParallaxError: whatever ``fn`` itself or the lowering raises, as itself.
    """
    require_triton()
    resolved = resolve(target)
    recorder = Recorder(resolved, candidate=candidate, max_autotune=max_autotune)
    flat, structure = pytree.tree_flatten((list(args), dict(kwargs or {})))
    flat = prepared(flat, backward)
    args, kwargs = pytree.tree_unflatten(flat, structure)
    with LOCK, compat.deterministic_tracing(), torch.set_grad_enabled(backward), _user_errors():
        compiled = torch.compile(fresh(fn), backend=recorder.backend, fullgraph=True, dynamic=dynamic)
        results = compiled(*args, **kwargs)
        if backward:
            _differentiate(results)
    return recorder.code()


def require_triton() -> Any:
    """The triton module.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import triton
    except ImportError as error:
        raise UnsupportedError("generated kernels need triton, which is not installed (pip install triton).") from error
    return triton


class Recorder:
    """A ``torch.compile`` backend that records what Inductor generates for a target.

    Args:
        target, candidate, max_autotune: see :func:`generate`.
        execute: what running a compiled graph does: ``(generated, traced, arguments) -> results``. The default makes
            results without values. It may be called any number of times, after compilation.
        isolated: whether kernels are kept apart: no buffer holds one result after another, so that what a kernel was launched
            with is still there after its graph ran, and nothing is fused into a stage's kernel, so that every candidate
            takes what it was launched with.
    """

    def __init__(
        self,
        target: Target,
        *,
        candidate: int | Mapping[str, int] = 0,
        max_autotune: bool = False,
        execute: Execute | None = None,
        isolated: bool = False,
    ) -> None:
        self.target = target
        self._isolated = isolated
        self._candidate = _checked_candidate(candidate)
        self._execute = execute or _without_values
        self._every = max_autotune or self._candidate.any
        self._graphs: list[GeneratedGraph] = []
        self._heard: list[tuned.Answer] = []
        self._offered: dict[str, tuple[Mapping[str, Any], ...]] = {}
        self._filled: dict[str, list[dict[str, Any]]] = {}
        self._answers: list[tuned.Answer] = []
        self._instances: list[Instance] = []
        self.backend = compat.compile_backend(self._compile)

    def code(self) -> GeneratedCode:
        """What was recorded so far.

        Raises:
            InputError: a candidate was asked for that no stage has.
        """
        self._candidate.check(self._offered)
        order = sorted(self._graphs, key=lambda graph: graph.direction == "backward")
        offered = MappingProxyType(dict(self._offered))
        return GeneratedCode(self.target, tuple(order), offered, tuple(self._answers), tuple(self._instances))

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
        traced, there = graph, list(inputs)
        if not any(isinstance(value, Tensor) and value.device.type == "cuda" for value in inputs):
            graph, there = compat.move_graph(graph, inputs)
        else:
            traced = copy.deepcopy(graph)
        direction: Direction = "backward" if kwargs.get("is_backward") else "forward"
        sources: list[tuple[str, str]] = []
        wrappers: list[str] = []
        hooks = compat.InductorHooks(
            on_kernel=lambda name, source: sources.append((name, source)),
            on_wrapper=wrappers.append,
            on_choices=self._choose,
        )
        # The choice is made by us, without timing; with one candidate offered there is nothing to choose.
        with tuned.listening() as self._heard:
            options = {"max_autotune": self._every}
            if self._isolated:
                options |= dict.fromkeys(("allow_buffer_reuse", "inplace_buffers", "epilogue_fusion"), False)
            compat.triton_source(graph, there, self.target, hooks, options, **kwargs)
        self._answers += self._heard
        kernels = tuple(self._kernel(name, source, direction) for name, source in sources)
        generated = GeneratedGraph(direction, _reproducible("\n".join(wrappers)), kernels)
        position = len(self._graphs)
        self._graphs.append(generated)

        def run(arguments: list[Any]) -> Any:
            mine = list(arguments)
            arguments.clear()
            described = tuple(map(_described, mine))
            self._graphs[position] = GeneratedGraph(direction, generated.wrapper, kernels, described)
            return self._execute(self._graphs[position], traced, mine)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _choose(self, choices: list[Any]) -> list[Any]:
        stages = {_stage_of(choice.name) for choice in choices}
        stage = stages.pop() if len(stages) == 1 else None
        if stage is None:  # a choice that is not about a stage of ours: a matrix product of the caller's
            return choices[:1]
        self._offered[stage] = tuple(MappingProxyType(_parameters_of(choice)) for choice in choices)
        self._filled.setdefault(stage, []).extend(map(_parameters_of, choices))
        if self._every:
            answer = self._heard[-1]  # a stage asks, and then lets Inductor choose
            trials = (
                Trial(c, *compat.choice_source(choice), _parameters_of(choice), compat.choice_grid(choice))
                for c, choice in zip(answer.candidates, choices, strict=True)
            )
            self._instances.append(Instance(answer, tuple(trials)))
        return [choices[self._candidate.index(stage, len(choices))]]

    def _kernel(self, name: str, source: str, direction: Direction) -> GeneratedKernel:
        parameters = _parameters_in(source) if name.startswith(_TEMPLATE_KERNELS) else {}
        stage = None
        for known, instances in self._filled.items():
            # Each stage's template is filled with its own set of switches and tiles, and may be instantiated more than once.
            if parameters and any(parameters.items() >= filled.items() for filled in instances):
                stage = known
        return GeneratedKernel(name, source, direction, stage, MappingProxyType(parameters))


# --- candidates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """The candidate that was asked for, for all stages or for each."""

    everywhere: int = 0
    by_stage: Mapping[str, int] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        return bool(self.everywhere or any(self.by_stage.values()))

    def index(self, stage: str, count: int) -> int:
        return min(self.by_stage.get(stage, self.everywhere), count - 1)

    def check(self, offered: Mapping[str, Sequence[Any]]) -> None:
        counts = {stage: len(choices) for stage, choices in offered.items()}
        if counts and self.everywhere >= max(counts.values()):
            raise InputError(
                f"candidate must be below the number that some stage offers ({counts}), but got {self.everywhere}."
            )
        for stage, index in self.by_stage.items():
            if stage not in counts:
                raise InputError(
                    f"candidate names the stage {stage!r}, but the call has the stages {', '.join(counts)}."
                )
            if index >= counts[stage]:
                raise InputError(f"candidate of {stage} must be below {counts[stage]}, but got {index}.")


def _checked_candidate(candidate: int | Mapping[str, int]) -> _Candidate:
    found = _Candidate(by_stage=dict(candidate)) if isinstance(candidate, Mapping) else _Candidate(candidate)
    for index in (found.everywhere, *found.by_stage.values()):
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputTypeError(f"candidate must be an int, or a mapping of stage to int, but got {index!r}.")
        if index < 0:
            raise InputError(f"candidate must be 0 or greater, but got {index}.")
    return found


def _stage_of(choice: str) -> str | None:
    """``triton_parallax_core_forward_3``, ``triton_parallax_core_forward_specialized_3`` -> ``core_forward``."""
    if not choice.startswith(_OUR_TEMPLATES):
        return None
    return choice.removeprefix(_OUR_TEMPLATES).rsplit("_", 1)[0].removesuffix("_specialized")


def _parameters_of(choice: Any) -> dict[str, Any]:
    """What a candidate's template is filled with, from Inductor's description ``BLOCK_M=64, ..., num_warps=4``."""
    pairs = re.findall(r"(\w+)=((?:'[^']*'|[^,])+?)(?:, |$)", choice.description)
    return {name: _literal(value) for name, value in pairs}


def _parameters_in(source: str) -> dict[str, Any]:
    """The same from a kernel's source, where Inductor's decorator holds them."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", None) != "template":
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        parameters = {name: ast.literal_eval(given[name]) for name in ("num_warps", "num_stages")}
        meta = given["inductor_meta"]
        if isinstance(meta, ast.Dict):
            for key, value in zip(meta.keys, meta.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "config_args":
                    parameters |= {name: _literal(v) for name, v in ast.literal_eval(value).items()}
        return parameters
    return {}


def _literal(value: Any) -> Any:
    """``"64"`` -> 64, ``"'ieee'"`` -> "ieee" (Inductor quotes it once or twice); other text stays."""
    text = value.strip("\"'") if isinstance(value, str) else ""
    try:
        return ast.literal_eval(text) if text else value
    except (ValueError, SyntaxError):
        return text


def _reproducible(wrapper: str) -> str:
    """A wrapper without the comments that differ from run to run (a counter, temporary files)."""
    return re.sub(r"^# (AOT ID|kernel path):.*\n", "", wrapper, flags=re.MULTILINE)


# --- tracing --------------------------------------------------------------------------------------------------------


def fresh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` behind a code object of its own: Dynamo counts recompilations, and remembers sizes, by code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)


def prepared(leaves: list[Any], backward: bool) -> list[Any]:
    """The arguments with data on some device, detached from any graph, and with something to differentiate."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    chosen = [leaf.requires_grad for leaf in tensors]
    every = backward and not any(chosen)

    def prepare(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        requires_grad = backward and (leaf.requires_grad or (every and leaf.is_floating_point()))
        if leaf.is_meta:
            leaf = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
        return leaf.detach().requires_grad_(requires_grad)

    return [prepare(leaf) for leaf in leaves]


def _differentiate(results: Any) -> None:
    """Run the backward of every differentiable result, which compiles it. Gradients go nowhere."""
    outputs = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor) and leaf.requires_grad]
    leaves = list(_leaves(outputs))
    if leaves:
        grads = [torch.empty_like(output) for output in outputs]
        torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def _leaves(outputs: list[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors that ``outputs`` depend on, captured ones among them."""
    pending: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        pending += [following for following, _ in node.next_functions]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Raise our own errors as themselves where the compiler wrapped them in its own."""
    try:
        yield
    except ParallaxError:
        raise
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, ParallaxError):
            inner = getattr(inner, "inner_exception", None) or inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise inner from error


def _described(argument: Any) -> Argument | int | None:
    if isinstance(argument, Tensor):
        return Argument(tuple(argument.shape), argument.stride(), argument.dtype)
    return argument if argument is None else int(argument)


def _without_values(generated: GeneratedGraph, traced: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
    return compat.run_without_values(traced, arguments)
