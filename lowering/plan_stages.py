"""What a plan is made of: the problem, its stages, and what each must cost at least."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

from .plan_scan import CHUNK, chunked_scan

Direction = Literal["forward", "backward"]
Algorithm = Literal[
    "streaming",
    "row chunks",
    "pointwise",
    "conjugate gradients",
    "direct solve",
    "gradient steps",
    "chunked scan",
    "split keys",
    "merge of states",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One call of the operator, as far as the choice of stages goes.

    Sizes are ints, or symbols of the compiler where a length is dynamic; costs need ints.

    Attributes:
        visited: share of the (query block, key block) pairs that the mask lets a kernel visit; 1 without a mask.
        needs_grad: which of query, key, value, probe need a gradient; None for inference.
        captured_grads: whether a tensor captured by a mod needs a gradient.
        uniform: whether every allowed key weighs the same (infinite bandwidth): no product of queries and keys.
        prefix: whether each row's keys are a causal prefix (of its document), or all of them.
        probe_steps: steps of the stage that finds the probe, for a solved (expected) or gradient probe; 0 for others.
        solved: whether that stage stops by residual and is differentiated implicitly.
        cache_itemsize: bytes of a number of keys and values, where it is not that of the queries (8-bit caches).
        split_keys: the user's choice whether the keys of few rows are split; None leaves it to the plan.
        own_lists: whether query heads that share a key head have lists of blocks of their own, or rows several lists.
        direct: whether the systems are to be solved directly, where the user says so.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    width: int
    value_width: int
    dtype: str
    itemsize: int
    device: str
    has_probe: bool = True
    intercept: bool = True
    score_mod: bool = False
    covariance_mod: bool = False
    mask: bool = False
    block_sparse: bool = False
    visited: float = 1.0
    needs_grad: tuple[bool, bool, bool, bool] | None = None
    captured_grads: bool = False
    uniform: bool = False
    prefix: bool = False
    probe_steps: int = 0
    solved: bool = False
    cache_itemsize: int | None = None
    split_keys: bool | None = None
    own_lists: bool = False
    direct: bool | None = None

    @property
    def scans(self) -> bool:
        """Whether the sums run along the sequence."""
        return self.prefix and chunked_scan(self.uniform, self.covariance_mod)

    @property
    def score_products(self) -> int:
        """Products that make the scores and probe scores of a pass."""
        return int(not self.uniform) + int(self.has_probe)

    @property
    def saves_value_mean(self) -> bool:
        """Whether the forward writes the value mean, which the backward's row terms need."""
        return self.needs_grad is not None and self.has_probe and self.intercept


@dataclass(frozen=True)
class Stage:
    """One kernel, or one group of operations that Inductor fuses by itself.

    Attributes:
        name: what the stage computes; kernel stages are named after their template.
        algorithm: how.
        direction: forward or backward.
        products: matrix products of ``[Lq, D] x [D, Lk]`` size that it takes, as (of width D, of width Dv).
        reads, writes: tensors that it moves, by name.
        reason: why this stage and not another.
        keys: how many keys a row meets; None is the visited ones.
    """

    name: str
    algorithm: Algorithm
    direction: Direction
    products: tuple[int, int]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    reason: str
    keys: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a stage must do at least: floating-point operations of its products, and bytes moved once."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return self.flops / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True)
class Plan:
    """The ordered stages of a call."""

    problem: Problem
    stages: tuple[Stage, ...] = field(default_factory=tuple)

    def direction(self, direction: str) -> tuple[Stage, ...]:
        """The stages of one direction, in order."""
        return tuple(stage for stage in self.stages if stage.direction == direction)

    def cost(self, stage: Stage) -> Cost:
        """The least cost of ``stage``; sizes must be ints."""
        p = self.problem
        keys = p.kv_length * p.visited if stage.keys is None else stage.keys
        pairs = p.batch * p.q_heads * p.q_length * keys
        flops = 2.0 * pairs * (stage.products[0] * p.width + stage.products[1] * p.value_width)
        moved = sum(_elements(p, name) * _itemsize(p, name) for name in (*stage.reads, *stage.writes))
        return Cost(flops, float(moved))


def log_choice(stage: str, direction: Direction, algorithm: Algorithm, reason: str) -> None:
    """Say what was chosen, to ``TORCH_LOGS="+parallax_compile"``: of a plan, or where a lowering has none to make."""
    _log.info("%s: %s, %s: %s", stage, direction, algorithm, reason)


_ROWS = ("lse", "probe_mean", "tau", "beta")


def _elements(problem: Problem, name: str) -> int:
    rows = problem.batch * problem.q_heads * problem.q_length
    keys = problem.batch * problem.kv_heads * problem.kv_length
    if name in _ROWS:
        return rows
    if name == "states":
        return keys // CHUNK * problem.width**2
    if name in ("out", "grad_out", "value_mean"):
        return rows * problem.value_width
    side = {"query": rows, "probe": rows, "key": keys, "value": keys}[name.removeprefix("grad_")]
    return side * (problem.value_width if name.endswith("value") else problem.width)


def _itemsize(problem: Problem, name: str) -> int:
    if name in ("key", "value") and problem.cache_itemsize is not None:
        return problem.cache_itemsize
    return max(4, problem.itemsize) if name in _ROWS else problem.itemsize
