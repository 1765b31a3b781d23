"""Beyond NVIDIA: a call as MLIR, for any compiler that reads it, and compiled by IREE for CPUs and GPUs of other makers.

No claim of speed is made: the point is reach, and an oracle that shares no kernel with the Triton path. Needs the extra
``parallax-compile[mlir]``. The same spec, mods and masks as everywhere; ``docs/portable.md`` has the table of targets.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import validation
from .attention import attention
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.mlir import emission, forms, toolchain
from .lowering.mlir.scalars import UnfitError
from .spec import AttentionSpec

__all__ = [
    "FORMS",
    "MlirInspection",
    "PortableArtifact",
    "PortableProgram",
    "compile_portable",
    "export_mlir",
    "inspect_mlir",
]

FORMS = ("dense", "blockwise", "streaming")
_NAMES = ("query", "key", "value", "probe")


@dataclass(frozen=True)
class MlirInspection:
    """A call as MLIR. ``str()`` of it is a table; :attr:`modules` holds the texts.

    Attributes:
        spec: what was traced.
        dialect: ``"linalg"``, ``"torch"`` or ``"stablehlo"``.
        modules: ``"forward"`` -> a module with ``@attention(query, key, value[, probe]) -> out``, and where it was asked for
            ``"backward"`` -> one with ``@attention_backward(query, key, value[, probe], grad_out) -> (out, gradients)``.
        forms: the same names -> ``"dense"``, ``"blockwise"``, ``"streaming"`` or ``"opaque"``.
        differentiated: the inputs whose gradients ``@attention_backward`` returns, in this order.
        notes: what was not done as asked, and why.
    """

    spec: AttentionSpec
    dialect: str
    modules: Mapping[str, str] = field(repr=False, hash=False)
    forms: Mapping[str, str] = field(hash=False)
    differentiated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """Lines and operations of each module, by dialect."""
        from tabulate import tabulate

        rows = [
            [name, self.forms[name], len(text.splitlines()), _operations(text)] for name, text in self.modules.items()
        ]
        return tabulate(rows, headers=["module", "form", "lines", "operations"], disable_numparse=True)

    def write(self, directory: str | Path) -> list[Path]:
        """Write ``forward.<dialect>.mlir``, ``backward.<dialect>.mlir`` and ``summary.txt`` into ``directory`` (made)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {f"{name}.{self.dialect}.mlir": text for name, text in self.modules.items()}
        texts["summary.txt"] = f"{self}\n"
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]

    def __str__(self) -> str:
        lines = [f"{self.spec.name or 'variant'} as {self.dialect}", "", self.table()]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


def _operations(text: str) -> str:
    """``linalg 12, arith 20, ...``: how many operations of each dialect a module has."""
    named = re.findall(r"(?:=|^)\s*\"?([a-z_]+)\.[a-z_.]+", text, re.MULTILINE)
    return ", ".join(f"{dialect} {count}" for dialect, count in Counter(named).most_common() if dialect != "func")


def inspect_mlir(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    score_mod: Any = None,
    covariance_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    backward: bool = True,
    dialect: str = "linalg",
    form: str = "dense",
    dynamic: bool = False,
    opaque: bool = False,
    block_size: int = 128,
) -> MlirInspection:
    """What :func:`~parallax_compile.inspect` does for ``emit="mlir"``; that has the arguments and errors."""
    emission.check_dialect(dialect)
    _check_form(form, block_size)
    toolchain.require(toolchain.IMPORTER)
    call = _Traced(spec, score_mod, covariance_mod, block_mask, scale)
    call.check(query, key, value, probe)
    tensors = [query, key, value] if probe is None else [query, key, value, probe]
    if dynamic and block_mask is not None:
        raise InputError(
            "block_mask is for fixed lengths, but dynamic=True. Put the mask into the spec (mask_mod=plx.masks...)."
        )
    if opaque and form != "dense":
        raise InputError(f"an opaque call has no form, but form={form!r}. Leave one of them out.")
    if form == "streaming":
        if dialect != "linalg":
            raise InputError(f'form="streaming" is written in linalg, but dialect={dialect!r}. Leave the dialect out.')
        toolchain.require(toolchain.COMPILER)
    notes: list[str] = []
    chosen = forms.Form("opaque" if opaque else form, block_size)
    text, named = None, {}
    if form == "streaming":
        try:
            text, named["forward"] = call.streaming(tensors, dynamic, block_size, toolchain.Limits()), "streaming"
        except (UnfitError, toolchain.ToolError) as error:
            notes.append(f"no streaming form: {error}.")
        chosen = forms.Form("dense" if dynamic else "blockwise", block_size)
    if text is None:
        text, named["forward"] = call.forward(tensors, chosen, dialect, dynamic), chosen.name
    modules = {"forward": text}
    names = _NAMES[: len(tensors)]
    differentiated = tuple(n for n, t in zip(names, tensors, strict=True) if t.requires_grad) or names
    if backward:
        modules["backward"] = call.backward(tensors, differentiated, chosen, dialect, dynamic)
        named["backward"] = chosen.name
    return MlirInspection(spec, dialect, modules, named, differentiated if backward else (), tuple(notes))


