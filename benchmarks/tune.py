"""Tune the main training shapes on this machine's GPU and write the table that the package ships.

    python benchmarks/tune.py --out lowering/shipped_h100.json [--effort quick] [--only PARALLAX ...]
    python benchmarks/tune.py --out lowering/shipped_h100.json --record benchmarks/results/search-h100-2026-11-24.json
    python benchmarks/tune.py --out lowering/shipped_l4_untested.json --model sm_89

The winners go into a store of their own, and are written after each problem, so that an interrupt loses none and the same
command goes on. With --record they are the fastest of a recorded search; nothing is timed, and no GPU is needed. With --model
they are what the resource model ranks first for a target, by kernels that are compiled for it without the GPU: an untested
fallback for those who have not tuned.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from parallax_compile.lowering import tuned
from parallax_compile.lowering.candidates import Candidate
from parallax_compile.lowering.codegen import generate
from parallax_compile.lowering.store import Entry, Store, encoded

import parallax_compile as plx
from parallax_compile.shapes import Shape

CAUSAL = plx.masks.causal()
# Member, shape, stages, effort: what is trained most comes first.
PROBLEMS: tuple[tuple[plx.AttentionSpec, str, Any, str], ...] = (
    (plx.PARALLAX, "4,16,4096,128", "all", "normal"),
    (plx.PARALLAX, "8,16,2048,64", "all", "normal"),
    (plx.SOFTMAX, "4,16,4096,128", "all", "quick"),
    (plx.SOFTMAX, "8,16,2048,64", "all", "quick"),
    (plx.AFFINE_LINEAR, "4,16,4096,128", "all", "quick"),
    (plx.LLA.replace(probe=plx.Solved(ridge=1.0)), "1,16,2048,128", ["core_solve"], "quick"),
    (plx.PARALLAX, "2,32:8,8192,128", "all", "quick"),
)
# What the resource model can rank: the stages that every training has.
FALLBACKS = tuple(
    (spec, shape, ["core_forward", "core_backward_query", "core_backward_key"], "normal")
    for spec in (plx.PARALLAX, plx.SOFTMAX)
    for shape in ("4,16,4096,128", "8,16,2048,64")
)


def recorded(path: Path) -> Iterator[Entry]:
    """The fastest candidate of each (member, width, stage) of a record, under the question that its call asks today."""
    record = json.loads(path.read_text(encoding="utf-8"))
    for width, (batch, heads, length) in record["shapes"].items():
        shape = Shape.of((batch, heads, length, int(width)))
        for member in ("parallax", "softmax"):
            spec = plx.family()[member.upper()].replace(mask_mod=CAUSAL)
            inputs = shape.tensors(spec, torch.bfloat16)
            code = generate(lambda *t, spec=spec: plx.attention(*t, spec=spec), inputs, target="sm_90")
            rows = [row for row in record["times"] if (row["member"], row["width"]) == (member, int(width))]
            for answer in code.answers:
                yield _entry(
                    answer, [row for row in rows if row["stage"] == answer.question.stage], shape, path, record
                )


def _entry(answer: tuned.Answer, rows: list[dict[str, Any]], shape: Shape, path: Path, record: dict[str, Any]) -> Entry:
    fields = ("block_m", "block_n", "num_warps", "num_stages", "tma", "held")
    ranked = sorted(rows, key=lambda row: row["ms"])
    default = next((row for row in ranked if Candidate(*row["tile"]) == answer.candidate), ranked[0])
    # The record is of the releases and of the texts of its day, which nobody wrote down more exactly.
    versions = {"package": "0.1.0", "torch": "2.11.0", "triton": "3.6.0", "template": "as recorded"}
    return Entry(
        key={**answer.question.key(), **versions},
        candidate=dict(zip(fields, ranked[0]["tile"], strict=True)),
        result={
            "milliseconds": ranked[0]["ms"], "default_milliseconds": default["ms"], "tried": len(rows), "failed": {},
            "effort": "normal", "shape": shape.sizes(),
        },
        provenance={
            "source": f"{path.name}: {record['note']}", "device": answer.question.device, "date": "2026-11-24",
            "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"}, "tested": True,
        },
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=Path("build/tuned"))
    parser.add_argument("--effort", choices=("quick", "normal", "full"), help="in place of each problem's own")
    parser.add_argument("--only", nargs="*", help="members")
    parser.add_argument("--record", type=Path, help="a record of a search")
    parser.add_argument("--model", metavar="TARGET", help="rank for sm_80, sm_89, sm_100 by the resource model")
    arguments = parser.parse_args()
    if arguments.record:
        entries = list(recorded(arguments.record))
        arguments.out.write_text(encoded(entries), encoding="utf-8")
        print(f"{len(entries)} entries in {arguments.out}")
        return
    start = time.perf_counter()
    ranked = {"target": arguments.model, "measures": "model"} if arguments.model else {}
    store = Store(arguments.store / arguments.model if arguments.model else arguments.store)
    if arguments.only and arguments.out.exists():
        store.load(arguments.out)  # what the others' problems found stays in the table
    with tuned.using(store):
        for spec, shape, stages, effort in FALLBACKS if arguments.model else PROBLEMS:
            if arguments.only and spec.name not in arguments.only:
                continue
            chosen = arguments.effort or effort
            print(f"\n{spec.name}, causal, {shape}, effort {chosen}", flush=True)
            causal = spec.replace(mask_mod=CAUSAL)
            try:
                print(plx.autotune(causal, shape, stages=stages, effort=chosen, **ranked), flush=True)
            finally:
                count = store.export(arguments.out)
                print(f"{count} entries in {arguments.out} after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
