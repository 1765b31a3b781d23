"""The streaming form: one online reduction over the keys, in a loop that IREE tiles, with memory linear in the lengths.

The five running statistics of FAMILY, "Streaming", ``m, d1, d2, O1, O2``, are what ``iree_linalg_ext.exp_reduction`` reduces:
one maximum, and any number of sums that rescale when it rises. It is written here over whole score matrices; a schedule in the
transform dialect tiles it along the keys and fuses everything that makes scores into the loop, so that none is ever whole.

The operation works in powers of two, so that scores are multiplied by ``log2 e``. A masked score is ``-1e30`` rather than
``-inf``, from which nothing may be subtracted; a row whose maximum stays there has met no key, and gives 0.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from .programs import Declared
from .scalars import Body, Literals, Scalar, UnfitError, mlir_type
from .toolchain import Limits, run_tool

__all__ = ["obstacle", "reduction", "tiled"]

_MASKED = -1.0e30
_LOWEST = -3.0e38
_ROWS = "(b, h, g, m, n)"  # batch, key head, query head of the group, row, key


def obstacle(call: Declared) -> str | None:
    """Why the call has no streaming form, before anything is written; None if nothing is in the way."""
    if call.spec.probe.kind in ("solved", "gradient"):
        return f"a {call.spec.probe.kind} probe needs the rows' systems, which are not a reduction over the keys"
    return None


class _Shapes:
    """Sizes of a call; a length that is left open is ``?`` in types and a value where a size is needed."""

    def __init__(self, call: Declared, dynamic: bool) -> None:
        self.batch, heads, rows, self.width = call.query.shape
        self.heads, keys, self.value_width = call.key.size(1), call.key.size(2), call.value.size(3)
        self.group, self.repeats = heads // self.heads, 1
        if dynamic and self.group > 1:
            # IREE 3.13 collapses a group with an open length wrongly (wrong numbers), so that keys are repeated instead.
            self.heads, self.group, self.repeats = heads, 1, self.group
        self.dynamic = dynamic
        self.rows, self.keys = ("?", "?") if dynamic else (str(rows), str(keys))
        self.dtype, self.element = call.query.dtype, mlir_type(call.query.dtype)
        self.accumulation = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        self.scalar = mlir_type(self.accumulation)

    def of(self, *sizes: Any, element: str | None = None) -> str:
        return f"tensor<{'x'.join(map(str, sizes))}x{element or self.scalar}>"

    def grouped(self, *last: Any, element: str | None = None) -> str:
        """A tensor of rows, query heads split into key heads and members of their groups."""
        return self.of(self.batch, self.heads, self.group, self.rows, *last, element=element)

    def empty(self, name: str, kind: str, *, keys: bool = False) -> str:
        sizes = ["%rows", *(["%keys"] if keys else [])] if self.dynamic else []
        return f"{name} = tensor.empty({', '.join(sizes)}) : {kind}"


def reduction(call: Declared, *, dynamic: bool) -> str:
    """The call as a module with ``@attention``, its reduction not yet tiled.

    Raises:
        UnfitError: something in the call does not fit into a reduction, or a mod into a loop's body.
    """
    reason = obstacle(call)
    if reason is not None:
        raise UnfitError(reason)
    shapes, literals = _Shapes(call, dynamic), Literals()
    stages = [
        _scores(call, shapes, literals),
        _probe_scores(call, shapes, literals),
        _reduce(call, shapes),
        _output(call, shapes),
    ]
    return _module(call, shapes, literals, [line for stage in stages for line in stage])


def _module(call: Declared, shapes: _Shapes, literals: Literals, stages: list[str]) -> str:
    query = shapes.of(shapes.batch, call.query.size(1), shapes.rows, shapes.width, element=shapes.element)
    key_heads = call.key.size(1)
    key = shapes.of(shapes.batch, key_heads, shapes.keys, shapes.width, element=shapes.element)
    value = shapes.of(shapes.batch, key_heads, shapes.keys, shapes.value_width, element=shapes.element)
    out = shapes.of(shapes.batch, call.query.size(1), shapes.rows, shapes.value_width, element=shapes.element)
    given = "" if shapes.repeats == 1 else "_of_group"
    arguments = [f"%query: {query}", f"%key{given}: {key}", f"%value{given}: {value}"]
    if call.probe is not None:
        arguments.append(f"%probe: {query}")
    s = shapes.scalar
    begin = [
        "%two = arith.constant 2 : index",
        f"%rows = tensor.dim %query, %two : {query}",
        f"%keys = tensor.dim %key{given}, %two : {key}",
        f"%zero = arith.constant 0.0 : {s}",
        f"%one = arith.constant 1.0 : {s}",
        f"%lowest = arith.constant {_LOWEST:e} : {s}",
        *literals.lines,
    ]
    if given:
        begin += [*_repeated("key", shapes.width, shapes), *_repeated("value", shapes.value_width, shapes)]
    grouped = shapes.grouped(shapes.width, element=shapes.element)
    for name in ("query", "probe")[: 1 if call.probe is None else 2]:
        rows = "%rows" if shapes.dynamic else shapes.rows
        sizes = f"[{shapes.batch}, {shapes.heads}, {shapes.group}, {rows}, {shapes.width}]"
        begin.append(
            f"%{name}_rows = tensor.expand_shape %{name} [[0], [1, 2], [3], [4]] output_shape {sizes} : {query} into {grouped}"
        )
    wide = shapes.grouped(shapes.value_width, element=shapes.element)
    end = [
        f"%result = tensor.collapse_shape %out [[0], [1, 2], [3], [4]] : {wide} into {out}",
        f"return %result : {out}",
    ]
    body = "\n".join(f"    {line}" for line in [*begin, *stages, *end])
    return f"module {{\n  func.func @attention({', '.join(arguments)}) -> {out} {{\n{body}\n  }}\n}}\n"


def _repeated(name: str, width: int, shapes: _Shapes) -> list[str]:
    """Key or value heads once for each query head."""
    heads, last = shapes.heads // shapes.repeats, (shapes.keys, width)
    source = shapes.of(shapes.batch, heads, *last, element=shapes.element)
    wide = shapes.of(shapes.batch, heads, shapes.repeats, *last, element=shapes.element)
    result = shapes.of(shapes.batch, shapes.heads, *last, element=shapes.element)
    maps = "[affine_map<(b, h, g, n, d) -> (b, h, n, d)>, affine_map<(b, h, g, n, d) -> (b, h, g, n, d)>]"
    parallel = ", ".join(['"parallel"'] * 5)
    return [
        f"%{name}_empty = tensor.empty({'%keys' if shapes.dynamic else ''}) : {wide}",
        f"%{name}_wide = linalg.generic {{indexing_maps = {maps}, iterator_types = [{parallel}]}} "
        f"ins(%{name}_of_group : {source}) outs(%{name}_empty : {wide}) {{",
        f"^bb0(%x: {shapes.element}, %unused: {shapes.element}):",
        f"  linalg.yield %x : {shapes.element}",
        f"}} -> {wide}",
        f"%{name} = tensor.collapse_shape %{name}_wide [[0], [1, 2], [3], [4]] : {wide} into {result}",
    ]


def _generic(
    result: str, maps: list[str], iterators: list[str], ins: list[tuple[str, str]], outs: tuple[str, str], body: Body,
    arguments: list[str], stage: str,
) -> list[str]:  # fmt: skip
    """A ``linalg.generic`` of one result, marked with its stage for the schedule."""
    affine = ", ".join(f"affine_map<{m}>" for m in maps)
    given = ""
    if ins:
        given = f" ins({', '.join(n for n, _ in ins)} : {', '.join(t for _, t in ins)})"
    return [
        f"{result} = linalg.generic {{indexing_maps = [{affine}], iterator_types = [{', '.join(iterators)}]}}"
        f"{given} outs({outs[0]} : {outs[1]}) attrs = {{stage = \"{stage}\"}} {{",
        f"^bb0({', '.join(arguments)}):",
        *(f"  {line}" for line in body.lines),
        f"}} -> {outs[1]}",
    ]  # fmt: skip


def _product(result: str, rows: str, shapes: _Shapes, stage: str) -> list[str]:
    """``rows . key`` over the width: ``[B, Hkv, G, Lq, Lk]`` in the accumulation type."""
    body = Body(shapes.accumulation, Literals())
    a, b = (body.cast(Scalar(name, shapes.dtype), shapes.accumulation) for name in ("%a", "%b"))
    total = body.binary("addf", body.binary("mulf", a, b), Scalar("%sum", shapes.accumulation))
    body.lines.append(f"linalg.yield {total.name} : {shapes.scalar}")
    kind = shapes.grouped(shapes.keys)
    ins = [
        (rows, shapes.grouped(shapes.width, element=shapes.element)),
        ("%key", shapes.of(shapes.batch, shapes.heads, shapes.keys, shapes.width, element=shapes.element)),
    ]
    all_of = "(b, h, g, m, n, d)"
    maps = [f"{all_of} -> (b, h, g, m, d)", f"{all_of} -> (b, h, n, d)", f"{all_of} -> (b, h, g, m, n)"]
    return [
        shapes.empty(f"{result}_empty", kind, keys=True),
        f"{result}_zero = linalg.fill {{stage = \"{stage}_zero\"}} ins(%zero : {shapes.scalar}) "
        f"outs({result}_empty : {kind}) -> {kind}",
        *_generic(
            result, maps, ['"parallel"'] * 5 + ['"reduction"'], ins, (f"{result}_zero", kind), body,
            [f"%a: {shapes.element}", f"%b: {shapes.element}", f"%sum: {shapes.scalar}"], stage,
        ),
    ]  # fmt: skip


def _positions(body: Body, shapes: _Shapes) -> list[Scalar]:
    """``b, h, q_idx, kv_idx`` as mods are given them; ``h`` counts query heads."""
    batch, key_head, member, row, column = (body.index(dimension) for dimension in range(5))
    head = body.binary("addi", body.binary("muli", key_head, body.constant(shapes.group, torch.int32)), member)
    return [batch, head, row, column]


def _scores(call: Declared, shapes: _Shapes, literals: Literals) -> list[str]:
    """``%scores``: masked scores in powers of two."""
    uniform = call.spec.bandwidth.kind == "infinite"
    lines = [] if uniform else _product("%raw_scores", "%query_rows", shapes, "score_products")
    body = Body(shapes.accumulation, literals)
    positions = _positions(body, shapes)
    if uniform:
        score = body.constant(0, shapes.accumulation)
    else:
        scale = 1 / math.sqrt(shapes.width) if call.scale is None else float(call.scale)
        score = body.binary("mulf", Scalar("%raw", shapes.accumulation), body.constant(scale, shapes.accumulation))
    if call.score_mod is not None:
        score = body.cast(body.mod(call.score_mod, [score, *positions]), shapes.accumulation)
    masked = body.constant(_MASKED, shapes.accumulation)
    score = body.binary("mulf", score, body.constant(math.log2(math.e), shapes.accumulation))
    score = body.binary("maximumf", score, masked)
    if call.mask_mod is not None:
        score = body.select(body.mod(call.mask_mod, positions), score, masked)
    body.lines.append(f"linalg.yield {score.name} : {shapes.scalar}")
    return lines + _over_pairs("%scores", None if uniform else "%raw_scores", body, shapes, "scores")


def _probe_scores(call: Declared, shapes: _Shapes, literals: Literals) -> list[str]:
    """``%probe_scores``, 0 where nothing is allowed."""
    if call.probe is None:
        return []
    lines = _product("%raw_probe_scores", "%probe_rows", shapes, "probe_products")
    body = Body(shapes.accumulation, literals)
    positions = _positions(body, shapes)
    score = Scalar("%raw", shapes.accumulation)
    if call.covariance_mod is not None:
        score = body.cast(body.mod(call.covariance_mod, [score, *positions]), shapes.accumulation)
    if call.mask_mod is not None:
        score = body.select(body.mod(call.mask_mod, positions), score, body.constant(0, shapes.accumulation))
    body.lines.append(f"linalg.yield {score.name} : {shapes.scalar}")
    return lines + _over_pairs("%probe_scores", "%raw_probe_scores", body, shapes, "probe_scores")


def _over_pairs(result: str, raw: str | None, body: Body, shapes: _Shapes, stage: str) -> list[str]:
    kind = shapes.grouped(shapes.keys)
    same = f"{_ROWS} -> {_ROWS}"
    ins = [] if raw is None else [(raw, kind)]
    arguments = [*([f"%raw: {shapes.scalar}"] if ins else []), f"%unused: {shapes.scalar}"]
    return [
        shapes.empty(f"{result}_empty", kind, keys=True),
        *_generic(
            result, [same] * (len(ins) + 1), ['"parallel"'] * 5, ins, (f"{result}_empty", kind), body, arguments, stage
        ),
    ]


def _statistics(call: Declared) -> tuple[str, ...]:
    """Which running statistics the member needs beside the maximum."""
    if call.probe is None:
        return ("d1", "o1")
    return ("d1", "d2", "o1", "o2") if call.spec.intercept else ("d1", "o2")


def _reduce(call: Declared, shapes: _Shapes) -> list[str]:
    """The online reduction over the keys: the maximum, and the member's statistics."""
    names, s = _statistics(call), shapes.scalar
    row, wide = shapes.grouped(), shapes.grouped(shapes.value_width)
    kinds = [wide if name.startswith("o") else row for name in names]
    all_of = "(b, h, g, m, v, n)"
    of_row, of_wide, of_pair = (
        f"{all_of} -> (b, h, g, m)",
        f"{all_of} -> (b, h, g, m, v)",
        f"{all_of} -> (b, h, g, m, n)",
    )
    pairs = [] if call.probe is None else ["%probe_scores"]
    ins = ["%scores", *pairs, "%value"]
    value = shapes.of(shapes.batch, shapes.heads, shapes.keys, shapes.value_width, element=shapes.element)
    in_kinds = [shapes.grouped(shapes.keys)] * (1 + len(pairs)) + [value]
    maps = [of_pair] * (1 + len(pairs)) + [f"{all_of} -> (b, h, n, v)", of_row]
    maps += [of_wide if name.startswith("o") else of_row for name in names]
    parallel, reduced = (f"#iree_linalg_ext.iterator_type<{kind}>" for kind in ("parallel", "reduction"))
    body = Body(shapes.accumulation, Literals())
    acc = shapes.accumulation
    weight, value_of = Scalar("%weight", acc), body.cast(Scalar("%value_of", shapes.dtype), acc)
    terms = {"d1": weight}
    if pairs:
        terms["d2"] = body.binary("mulf", weight, Scalar("%probe_score", acc))
        terms["o2"] = body.binary("mulf", terms["d2"], value_of)
    if "o1" in names:
        terms["o1"] = body.binary("mulf", weight, value_of)
    totals = [body.binary("addf", terms[name], Scalar(f"%{name}_so_far", acc)).name for name in names]
    arguments = [f"%weight: {s}", *([f"%probe_score: {s}"] if pairs else []), f"%value_of: {shapes.element}"]
    arguments += [f"%m_so_far: {s}", *(f"%{name}_so_far: {s}" for name in names)]
    results = ["%m", *(f"%{name}" for name in names)]
    begin = [
        shapes.empty("%row_empty", row),
        shapes.empty("%wide_empty", wide),
        f"%m_begin = linalg.fill ins(%lowest : {s}) outs(%row_empty : {row}) -> {row}",
        f"%row_begin = linalg.fill ins(%zero : {s}) outs(%row_empty : {row}) -> {row}",
        f"%wide_begin = linalg.fill ins(%zero : {s}) outs(%wide_empty : {wide}) -> {wide}",
    ]
    outs = ["%m_begin", *("%wide_begin" if name.startswith("o") else "%row_begin" for name in names)]
    out_kinds = [row, *kinds]
    return [
        *begin,
        f"{', '.join(results)} = iree_linalg_ext.exp_reduction {{indexing_maps = "
        f"[{', '.join(f'affine_map<{m}>' for m in maps)}], iterator_types = [{', '.join([parallel] * 5 + [reduced])}], "
        f"exp_reduced_operands = [{', '.join(str(n + 1) for n in range(len(names)))}]}}",
        f"  ins({', '.join(ins)} : {', '.join(in_kinds)}) outs({', '.join(outs)} : {', '.join(out_kinds)}) {{",
        f"^bb0({', '.join(arguments)}):",
        *(f"  {line}" for line in body.lines),
        f"  iree_linalg_ext.yield %m_so_far, {', '.join(totals)} : {', '.join([s] * (1 + len(names)))}",
        f"}} -> {', '.join(out_kinds)}",
    ]


