"""User errors inside traced code: they surface as themselves, compiled or not (private torch: :mod:`.torch_compat`)."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch._ops import HigherOrderOperator

from ..errors import InputTypeError
from .torch_compat import once_imported

__all__ = ["check_arity", "raise_input", "settled_when_traced", "traced_error"]


class _RaiseInput(HigherOrderOperator):
    """Raises a user error; under Dynamo it does so at trace time, as itself.

    A ``raise`` that Dynamo traces surfaces as "Unsupported: Observed exception" under ``fullgraph=True``. This operator's
    Dynamo handler raises the very exception instead, so that a wrong argument reads the same compiled or not.
    """

    def __init__(self) -> None:
        super().__init__("parallax_raise_input")

    def __call__(self, error: type[Exception], message: str) -> None:
        raise error(message)


raise_input = _RaiseInput()


class _SettledWhenTraced(HigherOrderOperator):
    """Calls a function of no arguments; under Dynamo once, when the call is traced, and what it gave is a constant then.

    There is no guard on it: what is compiled already stays as it is.
    """

    def __init__(self) -> None:
        super().__init__("parallax_settled_when_traced")

    def __call__(self, function: Callable[[], str]) -> str:
        return function()


settled_when_traced = _SettledWhenTraced()


class _CheckArity(HigherOrderOperator):
    """Checks that a mod takes the arguments it will get; under Dynamo at trace time, on the function itself."""

    def __init__(self) -> None:
        super().__init__("parallax_check_arity")

    def __call__(self, name: str, mod: Callable[..., Any], *expected: str) -> None:
        problem = arity_problem(mod, expected)
        if problem is not None:
            raise InputTypeError(f"{name} {problem}")


check_arity = _CheckArity()


def arity_problem(mod: Callable[..., Any], expected: Sequence[str]) -> str | None:
    """What is wrong with the arguments that ``mod`` takes, or None."""
    try:
        inspect.signature(mod).bind(*expected)
    except TypeError as error:
        name = getattr(mod, "__qualname__", None) or type(mod).__qualname__
        return f"must take ({', '.join(expected)}), but {name} does not: {error}."
    except ValueError:  # a builtin without a signature: the trace will tell
        return None
    return None


def _register_user_errors() -> None:
    from torch._dynamo import exc, variables
    from torch._dynamo.variables import higher_order_ops

    def traced(error: type[Exception]) -> type[Exception]:
        return traced_error(error, exc)

    class RaiseInputVariable(higher_order_ops.TorchHigherOrderOperatorVariable):
        _HOP_NAME = raise_input.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            error, message = args
            raise traced(error.as_python_constant())(_render(message))

        call_function = _call_function

    class SettledWhenTracedVariable(higher_order_ops.TorchHigherOrderOperatorVariable):
        _HOP_NAME = settled_when_traced.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            (function,) = args
            return variables.ConstantVariable.create(function.get_function()())

        call_function = _call_function

    class CheckArityVariable(higher_order_ops.TorchHigherOrderOperatorVariable):
        _HOP_NAME = check_arity.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            name, mod, *expected = args
            fn = _callable_of(mod)
            problem = None if fn is None else arity_problem(fn, [item.as_python_constant() for item in expected])
            if problem is not None:
                raise traced(InputTypeError)(f"{name.as_python_constant()} {problem}")
            return variables.ConstantVariable.create(None)

        call_function = _call_function

    registered = higher_order_ops._hop_name_to_variable_class
    registered[raise_input.__name__] = RaiseInputVariable
    registered[check_arity.__name__] = CheckArityVariable
    registered[settled_when_traced.__name__] = SettledWhenTracedVariable


def traced_error(error: type[Exception], exc: Any) -> type[Exception]:
    """``error`` as a class that Dynamo passes on unchanged (it rewraps exceptions that are not its own)."""

    class Traced(error, exc.UserError):  # type: ignore[misc, valid-type, name-defined]
        def __init__(self, message: str) -> None:
            exc.UserError.__init__(self, exc.UserErrorType.INVALID_INPUT, message)

    Traced.__name__, Traced.__qualname__, Traced.__module__ = error.__name__, error.__qualname__, error.__module__
    return Traced


def _callable_of(variable: Any) -> Callable[..., Any] | None:
    """The Python callable behind a Dynamo variable; None where Dynamo holds only code that it made itself."""
    for attribute in ("value", "fn"):
        found = getattr(variable, attribute, None)
        if callable(found):
            return found
    code: Any = getattr(variable, "code", None)
    if hasattr(code, "as_python_constant"):
        code = code.as_python_constant()
    if not isinstance(code, types.CodeType) or code.co_freevars:
        return None
    return types.FunctionType(code, {})


def _render(message: Any) -> str:
    """The text of a traced string; sizes that are symbolic at trace time print as their symbols."""
    if message.is_python_constant():
        return str(message.as_python_constant())
    if hasattr(message, "format_string"):
        return str(message.format_string).format(*map(_render, message.sym_args))
    if hasattr(message, "items"):
        return "(" + ", ".join(map(_render, message.items)) + ")"
    return str(getattr(message, "sym_num", message))


once_imported("torch._dynamo", _register_user_errors)