def _check_form(form: Any, block_size: Any) -> None:
    """``form`` is one of :data:`FORMS` and ``block_size`` a positive integer."""
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, but got {form!r}.")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise InputError(f"block_size must be a positive integer (keys of a block), but got {block_size!r}.")


class _Traced:
    """A declared call, emitted in one direction after the other."""

    def __init__(
        self,
        spec: AttentionSpec,
        score_mod: Any,
        covariance_mod: Any,
        block_mask: BlockMask | None,
        scale: float | None,
    ) -> None:
        self.spec = spec
        self.options = {
            "spec": spec,
            "score_mod": score_mod,
            "covariance_mod": covariance_mod,
            "block_mask": block_mask,
            "scale": scale,
            "enable_gqa": True,
        }

    def check(self, query: Any, key: Any, value: Any, probe: Any) -> None:
        """What is wrong with the tensors and mods, and lengths of 0, which MLIR's tensors do not have."""
        if not isinstance(self.spec, AttentionSpec):
            raise InputTypeError(f"spec must be an AttentionSpec, but got {type(self.spec).__name__}.")
        validation.check_tensors(query, key, value, probe, self.spec, enable_gqa=True)
        validation.check_mods(self.spec, self.options["score_mod"], self.options["covariance_mod"])
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.numel() == 0:
                raise InputError(f"{name} must not be empty to be emitted, but has shape {tuple(tensor.shape)}.")

    def call(self, *tensors: Tensor) -> Tensor:
        return attention(*tensors, **self.options)

    def forward(self, tensors: Sequence[Tensor], form: forms.Form, dialect: str, dynamic: bool) -> str:
        with forms.tracing(form):
            graph = emission.trace(self.call, emission.example(tensors, _symbols(len(tensors), dynamic)))
        return emission.emit_graph(graph, dialect, "attention")

    def declared(self, tensors: Sequence[Tensor]) -> Any:
        """The call as it was checked, its mods composed and its masks in one."""
        form = forms.Form("declared")
        with forms.tracing(form):
            self.call(*(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors))
        return form.handed_over[0]

    def streaming(self, tensors: Sequence[Tensor], dynamic: bool, block_size: int, limits: toolchain.Limits) -> str:
        from .lowering.mlir import streaming

        text = streaming.reduction(self.declared(tensors), dynamic=dynamic)
        with tempfile.TemporaryDirectory(prefix="parallax-mlir-") as folder:
            return streaming.tiled(text, block_size, Path(folder), limits)

    def backward(
        self, tensors: Sequence[Tensor], differentiated: Sequence[str], form: forms.Form, dialect: str, dynamic: bool
    ) -> str:
        batch, heads, rows, _ = tensors[0].shape
        grad = torch.empty(batch, heads, rows, tensors[2].size(3), dtype=tensors[0].dtype, device="meta")
        wanted = [_NAMES.index(name) for name in differentiated]

        def both(*arguments: Tensor) -> tuple[Tensor, ...]:
            *inputs, grad_out = (tensor.detach() for tensor in arguments)
            leaves = [inputs[number].requires_grad_() for number in wanted]
            out = self.call(*inputs)
            if not out.requires_grad:
                return (out.detach(), *(torch.zeros_like(leaf) for leaf in leaves))
            return (out.detach(), *torch.autograd.grad(out, leaves, grad_out, materialize_grads=True))

        symbols = [*_symbols(len(tensors), dynamic), *_symbols(1, dynamic)]
        with forms.tracing(form):
            graph = emission.trace(both, emission.example([*tensors, grad], symbols))
        captured = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        trainable = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in captured)
        if trainable:
            raise UnsupportedError(
                "a mod captures a tensor that requires a gradient, which @attention_backward does not return. "
                "Detach it, or emit the forward alone (backward=False)."
            )
        return emission.emit_graph(graph, dialect, "attention_backward")


