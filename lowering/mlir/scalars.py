"""Mods as straight-line scalar code: the body of an elementwise loop over scores, in MLIR's ``arith`` and ``math``.

A mod is traced on 0-dim tensors, where each operation of torch is a few of MLIR's on numbers. Types follow torch's: every
operand is cast to what torch would compute in. A tensor that a mod captures is a literal that the body reads from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..torch_compat_operator import indexing_by_tensors

__all__ = ["Body", "Literals", "Scalar", "UnfitError", "mlir_type"]

_TYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
MAX_LITERAL = 1 << 20
"""Elements that a captured tensor may have: literals are text."""

# torch's name -> MLIR's on floats, on integers.
_BINARY = {
    "add": ("arith.addf", "arith.addi"),
    "sub": ("arith.subf", "arith.subi"),
    "mul": ("arith.mulf", "arith.muli"),
    "maximum": ("arith.maximumf", "arith.maxsi"),
    "minimum": ("arith.minimumf", "arith.minsi"),
    "bitwise_and": ("", "arith.andi"),
    "bitwise_or": ("", "arith.ori"),
    "bitwise_xor": ("", "arith.xori"),
}
_COMPARISONS = {
    "eq": ("oeq", "eq"),
    "ne": ("une", "ne"),
    "lt": ("olt", "slt"),
    "le": ("ole", "sle"),
    "gt": ("ogt", "sgt"),
    "ge": ("oge", "sge"),
}
_LOGICAL = {"logical_and": "arith.andi", "logical_or": "arith.ori", "logical_xor": "arith.xori"}
_UNARY = {
    name: f"math.{mlir}"
    for name, mlir in {
        "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2", "log1p": "log1p", "sqrt": "sqrt",
        "rsqrt": "rsqrt", "tanh": "tanh", "tanh_approx": "tanh", "sin": "sin", "cos": "cos", "erf": "erf", "floor": "floor",
        "ceil": "ceil", "round": "roundeven", "trunc": "trunc", "abs": "absf", "atan": "atan",
    }.items()
}  # fmt: skip
_SAME = ("_to_copy", "clone", "detach", "alias", "lift_fresh_copy", "view", "_unsafe_view", "expand", "squeeze", "to")


class UnfitError(Exception):
    """The mod does not fit into a loop's body; the message says what does not."""


class Scalar(NamedTuple):
    """A value of the body."""

    name: str
    dtype: torch.dtype


def mlir_type(dtype: torch.dtype) -> str:
    """The element type's name in MLIR."""
    if dtype not in _TYPES:
        raise UnfitError(f"{dtype} has no counterpart")
    return _TYPES[dtype]


class Literals:
    """Captured tensors as constants outside of the loops."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, str]] = []
        self.lines: list[str] = []

    def name(self, tensor: Tensor) -> str:
        """The constant of ``tensor``, made at its first use."""
        for known, name in self._found:
            if known is tensor:
                return name
        if tensor.numel() > MAX_LITERAL:
            raise UnfitError(f"a captured tensor of {tensor.numel()} elements is too large for a literal")
        name = f"%captured_{len(self._found)}"
        self._found.append((tensor, name))
        self.lines.append(f"{name} = arith.constant {_dense(tensor)} : {literal_type(tensor)}")
        return name


def literal_type(tensor: Tensor) -> str:
    """``tensor<4x8xf32>``."""
    return f"tensor<{'x'.join([*map(str, tensor.shape), mlir_type(tensor.dtype)])}>"


def _dense(tensor: Tensor) -> str:
    """Every element exactly: its bytes in hexadecimal; booleans, which MLIR packs, as words."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bool:
        return f"dense<{str(tensor.tolist()).lower()}>"
    return f'dense<"0x{bytes(tensor.reshape(-1).view(torch.uint8).tolist()).hex().upper()}">'


