"""The plan: which stages compute a call.

Whatever chooses an algorithm is here or in the modules of one choice each: :mod:`.plan_scan`, :mod:`.plan_solve`,
:mod:`.plan_split`. What a plan is made of, and what its stages cost, is in :mod:`.plan_stages`. The lowering executes a plan,
``plx.explain`` prints it, tests compare its text.
"""

from __future__ import annotations

from dataclasses import replace

from .plan_scan import CHUNK
from .plan_solve import SolveMethod, solve_method
from .plan_split import MERGES, Cut, splits_keys
from .plan_stages import Algorithm, Direction, Plan, Problem, Stage, log_choice


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
