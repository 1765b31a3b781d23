"""The reference against computations that share no formula with it: the properties of the family, in float64."""

from __future__ import annotations

import pytest
import torch
from support.oracle import relative_error
from torch import Tensor

import parallax_compile as plx
from parallax_compile import reference

MEMBERS = {
    **plx.family(),
    "finite, learned, no intercept": plx.PARALLAX.replace(intercept=False),
    "finite, solved, no intercept": plx.LLA.replace(intercept=False),
    "gradient": plx.LLA.replace(probe=plx.Gradient(4)),
    "gradient, infinite, no intercept": plx.MESA.replace(probe=plx.Gradient(3, ridge_scale="sum")),
}


def operands(rows: int = 9, columns: int = 11, width: int = 4, requires_grad: bool = False) -> list[Tensor]:
    def normal(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(2, heads, length, width, dtype=torch.float64, requires_grad=requires_grad)

    return [normal(4, rows, width), normal(2, columns, width), normal(2, columns, 3), normal(4, rows, width)]


def run(spec: plx.AttentionSpec, q: Tensor, k: Tensor, v: Tensor, r: Tensor, **options: object) -> Tensor:
    return reference.attention(q, k, v, r if spec.probe.kind == "learned" else None, spec=spec, **options).out


def weights_of(spec: plx.AttentionSpec, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(2, 1).mT * q.size(-1) ** -0.5
    if spec.bandwidth.kind == "infinite":
        scores = torch.zeros_like(scores)
    return torch.softmax(scores.masked_fill(~mask, -float("inf")), -1)


@pytest.mark.parametrize("name", [name for name, spec in MEMBERS.items() if spec.probe.kind == "solved"])
@pytest.mark.parametrize("ridge", [1e-3, 0.7])
def test_solved_probe_is_weighted_ridge_regression(name: str, ridge: float) -> None:
    spec = MEMBERS[name]
    q, k, v, r = operands()
    mask = torch.ones(9, 11, dtype=torch.bool).tril(2)
    got = run(spec, q, k, v, r, mask=mask, ridge=ridge)
    p = weights_of(spec, q, k, mask)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = torch.empty_like(got)
    for b in range(2):
        for h in range(4):
            for i in range(9):
                # Ordinary least squares on an augmented system; the intercept is not penalised.
                root = p[b, h, i].sqrt()[:, None]
                design = torch.cat([keys[b, h], torch.ones(11, 1)], 1) if spec.intercept else keys[b, h]
                penalty = ridge**0.5 * torch.eye(4, design.size(1), dtype=torch.float64)
                left = torch.cat([root * design, penalty])
                right = torch.cat([root * values[b, h], torch.zeros(4, 3, dtype=torch.float64)])
                point = torch.cat([q[b, h, i], torch.ones(1)]) if spec.intercept else q[b, h, i]
                want[b, h, i] = point @ torch.linalg.lstsq(left, right, driver="gelsd").solution
    assert relative_error(got, want) < 1e-8


@pytest.mark.parametrize("name", MEMBERS)
def test_zero_probe_and_large_ridge(name: str) -> None:
    spec = MEMBERS[name]
    q, k, v, r = operands()
    plain = spec.replace(probe=plx.Zero(), intercept=True)
    if spec.probe.kind == "learned":
        found = run(spec, q, k, v, torch.zeros_like(r))
    elif spec.probe.kind == "solved":
        found = run(spec, q, k, v, r, ridge=1e12)
    else:
        return
    want = run(plain, q, k, v, r) if spec.intercept else torch.zeros_like(found)
    assert (found - want).abs().max() < 1e-9


@pytest.mark.parametrize("name", [n for n, s in MEMBERS.items() if s.intercept and s.probe.kind in ("zero", "learned")])
def test_translating_the_keys_changes_nothing(name: str) -> None:
    q, k, v, r = operands()
    shift = torch.randn(4, dtype=torch.float64)
    spec = MEMBERS[name]
    assert relative_error(run(spec, q, k + shift, v, r), run(spec, q, k, v, r)) < 1e-11


def test_translating_keys_and_queries_of_a_solved_probe_at_infinite_bandwidth() -> None:
    q, k, v, r = operands()
    shift = torch.randn(4, dtype=torch.float64)
    spec = plx.AFFINE_MESA
    assert relative_error(run(spec, q + shift, k + shift, v, r), run(spec, q, k, v, r)) < 1e-11


@pytest.mark.parametrize("name", [n for n, s in MEMBERS.items() if s.intercept])
def test_translating_the_values_translates_the_output(name: str) -> None:
    q, k, v, r = operands()
    shift = torch.randn(3, dtype=torch.float64)
    assert relative_error(run(MEMBERS[name], q, k, v + shift, r), run(MEMBERS[name], q, k, v, r) + shift) < 1e-11


@pytest.mark.parametrize("name", MEMBERS)
def test_permuting_pairs_changes_nothing(name: str) -> None:
    q, k, v, r = operands()
    order = torch.randperm(11)
    assert (
        relative_error(run(MEMBERS[name], q, k[:, :, order], v[:, :, order], r), run(MEMBERS[name], q, k, v, r)) < 1e-10
    )


@pytest.mark.parametrize("name", [n for n, s in MEMBERS.items() if s.probe.kind == "solved"])
def test_affine_values_are_recovered_exactly_at_the_edge(name: str) -> None:
    spec = MEMBERS[name]
    q, k, _, r = operands()
    slope, offset = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64) * spec.intercept
    q = 3 * q  # well outside of the keys
    got = run(spec, q, k, k @ slope + offset, r, ridge=1e-12)
    assert relative_error(got, q @ slope + offset) < 1e-6
    softmax = run(plx.SOFTMAX, q, k, k @ slope + offset, r)
    assert relative_error(softmax, q @ slope + offset) > 0.1


@pytest.mark.parametrize("name", MEMBERS)
def test_rows_without_a_key_are_zero_and_nothing_behind_the_mask_is_read(name: str) -> None:
    spec = MEMBERS[name]
    q, k, v, r = operands(requires_grad=True)
    mask = torch.ones(9, 11, dtype=torch.bool).tril(-3)
    closed = lambda s: torch.where(mask, s, torch.tensor(float("nan"), dtype=s.dtype))
    result = reference.attention(
        q, k, v, r if spec.probe.kind == "learned" else None, spec=spec, mask=mask,
        score_mod=closed if spec.bandwidth.kind == "finite" else None,
        covariance_mod=None if spec.probe.kind == "zero" else closed,
    )  # fmt: skip
    assert not result.out[:, :, :3].any()
    assert result.lse[:, :, :3].isneginf().all()
    assert not result.probe_mean[:, :, :3].any()
    assert result.out.isfinite().all()
    used = list((q, k, v, r) if spec.probe.kind == "learned" else (q, k, v))
    grads = torch.autograd.grad(result.out.sum() + result.probe_mean.sum(), used, allow_unused=True)
    for grad in grads:
        assert grad is None or grad.isfinite().all()
    assert grads[0] is None or not grads[0][:, :, :3].any()


def test_statistics() -> None:
    q, k, v, r = operands()
    mask = torch.ones(9, 11, dtype=torch.bool).tril(1)
    found = reference.attention(q, k, v, r, spec=plx.PARALLAX, mask=mask)
    scores = (q @ k.repeat_interleave(2, 1).mT / 2).masked_fill(~mask, -float("inf"))
    p = scores.softmax(-1)
    assert relative_error(found.lse, scores.logsumexp(-1)) < 1e-13
    assert relative_error(found.probe_mean, (p * (r @ k.repeat_interleave(2, 1).mT)).sum(-1)) < 1e-12
    assert relative_error(found.value_mean, p @ v.repeat_interleave(2, 1)) < 1e-13
    counted = reference.attention(q, k, v, r, spec=plx.AFFINE_LINEAR, mask=mask)
    assert relative_error(counted.lse, mask.sum(-1).double().log().expand(2, 4, 9)) < 1e-13


def test_ridge_per_head_and_its_scale() -> None:
    q, k, v, r = operands()
    ridge = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)[:, None]
    got = run(plx.LLA, q, k, v, r, ridge=ridge)
    for head in range(4):
        want = run(plx.LLA, q, k, v, r, ridge=float(ridge[head]))
        assert relative_error(got[:, head], want[:, head]) < 1e-12
    summed = run(plx.MESA.replace(probe=plx.Solved(2.0, "sum")), q, k, v, r)
    assert relative_error(summed, run(plx.MESA, q, k, v, r, ridge=2.0 / 11)) < 1e-12


