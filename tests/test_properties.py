"""The properties of the family (FAMILY.md, 1 to 8) for every member to which each applies, compiled, on every device.

``tests/test_reference.py`` holds the float64 reference to them; here it is the graph of the operator (float64, which nothing
lowers), the CPU's compiled loops, and a GPU's kernels where there is one. No oracle here shares a formula with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import jvp_oracle, relative_error
from torch import Tensor

import parallax_compile as plx
from parallax_compile.check_family import members

MEMBERS = {
    name: spec.replace(probe=plx.Gradient(1)) if spec.probe.kind == "gradient" else spec
    for name, spec in members().items()
}
LOWERED = ("PARALLAX", "LLA")
"""What the CPU's path is compiled for here, with a probe that is given and one that is solved."""


def _cases() -> list[Any]:
    cases = [pytest.param(name, "cpu", "aot_eager", id=f"{name}-graph") for name in MEMBERS]
    cases += [pytest.param(name, "cpu", "inductor", id=f"{name}-cpu") for name in LOWERED]
    return cases + [pytest.param(n, "cuda", "inductor", id=f"{n}-cuda", marks=pytest.mark.gpu) for n in MEMBERS]


EACH = pytest.mark.parametrize(("name", "device", "backend"), _cases())
ROWS, COLUMNS, WIDTH = 33, 70, 5


