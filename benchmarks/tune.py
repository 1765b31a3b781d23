"""Tune the main training shapes on this machine's GPU and write the table that the package ships.

    python benchmarks/tune.py --out lowering/shipped_h100.json [--effort quick] [--only PARALLAX ...]

The winners go into a store of their own, and are written after each problem, so that an interrupt loses none.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from parallax_compile.lowering import tuned
from parallax_compile.lowering.store import Store

import parallax_compile as plx

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=Path("build/tuned"))
    parser.add_argument("--effort", choices=("quick", "normal", "full"), help="in place of each problem's own")
    parser.add_argument("--only", nargs="*", help="members")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tuned.using(Store(arguments.store)) as store:
        for spec, shape, stages, effort in PROBLEMS:
            if arguments.only and spec.name not in arguments.only:
                continue
            chosen = arguments.effort or effort
            print(f"\n{spec.name}, causal, {shape}, effort {chosen}", flush=True)
            try:
                print(plx.autotune(spec.replace(mask_mod=CAUSAL), shape, stages=stages, effort=chosen), flush=True)
            finally:
                count = store.export(arguments.out)
                print(f"{count} entries in {arguments.out} after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
