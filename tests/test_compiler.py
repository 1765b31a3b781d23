"""The decorator and the backend."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from support.oracle import relative_error
from torch import Tensor, nn

import parallax_compile as plx
from parallax_compile.errors import InputError, InputTypeError


class Plain(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        """Doc."""
        return plx.attention(x, x, self.projection(x), x) * gain


@plx.parallax_compile(fullgraph=True)
class Decorated(Plain):
    """A docstring that stays."""


@plx.parallax_compile
class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return plx.attention(x, x, x)


def test_a_decorated_class_stays_a_class() -> None:
    model = Decorated()
    assert isinstance(model, Decorated)
    assert isinstance(model, Plain)
    assert Decorated.__name__ == "Decorated"
    assert Decorated.__doc__ == "A docstring that stays."
    assert inspect.signature(Decorated.forward) == inspect.signature(Plain.forward)
    assert list(model.state_dict()) == ["projection.weight", "projection.bias"]
    again = pickle.loads(pickle.dumps(model))
    copied = copy.deepcopy(model)
    x = torch.randn(1, 2, 16, 8)
    want = Plain.forward(model, x)
    for twin in (model, again, copied):
        assert relative_error(twin(x, gain=2.0), 2 * want) < 1e-5


def test_a_decorated_subclass_leaves_its_base_alone() -> None:
    assert Plain.forward is not Decorated.forward
    assert "_parallax_eager_forward" not in vars(Plain)


def test_a_decorated_instance_is_a_twin() -> None:
    model = Plain()
    compiled = plx.parallax_compile(model, fullgraph=True)
    x = torch.randn(1, 2, 16, 8)
    assert compiled is not model
    assert type(compiled) is Plain
    assert "forward" not in vars(model)
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert compiled.projection is model.projection
    assert relative_error(compiled(x), model(x)) < 1e-5
    compiled(x).sum().backward()
    assert model.projection.weight.grad is not None


def test_a_function_and_its_metadata() -> None:
    @plx.parallax_compile(mode="default", dynamic=False)
    def attend(q: Tensor, k: Tensor) -> Tensor:
        """Attend."""
        return plx.attention(q, k, k)

    assert attend.__name__ == "attend"
    assert attend.__doc__ == "Attend."
    x = torch.randn(1, 2, 16, 8)
    assert relative_error(attend(x, x), plx.attention(x, x, x)) < 1e-5


def test_backend_by_name_with_options() -> None:
    assert "parallax" in torch._dynamo.list_backends()
    x = torch.randn(1, 2, 16, 8)
    compiled = torch.compile(Bare(), backend="parallax", options={"epilogue_fusion": False})
    assert relative_error(compiled(x), plx.attention(x, x, x)) < 1e-5


def test_refusals() -> None:
    with pytest.raises(InputTypeError, match="Module classes"):
        plx.parallax_compile(dict)
    with pytest.raises(InputTypeError, match="got int"):
        plx.parallax_compile(3)
    with pytest.raises(InputError, match="mode must be one of"):
        plx.parallax_compile(Plain(), mode="fastest")
    with pytest.raises(Exception, match=r"parallax\.unknown"):
        torch.compile(Bare(), backend="parallax", options={"parallax.unknown": 1})(torch.randn(1, 1, 4, 4))


def test_numbers_that_change_between_calls_stay_constants() -> None:
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(n.args for n in graph.graph.nodes if "parallax_attention" in str(n.target))
        return graph

    q = torch.randn(1, 2, 32, 16)
    compiled = torch.compile(
        lambda q, scale, options: plx.attention(q, q, q, q, scale=scale, kernel_options=options),
        backend=backend,
        fullgraph=True,
    )
    for scale, block in ((0.1, 16), (0.2, 32), (0.3, 64)):
        out = compiled(q, scale, {"BLOCK_M": block, "USE_TMA": False})
        torch.testing.assert_close(out, plx.attention(q, q, q, q, scale=scale))
        constants = [argument for argument in seen[-1] if isinstance(argument, (float, dict))]
        assert constants[0] == scale and constants[1]["BLOCK_M"] == block


def test_the_approximate_cap_is_exact_where_there_is_no_such_instruction() -> None:
    inputs = [torch.randn(1, 2, 24, 8, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def results(approx: bool, compiled: bool) -> list[Tensor]:
        spec = plx.PARALLAX.replace(covariance_mod=plx.mods.tanh_cap(1.5, approx=approx))
        call = lambda *tensors: plx.attention(*tensors, spec=spec)
        out = (torch.compile(call, fullgraph=True) if compiled else call)(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    exact = results(False, False)
    for compiled in (False, True):
        torch.testing.assert_close(results(True, compiled), exact)