def _symbols(count: int, dynamic: bool) -> list[dict[int, str]]:
    """The dynamic dimensions of query, key, value and probe."""
    rows, keys = {2: "query_length"}, {2: "key_length"}
    return [rows, keys, keys, rows][:count] if dynamic else [{}] * count


def export_mlir(
    module: torch.nn.Module,
    args: Sequence[Any],
    *,
    dialect: str = "linalg",
    opaque: bool = False,
    dynamic_shapes: Any = None,
    name: str = "main",
) -> str:
    """A whole model as MLIR, its attention decomposed or opaque.

    Args:
        module: whose ``forward`` calls :func:`~parallax_compile.attention`; parameters become literals.
        args: example inputs of ``forward``.
        dialect: ``"linalg"``, ``"torch"`` or ``"stablehlo"``.
        opaque: keep each call whole: ``torch.operator "torch.parallax_compile.attention"`` in the torch dialect, elsewhere a
            ``func.call`` of a private function whose attributes carry the spec as JSON and the scale.
        dynamic_shapes: as for ``torch.export.export``.
        name: of the function.

    Raises:
        InputTypeError, InputError: a wrong argument.
        UnsupportedError: torch-mlir is not installed; an operator that it would import wrongly or not at all
            (``while_loop``, ``torch.linalg.solve``), with the way round; an opaque call that its spec does not tell whole.
    """
    emission.check_dialect(dialect)
    if not isinstance(module, torch.nn.Module):
        raise InputTypeError(f"module must be a torch.nn.Module, but got {type(module).__name__}.")
    toolchain.require(toolchain.IMPORTER)
    with forms.tracing(forms.Form("opaque" if opaque else "dense")):
        program = torch.export.export(module, tuple(args), dynamic_shapes=dynamic_shapes, strict=False)
    return emission.emit_exported(program, dialect, name)


# --- compiled -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PortableProgram:
    """One direction of a call, compiled.

    Attributes:
        function: its name in the module.
        form: ``"dense"``, ``"blockwise"`` or ``"streaming"``.
        mlir: the module that IREE was given.
        texts: file name -> what IREE made of it, readable: MLIR of each dispatch; LLVM, assembly, PTX, AMDGCN or Metal.
        binary: what IREE's runtime loads (a ``.vmfb``).
    """

    function: str
    form: str
    mlir: str = field(repr=False)
    texts: Mapping[str, str] = field(repr=False, hash=False)
    binary: bytes = field(repr=False)

    @functools.cached_property
    def loaded(self) -> Any:
        """The program in IREE's runtime, on this CPU."""
        toolchain.require(toolchain.RUNTIME)
        from .lowering.mlir.iree import Loaded

        return Loaded(self.binary, self.function)


