"""``python -m parallax_compile.check_family``: a tick is something that ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import parallax_compile as plx
from parallax_compile import check_family


def test_the_cells_are_the_ten_members_and_their_gradient_probes() -> None:
    members = check_family.members()
    assert set(plx.family()) < set(members)
    kinds = [spec.probe.kind for spec in members.values()]
    assert len(members) == 14 and kinds.count("gradient") == 4


def test_a_cell_runs_and_is_ticked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "checks.json"
    assert check_family.main(["--device", "cpu", "--only", "VALUE_AVERAGE", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "VALUE_AVERAGE ✓" in printed and printed.count("not run") == 13 and "1 of 1 within" in printed
    (record,) = json.loads(path.read_text())["checks"]
    assert record["passed"] and 0 < record["error"] < 1e-5 and record["device"] == "cpu"


def test_a_cell_that_is_wrong_or_fails_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = check_family.attention

    def slightly_off(*operands: torch.Tensor, **options: object) -> torch.Tensor:
        out = exact(*operands, **options)
        return out * 1.001 if torch.compiler.is_compiling() else out

    monkeypatch.setattr(check_family, "attention", slightly_off)
    assert check_family.main(["--device", "cpu", "--only", "VALUE_AVERAGE"]) == 1
    printed = capsys.readouterr().out
    assert "VALUE_AVERAGE ✗ 1e-03" in printed and "0 of 1 within" in printed

    def broken(*operands: torch.Tensor, **options: object) -> torch.Tensor:
        raise plx.errors.UnsupportedError("not on this device")

    monkeypatch.setattr(check_family, "attention", broken)
    item = check_family.check("SOFTMAX", plx.SOFTMAX, "cpu")
    assert not item.passed and str(item) == "✗ failed" and item.failure is not None


def test_what_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_family.main(["--only", "flash"])
    assert "no such member" in capsys.readouterr().err