class Body:
    """The lines of a loop's body, and the operations that make them.

    Args:
        accumulation: dtype of the scores.
        literals: where captured tensors go.
    """

    def __init__(self, accumulation: torch.dtype, literals: Literals) -> None:
        self.accumulation = accumulation
        self.literals = literals
        self.lines: list[str] = []
        self._fresh = (f"%x{number}" for number in itertools.count())

    def emit(self, operation: str, dtype: torch.dtype) -> Scalar:
        """A line ``%x = operation``."""
        name = next(self._fresh)
        self.lines.append(f"{name} = {operation}")
        return Scalar(name, dtype)

    def constant(self, value: float | bool, dtype: torch.dtype) -> Scalar:
        """A number."""
        if dtype == torch.bool:
            return self.emit(f"arith.constant {str(bool(value)).lower()}", dtype)
        if dtype.is_floating_point:
            bits = torch.tensor(value, dtype=torch.float64 if dtype == torch.float64 else dtype)
            return self.emit(f"arith.constant {_float_text(bits)} : {mlir_type(dtype)}", dtype)
        return self.emit(f"arith.constant {int(value)} : {mlir_type(dtype)}", dtype)

    def index(self, dimension: int) -> Scalar:
        """The loop's position along ``dimension``, as the index tensors of mods have it."""
        position = self.emit(f"linalg.index {dimension} : index", torch.int32)
        return self.emit(f"arith.index_cast {position.name} : index to i32", torch.int32)

    def binary(self, name: str, a: Scalar, b: Scalar) -> Scalar:
        """``arith`` operation ``name`` (addf, mulf, ...) on two values of one type."""
        return self.emit(f"arith.{name} {a.name}, {b.name} : {mlir_type(a.dtype)}", a.dtype)

    def select(self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """``a`` where the condition holds, else ``b``."""
        return self.emit(f"arith.select {condition.name}, {a.name}, {b.name} : {mlir_type(a.dtype)}", a.dtype)

    def cast(self, value: Scalar, dtype: torch.dtype) -> Scalar:
        """``value`` as ``dtype``, as torch converts."""
        if value.dtype == dtype:
            return value
        if dtype == torch.bool:
            return self._compare("ne", value, self.constant(0, value.dtype))
        source, target = mlir_type(value.dtype), mlir_type(dtype)
        widen = dtype.itemsize > value.dtype.itemsize
        if value.dtype.is_floating_point and dtype.is_floating_point:
            if dtype.itemsize == value.dtype.itemsize:  # between the two of 16 bits
                return self.cast(self.cast(value, torch.float32), dtype)
            operation = "extf" if widen else "truncf"
        elif value.dtype.is_floating_point:
            operation = "fptosi"
        elif dtype.is_floating_point:
            operation = "uitofp" if value.dtype == torch.bool else "sitofp"
        elif value.dtype == torch.bool:
            operation = "extui"
        else:
            operation = "extsi" if widen else "trunci"
        return self.emit(f"arith.{operation} {value.name} : {source} to {target}", dtype)

    # --- mods -------------------------------------------------------------------------------------------------------

    def mod(self, mod: Callable[..., Any], arguments: Sequence[Scalar]) -> Scalar:
        """``mod`` of the arguments.

        Raises:
            UnfitError: an operation, or a way to index, that is not among those known here.
        """
        graph = _scalar_graph(mod, [argument.dtype for argument in arguments])
        values: dict[fx.Node, Any] = {}
        given: Iterator[Scalar] = iter(arguments)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = getattr(graph, str(node.target))
            elif node.op == "output":
                result = node.args[0]
                return self._value(values[result], None)
            else:
                values[node] = self._operation(node, values)
        raise AssertionError("a graph ends with its output")

    def _operation(self, node: fx.Node, values: dict[fx.Node, Any]) -> Scalar:
        packet = getattr(node.target, "overloadpacket", node.target)
        name = str(getattr(packet, "__name__", packet))
        result: Any = node.meta["val"]
        if not isinstance(result, Tensor) or result.dim() != 0:
            raise UnfitError(f"{name} does not make a number")
        dtype = result.dtype
        args = [values.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
        if name == "index":
            return self._read(args[0], [values[i] if isinstance(i, fx.Node) else i for i in node.args[1]])  # type: ignore[union-attr]
        if name in ("scalar_tensor", "full"):
            number: Any = args[-1]
            return self.constant(number, dtype)
        if name in _SAME:
            return self.cast(self._value(args[0], dtype), dtype)
        if name in _BINARY:
            a, b = (self.cast(self._value(arg, dtype), dtype) for arg in args[:2])
            alpha: Any = node.kwargs.get("alpha", 1)
            if alpha != 1:
                b = self._arith("mul", b, self.constant(alpha, dtype))
            return self._arith(name, a, b)
        if name == "rsub":
            a, b = (self.cast(self._value(arg, dtype), dtype) for arg in args[:2])
            return self._arith("sub", b, a)
        if name in _COMPARISONS:
            return self._compare(name, *self._promoted(node, args))
        if name in _LOGICAL:
            a, b = (self.cast(self._value(arg, torch.bool), torch.bool) for arg in args[:2])
            return self.emit(f"{_LOGICAL[name]} {a.name}, {b.name} : i1", torch.bool)
        if name in ("logical_not", "bitwise_not"):
            value = self._value(args[0], dtype)
            value = self.cast(value, torch.bool) if name == "logical_not" else value
            ones = self.constant(True, torch.bool) if value.dtype == torch.bool else self.constant(-1, value.dtype)
            return self.binary("xori", value, ones)
        if name == "where":
            condition = self.cast(self._value(args[0], torch.bool), torch.bool)
            return self.select(condition, *(self.cast(self._value(arg, dtype), dtype) for arg in args[1:3]))
        if name in ("div", "floor_divide", "remainder"):
            rounding = node.kwargs.get("rounding_mode") if name == "div" else "floor"
            a, b = (self.cast(self._value(arg, dtype), dtype) for arg in args[:2])
            quotient = self._quotient(a, b, rounding)
            return quotient if name != "remainder" else self._arith("sub", a, self._arith("mul", quotient, b))
        return self._function(name, [self._value(arg, dtype) for arg in args], dtype)

    def _function(self, name: str, args: list[Scalar], dtype: torch.dtype) -> Scalar:
        """Functions of one number, and of numbers and constants."""
        if not dtype.is_floating_point:
            if name == "neg":
                return self._arith("sub", self.constant(0, dtype), self.cast(args[0], dtype))
            if name == "abs":
                x = self.cast(args[0], dtype)
                return self._arith("maximum", x, self._arith("sub", self.constant(0, dtype), x))
            raise UnfitError(f"{name} of integers is not known here")
        x, kind = self.cast(args[0], dtype), mlir_type(dtype)
        one = lambda: self.constant(1, dtype)  # noqa: E731
        if dtype == torch.float64 and name in ("tanh", "tanh_approx"):
            return self._wide_tanh(x)
        if dtype == torch.float64 and name == "log2":
            natural = self.emit(f"math.log {x.name} : f64", dtype)
            return self.binary("mulf", natural, self.constant(math.log2(math.e), dtype))
        if name in _UNARY:
            return self.emit(f"{_UNARY[name]} {x.name} : {kind}", dtype)
        if name == "neg":
            return self.emit(f"arith.negf {x.name} : {kind}", dtype)
        if name == "reciprocal":
            return self.binary("divf", one(), x)
        if name == "square":
            return self.binary("mulf", x, x)
        if name == "relu":
            return self.binary("maximumf", x, self.constant(0, dtype))
        if name == "sigmoid":
            negated = self.emit(f"arith.negf {x.name} : {kind}", dtype)
            return self.binary(
                "divf", one(), self.binary("addf", one(), self.emit(f"math.exp {negated.name} : {kind}", dtype))
            )
        if name == "pow":
            return self.emit(f"math.powf {x.name}, {self.cast(args[1], dtype).name} : {kind}", dtype)
        if name in ("clamp", "clamp_min", "clamp_max"):
            low, high = {"clamp_min": (args[1], None), "clamp_max": (None, args[1])}.get(name, (*args[1:], None)[:2])
            if low is not None:
                x = self.binary("maximumf", x, self.cast(low, dtype))
            return x if high is None else self.binary("minimumf", x, self.cast(high, dtype))
        raise UnfitError(f"{name} is not known here")

    def _wide_tanh(self, x: Scalar) -> Scalar:
        """Tanh of a float64, for which IREE has no code: ``-t / (t + 2)`` with ``t = e^(-2|x|) - 1``, and the sign of ``x``."""
        size = self.emit(f"math.absf {x.name} : f64", x.dtype)
        twice = self.binary("mulf", size, self.constant(-2, x.dtype))
        t = self.emit(f"math.expm1 {twice.name} : f64", x.dtype)
        below = self.binary("divf", t, self.binary("addf", t, self.constant(2, x.dtype)))
        above = self.emit(f"arith.negf {below.name} : f64", x.dtype)
        return self.select(self._compare("lt", x, self.constant(0, x.dtype)), below, above)

    def _value(self, value: Any, dtype: torch.dtype | None) -> Any:
        """A scalar: itself, a number of Python's (of a kind that does not widen ``dtype``), or a captured 0-dim tensor."""
        if value is None or isinstance(value, Scalar):
            return value
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise UnfitError("a captured tensor is used as a whole")
            return self._read(value, [])
        if isinstance(value, (bool, int, float)):
            if isinstance(value, float) and (dtype is None or not dtype.is_floating_point):
                return self.constant(value, torch.float64)
            return self.constant(value, torch.int64 if dtype is None else dtype)
        raise UnfitError(f"an argument of type {type(value).__name__} is not known here")

    def _arith(self, name: str, a: Scalar, b: Scalar) -> Scalar:
        operation = _BINARY[name][0 if a.dtype.is_floating_point else 1]
        if a.dtype == torch.bool and name in ("add", "maximum"):
            operation = "arith.ori"
        if a.dtype == torch.bool and name in ("mul", "minimum"):
            operation = "arith.andi"
        return self.emit(f"{operation} {a.name}, {b.name} : {mlir_type(a.dtype)}", a.dtype)

    def _promoted(self, node: fx.Node, args: Sequence[Any]) -> tuple[Scalar, Scalar]:
        """Both sides of a comparison in the type that torch compares in."""
        sides: list[Any] = []
        for arg, value in zip(node.args[:2], args, strict=False):
            sides.append(arg.meta["val"] if isinstance(arg, fx.Node) and "val" in arg.meta else value)
        dtype = torch.result_type(*sides)
        a, b = (self.cast(self._value(arg, dtype), dtype) for arg in args[:2])
        return a, b

    def _compare(self, name: str, a: Scalar, b: Scalar) -> Scalar:
        on_floats, on_integers = _COMPARISONS[name]
        if a.dtype.is_floating_point:
            return self.emit(f"arith.cmpf {on_floats}, {a.name}, {b.name} : {mlir_type(a.dtype)}", torch.bool)
        order = on_integers.replace("s", "u", 1) if a.dtype == torch.bool else on_integers
        return self.emit(f"arith.cmpi {order}, {a.name}, {b.name} : {mlir_type(a.dtype)}", torch.bool)

    def _quotient(self, a: Scalar, b: Scalar, rounding: Any) -> Scalar:
        kind = mlir_type(a.dtype)
        if not a.dtype.is_floating_point:
            return self.emit(
                f"arith.{'floordivsi' if rounding == 'floor' else 'divsi'} {a.name}, {b.name} : {kind}", a.dtype
            )
        quotient = self.binary("divf", a, b)
        return quotient if rounding is None else self.emit(f"math.{rounding} {quotient.name} : {kind}", a.dtype)

    def _read(self, tensor: Any, indices: Sequence[Any]) -> Scalar:
        """``tensor[indices]``, negative ones counted from the end."""
        if not isinstance(tensor, Tensor) or len(indices) != tensor.dim() or any(i is None for i in indices):
            raise UnfitError("a mod indexes something else than one element of a captured tensor")
        positions = []
        for index, size in zip(indices, tensor.shape, strict=True):
            at = self.cast(self._value(index, torch.int64), torch.int64)
            wrapped = self.binary("addi", at, self.constant(size, torch.int64))
            at = self.select(self._compare("lt", at, self.constant(0, torch.int64)), wrapped, at)
            positions.append(self.emit(f"arith.index_cast {at.name} : i64 to index", torch.int64).name)
        name = self.literals.name(tensor)
        return self.emit(f"tensor.extract {name}[{', '.join(positions)}] : {literal_type(tensor)}", tensor.dtype)


def _float_text(value: Tensor) -> str:
    """A number exactly: its bits, which MLIR reads for every float type."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()]
    width = value.element_size() * 8
    return f"0x{int(value.view(bits).item()) & ((1 << width) - 1):0{width // 4}X}"


def _scalar_graph(mod: Callable[..., Any], dtypes: Sequence[torch.dtype]) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*arguments: Tensor) -> Any:
        with indexing_by_tensors():
            return mod(*arguments)

    examples = [torch.zeros((), dtype=dtype) for dtype in dtypes]
    graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    graph.graph.eliminate_dead_code()
    return graph
