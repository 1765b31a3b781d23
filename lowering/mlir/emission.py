"""From torch code to a dialect of MLIR: traced, checked for what the importer gets wrong or lacks, imported by torch-mlir."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import InputError, InputTypeError, UnsupportedError
from . import opaque, toolchain

__all__ = ["DIALECTS", "check_dialect", "check_graph", "emit_exported", "emit_graph", "example", "trace"]

DIALECTS: Mapping[str, str] = {"linalg": "linalg-on-tensors", "torch": "torch", "stablehlo": "stablehlo"}
"""Our name of a dialect -> torch-mlir's."""

MAX_LENGTH = 1 << 30

_UNROLL = "Unroll it for a fixed number of steps before export."
_FIXED = "plx.attention solves its own systems in a fixed number of steps; solve yours in matrix products, as it does."
# What a graph may not hold: the start of the operator's name -> (why, the way round).
_REFUSED: Mapping[str, tuple[str, str]] = {
    "while_loop": ("torch-mlir drops the condition of a while_loop, so that it runs a wrong number of steps", _UNROLL),
    "scan": ("torch-mlir has no import for scan", _UNROLL),
    "associative_scan": ("torch-mlir has no import for associative_scan", _UNROLL),
    "map_impl": ("torch-mlir has no import for map", _UNROLL),
    "cond": ("torch-mlir has no import for cond", "Compute both branches and choose by torch.where."),
    "flex_attention": (
        "torch-mlir imports flex_attention without its block mask",
        "Call plx.flex_attention, which is traced as plain operations.",
    ),
    "parallax_attention": (
        "strict export keeps the operator of the compiled path, which torch-mlir does not know",
        "Give the module to plx.export_mlir, or export with strict=False.",
    ),
    **{
        name: (f"no dialect has a lowering of {name}", _FIXED)
        for name in (
            "linalg_solve", "linalg_inv", "linalg_cholesky", "linalg_lu", "linalg_ldl", "linalg_qr", "linalg_lstsq",
            "linalg_eig", "linalg_eigh", "linalg_eigvals", "linalg_eigvalsh", "linalg_svd", "linalg_svdvals", "linalg_det",
            "linalg_slogdet", "linalg_pinv", "linalg_householder", "cholesky", "triangular_solve",
        )
    },
}  # fmt: skip
_DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def check_dialect(dialect: Any) -> str:
    """``dialect``, one of :data:`DIALECTS`."""
    if not isinstance(dialect, str):
        raise InputTypeError(f"dialect must be a string, but got {type(dialect).__name__}.")
    if dialect not in DIALECTS:
        raise InputError(f"dialect must be one of {', '.join(DIALECTS)}, but got {dialect!r}.")
    return dialect


# --- tracing --------------------------------------------------------------------------------------------------------


class _Identity(torch.nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor * 1 for tensor in tensors)


def example(tensors: Sequence[Tensor], symbols: Sequence[Mapping[int, str]]) -> list[Tensor]:
    """Fake tensors without data; the dimensions that are named are symbols, equal names equal symbols.

    Args:
        tensors: for shapes and dtypes.
        symbols: dimension -> name, for each tensor.
    """
    dims = {
        name: torch.export.Dim(name, min=2, max=MAX_LENGTH)
        for name in sorted({name for named in symbols for name in named.values()})
    }
    hints = {name: 37 + 4 * number for number, name in enumerate(dims)}  # sizes that nothing else has
    shapes = [
        [hints[named[dim]] if dim in named else size for dim, size in enumerate(tensor.shape)]
        for tensor, named in zip(tensors, symbols, strict=True)
    ]
    fakes = [torch.empty(shape, dtype=tensor.dtype) for tensor, shape in zip(tensors, shapes, strict=True)]
    named = tuple({dim: dims[name] for dim, name in of.items()} or None for of in symbols)
    program = torch.export.export(_Identity(), tuple(fakes), dynamic_shapes=(named,), strict=False)
    return [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]


