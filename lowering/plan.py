"""The plan: which stages compute a call, and what each costs. Whatever chooses an algorithm is here and nowhere else.

The lowering executes a plan, ``plx.explain`` prints it, tests compare its text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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

EXPECTED_ITERATIONS = 16
"""Steps that a solve is expected to take, for its cost: rows stop by their residual (the first ``2 D`` rows take more)."""

CHUNK = 64
"""Rows that a kernel of a scan takes at once, at most; segments are whole numbers of them."""

# A program of a scan adds up the segments before its own, so that they are few; and each is several chunks of rows.
_MOST_SEGMENTS = 16
_LEAST_SEGMENT = 256
_SCAN_PROGRAMS = 1024

# Decoding: rows of a program at most, and rows of a head that the program which arrives last still merges by itself.
_MOST_ROWS = 32
_MERGED_BY_THE_LAST = 4
# States of splits, rows times splits, that it may merge: on an H100 4 rows of 34 splits, merged so, took 20 us longer
# than 8 rows that a stage of their own merged; 1 row of 34 splits and 4 rows of 5 did not.
_MOST_STATES = 64
MOST_COUNTERS = 1 << 15
"""Heads of all sequences whose splits may count who is last (:mod:`.counters`)."""

# A call of the core with few rows, over many keys: there a program for each tile of rows would leave most of the device idle.
MOST_ROWS_TO_SPLIT = 16
FEWEST_KEYS_TO_SPLIT = 512
ONLY_OF_THE_CORE = ("BLOCK_M", "HELD_TILES", "WARP_SPECIALIZED")


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


def chunked_scan(uniform: bool, covariance_mod: bool) -> bool:
    """Whether a call's sums may run along the sequence, in linear time, where its mask is a causal prefix or none.

    At infinite bandwidth they may, unless a covariance_mod stands between the probe's products and the sum: it has no state.
    """
    return uniform and not covariance_mod


def scan_segments(batch: Any, heads: Any, length: Any) -> int:
    """Into how many segments a scan cuts the sequence, so that the device has enough to do: a constant of its kernels."""
    if not all(isinstance(size, int) for size in (batch, heads, length)):
        return _MOST_SEGMENTS // 2
    most = min(_MOST_SEGMENTS, -(-length // _LEAST_SEGMENT))
    return max(1, min(most, -(-_SCAN_PROGRAMS // max(1, 2 * batch * heads))))


def splits_keys(problem: Problem) -> bool:
    """Whether the output of a call comes from the decoding kernels: few rows, no gradient, many keys.

    Their programs take a split of a head's keys each, where those of ``core_forward`` take a tile of rows and all its keys.
    They save no value mean for a backward, and take one list of blocks for all rows of a key head.
    """
    able = problem.device != "cpu" and problem.needs_grad is None and not problem.own_lists and not problem.scans
    if not able or problem.split_keys is False or (problem.solved and not problem.covariance_mod):
        return False
    rows, keys = problem.q_length, problem.kv_length
    # Of a length that is a symbol: rows may be any number; keys are a cache that grows.
    few = isinstance(rows, int) and rows <= MOST_ROWS_TO_SPLIT
    many = not isinstance(keys, int) or keys >= FEWEST_KEYS_TO_SPLIT
    return bool(problem.split_keys) or (few and many)


def split_choice(options: Mapping[str, Any] | None) -> bool | None:
    """What the user's ``kernel_options`` say of splitting keys: ``SPLIT_KEYS``, or options that only ``core_forward`` has."""
    if options is None:
        return None
    if "SPLIT_KEYS" in options:
        return bool(options["SPLIT_KEYS"])
    for name in ONLY_OF_THE_CORE:
        if name in options or "fwd_" + name in options:
            return False
    return None


# Costs of a solve in multiply-adds of the tensor cores, of which an H100's multiprocessor has 2048 a clock: an operation in
# float32 (128 a clock), and a weight: its exponential (16 a clock) and the operations around it. At D = 64 and 128 a step of
# conjugate gradients took 1.4 and 1.9 times as long as this says (benchmarks/NOTES.md).
_FLOAT32_COST = 16
_WEIGHT_COST = 256
# Operations on a product of two key entries until it is two 16-bit terms, and on an entry of a matrix in one of its sweeps.
_PAIR_OPERATIONS = 8
_SWEEP_OPERATIONS = 6
_WORTH_IT = 0.75  # of the cost of conjugate gradients, because these are estimates
_MATRIX_ENTRIES = 64 * 16 * 16  # that a tile's rows have together
WIDEST_DIRECT = 32
"""The widest keys whose matrices a tile of rows can hold in registers."""