def _output(call: Declared, shapes: _Shapes) -> list[str]:
    """``%out`` from the statistics of each row, in the operands' type."""
    names, acc = _statistics(call), shapes.accumulation
    body = Body(acc, Literals())
    has = {name: Scalar(f"%{name}_of", acc) for name in ("m", *names)}
    over = lambda x: body.binary("divf", x, has["d1"])  # noqa: E731
    if call.probe is None:
        out = over(has["o1"])
    elif call.spec.intercept:
        factor = body.binary("addf", Scalar("%one", acc), over(has["d2"]))
        out = body.binary("subf", body.binary("mulf", over(has["o1"]), factor), over(has["o2"]))
    else:
        out = over(has["o2"])
    bound = body.constant(_MASKED / 2, acc)
    seen = body.emit(f"arith.cmpf ogt, {has['m'].name}, {bound.name} : {shapes.scalar}", torch.bool)
    out = body.select(seen, out, Scalar("%zero", acc))
    out = body.cast(out, shapes.dtype)
    body.lines.append(f"linalg.yield {out.name} : {shapes.element}")
    row, wide = shapes.grouped(), shapes.grouped(shapes.value_width)
    result = shapes.grouped(shapes.value_width, element=shapes.element)
    all_of = "(b, h, g, m, v)"
    maps = [f"{all_of} -> {all_of}" if name.startswith("o") else f"{all_of} -> (b, h, g, m)" for name in ("m", *names)]
    ins = [(f"%{name}", wide if name.startswith("o") else row) for name in ("m", *names)]
    arguments = [*(f"%{name}_of: {shapes.scalar}" for name in ("m", *names)), f"%unused: {shapes.element}"]
    return [
        shapes.empty("%out_empty", result),
        *_generic(
            "%out",
            [*maps, f"{all_of} -> {all_of}"],
            ['"parallel"'] * 5,
            ins,
            ("%out_empty", result),
            body,
            arguments,
            "output",
        ),
    ]