def trace(function: Callable[..., Any], fakes: Sequence[Tensor]) -> fx.GraphModule:
    """``function`` of the fake tensors of :func:`example` as a graph of core operators.

    Raises:
        InputError: something in it fixes a length that is to be dynamic.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    dynamic = any(isinstance(size, torch.SymInt) for fake in fakes for size in fake.shape)
    mode: Any = "symbolic" if dynamic else "fake"
    graph = make_fx(function, tracing_mode=mode, decomposition_table=_decompositions())(*fakes)
    for fake in fakes:
        for dim, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt) and str(size).isdigit():
                raise InputError(
                    f"dimension {dim} was to be dynamic, but a mod or mask fixes it at {size}. "
                    "Leave the length open there, or emit for static lengths."
                )
    graph.graph.eliminate_dead_code()
    return graph


def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    ours = {
        torch.ops.parallax_compile.tanh_approx.default: torch.tanh,
        torch.ops.aten.tanh.default: _tanh,
        torch.ops.aten.index.Tensor: _index_by_int64,
    }
    return {**get_decomposition_table(), **ours}


def _tanh(x: Tensor) -> Any:
    """IREE has no tanh of float64: ``-t / (t + 2)`` with ``t = e^(-2|x|) - 1``, and the sign of ``x``."""
    if x.dtype != torch.float64:
        return NotImplemented
    t = torch.expm1(-2.0 * x.abs())
    below = t / (t + 2.0)
    return torch.where(x < 0, below, -below)


def _index_by_int64(tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """torch-mlir lowers ``aten.index`` by 64-bit integers only."""
    narrow = [index is not None and index.dtype == torch.int32 for index in indices]
    if not any(narrow):
        return NotImplemented
    wide = [
        index.to(torch.int64) if index is not None and is_narrow else index
        for index, is_narrow in zip(indices, narrow, strict=True)
    ]
    return torch.ops.aten.index.Tensor(tensor, wide)


# --- what is refused ------------------------------------------------------------------------------------------------


def check_graph(module: torch.nn.Module) -> None:
    """Refuse graphs that torch-mlir would import wrongly or not at all, subgraphs included.

    Raises:
        UnsupportedError: an operator of :data:`_REFUSED`, or a dtype without a lowering; the message has the way round.
    """
    for node in _nodes(module):
        if node.op == "call_function":
            name = _operator_name(node.target).lstrip("_")
            for start, (reason, way) in _REFUSED.items():
                if name == start or name.startswith((f"{start}_", f"{start}.")):
                    raise UnsupportedError(f"the graph has {name}: {reason}. {way}")
        for value in _tensors(node.meta.get("val")):
            if value.dtype not in _DTYPES:
                raise UnsupportedError(
                    f"the graph has a tensor of {value.dtype} ({node.name}), which is not lowered. "
                    "Compute in bfloat16, float16, float32 or float64; real and imaginary parts apart."
                )


def _nodes(module: torch.nn.Module) -> Iterator[fx.Node]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _operator_name(target: Any) -> str:
    """``aten.linalg_inv_ex.default`` -> ``linalg_inv_ex``; a higher-order operator's own name."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


# --- import ---------------------------------------------------------------------------------------------------------


def emit_graph(graph: fx.GraphModule, dialect: str, name: str) -> str:
    """The graph as a module of ``dialect`` with one function ``name``; tensors that it captures become literals."""
    check_graph(graph)
    importer = _importer(dialect)
    importer.import_stateless_graph(graph.graph, func_name=name)
    return _lowered(importer.module, dialect)


def emit_exported(program: torch.export.ExportedProgram, dialect: str, name: str) -> str:
    """The same of an exported program; parameters and buffers become literals."""
    check_graph(program.graph_module)
    program = program.run_decompositions(_decompositions())
    check_graph(program.graph_module)
    importer = _importer(dialect)
    importer.import_stateless_graph(_frozen(program), func_name=name)
    return _lowered(importer.module, dialect)