@dataclass(frozen=True)
class PortableArtifact:
    """A call compiled for a target. ``str()`` of it is a table.

    Attributes:
        spec, target: what was compiled, and for what.
        shapes: of query, key, value and, where the spec takes one, probe; an open length is None.
        dtype: of the operands.
        programs: ``"forward"``, and ``"backward"`` where it was asked for.
        differentiated: the inputs whose gradients the backward returns, in this order.
        notes: forms that were tried first, and why they are not there.
    """

    spec: AttentionSpec
    target: str
    shapes: tuple[tuple[int | None, ...], ...]
    dtype: torch.dtype
    programs: Mapping[str, PortableProgram] = field(hash=False)
    differentiated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def run(self, query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None = None) -> Tensor:
        """``out [B, Hq, Lq, Dv]``, computed by IREE on this CPU.

        Raises:
            InputError: tensors of other shapes or another dtype than it was compiled for.
            UnsupportedError: the artifact is for another target than ``"cpu"``.
        """
        return self._run("forward", (query, key, value, probe))[0]

    def run_backward(
        self, query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None = None, *, grad_out: Tensor
    ) -> tuple[Tensor, ...]:
        """``out``, then the gradients of ``(out * grad_out).sum()``, as :attr:`differentiated` has them; errors as :meth:`run`.

        Args:
            grad_out: like ``out``.
        """
        return tuple(self._run("backward", (query, key, value, probe), grad_out))

    def peak_memory(self, query_length: int | None = None, key_length: int | None = None) -> int:
        """Bytes that a process which runs the forward once holds at most, Python and IREE's runtime included.

        Args:
            query_length, key_length: in the place of open lengths.
        """
        self._check_runs_here()
        from .lowering.mlir.iree import peak_memory

        lengths = (query_length, key_length, key_length, query_length)
        shapes = [
            [length if size is None else size for size in shape]
            for shape, length in zip(self.shapes, lengths, strict=False)
        ]
        if any(size is None for shape in shapes for size in shape):
            raise InputError("query_length and key_length must be given, since the artifact leaves them open.")
        program = self.programs["forward"]
        return peak_memory(program.binary, program.function, self.dtype, shapes)  # type: ignore[arg-type]

    def write(self, directory: str | Path) -> list[Path]:
        """Write every program: ``<direction>.vmfb``, ``<direction>.mlir``, and its texts in a folder beside them."""
        folder = Path(directory)
        written: list[Path] = []
        for direction, program in self.programs.items():
            (folder / direction).mkdir(parents=True, exist_ok=True)
            texts = {f"{direction}/{name}": text for name, text in program.texts.items()}
            for name, text in {f"{direction}.mlir": program.mlir, **texts}.items():
                (folder / name).write_text(text, encoding="utf-8")
                written.append(folder / name)
            (folder / f"{direction}.vmfb").write_bytes(program.binary)
            written.append(folder / f"{direction}.vmfb")
        return written

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            [direction, program.form, len(program.mlir.splitlines()), len(program.binary), len(program.texts)]
            for direction, program in self.programs.items()
        ]
        table = tabulate(rows, headers=["program", "form", "lines of MLIR", "bytes", "texts"], disable_numparse=True)
        lines = [f"{self.spec.name or 'variant'} for {self.target}, {self.dtype}", "", table]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])

    def _check_runs_here(self) -> None:
        if self.target != "cpu":
            raise UnsupportedError(
                f"the artifact is for {self.target}, and run() executes on this CPU. "
                'Load its binary with IREE\'s runtime there, or compile for target="cpu".'
            )
        toolchain.require(toolchain.RUNTIME)

    def _run(self, direction: str, tensors: tuple[Tensor | None, ...], grad_out: Tensor | None = None) -> list[Tensor]:
        self._check_runs_here()
        if direction not in self.programs:
            raise InputError("the artifact has no backward. Compile it with backward=True.")
        query, key, value, probe = tensors
        validation.check_tensors(query, key, value, probe, self.spec, enable_gqa=True)  # type: ignore[arg-type]
        given = [tensor for tensor in tensors if tensor is not None]
        shapes = list(self.shapes)
        if direction == "backward":
            if not isinstance(grad_out, Tensor):
                raise InputTypeError(f"grad_out must be a tensor, but got {type(grad_out).__name__}.")
            given.append(grad_out)
            shapes.append((*shapes[0][:3], shapes[2][3]))
        names = (*_NAMES[: len(self.shapes)], "grad_out")
        for name, tensor, shape in zip(names, given, shapes, strict=False):
            if tensor.dtype != self.dtype or tensor.device.type != "cpu":
                raise InputError(f"{name} must be {self.dtype} on cpu, but is {tensor.dtype} on {tensor.device}.")
            if len(tensor.shape) != len(shape) or any(
                want is not None and want != size for want, size in zip(shape, tensor.shape, strict=True)
            ):
                raise InputError(f"{name} must have shape {shape} (None: any), but got {tuple(tensor.shape)}.")
        if grad_out is not None and grad_out.size(2) != given[0].size(2):
            raise InputError(f"grad_out must have query's length {given[0].size(2)}, but got {grad_out.size(2)}.")
        return self.programs[direction].loaded(given)