# --- the schedule ---------------------------------------------------------------------------------------------------

# Consumers first: what is fused into the loop must be used there.
_STAGES = ("scores", "probe_scores", "score_products", "probe_products", "score_products_zero", "probe_products_zero")


def _schedule(text: str, block_size: int) -> str:
    """Tile the reduction by ``block_size`` keys, and compute in the loop what makes its scores."""
    op = "!transform.any_op"
    lines = [
        f'%reduction = transform.structured.match ops{{["iree_linalg_ext.exp_reduction"]}} in %module : ({op}) -> {op}',
        f"%tiled, %loop_0 = transform.structured.tile_using_for %reduction tile_sizes [0, 0, 0, 0, 0, {block_size}] "
        f": ({op}) -> ({op}, {op})",
    ]
    present = [stage for stage in _STAGES if f'stage = "{stage}"' in text]
    for number, stage in enumerate(present):
        lines += [
            f'%{stage} = transform.structured.match attributes{{stage = "{stage}"}} in %module : ({op}) -> {op}',
            f"%{stage}_in, %loop_{number + 1} = transform.structured.fuse_into_containing_op %{stage} into %loop_{number} "
            f": ({op}, {op}) -> ({op}, {op})",
        ]
    lines += [
        f'%functions = transform.structured.match ops{{["func.func"]}} in %module : ({op}) -> {op}',
        f"transform.apply_patterns to %functions {{ transform.apply_patterns.tensor.fold_tensor_empty }} : {op}",
    ]
    body = "\n".join(f"    {line}" for line in [*lines, "transform.yield"])
    return (
        "module attributes {transform.with_named_sequence} {\n"
        f"  transform.named_sequence @__transform_main(%module: {op} {{transform.consumed}}) {{\n{body}\n  }}\n}}\n"
    )