def test_gradient_steps_converge_to_the_solved_probe() -> None:
    q, k, v, r = operands()
    want = run(plx.LLA, q, k, v, r, ridge=0.5)
    near = run(plx.LLA.replace(probe=plx.Gradient(4000)), q, k, v, r, ridge=0.5)
    far = run(plx.LLA.replace(probe=plx.Gradient(2)), q, k, v, r, ridge=0.5)
    assert relative_error(near, want) < 1e-8 < relative_error(far, want)


@pytest.mark.parametrize("name", MEMBERS)
def test_gradcheck(name: str) -> None:
    spec = MEMBERS[name]
    q, k, v, r = (tensor[:1, :2, :4].detach().requires_grad_() for tensor in operands(width=3))
    k, v = k[:, :1], v[:, :1]
    function = lambda q, k, v, r: run(spec, q, k, v, r, mask=torch.ones(4, 4, dtype=torch.bool).tril(1))
    assert torch.autograd.gradcheck(function, (q, k, v, r))
    if name in ("PARALLAX", "LLA"):
        assert torch.autograd.gradgradcheck(function, (q, k, v, r))


@pytest.mark.parametrize("intercept", [True, False])
def test_implicit_gradients_of_the_solved_probe(intercept: bool) -> None:
    """What a fused backward will use (FAMILY.md) agrees with autograd through the dense solve, at infinite bandwidth."""
    q, k, _, _ = operands(requires_grad=True)
    keys = k.repeat_interleave(2, 1)
    ridge = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    p = torch.full((2, 4, 9, 11), 1 / 11, dtype=torch.float64)
    matrix, right = reference._system(q, keys, p, ridge.expand(2, 4, 9), intercept)
    rho = torch.linalg.solve(matrix, right[..., None])[..., 0]
    upstream = torch.randn_like(rho)
    want = torch.autograd.grad(rho, (q, k, ridge), upstream, retain_graph=True)
    u, held = torch.linalg.solve(matrix, upstream[..., None])[..., 0].detach(), rho.detach()
    ku, kr = u @ keys.mT, held @ keys.mT
    if intercept:
        mean = p @ keys
        phi = (u * mean).sum() - (p * ku * kr).sum() + ((p * ku).sum(-1) * (p * kr).sum(-1)).sum()
        dq = -u
    else:
        phi, dq = -(p * ku * kr).sum(), u
    got = (dq, torch.autograd.grad(phi, k)[0], -(u * held).sum())
    assert max(map(relative_error, got, want)) < 1e-10
