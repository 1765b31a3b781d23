"""How Dynamo traces an operator with mods, and what else is asked of it (private torch: :mod:`.torch_compat`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx.experimental.proxy_tensor import set_original_aten_op

from ..errors import InputTypeError, UnsupportedError
from .torch_compat import once_imported
from .torch_compat_errors import traced_error
from .torch_compat_operator import result_problem

__all__ = ["mark_static", "register_dynamo_operator", "skip_frames_of", "sums_by_atomics"]


def mark_static(tensor: Tensor, dim: int) -> None:
    """Heads and widths stay constants of compiled code, so that grids and scales do."""
    torch._dynamo.mark_static(tensor, dim)


def skip_frames_of(function: Callable[..., Any]) -> None:
    """Dynamo runs a call of ``function`` as it is; where it traces through one, it goes on to."""

    def skip() -> None:
        from torch._dynamo.eval_frame import skip_code

        skip_code(function.__code__)

    once_imported("torch._dynamo", skip)


def sums_by_atomics(device: torch.device, captured: Sequence[Any]) -> bool:
    """Whether gradients of ``captured`` would be summed in an order that the user has forbidden to vary."""
    if device.type == "cpu" or not torch.is_grad_enabled() or not torch.are_deterministic_algorithms_enabled():
        return False
    if torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in captured)


@contextlib.contextmanager
def _side_effects_in_place(tx: Any) -> Iterator[None]:
    """Dynamo's record of side effects stays one object while a mod is traced.

    Tracing a mod ends by putting a copy of the record from before in its place. What a Python object's ``__dict__`` holds is
    looked up in the record that was there when it was first read (torch 2.13), so that attributes set after the call, as
    Hugging Face's caches do, would be lost.
    """
    record = tx.output.side_effects
    yield
    restored = tx.output.side_effects
    for name in ("id_to_variable", "store_attr_mutations", "attr_mutation_kinds", "keepalive"):
        if hasattr(restored, name):
            setattr(record, name, getattr(restored, name))
    tx.output.side_effects = record


def _call_objects_made_in_the_graph() -> None:
    """Let Dynamo call an object that compiled code has made, whatever it hashes by.

    Dynamo looks a called object up among the functions of :mod:`random`, by its hash. Of an object made in compiled code it
    holds one without attributes, by which a dataclass cannot hash: torch 2.11 fails there ("'Alibi' object has no attribute
    'num_heads'"), later releases take it for no such function.
    """
    from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

    class Unfinished:
        def __hash__(self) -> int:
            raise AttributeError

    is_random = UserDefinedObjectVariable.is_supported_random
    lookup: Any = SimpleNamespace(value=Unfinished(), _supported_random_functions=frozenset)
    try:
        is_random(lookup)
    except AttributeError:

        def is_supported_random(self: Any) -> bool:
            try:
                return is_random(self)
            except AttributeError:
                return False

        UserDefinedObjectVariable.is_supported_random = is_supported_random  # type: ignore[method-assign]


def register_dynamo_operator(
    op: HigherOrderOperator, *, mods: dict[int, str], names: dict[int, str], on_trace: Callable[[], None]
) -> None:
    """Teach Dynamo to trace a call of ``op`` whose arguments hold mods.

    Args:
        op: the operator. Its arguments are positional; argument ``i`` in ``mods`` is a mod (or, for ``"mask_fn"``, a tuple
            whose last item is one). The tensors captured by the mods are lifted and appended as one tuple for each.
        mods: argument position -> ``"score_mod"`` or ``"mask_fn"``.
        names: argument position -> what the user calls the mod.
        on_trace: called before each trace (we register our lowerings there).
    """
    _call_objects_made_in_the_graph()
    from torch._dynamo import exc
    from torch._dynamo.utils import proxy_args_kwargs
    from torch._dynamo.variables import higher_order_ops
    from torch._dynamo.variables.builder import wrap_fx_proxy
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lists import TupleVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    def _check_result(graph: torch.fx.GraphModule, position: int) -> None:
        (result,) = list(graph.graph.nodes)[-1].args
        while isinstance(result, (list, tuple)) and len(result) == 1:
            (result,) = result
        value = result.meta.get("example_value") if isinstance(result, torch.fx.Node) else result
        problem = result_problem(value, is_mask=mods[position] == "mask_fn")
        if problem is not None:
            raise traced_error(InputTypeError, exc)(f"{names[position]} {problem}")

    def _check_deterministic(query: Any, captured: Sequence[Any], position: int) -> None:
        values = [proxy.node.meta.get("example_value") for proxy in captured]
        if mods[position] == "score_mod" and sums_by_atomics(query.device, values):
            raise traced_error(UnsupportedError, exc)(
                f"the gradient of a tensor captured by {names[position]} is summed by atomic additions on a GPU, whose order "
                "differs between runs, which torch.use_deterministic_algorithms(True) forbids. Detach the tensor, or pass "
                "warn_only=True."
            )

    def _specialized(argument: Any, tx: Any) -> Any:
        # Dynamo makes a number that changed between calls a symbol. Scale, switches and kernel options are constants of the
        # kernels: another value is another kernel.
        if isinstance(argument, SymNodeVariable):
            return ConstantVariable.create(argument.evaluate_expr(tx.output))
        if isinstance(argument, ConstDictVariable):
            items = {key: _specialized(item, tx) for key, item in argument.items.items()}
            return argument.clone(items=items)
        return argument

    class ParallaxOperatorVariable(higher_order_ops.FlexAttentionHigherOrderVariable):
        _HOP_NAME = op.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            on_trace()
            arguments = self.normalize_to_args(list(args), kwargs)
            query = arguments[0]
            # Mods act on scores, which are float32 (float64 for float64 inputs) whatever the inputs are: traced on
            # low-precision scalars they would round back at every decomposed operation.
            score_like = query
            if query.dtype in (torch.bfloat16, torch.float16):
                score_like = query.call_method(tx, "float", [], {})
            nodes: dict[int, Any] = {}
            lifted: list[Any] = []
            plain = [_specialized(argument, tx) for argument in arguments]
            for position, name in mods.items():
                mod = arguments[position]
                if name == "mask_fn":
                    plain[position] = TupleVariable(mod.items[:-1], source=mod.source)
                    mod = mod.items[-1]
                with _side_effects_in_place(tx):
                    nodes[position], captured = self.create_wrapped_node(tx, score_like, mod, name)
                _check_result(tx.output.nn_modules[nodes[position].node.target], position)
                _check_deterministic(query, captured, position)
                lifted.append(captured)
            keep = [i for i in range(len(plain)) if mods.get(i) != "score_mod"]
            proxies, _ = proxy_args_kwargs([plain[i] for i in keep], {})
            final: list[Any] = [None] * len(plain)
            for i, proxy in zip(keep, proxies, strict=True):
                final[i] = proxy
            for position, node in nodes.items():
                final[position] = (*final[position], node) if mods[position] == "mask_fn" else node
            with set_original_aten_op(self.value):
                proxy = tx.output.create_proxy("call_function", self.value, args=(*final, *lifted), kwargs={})
                return wrap_fx_proxy(tx=tx, proxy=proxy, example_value=None)

    higher_order_ops._hop_name_to_variable_class[op.__name__] = ParallaxOperatorVariable
