"""Training speed beside everything else that is installed, in one process, on the same inputs.

    python benchmarks/training.py [--case 4k d64 ...] [--contender NAME ...] [--json PATH] [--plots DIR] [--quick]

Milliseconds are medians of interleaved rounds with a cold L2, each run a replayed CUDA graph where it can be captured (the
host's time is no part of them); TFLOP/s count the matrix products that the method needs at
least (Parallax 4 forward and 8 backward, softmax 2 and 5). Needs a CUDA GPU; ``--device cpu --quick`` tries the harness itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Case, Contender, cases
from measure import Clock, accuracy, measure
from record import environment
from report import accuracy_table, case_table, goals_table, plots
from together import Alone, outcomes

import parallax_compile as plx


def copy_bandwidth(device: str) -> float:
    """GB/s of a large copy, bytes read and written counted."""
    size = 2**30 if device == "cuda" else 2**22
    source = torch.empty(size, dtype=torch.int8, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    times = clock(lambda: target.copy_(source), 10)
    return 2 * size / sorted(times)[5] / 1e6


def visited_pairs(case: Case, device: str) -> int:
    """Pairs of one head in the blocks that a kernel visits: what time should be in proportion to."""
    mask = plx.masks.block_mask(case.mask, None, None, case.length, case.length, device)
    blocks = int(mask.kv_num_blocks.sum()) + (
        0 if mask.full_kv_num_blocks is None else int(mask.full_kv_num_blocks.sum())
    )
    return blocks * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1]


def accuracies(contender: Contender, device: str, quick: bool) -> dict[str, Any]:
    """Errors of a contender at each width, ours with keys at an offset too, by label; a failure's reason in their place."""
    found: dict[str, Any] = {}
    offsets = (0.0, 10.0) if "ours" in contender.name else (0.0,)
    for width, offset in ((width, offset) for width in ((16,) if quick else (64, 128)) for offset in offsets):
        label = f"{contender.name}, D={width}" + (f", keys offset {offset:g} sigma" if offset else "")
        try:
            found[label] = accuracy(contender, width, device, offset)
        except Exception as error:  # a contender that cannot run is a result, not a failure of the run
            found[label] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


@dataclass(frozen=True)
class Job:
    """What a process measures: a case with all contenders, or without one the accuracy of a contender."""

    case: str | None
    contenders: tuple[str, ...]
    device: str
    rounds: int
    repeats: int
    quick: bool


def run(job: Job, alone: Alone) -> dict[str, Any]:
    """The case's entry of the record, or errors by label."""
    chosen = [entry for entry in CONTENDERS if entry.name in job.contenders]
    if job.case is None:
        return accuracies(chosen[0], job.device, job.quick)
    case = cases(job.device)[job.case]
    found = measure(case, chosen, job.device, job.rounds, job.repeats, alone)
    return found | {"visited_pairs": visited_pairs(case, job.device)}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--case", nargs="*", help="default: all but tiny")
    parser.add_argument("--contender", nargs="*", choices=[contender.name for contender in CONTENDERS])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contender in a round")
    parser.add_argument("--quick", action="store_true", help="two rounds of two")
    parser.add_argument("--at-once", type=int, default=0, metavar="N", help="build so many cases at once (together.py)")
    parser.add_argument("--json", type=Path, help="write every number here, after each case")
    parser.add_argument("--plots", type=Path, help="write roofline.png and lengths.png here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("training.py needs a CUDA GPU; `--device cpu --case tiny --quick` tries the harness itself.")
        return 2
    known = cases(arguments.device)
    names = arguments.case or [name for name in known if name != "tiny"]
    if unknown := set(names) - set(known):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    contenders = [entry for entry in CONTENDERS if not arguments.contender or entry.name in arguments.contender]
    rounds, repeats = (2, 2) if arguments.quick else (arguments.rounds, arguments.repeats)
    record: dict[str, Any] = {
        "schema": 1,
        "environment": environment(arguments.device),
        "copy_gb_s": copy_bandwidth(arguments.device),
        "cases": [],
        "accuracy": {},
    }

    def write() -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    chosen = tuple(contender.name for contender in contenders)
    about = {"device": arguments.device, "rounds": rounds, "repeats": repeats, "quick": arguments.quick}
    present = [entry.name for entry in contenders if entry.absent(known["4k"], arguments.device) is None]
    jobs = [Job(name, chosen, **about) for name in names] + [Job(None, (name,), **about) for name in present]
    for job, found in outcomes(run, jobs, arguments.at_once):
        if isinstance(found, str):
            print(f"{job.case or 'accuracy of ' + job.contenders[0]} failed: {found}", flush=True)
        elif job.case is None:
            for label, errors in found.items():
                if isinstance(errors, str):
                    print(f"accuracy of {label} failed: {errors}")
                else:
                    record["accuracy"][label] = errors
        else:
            record["cases"].append(found)
            print(f"\n{job.case} {found['shape']}, matrix product {found['matmul_tflops']:.0f} TFLOP/s")
            print(case_table(found), flush=True)
        write()
    write()
    print("\n" + accuracy_table(record) + "\n\n" + goals_table(record))
    if arguments.plots:
        print(plots(record, arguments.plots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
