"""The family beside its peers: errors against float64, times, goals, growth with the length. One row at a time, resumable.

    python benchmarks/family.py --json benchmarks/results/family.json [--seconds 150] [--match TEXT] [--at-once 16]

A record that exists is continued: rows that it has are not run again, unless the device or a version differs. ``--seconds``
starts no row after that time; ``--match`` takes rows whose name contains the text; ``--at-once N`` builds N rows at once, each
in a process of its own. ``--quick`` runs small shapes, on a CPU too; ``--show`` prints a record.

Errors: relative, by norm, of out and gradients at (1, 2, 1024, D), and the worst row of out. Times: medians over interleaved
rounds with a cold L2, each run a replayed CUDA graph where it can be captured (``clock`` says so), so that the host's time is
no part of them. bf16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from family_contenders import FLA_LINEAR, FLA_MESA, FLASH_LLA, OURS, Contender, Problem, others
from measure import Clock, Replay, summary
from record import environment
from tabulate import tabulate
from together import Alone, outcomes
from torch import Tensor

import parallax_compile as plx

DIRECTIONS = ("forward", "both")
ROUNDS = 3
PATIENCE = 120.0
"""Seconds that a built row waits for the others of its wave."""
ROUND_MS = 300.0
"""A call that takes long is repeated less often: a round of it may take so much."""


@dataclass(frozen=True)
class Goal:
    """What the project set out to reach on a row.

    Attributes:
        speedup: least ratio of the peer's time to ours, in each direction.
        error: largest error of out and of every gradient; None where the peer's own is the measure.
    """

    speedup: float | None = None
    error: float | None = None
    peer_error: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the record: a problem, the contenders beside us, and whether errors or times are wanted."""

    kind: str
    problem: Problem
    peers: tuple[Contender, ...] = ()
    goal: Goal = Goal()

    @property
    def name(self) -> str:
        """Its key in the record."""
        p = self.problem
        ridge = "" if p.ridge is None else f" ridge {p.ridge:g}"
        return f"{p.member}{ridge} {self.kind} ({p.batch}, {p.heads}, {p.length}, {p.width})"


LLA_GOALS = {1.0: Goal(3.0, 3e-3), 0.1: Goal(2.0, 5e-3), 0.01: Goal(1.0, 1e-2)}
LINEAR_SHAPES = ((4, 16, 4096, 128), (1, 16, 16384, 128), (1, 16, 65536, 128))
MESA_SHAPES = ((4, 16, 4096, 128), (1, 16, 16384, 128), (1, 16, 65536, 128))
GROWTH_LENGTHS = (65536, 131072, 262144)


def rows(quick: bool = False) -> list[Row]:
    """Every row, those that say most first: 17 that differ in shape or member, then the same at other ridges."""
    if quick:
        return _quick_rows()
    found = []
    for ridge, goal in LLA_GOALS.items():
        # Ridges of a shape share their kernels: built at once, the first compiles them for the others.
        for width in (64, 128):
            found.append(Row("errors", Problem("LLA", 1, 2, 1024, width, ridge), (FLASH_LLA,), goal))
            for length in (2048, 4096, 1024, 8192):
                speed = Goal(1 / 1.5, goal.error) if (ridge, width) == (0.01, 128) else goal
                found.append(Row("times", Problem("LLA", 1, 16, length, width, ridge), (FLASH_LLA,), speed))
        if ridge == 1.0:
            found += [Row("times", Problem("AFFINE_LINEAR", *s), (FLA_LINEAR,), Goal(1.2)) for s in LINEAR_SHAPES]
            found.append(Row("errors", Problem("MESA", 1, 2, 1024, 128, 1.0), (FLA_MESA,), Goal(peer_error=True)))
            found += [Row("times", Problem("MESA", *shape, 1.0), (FLA_MESA,), Goal(2.0)) for shape in MESA_SHAPES]
    for member in ("AFFINE_LINEAR", "MESA"):
        ridge = 1.0 if member == "MESA" else None
        found += [Row("times", Problem(member, 1, 16, n, 128, ridge)) for n in GROWTH_LENGTHS[1:]]
    for member in (*plx.family(), *others()):
        if member not in ("LLA", "MESA"):
            solved = member in ("AFFINE_MESA", "solved, no intercept", "gradient")
            found += [Row("errors", Problem(member, 1, 2, 1024, d, 1.0 if solved else None)) for d in (64, 128)]
    return found