@dataclass(frozen=True)
class SolveMethod:
    """How the systems of solved probes are solved where the keys are streamed.

    Attributes:
        direct: by factorising each row's matrix, and not by conjugate gradients.
        reason: why.
    """

    direct: bool
    reason: str

    @property
    def stage(self) -> str:
        """The stage, a template."""
        return "core_solve_direct" if self.direct else "core_solve"

    @property
    def algorithm(self) -> Algorithm:
        """What the plan calls it."""
        return "direct solve" if self.direct else "conjugate gradients"


def asked_direct(options: Mapping[str, Any]) -> bool | None:
    """What the user's ``kernel_options`` say of the solver; None where they say nothing."""
    found: bool | None = options.get("solve_DIRECT", options.get("DIRECT"))
    return found


def solve_method(width: int, keys: Any, asked: bool | None = None) -> SolveMethod:
    """Choose the solver of a call's systems by what each costs for a row and a key, but for what both do.

    Conjugate gradients meet every key in each step: the weight, ``k.x`` and the weights times the keys, three products of
    width D. The direct solve meets them twice: for the matrix, whose D x D entries are one product for all rows of a tile (in
    three terms), and for the residual; and it inverts the matrix, D^3 for each row, the same for any number of keys.

    Args:
        width: ``D``.
        keys: that a row may see, perhaps a symbol: many.
        asked: the user's choice (``kernel_options["DIRECT"]``).
    """
    if asked is not None:
        return SolveMethod(asked, "kernel_options ask for it")
    if width > WIDEST_DIRECT:
        return SolveMethod(False, f"the matrices of a tile's rows fit into registers up to D = {WIDEST_DIRECT}")
    padded = max(16, 1 << (width - 1).bit_length())
    steps = min(EXPECTED_ITERATIONS, width)
    iterated = steps * (3 * padded + _WEIGHT_COST)
    rows = _MATRIX_ENTRIES // padded**2
    pairs = padded**2 * (3 + _PAIR_OPERATIONS * _FLOAT32_COST / rows)
    direct = pairs + 6 * padded + 2 * _WEIGHT_COST
    if known_size(keys):
        direct += _SWEEP_OPERATIONS * _FLOAT32_COST * padded**2 * width / max(1, int(keys))
    compared = f"a direct solve costs about {direct / iterated:.1f} times {steps} steps of conjugate gradients"
    return SolveMethod(direct <= _WORTH_IT * iterated, compared)


def known_size(size: Any) -> bool:
    """Whether a size is a number, Python's or the compiler's, and not a symbol."""
    return isinstance(size, int) or bool(getattr(size, "is_Integer", False))


Merge = Literal["none", "kernel", "stage"]


@dataclass(frozen=True)
class Cut:
    """How a decode call's work is cut into programs: by rows here, by keys in the kernel, which alone knows the lengths.

    Attributes:
        rows: rows of a tile, a power of two; a row is one query of one of the heads that share a key head.
        row_tiles: tiles of rows of a key head.
        slots: programs of one tile of rows and one key head that the splits of all sequences are to fill.
        least_tiles: tiles of keys that a split has at least, where its sequence has that many.
        programs: programs of one tile of rows and one key head that are launched.
        merge: how the states of splits merge: there is one split of each sequence; by the program of a head that arrives last;
            or in a stage of its own.
    """

    rows: int
    row_tiles: int
    slots: int
    least_tiles: int
    programs: Any
    merge: Merge


