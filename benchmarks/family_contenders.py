"""Who takes part in the benchmark of the family: our members and their peers, called on the same tensors.

Peers are used where they are installed and reported as absent where not; none is vendored. ``fla-core==0.6.0`` gives fla's
operators; FlashLLA has no package: put a checkout of github.com/Yifei-Zuo/FlashLLA (of commit d104afa) on ``PYTHONPATH``.
Their kernels are compiled ahead by ``peers.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import parallax_compile as plx

CAUSAL = plx.masks.causal()
FLASH_LLA_ITERATIONS = 32  # its default


@dataclass(frozen=True)
class Problem:
    """What is computed, causal, in the layout ``[B, H, L, D]``.

    Attributes:
        member: a name of ``plx.family()``, or of :func:`others`.
        ridge: of solved probes.
    """

    member: str
    batch: int
    heads: int
    length: int
    width: int
    ridge: float | None = None

    @property
    def spec(self) -> plx.AttentionSpec:
        """The member with its causal mask; its ridge is the call's."""
        named = plx.family().get(self.member)
        return (others()[self.member] if named is None else named).replace(mask_mod=CAUSAL)

    def operands(self, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Query, key, value (and probe), which require gradients, and a gradient of out.

        Normal, from one seed. MesaNet's queries and keys have norm 1, as its authors prescribe.
        """
        torch.manual_seed(0)
        shape = (self.batch, self.heads, self.length, self.width)
        count = 4 if self.spec.probe.kind == "learned" else 3
        made = [torch.randn(shape, device=device) for _ in range(count + 1)]
        if self.member == "MESA":
            made[:2] = [torch.nn.functional.normalize(x, dim=-1) for x in made[:2]]
        tensors = [x.to(dtype) for x in made]
        return [x.requires_grad_() for x in tensors[:-1]], tensors[-1]


def others() -> dict[str, plx.AttentionSpec]:
    """The members without a name."""
    return {
        "learned, no intercept": plx.PARALLAX.replace(intercept=False),
        "solved, no intercept": plx.LLA.replace(intercept=False),
        "gradient": plx.LLA.replace(probe=plx.Gradient(3)),
    }


@dataclass(frozen=True)
class Runs:
    """A contender on one problem.

    Attributes:
        forward: out, without a graph for gradients.
        both: out and the gradients of the operands (None where there is none).
        notes: what else it can tell once it has run, as iterations of a solver.
    """

    forward: Callable[[], Tensor]
    both: Callable[[], tuple[Tensor, list[Tensor | None]]]
    notes: Callable[[], dict[str, Any]] = dict


Build = Callable[[Problem, list[Tensor], Tensor], Runs]


@dataclass(frozen=True)
class Contender:
    """One implementation: what it needs, and how it is called."""

    name: str
    build: Build
    module: str | None = None

    def absent(self, device: str) -> str | None:
        """Why it does not take part; None if it does."""
        if self.module is None:
            return None
        if device != "cuda":
            return "needs a GPU"
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed"


def _by_autograd(call: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> Runs:
    def forward() -> Tensor:
        with torch.no_grad():
            return call(*operands)

    def both() -> tuple[Tensor, list[Tensor | None]]:
        out = call(*operands)
        return out, list(torch.autograd.grad(out, operands, grad, allow_unused=True))

    return Runs(forward, both)


def _ours(problem: Problem, operands: list[Tensor], grad: Tensor) -> Runs:
    spec = problem.spec
    if problem.ridge is None:
        compiled = torch.compile(lambda *x: plx.attention(*x, spec=spec), fullgraph=True, dynamic=False)
        return _by_autograd(compiled, operands, grad)
    if problem.member == "MESA":  # fla's ridge belongs to sums
        spec = spec.replace(probe=plx.Solved(ridge_scale="sum"))
    # The ridge as a tensor: other ridges of a shape are the same kernels.
    ridge = torch.tensor(problem.ridge, device=grad.device)
    compiled = torch.compile(lambda *x: plx.attention(*x, spec=spec, ridge=ridge), fullgraph=True, dynamic=False)

    def notes() -> dict[str, Any]:
        request = plx.AuxRequest(iterations=True)
        telling = torch.compile(
            lambda *x: plx.attention(*x, spec=spec, ridge=ridge, return_aux=request), fullgraph=True, dynamic=False
        )
        with torch.no_grad():
            used = telling(*operands)[1].iterations
        return {"iterations_mean": float(used.float().mean()), "iterations_most": int(used.max())}

    made = _by_autograd(compiled, operands, grad)
    return Runs(made.forward, made.both, notes)


def _flash_lla(problem: Problem, operands: list[Tensor], grad: Tensor) -> Runs:
    """Its two functions under its autograd function, which reads back scalars to the host: its kernels' time alone."""
    from flashlla.ops import backward, forward

    scale, tolerance = problem.width**-0.5, 1e-12  # its defaults
    flat = [x.detach().flatten(0, 1).to(torch.bfloat16) for x in operands]
    out_grad = grad.flatten(0, 1).to(torch.bfloat16)
    ridge = torch.tensor(problem.ridge, device=grad.device)
    shape = grad.shape

    def run() -> tuple[Tensor, ...]:
        return forward.lla_forward(*flat, ridge, scale, tolerance, tolerance, tolerance, FLASH_LLA_ITERATIONS, False)

    def both() -> tuple[Tensor, list[Tensor | None]]:
        out, r, d, m, _ = run()
        grads = backward.lla_backward(
            *flat, r, d, m, out_grad, ridge, scale, tolerance, tolerance, FLASH_LLA_ITERATIONS, False
        )
        return out.view(shape), [x.view(shape) for x in grads]

    return Runs(lambda: run()[0].view(shape), both)


def _fla_linear(problem: Problem, operands: list[Tensor], grad: Tensor) -> Runs:
    """Chunked linear attention, which has no intercept and no average, so that only its time is comparable."""
    from fla.ops.linear_attn import chunk_linear_attn

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        turned = [x.transpose(1, 2) for x in (r, k, v)]
        return chunk_linear_attn(*turned, scale=1.0, normalize=False)[0].transpose(1, 2)

    return _by_autograd(call, operands, grad)


def _fla_mesa(problem: Problem, operands: list[Tensor], grad: Tensor) -> Runs:
    """MesaNet without decay and with unit step sizes: its state is the sum that ours is."""
    from fla.ops.mesa_net import chunk_mesa_net

    rows = (problem.batch, problem.length, problem.heads)
    decay = torch.zeros(rows, device=grad.device)
    step = torch.ones(rows, device=grad.device)
    ridge = torch.full((problem.heads, problem.width), float(problem.ridge or 1.0), device=grad.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        return chunk_mesa_net(*turned, decay, step, ridge)[0].transpose(1, 2)

    return _by_autograd(call, operands, grad)


OURS = Contender("ours", _ours)
FLASH_LLA = Contender("FlashLLA", _flash_lla, "flashlla")
FLA_LINEAR = Contender("fla linear", _fla_linear, "fla")
FLA_MESA = Contender("fla mesa_net", _fla_mesa, "fla")