def _quick_rows() -> list[Row]:
    return [
        Row("errors", Problem("LLA", 1, 2, 48, 16, 1.0), (FLASH_LLA,), LLA_GOALS[1.0]),
        Row("times", Problem("AFFINE_LINEAR", 1, 2, 64, 16), (FLA_LINEAR,), Goal(1.2)),
        Row("times", Problem("AFFINE_LINEAR", 1, 2, 128, 16)),
    ]


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A row, where, and how often a contender is timed in a round."""

    row: Row
    device: str
    repeats: int


def run_row(job: Job, alone: Alone) -> dict[str, Any]:
    """Measure every contender of a row; one that cannot run is named with the reason."""
    torch._dynamo.reset()
    peers.prepare()
    row, device = job.row, job.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    operands, grad = row.problem.operands(device, dtype)
    found: dict[str, dict[str, Any]] = {}
    built = {}
    for contender in (OURS, *row.peers):
        reason = contender.absent(device)
        if reason is not None:
            found[contender.name] = {"absent": reason}
            continue
        found[contender.name] = {}
        try:
            start = time.perf_counter()
            runs = contender.build(row.problem, operands, grad)
            runs.both()
            runs.forward()
            found[contender.name]["first_calls_s"] = time.perf_counter() - start
            built[contender.name] = runs
        except Exception as problem:  # a result, not a failure of the run
            found[contender.name] = {"failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
        if told := peers.tuned():
            found[contender.name]["tuned"] = told
    if row.kind == "errors":
        exact = _reference(row.problem, operands, grad)
        for name, runs in built.items():
            found[name] |= {"errors": _errors(runs.both(), exact), "repeatable": _same_bits(runs.both(), runs.both())}
            found[name] |= runs.notes()
    else:
        calls = {(name, d): Replay(getattr(runs, d), device) for name, runs in built.items() for d in DIRECTIONS}
        with alone():
            _time(calls, device, job.repeats, found)
    return {
        "name": row.name,
        "kind": row.kind,
        "problem": asdict(row.problem),
        "contenders": found,
        **_judged(row, found),
    }


def _reference(problem: Problem, operands: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Out and gradients in float64, by the dense reference."""
    spec = problem.spec
    if problem.member == "MESA":
        spec = spec.replace(probe=plx.Solved(ridge_scale="sum"))
    exact = [x.detach().double().requires_grad_() for x in operands]
    out = plx.attention(*exact, spec=spec, ridge=problem.ridge)
    return [out.detach(), *torch.autograd.grad(out, exact, grad.double(), allow_unused=True)]


def _errors(got: tuple[Tensor, list[Tensor | None]], exact: list[Tensor | None]) -> dict[str, float]:
    found = {}
    for name, a, b in zip(("out", "dq", "dk", "dv", "dr"), (got[0], *got[1]), exact, strict=False):
        if a is not None and b is not None and b.norm() > 0:
            found[name] = float((a.double() - b).norm() / b.norm())
    out, want = got[0].double(), exact[0]
    assert want is not None
    found["worst_row"] = float(((out - want).norm(dim=-1) / want.norm(dim=-1)).max())
    return found


def _same_bits(first: tuple[Tensor, list[Tensor | None]], second: tuple[Tensor, list[Tensor | None]]) -> bool:
    pairs = zip((first[0], *first[1]), (second[0], *second[1]), strict=True)
    return all(a is None or (b is not None and torch.equal(a, b)) for a, b in pairs)


def _time(replays: dict[tuple[str, str], Replay], device: str, repeats: int, found: dict[str, dict[str, Any]]) -> None:
    """Fill in milliseconds, round by round in turn."""
    clock = Clock(device)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in replays}
    each = {key: max(1, min(repeats, int(ROUND_MS / clock(replay, 1)[0]))) for key, replay in replays.items()}
    for _ in range(ROUNDS):
        for key, replay in replays.items():
            replay()
            samples[key] += clock(replay, each[key])
    for (name, direction), measured in samples.items():
        found[name][direction] = {**summary(measured), **replays[name, direction].clock}