def _frozen(program: torch.export.ExportedProgram) -> fx.Graph:
    """The program's graph with tensors in the place of the inputs that stand for them.

    torch-mlir has this too, but does not find buffers that are no part of the state, such as a cache of rotations.
    """
    signature, values = program.graph_signature, {**program.constants, **program.state_dict}
    named = {
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_buffers,
        **signature.inputs_to_parameters,
    }
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and node.name in named:
            node.replace_all_uses_with(values[named[node.name]])
            program.graph.erase_node(node)
    return program.graph


def _importer(dialect: str) -> Any:
    toolchain.require(toolchain.IMPORTER)
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_importer import FxImporter

    context = ir.Context()
    torch_dialect.register_dialect(context)
    if dialect == "torch":
        return FxImporter(context=context)
    from .opaque_calls import CallImporter

    return FxImporter(context=context, graph_node_importer_cls=CallImporter)


def _lowered(module: Any, dialect: str) -> str:
    """The imported module in ``dialect``: torch-mlir's passes, in a process of their own, because they can crash."""
    text = str(module)
    kept = ",".join(f"torch.{name}" for name in opaque.NAMES)
    with tempfile.TemporaryDirectory(prefix="parallax-mlir-") as folder:
        library = Path(folder, "operators.mlir")
        library.write_text(_VALUE_SEMANTICS, encoding="utf-8")
        options = f"{{backend-legal-ops={kept} extra-library={library}}}"
        text = _run(
            text, f"builtin.module(torchdynamo-export-to-torch-backend-pipeline{options})", dialect, Path(folder)
        )
        if dialect != "torch":
            passes = f"builtin.module(torch-backend-to-{DIALECTS[dialect]}-backend-pipeline)"
            if opaque.CALLEE in text:
                text = _run(text, _tolerant(passes), dialect, Path(folder))
                if dialect == "stablehlo":
                    text = _run(opaque.as_custom_calls(text), passes, dialect, Path(folder))
            else:
                text = _run(text, passes, dialect, Path(folder))
    left = None if dialect == "torch" else re.search(r"\b(?:torch\.(?!constant)|chlo\.)[\w.]+", text)
    if left is not None:
        raise UnsupportedError(f"torch-mlir does not lower the graph to {dialect}: {left[0]} is left over.")
    return text


def _run(text: str, passes: str, dialect: str, folder: Path) -> str:
    source, result = folder / "source.mlir", folder / "result.mlir"
    source.write_text(text, encoding="utf-8")
    try:
        toolchain.run_tool("torch-mlir-opt", [source, f"--pass-pipeline={passes}", "-o", result], toolchain.Limits())
    except toolchain.ToolError as error:
        raise UnsupportedError(f"torch-mlir does not lower the graph to {dialect}: {error}") from None
    return result.read_text(encoding="utf-8")


# A library in torch-mlir's form, which says that our opaque operators are functions of values.
_VALUE_SEMANTICS = "module {{\n{}\n}}\n".format(
    "\n".join(f"  func.func @__torch_mlir_has_value_semantics_fn.torch.{n}() {{ return }}" for n in opaque.NAMES)
)
_LEFT_OUT = (
    r",torch-verify-[a-z-]*-backend-contract"
    r"|,func\.func\((?:chlo|stablehlo)-[a-z-]*(?:\{[^}]*\})?\)"
    r"|,stablehlo-[a-z-]*"
)


def _tolerant(pipeline: str) -> str:
    """A pipeline without its verification, which refuses calls; and without StableHLO's own passes, which cannot be named."""
    from torch_mlir import ir
    from torch_mlir.passmanager import PassManager

    with ir.Context():
        return re.sub(_LEFT_OUT, "", str(PassManager.parse(pipeline)))