def compile_portable(
    spec: AttentionSpec,
    shapes: Sequence[Sequence[int | None]],
    target: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    score_mod: Any = None,
    covariance_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    backward: bool = False,
    form: str = "auto",
    block_size: int = 128,
    memory_limit: int = 8 << 30,
    time_limit: float = 300.0,
) -> PortableArtifact:
    """A call compiled by IREE for a target that need not be here.

    IREE can crash; it runs in a process of its own, within limits. For the numbers to come out, not for speed: see
    ``docs/portable.md``.

    Args:
        spec, score_mod, covariance_mod, block_mask, scale: as for :func:`~parallax_compile.attention`.
        shapes: of query, key and value, and of the probe where the spec takes one: ``[(B, Hq, Lq, D), (B, Hkv, Lk, D),
            (B, Hkv, Lk, Dv), (B, Hq, Lq, D)]``. None in the place of every length leaves them open.
        target: ``"cpu"`` (this machine), ``"cpu:aarch64"``, ``"cpu:riscv64"``, ``"vulkan"``, ``"metal"``, ``"rocm:gfx942"``,
            ``"cuda:sm_80"``, ...
        dtype: of the operands; float64 stays float64.
        backward: compile ``@attention_backward`` too, with the gradients of all operands.
        form: ``"streaming"``: memory linear in the lengths; ``"blockwise"``, ``"dense"``; ``"auto"`` is streaming where the
            call fits into it. What does not fit falls back to unrolled blocks (with open lengths, to dense), and
            :attr:`PortableArtifact.notes` says so. The backward is blockwise, or dense.
        block_size: keys of a block.
        memory_limit, time_limit: bytes of address space and seconds that each run of IREE may take.

    Raises:
        InputError, InputTypeError: a wrong argument.
        UnsupportedError: a target or dtype that IREE does not compile for; torch-mlir or IREE is not installed; IREE failed
            on every form.
    """
    from .lowering.mlir import targets

    if form != "auto":
        _check_form(form, block_size)
    resolved = targets.resolve(target, dtype)
    limits = toolchain.Limits(memory_limit, time_limit)
    checked = _checked_shapes(shapes)
    dynamic = checked[0][2] is None
    tensors = [torch.empty([_ANY if n is None else n for n in shape], dtype=dtype, device="meta") for shape in checked]
    call = _Traced(spec, score_mod, covariance_mod, block_mask, scale)
    call.check(*tensors, *[None] * (4 - len(tensors)))
    toolchain.require(toolchain.IMPORTER, toolchain.COMPILER)
    if dynamic and block_mask is not None:
        raise InputError("block_mask is for fixed lengths, but the lengths are open. Put the mask into the spec.")
    last = "dense" if dynamic else "blockwise"
    forward = {"auto": ["streaming", last], "streaming": ["streaming", last], "blockwise": [last], "dense": ["dense"]}[
        form
    ]
    names = _NAMES[: len(tensors)]
    notes: list[str] = []
    if form == "blockwise" and dynamic:
        raise InputError(
            'form="blockwise" unrolls the blocks of keys, so the lengths must be given. Use "streaming" or "dense".'
        )

    def build(direction: str, candidates: Sequence[str]) -> PortableProgram:
        for name in candidates:
            try:
                text = _text_of(call, tensors, direction, name, names, dynamic, block_size, limits)
                return _compiled_program(text, direction, name, resolved, limits)
            except (UnfitError, toolchain.ToolError) as error:  # noqa: PERF203  (seconds each)
                notes.append(f"{direction}: no {name} form: {error}.")
        raise UnsupportedError(f"IREE does not compile the call for {target}. " + " ".join(notes))

    programs = {"forward": build("forward", forward)}
    if backward:
        programs["backward"] = build("backward", ["dense" if form == "dense" else last])
    return PortableArtifact(spec, target, checked, dtype, programs, names if backward else (), tuple(notes))


_ANY = 37  # in the place of an open length


def _text_of(
    call: _Traced, tensors: Sequence[Tensor], direction: str, form: str, names: Sequence[str], dynamic: bool,
    block_size: int, limits: toolchain.Limits,
) -> str:  # fmt: skip
    if form == "streaming":
        return call.streaming(tensors, dynamic, block_size, limits)
    chosen = forms.Form(form, block_size)
    if direction == "forward":
        return call.forward(tensors, chosen, "linalg", dynamic)
    return call.backward(tensors, names, chosen, "linalg", dynamic)


def _compiled_program(text: str, direction: str, form: str, target: Any, limits: toolchain.Limits) -> PortableProgram:
    from .lowering.mlir.iree import compile_module

    with tempfile.TemporaryDirectory(prefix="parallax-mlir-") as folder:
        source = Path(folder, f"{direction}.mlir")
        source.write_text(text, encoding="utf-8")
        binary, texts = compile_module(source, target, limits)
    function = {"forward": "attention", "backward": "attention_backward"}[direction]
    return PortableProgram(function, form, text, texts, binary)


def _checked_shapes(shapes: Any) -> tuple[tuple[int | None, ...], ...]:
    if isinstance(shapes, (str, Mapping)) or not isinstance(shapes, Sequence) or len(shapes) not in (3, 4):
        raise InputTypeError(
            "shapes must be those of query, key, value and, where the spec takes one, probe: 3 or 4 tuples."
        )
    for name, shape in zip(_NAMES, shapes, strict=False):
        if not isinstance(shape, Sequence) or len(shape) != 4:
            raise InputError(f"the shape of {name} must be (batch, heads, length, width), but got {shape!r}.")
        for dim, size in enumerate(shape):
            if size is None and dim == 2:
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(
                    f"the shape of {name} must hold positive integers (a length may be None), but got {shape!r}."
                )
    opened = {shape[2] is None for shape in shapes}
    if len(opened) > 1:
        raise InputError("lengths must be given for all operands, or left open (None) for all.")
    return tuple(tuple(shape) for shape in shapes)
