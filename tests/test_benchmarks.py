"""The benchmark harness: what it counts, and that it runs and renders without a GPU."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

# Scripts import their neighbours, which a safe path forbids.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_pairs_are_counted_exactly() -> None:
    from contenders import cases

    for name, window in (("window", 1024), ("documents", 0)):
        case = cases("cpu")[name]
        rows = torch.arange(case.length, dtype=torch.float64)
        exact = torch.minimum(rows + 1, torch.tensor(float(window))) if window else rows % 2048 + 1
        assert abs(case.visible / float(exact.sum()) - 1) < 1e-3
        assert not case.plain_causal


def test_the_forward_moves_each_tensor_once() -> None:
    from contenders import cases

    gqa = cases("cpu")["gqa"]
    head = 2 * 2 * 8192 * 128  # bytes of one head of both batches
    assert gqa.forward_bytes("softmax") == head * (2 * 32 + 2 * 8)
    assert gqa.forward_bytes("parallax") == head * (3 * 32 + 2 * 8)


SASS = """Function:kernel
--:-:-:-:2	IADD3 R1, R1, -0x30, RZ;
LBB0:
--:-:-:Y:4	HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24;
LBB1:
--:-:1:-:1	HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0;
--:-:-:Y:2	WARPGROUP.DEPBAR.LE gsb0, 0x0;
02:-:-:-:b	FADD R24, R24, R25;
--:-:-:-:5	@P0 BRA LBB2;
--:-:-:-:1	@!P3 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R23+URZ], RZ;
LBB2:
--:-:-:-:6	@P3 BRA LBB1;
--:-:-:-:6	@P4 BRA LBB0;
--:-:-:-:1	FADD R2, R2, R3;
LBB3:
--:-:-:-:1	@P0 BRA LBB3;
"""


def test_a_schedule_has_the_stretches_of_the_innermost_loop_with_products() -> None:
    from schedule import innermost, loops, stretches

    assert [len(body) for body in loops(SASS)] == [6, 8, 1]
    assert [found[:3] for found in stretches(innermost(SASS))] == [
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 3, 2),
        ("BRA LBB2", 16, 2),
        ("BRA LBB1", 7, 2),
    ]
    with pytest.raises(ValueError, match="no loop of this kernel has products"):
        innermost(SASS.replace("HGMMA", "HMMA"))


def test_quantiles() -> None:
    from measure import summary

    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {"ms": 3.0, "ms_20": 2.0, "ms_80": 5.0}


@pytest.mark.parametrize("refused", ["", "it waits for the device"])
def test_a_capture_finds_no_graph_of_an_earlier_call(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    import measure

    class Held:
        pass

    gc.disable()  # not collected by chance
    held = Held()
    held.itself = held  # as the errors of an autotuner are
    alive = weakref.ref(held)
    del held

    @contextlib.contextmanager
    def capture(graph: Any) -> Iterator[None]:
        assert alive() is None
        if refused:
            raise RuntimeError(refused)
        yield

    for name in ("Stream", "current_stream", "CUDAGraph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    try:
        replay = measure.Replay(lambda: None, "cuda")
    finally:
        gc.enable()
    assert replay.clock == ({"clock": "call", "not_captured": refused} if refused else {"clock": "graph"})


def test_flops_are_the_least_products() -> None:
    from contenders import cases

    case = cases("cpu")["4k"]
    product = 2.0 * 4 * 16 * 4096 * 4096 / 2 * 128
    assert [case.flops("parallax", d) / product for d in ("forward", "both")] == [4, 12]
    assert [case.flops("softmax", d) / product for d in ("forward", "both")] == [2, 7]


def test_the_harness_runs_and_its_record_renders(tmp_path: Path) -> None:
    record_path = tmp_path / "record.json"
    together = Path(__file__).parent / "support" / "cpp_kernels.py"
    command = [sys.executable, str(together), str(BENCHMARKS / "training.py"), "--device", "cpu", "--case", "tiny"]
    command += ["--quick", "--json", str(record_path), "--contender", "parallax, ours", "softmax, cuDNN"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-2000:]
    record: dict[str, Any] = json.loads(record_path.read_text())
    rows = record["cases"][0]["contenders"]
    assert rows["parallax, ours"]["both"]["ms"] > 0
    assert rows["softmax, cuDNN"]["absent"] == "needs a GPU"
    assert all(error < 1e-4 for errors in record["accuracy"].values() for error in errors.values())
    import report

    text = report.page(record)
    assert "parallax, ours" in text and "not measured" in text


def test_jobs_are_timed_one_by_one_and_those_that_fail_say_why() -> None:
    from support import jobs
    from together import outcomes

    names, begun, patience = ["times", "raises", "times", "dies", "times"], time.monotonic(), 120.0
    found = list(outcomes(jobs.run, names, at_once=4, patience=patience))
    assert [name for name, _ in found] == names
    first, raised, second, died, last = (result for _, result in found)
    assert (raised, died) == ("ValueError: no", "its process ended with 3")
    spans = sorted([first, second, last])  # the last is of a second wave
    assert spans[0][0] < begun + patience  # who is gone is not waited for
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_the_page_is_what_its_record_gives() -> None:
    record = BENCHMARKS / "results" / "training-h200-2026-12-01.json"
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(record), "--check"]
    done = subprocess.run(command, check=False, env=ENVIRONMENT)
    assert done.returncode == 0


def test_decode_counts_keys_and_values_once_and_compares_with_the_best() -> None:
    import decode

    known = decode.cases()
    assert known["B32-4096"].bytes == 2 * 32 * 8 * 4096 * 128 * 2
    assert known["B32-16384-fp8"].bytes == known["B32-16384"].bytes / 2
    assert known["ragged"].bytes == 2 * (16384 + 15 * 512) * 8 * 128 * 2

    def entry(name: str, mine: float, **others: float) -> dict[str, Any]:
        rows = {other: {"us": us} for other, us in others.items()}
        return {"case": name, "contenders": {"parallax, ours": {"us": mine}, "softmax, ours": {"us": 1.0}, **rows}}

    cases = [entry("B32-4096", 180.0, cuDNN=178.0, FA2=200.0), entry("GQA", 96.0), entry("B32-4096-page16", 190.0)]
    rows = decode.goals({"cases": cases, "copy_bytes_s": 3e12})
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("B32-4096", "cuDNN", "met"),
        ("GQA", "us", "short"),
        ("B32-4096-page16", "B32-4096", "met"),
    ]


def _family_row(speed: dict[str, float], errors: dict[str, float]) -> dict[str, dict[str, Any]]:
    times = {direction: {"ms": ms, "clock": "graph"} for direction, ms in speed.items()}
    return {"ours": {**times, "errors": errors}, "FlashLLA": {d: {"ms": 6.0, "clock": "graph"} for d in speed}}


def test_the_family_is_judged_by_its_goals() -> None:
    import family

    rows = {row.name: row for row in family.rows()}
    assert len(rows) == len(family.rows())
    row = rows["LLA ridge 0.1 times (1, 16, 2048, 64)"]
    judged = family._judged(
        row, _family_row({"forward": 2.0, "both": 4.0}, {"out": 4e-3, "dk": 6e-3, "worst_row": 1.0})
    )
    assert judged["speedup"] == {"forward": 3.0, "both": 1.5}
    assert judged["met"] == {"forward": True, "both": False, "out": True, "dk": False}
    # Every row of the table has its contender and its goal.
    for name in (
        "LLA ridge 1 times (1, 16, 8192, 128)",
        "AFFINE_LINEAR times (1, 16, 65536, 128)",
        "MESA ridge 1 times (4, 16, 4096, 128)",
    ):
        assert rows[name].peers and rows[name].goal.speedup is not None


def test_the_family_reports_its_growth() -> None:
    import family

    def row(length: int, ms: float) -> dict[str, Any]:
        return {
            "kind": "times",
            "problem": {"member": "AFFINE_LINEAR", "batch": 1, "length": length},
            "contenders": {"ours": {"forward": {"ms": ms}}},
        }

    record = {"rows": [row(n, n**1.5) for n in (4096, 65536, 131072, 262144)]}
    assert family.growth(record) == {"AFFINE_LINEAR forward": pytest.approx(1.5)}


def test_the_family_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import family

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what is measured does not matter here
    path = tmp_path / "family.json"
    monkeypatch.setattr(sys, "argv", ["family.py", "--device", "cpu", "--quick", "--repeats", "1", "--json", str(path)])
    assert family.main() == 0
    record = json.loads(path.read_text())
    errors, first, _ = record["rows"]
    assert errors["met"] == {"out": True, "dq": True, "dk": True, "dv": True}
    assert first["contenders"]["ours"]["both"]["ms"] > 0 and first["contenders"]["fla linear"] == {
        "absent": "needs a GPU"
    }
    first["contenders"]["ours"]["both"]["ms"] = 12345.0
    del record["rows"][2]
    path.write_text(json.dumps(record))
    assert family.main() == 0
    assert "12345.000" in capsys.readouterr().out  # not measured again
    assert len(json.loads(path.read_text())["rows"]) == 3