def _judged(row: Row, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios to the peers, the goal, and whether it is met; None where nothing says."""
    ours, goal = found["ours"], row.goal
    result: dict[str, Any] = {"goal": asdict(goal), "speedup": {}, "met": {}}
    for peer in row.peers:
        theirs = found[peer.name]
        for direction in DIRECTIONS:
            if "ms" in ours.get(direction, {}) and "ms" in theirs.get(direction, {}):
                result["speedup"][direction] = theirs[direction]["ms"] / ours[direction]["ms"]
    if goal.speedup is not None:
        for direction, ratio in result["speedup"].items():
            result["met"][direction] = ratio >= goal.speedup
    if "errors" in ours:
        for name, error in ours["errors"].items():
            allowed = goal.error
            if goal.peer_error:
                allowed = next((found[p.name]["errors"][name] for p in row.peers if "errors" in found[p.name]), None)
            if allowed is not None and name != "worst_row":
                result["met"][name] = error <= allowed
    return result


def growth(record: dict[str, Any]) -> dict[str, float]:
    """Least-squares exponents of the times over the length, for the members with rows at several of the long lengths."""
    found = {}
    done = [row for row in record["rows"] if row["kind"] == "times" and row["problem"]["batch"] == 1]
    for member in dict.fromkeys(row["problem"]["member"] for row in done):
        if plx.family()[member].bandwidth.kind != "infinite":
            continue
        for direction in DIRECTIONS:
            points = sorted(
                (row["problem"]["length"], row["contenders"]["ours"][direction]["ms"])
                for row in done
                if row["problem"]["member"] == member and "ms" in row["contenders"]["ours"].get(direction, {})
            )
            points = [p for p in points if p[0] >= GROWTH_LENGTHS[0]] or points
            if len(points) > 1:
                found[f"{member} {direction}"] = _exponent(points)
    return found


def _exponent(points: list[tuple[int, float]]) -> float:
    x, y = [math.log(n) for n, _ in points], [math.log(t) for _, t in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


# --- the record -----------------------------------------------------------------------------------------------------

SAME = ("device", "torch", "triton", "commit")
"""What must be equal for rows of an earlier run to count."""


def opened(path: Path | None, device: str) -> dict[str, Any]:
    """The record at ``path`` where it can be continued, else a new one."""
    mine = environment(device)
    if path is not None and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("schema") == 2 and all(before["environment"].get(name) == mine[name] for name in SAME):
            return before
        print(f"{path} is of another device, release or commit: begun again", flush=True)
    return {"schema": 2, "environment": mine, "rows": []}


def write(record: dict[str, Any], path: Path | None) -> None:
    """Replace the file in one step, so that a run that is cut off leaves the last whole record."""
    record["growth"] = growth(record)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def tables(record: dict[str, Any]) -> str:
    """The record as text: errors, then times."""
    parts = []
    for kind, columns in (("errors", ("out", "dq", "dk", "dv", "dr", "worst_row")), ("times", DIRECTIONS)):
        lines = []
        for row in record["rows"]:
            if row["kind"] != kind:
                continue
            for name, found in row["contenders"].items():
                ours = name == "ours"
                if kind == "errors":
                    cells = [f"{found['errors'][c]:.1e}" if c in found.get("errors", {}) else "" for c in columns]
                    steps = (
                        f"{found['iterations_mean']:.0f} · {found['iterations_most']}"
                        if "iterations_mean" in found
                        else ""
                    )
                    goal = row["goal"]["error"]
                    cells += [steps, "" if goal is None or not ours else f"{goal:g}"]
                else:
                    cells = [f"{found[c]['ms']:.3f}" if "ms" in found.get(c, {}) else "" for c in columns]
                    cells += [f"{row['speedup'][c]:.2f}" if ours and c in row["speedup"] else "" for c in columns]
                    goal = row["goal"]["speedup"]
                    clocks = {found[c].get("clock", "") for c in columns if c in found}
                    cells += ["" if goal is None or not ours else f"{goal:.2f}", "/".join(sorted(clocks))]
                verdict = "" if not ours or not row["met"] else "met" if all(row["met"].values()) else "short"
                remark = found.get("failed", found.get("absent", ""))[:50]
                lines.append([row["name"] if ours else "", name, *cells, verdict, remark])
        if not lines:
            continue
        ends = (
            ["steps mean · most", "goal"]
            if kind == "errors"
            else ["peer / ours fwd", "peer / ours both", "goal", "clock"]
        )
        titles = ["row", "contender", *columns, *ends, "", "remark"]
        parts.append(tabulate(lines, headers=titles, disable_numparse=True))
    if record.get("growth"):
        parts.append(f"growth exponents: { {name: round(value, 3) for name, value in record['growth'].items()} }")
    return "\n\n".join(parts)


def main() -> int:
    """Measure, print, write; 1 if a contender of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="the record; continued if it exists")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after this time")
    parser.add_argument("--match", default="", help="only rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=10, help=f"of each of {ROUNDS} rounds")
    parser.add_argument("--at-once", type=int, default=0, metavar="N", help="build so many rows at once (together.py)")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--show", type=Path, metavar="RECORD", help="print a record and end")
    arguments = parser.parse_args()
    if arguments.show is not None:
        print(tables(json.loads(arguments.show.read_text(encoding="utf-8"))))
        return 0
    start = time.monotonic()
    record = opened(arguments.json, arguments.device)
    done = {row["name"] for row in record["rows"]}
    wanted = [row for row in rows(arguments.quick) if arguments.match in row.name]
    if not wanted:
        parser.error("no such row. Rows: " + "; ".join(row.name for row in rows(arguments.quick)))
    left = [row for row in wanted if row.name not in done]
    failed = False
    jobs = [Job(row, arguments.device, arguments.repeats) for row in left]
    for job, measured in outcomes(run_row, jobs, arguments.at_once, PATIENCE):
        if isinstance(measured, str):
            print(f"{job.row.name} failed: {measured}", flush=True)
            failed = True
            continue
        done.add(job.row.name)
        record["rows"].append(measured)
        failed |= "failed" in measured["contenders"]["ours"]
        write(record, arguments.json)
        print(f"{job.row.name}: at {time.monotonic() - start:.0f} s, met {measured['met']}", flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time: {len(wanted) - len(done)} rows left", flush=True)
            break
    record["growth"] = growth(record)
    print("\n" + tables(record))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