class Member:
    """A member compiled once, forward alone: the properties are of its values; one shape, the ridge an operand."""

    def __init__(self, name: str, device: str, backend: str) -> None:
        self.spec, self.device = MEMBERS[name], device
        self.dtype = torch.float64 if device == "cpu" else torch.float32
        # A GPU has no float64 here, and its float32 products add up 70 terms; a solve adds its own.
        self.exact = 1e-9 if device == "cpu" else 1e-4
        self.solved = self.spec.probe.kind in ("solved", "gradient")
        self.learned = self.spec.probe.kind == "learned"
        self._call = torch.compile(self._plain, backend=backend, fullgraph=True)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, ridge: Tensor) -> Tensor:
        probe = r if self.learned else None
        options = {"ridge": ridge} if self.solved else {}
        return plx.attention(q, k, v, probe, spec=self.spec, enable_gqa=True, **options)

    @torch.no_grad()
    def __call__(self, *operands: Tensor, ridge: float = 0.5) -> Tensor:
        return self._call(*operands, torch.tensor(ridge, dtype=self.dtype, device=self.device))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(self.device, self.dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, r = self.normal(2, 4, ROWS, WIDTH), self.normal(2, 4, ROWS, WIDTH)
        return q, self.normal(2, 2, COLUMNS, WIDTH), self.normal(2, 2, COLUMNS, 3), r


@EACH
def test_values_follow(name: str, device: str, backend: str) -> None:
    """Properties 1 to 6 and 8, on one compiled call of all keys."""
    member = Member(name, device, backend)
    spec, close = member.spec, member.exact
    q, k, v, r = member.operands()
    out = member(q, k, v, r)
    softmax = _plain_average(spec, q, k, v)

    if member.learned:  # 1
        still = member(q, k, v, torch.zeros_like(r))
        assert _difference(still, softmax if spec.intercept else torch.zeros_like(out)) < close
    if spec.probe.kind == "zero":  # 1, where it is the member itself
        assert relative_error(out, softmax) < close
    if spec.bandwidth.kind == "finite" and member.learned and spec.intercept:  # 2
        assert relative_error(out, jvp_oracle(q, k, v, r, None, WIDTH**-0.5)) < close
    shift = 3 * member.normal(WIDTH)
    if spec.intercept and not member.solved:  # 3
        assert relative_error(member(q, k + shift, v, r), out) < 10 * close
    if spec.intercept and member.solved and spec.bandwidth.kind == "infinite":  # 3: queries move with the keys
        assert relative_error(member(q + shift, k + shift, v, r), out) < 10 * close
    if spec.intercept:  # 4
        along = member.normal(3)
        assert relative_error(member(q, k, v + along, r), out + along) < close
    order = torch.randperm(COLUMNS, device=device)  # 5
    assert relative_error(member(q, k[:, :, order], v[:, :, order], r), out) < close
    if spec.probe.kind == "solved":
        # 6: queries reach beyond the keys; 32-bit numbers leave a ridge of 1e-4 to be told from none.
        slope, offset = member.normal(WIDTH, 3), member.normal(3) * spec.intercept
        ridge, allowed = (1e-10, 1e-6) if device == "cpu" else (1e-4, 1e-2)
        affine = 2 * q @ slope + offset
        assert relative_error(member(2 * q, k, k @ slope + offset, r, ridge=ridge), affine) < allowed
        assert relative_error(_plain_average(spec, 2 * q, k, k @ slope + offset), affine) > 0.1
        far = member(q, k, v, r, ridge=1e12)  # 8
        assert _difference(far, softmax if spec.intercept else torch.zeros_like(out)) < 10 * close


def _plain_average(spec: plx.AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ keys.mT * (WIDTH**-0.5 if spec.bandwidth.kind == "finite" else 0.0)
    return torch.softmax(scores, -1) @ values


def _difference(got: Tensor, want: Tensor) -> float:
    """Absolute, for what may be zero."""
    return float((got - want).abs().max())


@EACH
def test_rows_without_a_key(name: str, device: str, backend: str) -> None:
    """Property 7: 0, an LSE of -inf, ``t`` 0, zero gradients, and no NaN from what is behind the mask."""
    if (backend, device) == ("inductor", "cpu") and name == "LLA":
        pytest.skip("in tests/test_family.py")
    member = Member(name, device, backend)
    spec = member.spec.replace(mask_mod=plx.masks.causal(offset=-3))
    q, k, v, r = (x.requires_grad_() for x in member.operands())
    request = plx.AuxRequest(lse=True, probe_mean=True)

    def call(*operands: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probe = operands[3] if member.learned else None
        out, aux = plx.attention(*operands[:3], probe, spec=spec, enable_gqa=True, return_aux=request)
        return out, aux.lse, aux.probe_mean

    out, lse, mean = torch.compile(call, backend=backend, fullgraph=True)(q, k, v, r)
    assert not out[:, :, :3].any() and not mean[:, :, :3].any() and lse[:, :, :3].isneginf().all()
    assert out.isfinite().all() and lse[:, :, 3:].isfinite().all() and mean.isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v, r), allow_unused=True)
    for operand, grad in zip("qkvr", grads, strict=True):
        assert grad is None or grad.isfinite().all(), operand
    for grad in (grads[0], grads[3]):
        assert grad is None or not grad[:, :, :3].any()
    # Keys that no row sees.
    assert not grads[2][:, :, ROWS - 3 :].any() and (grads[1] is None or not grads[1][:, :, ROWS - 3 :].any())


def test_every_property_meets_every_member_that_has_it() -> None:
    """The conditions above select what FAMILY.md says they do."""
    kinds = [(s.bandwidth.kind, s.probe.kind, s.intercept) for s in MEMBERS.values()]
    assert sum(probe == "learned" for _, probe, _ in kinds) == 4  # 1
    assert kinds.count(("finite", "learned", True)) == 1  # 2
    assert sum(probe == "solved" for _, probe, _ in kinds) == 4  # 6, 8
    assert sum(intercept for *_, intercept in kinds) == 8  # 4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_average_of_one_column(backend: str) -> None:
    """Chunks that are not full, values of width 1: an oracle by running sums."""
    spec = plx.VALUE_AVERAGE.replace(mask_mod=plx.masks.causal())
    q, v = torch.randn(1, 2, 150, 4, dtype=torch.float64), torch.randn(1, 2, 150, 1, dtype=torch.float64)
    call: Callable[..., Tensor] = torch.compile(lambda q, v: plx.attention(q, q, v, spec=spec), backend=backend)
    weights = torch.ones(150, 150, dtype=torch.float64).tril() / torch.arange(1, 151, dtype=torch.float64)[:, None]
    v.requires_grad_()
    out, grad = call(q, v), torch.randn(1, 2, 150, 1, dtype=torch.float64)
    assert relative_error(out, weights @ v) < 1e-12
    assert relative_error(torch.autograd.grad(out, v, grad)[0], weights.mT @ grad) < 1e-12


def test_the_picture_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """``examples/boundary.py``: at the edge LLA returns an affine map, softmax attention does not."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    import boundary

    query_points, _, found = boundary.estimates(queries=101)
    errors = boundary.errors(query_points, found)
    assert errors["LLA"]["affine"] < 1e-7 < 1e-2 < errors["softmax"]["affine"]
    assert all(errors["LLA"][label] < errors["softmax"][label] / 5 for label in boundary.MAPS)