def tiled(text: str, block_size: int, folder: Path, limits: Limits) -> str:
    """The module with its reduction as an ``scf.for`` over blocks of keys, in upstream dialects.

    Args:
        text: of :func:`reduction`.
        block_size: keys of a block.
        folder: for the files of the run.

    Raises:
        ToolError: the schedule did not apply.
    """
    source, schedule, result = (folder / name for name in ("reduction.mlir", "schedule.mlir", "streaming.mlir"))
    source.write_text(text, encoding="utf-8")
    schedule.write_text(_schedule(text, block_size), encoding="utf-8")
    decompose = "iree-linalg-ext-decompose-aggregated-ops{filter-ops=iree_linalg_ext.exp_reduction}"
    passes = (
        f"transform-preload-library{{transform-library-paths={schedule}}}", "transform-interpreter", "canonicalize", "cse",
        f"func.func({decompose})", "canonicalize", "cse",
    )  # fmt: skip
    run_tool("iree-opt", [source, f"--pass-pipeline=builtin.module({','.join(passes)})", "-o", result], limits)
    text = _without_whole_slices(result.read_text(encoding="utf-8"))
    result.write_text(text, encoding="utf-8")
    return text


def _without_whole_slices(text: str) -> str:
    """The text without slices of whole tensors of rows, which passes do not see through when the length is open.

    Every open row dimension of the module is the query's length, so that a slice with that many rows, from 0 on, is its source.
    """
    length = re.search(r"(%\w+) = tensor\.dim %arg0", text)
    if length is None:
        return text
    ranges = r"\[0(?:, 0)*\] \[([^\]]*)\] \[1(?:, 1)*\]"
    extract = rf"(%\w+) = tensor\.extract_slice (%\w+){ranges} : (tensor<[^>]*>) to (tensor<[^>]*>)"
    insert = rf"(%\w+) = tensor\.insert_slice (%\w+) into %\w+{ranges} : (tensor<[^>]*>) into (tensor<[^>]*>)"
    same: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        found = re.match(rf"\s*(?:{extract}|{insert})$", line)
        if found is not None:
            result, source, sizes, a, b = (part for part in found.groups() if part is not None)
            whole = [size.replace(length[1], "?") for size in sizes.split(", ")]
            if a == b and re.match(r"tensor<((?:[\d?]+x)*)", a)[1] == "".join(f"{size}x" for size in whole):  # type: ignore[index]
                same[result] = same.get(source, source)
                continue
        lines.append(re.sub(r"%\w+", lambda name: same.get(name[0], name[0]), line))
    return "\n".join(lines) + "\n"