def decode_cut(
    *,
    batch: Any,
    kv_heads: int,
    rows_of_head: int,
    most_keys: int | None,
    has_probe: bool,
    block_n: int,
    programs: int,
    least_tiles: int = 1,
    merge: Merge | None = None,
) -> Cut:
    """Cut a decode call.

    Args:
        batch: sequences, perhaps a symbol; rows_of_head: queries times query heads of a key head.
        most_keys: that a row can see: the capacity, or less under a window; None where it is a symbol.
        has_probe: a row's probe takes a second row of the tile.
        block_n: keys of a tile.
        programs: that fill the device.
        merge: the user's choice.
    """
    fewest = 8 if has_probe else 16  # the tensor cores take 16 rows
    rows = max(fewest, min(_MOST_ROWS, 1 << (rows_of_head - 1).bit_length()))
    row_tiles = -(-rows_of_head // rows)
    heads = kv_heads * row_tiles
    slots = max(1, -(-programs // heads))
    known = isinstance(batch, int)
    # A window, or the rows of a call, may begin inside of a tile.
    most_splits = None if most_keys is None else -(-(-(-most_keys // block_n) + 1) // least_tiles)
    if most_keys is not None and -(-most_keys // block_n) <= least_tiles:
        return Cut(rows, row_tiles, slots, least_tiles, batch, "none")
    launched = slots + batch
    if known and most_splits is not None:
        launched = min(launched, batch * most_splits)
    fits = row_tiles == 1 and rows_of_head <= _MERGED_BY_THE_LAST and known and batch * heads <= MOST_COUNTERS
    if not fits:
        merge = "stage"
    elif merge is None:
        merge = "kernel" if rows_of_head * -(-launched // batch) <= _MOST_STATES else "stage"
    return Cut(rows, row_tiles, slots, least_tiles, launched, merge)


MERGES: dict[Merge, str] = {
    "none": "one split of each sequence: nothing to merge",
    "kernel": "keys are split to fill the device; the program of a head that arrives last merges its states",
    "stage": "keys are split to fill the device; too many rows and splits for one program to merge",
}


def make_decode_plan(problem: Problem, cut: Cut) -> Plan:
    """The stages of a decode call, or of one whose keys are split; ``kv_length`` is of the keys that its rows see."""
    if problem.device == "cpu":
        return Plan(problem, (*_probe_in_front(problem), _forward(problem, "row chunks")))
    return Plan(problem, (*_probe_in_front(problem), *_split(problem, cut)))


def _split(problem: Problem, cut: Cut | None) -> list[Stage]:
    how = "keys are split to fill the device" if cut is None else MERGES[cut.merge]
    split = replace(_forward(problem, "split keys"), name="decode_split", writes=("out",), reason=f"few rows: {how}")
    if cut is None or cut.merge != "stage":
        return [split]
    reason = "states of the splits, in float32: few beside the keys, and not counted"
    return [split, Stage("decode_merge", "merge of states", "forward", (0, 0), (), ("out",), reason)]


def _probe_in_front(problem: Problem) -> list[Stage]:
    """The stage that finds the probe where another stage makes the output."""
    if problem.solved:
        return _solved(replace(problem, covariance_mod=True, needs_grad=None), "streaming")[:1]
    return _gradient_steps(problem)


def make_plan(problem: Problem, cut: Cut | None = None) -> Plan:
    """Choose the stages of ``problem``; ``cut`` says how the keys of few rows are split, where they are (:func:`splits_keys`).

    Finite bandwidth with a zero or learned probe is one streaming pass forward; backward, the row terms, then one pass
    for query and probe and one for key and value, each left out when nothing needs it. Infinite bandwidth over a prefix
    is a scan instead. Few rows without a gradient have their keys split.
    """
    if problem.scans:
        stages = _scan(problem)
    elif splits_keys(problem):
        stages = [*_probe_in_front(problem), *_split(problem, cut)]
    else:
        algorithm: Algorithm = "streaming" if problem.device != "cpu" else "row chunks"
        if problem.solved:
            stages = _solved(problem, algorithm)
        else:
            stages = [*_gradient_steps(problem), _forward(problem, algorithm)]
            if problem.needs_grad is not None:
                stages += [*_backward(problem, algorithm), *_gradient_steps_backward(problem)]
    for stage in stages:
        log_choice(stage.name, stage.direction, stage.algorithm, stage.reason)
    return Plan(problem, tuple(stages))


def log_choice(stage: str, direction: Direction, algorithm: Algorithm, reason: str) -> None:
    """Say what was chosen, to ``TORCH_LOGS="+parallax_compile"``: of a plan, or where a lowering has none to make."""
    _log.info("%s: %s, %s: %s", stage, direction, algorithm, reason)


def _scan(problem: Problem) -> list[Stage]:
    """The stages where the sums run; a product meets the keys of its chunk, and the others as D rows of their sums."""
    chunk_and_sums = CHUNK + problem.width

    def totals(direction: Direction, *reads: str) -> Stage:
        reason = "the sums of each segment, so that the segments run at once"
        return Stage("scan_totals", "chunked scan", direction, (0, 1), reads, (), reason, problem.width)

    def product(direction: Direction, reads: tuple[str, ...], written: str, reason: str) -> Stage:
        return Stage("scan_product", "chunked scan", direction, (1, 1), reads, (written,), reason, chunk_and_sums)

    forward = ("key", "value", *_probe(problem, "probe"))
    stages = [
        *(_systems(problem, "forward", chunk_and_sums) if problem.solved else _gradient_steps(problem, chunk_and_sums)),
        totals("forward", "key", "value"),
        product("forward", forward, "out", "infinite bandwidth over a prefix: linear in the length"),
    ]
    if problem.needs_grad is None:
        return stages
    _, need_key, need_value, need_probe = problem.needs_grad
    need_key, need_probe = need_key and problem.has_probe, need_probe and problem.has_probe
    reads = (*forward, "grad_out")
    if need_probe or (need_key and problem.intercept):
        stages.append(totals("backward", "key", "value"))
        stages.append(product("backward", reads, "grad_probe", "the probe's gradient; the key's needs its means"))
    if need_key or need_value:
        stages.append(totals("backward", "grad_out", *_probe(problem, "probe")))
    if need_value:
        stages.append(product("backward", reads, "grad_value", "value needs a gradient: the sums run backwards"))
    if need_key:
        stages.append(product("backward", reads, "grad_key", "key needs a gradient: the sums run backwards"))
    if not problem.solved:
        return [*stages, *_gradient_steps_backward(problem, chunk_and_sums)]
    stages += [*_systems(problem, "backward", chunk_and_sums), totals("backward", "query", "probe")]
    reads = ("key", "query", "probe")
    return [*stages, *[product("backward", reads, "grad_key", "of the systems' matrices")] * 2]


def _systems(problem: Problem, direction: Direction, keys: int) -> list[Stage]:
    """The stages that solve the rows' systems where the sums run."""
    reads = ("query", "key", "states") if direction == "forward" else ("grad_probe", "key", "states")
    sums = "the sums of each segment, and the sums before each chunk, which its systems share"
    steps = "linear in the length: a step meets the keys of the row's chunk, and the others as D rows of their sums"
    if direction == "backward":
        steps = "implicit differentiation: the same systems for the probe's gradient"
    written = ("probe",) if direction == "forward" else ("grad_query",)
    return [
        Stage("scan_totals", "chunked scan", direction, (1, 0), ("key",), (), sums, problem.width),
        Stage("scan_states", "chunked scan", direction, (1, 0), ("key",), ("states",), sums, problem.width),
        # Of a step's two products one meets the chunk twice and the sums once: about as much as one product of both.
        Stage(
            "scan_systems",
            "conjugate gradients",
            direction,
            (problem.probe_steps, 0),
            reads,
            written,
            steps,
            keys + CHUNK,
        ),
    ]


def _gradient_steps(problem: Problem, keys: int | None = None) -> list[Stage]:
    if not problem.probe_steps:
        return []
    # The first step starts from 0: no probe score, and one product with the keys.
    products = (problem.probe_steps - 1) * (problem.score_products + 2) + problem.score_products
    reason = f"{problem.probe_steps} steps, each the core with the keys in the values' place"
    reads, writes = ("query", "key"), ("probe",)
    return [Stage("gradient_steps", "gradient steps", "forward", (products, 0), reads, writes, reason, keys)]


def _gradient_steps_backward(problem: Problem, keys: int | None = None) -> list[Stage]:
    if not problem.probe_steps:
        return []
    products = problem.probe_steps * (2 * problem.score_products + 7)
    reads, writes = ("query", "key", "probe", "grad_probe"), ("grad_query", "grad_key")
    reason = "back through the steps"
    return [Stage("gradient_steps", "gradient steps", "backward", (products, 0), reads, writes, reason, keys)]


def _solved(problem: Problem, algorithm: Algorithm) -> list[Stage]:
    """Solved probes: the solve makes the output too, and one backward serves the output and the systems.

    A covariance_mod acts after the solve: there the core makes the output, and differentiates it by itself.
    """
    scores, apart = int(not problem.uniform), problem.covariance_mod
    if algorithm == "row chunks":
        method = SolveMethod(False, "cpu: the rows of a chunk iterate together")
    else:
        method = solve_method(problem.width, problem.kv_length, problem.direct)
    # A direct solve: the entries of the matrix in three terms, then the residual, whose factors are in two.
    steps = 2 * scores + 3 * problem.width + 4 if method.direct else problem.probe_steps * (scores + 2)
    # The mean key and what is made of the solution take its terms one by one.
    mean, output = scores + 2, (0, 0) if apart else (scores + 2, 1)
    forward = Stage(
        method.stage, method.algorithm, "forward", (mean + steps + output[0], output[1]),
        ("query", "key", *(() if apart else ("value",))), ("probe", "lse", *(() if apart else ("probe_mean", "out"))),
        f"the probe of each row by its ridge system ({method.reason})"
        + ("" if apart else "; then its output: one product, because LSE and t are known"),
    )  # fmt: skip
    stages = [forward, _forward(problem, algorithm)] if apart else [forward]
    if problem.needs_grad is None:
        return stages
    if apart:
        stages += _backward(problem, algorithm)
    adjoint = Stage(
        method.stage, method.algorithm, "backward", (mean + steps + output[0], output[1]),
        ("query", "key", "probe", *(() if apart else ("value", "grad_out"))), ("grad_probe", "tau", "beta"),
        "implicit differentiation: the same systems for the probe's gradient, and the exact row terms",
    )  # fmt: skip
    kernels = [stage for stage in _backward(problem, algorithm) if stage.name != "row_terms"]
    together = "; with the adjoint beside the values, which is the gradient through the systems"
    return [
        *stages,
        adjoint,
        *(
            # The probe in a second term, and the adjoint in two, each once more for the keys.
            replace(stage, products=(stage.products[0] + (3 if "query" in stage.name else 6), stage.products[1]),
                    reads=(*stage.reads, "grad_probe"), reason=stage.reason + together)
            for stage in kernels
        ),
    ]  # fmt: skip


def _probe(problem: Problem, *names: str) -> tuple[str, ...]:
    return names if problem.has_probe else ()


def _forward(problem: Problem, algorithm: Algorithm) -> Stage:
    score_products = problem.score_products
    value_products = 2 if problem.has_probe and algorithm != "row chunks" else 1
    return Stage(
        name="core_forward",
        algorithm=algorithm,
        direction="forward",
        products=(score_products, value_products),
        reads=("query", "key", "value", *_probe(problem, "probe")),
        writes=(
            "out",
            "lse",
            *_probe(problem, "probe_mean"),
            *(("value_mean",) if problem.saves_value_mean else ()),
        ),
        reason="infinite bandwidth: every allowed key weighs the same, one pass keeps no score"
        if problem.uniform
        else "finite bandwidth: the weights need every allowed key, one pass keeps no score"
        if algorithm == "streaming"
        else "cpu: chunks of rows over all keys, one signed product with the values",
    )


def _backward(problem: Problem, algorithm: Algorithm) -> list[Stage]:
    assert problem.needs_grad is not None
    need_query, need_key, need_value, need_probe = problem.needs_grad
    need_probe = need_probe and problem.has_probe
    score_products = problem.score_products
    statistics = ("lse", "tau", *_probe(problem, "probe_mean", "beta"))
    operands = ("query", "key", "value", *_probe(problem, "probe"), "grad_out", *statistics)
    stages = [
        Stage(
            name="row_terms",
            algorithm="pointwise",
            direction="backward",
            products=(0, 0),
            reads=("grad_out", "out", *(("value_mean",) if problem.saves_value_mean else ())),
            writes=("tau", *_probe(problem, "beta")),
            reason="two row sums, fused by Inductor",
        )
    ]
    written = (
        *(("grad_query",) if need_query else ()),
        *(("grad_probe",) if need_probe else ()),
        *(("grad_key",) if need_key else ()),
        *(("grad_value",) if need_value else ()),
    )
    if algorithm == "row chunks":
        products = (score_products + need_query + need_probe + need_key * score_products, 1 + need_value)
        stages.append(Stage("core_backward", algorithm, "backward", products, operands, written, "cpu: as the forward"))
        return stages
    if need_query or need_probe:
        stages.append(
            Stage(
                name="core_backward_query",
                algorithm=algorithm,
                direction="backward",
                products=(score_products + need_query + need_probe, 1),
                reads=operands,
                writes=written[: need_query + need_probe],
                reason="query or probe needs a gradient: rows stay, keys stream",
            )
        )
    if need_key or need_value or problem.captured_grads:
        keys = need_key or problem.captured_grads
        stages.append(
            Stage(
                name="core_backward_key",
                algorithm=algorithm,
                direction="backward",
                products=(score_products * (1 + keys), keys + need_value),
                reads=operands,
                writes=written[need_query + need_probe :],
                reason="key, value or a captured tensor needs a gradient: keys stay, rows stream, "
                "the query heads of a group are summed in registers",
            )
        )
    return stages


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


def describe(plan: Plan, headers: Sequence[str] = ("stage", "algorithm", "GFLOP", "MB", "FLOP/byte", "why")) -> str:
    """The plan as a table, one line a stage."""
    from tabulate import tabulate

    rows = []
    for stage in plan.stages:
        cost = plan.cost(stage)
        rows.append(
            (
                stage.name,
                stage.algorithm,
                f"{cost.flops / 1e9:.3f}",
                f"{cost.bytes / 1e6:.2f}",
                f"{cost.intensity:.0f}",
                stage.reason,
            )
        )
    return tabulate(rows, headers=headers, disable_numparse=True)
