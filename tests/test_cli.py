"""The command line, by click's runner; what is installed is tested in test_packaging.py."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from parallax_compile.lowering import tuned
from parallax_compile.lowering.store import Entry, Store

import parallax_compile as plx
from parallax_compile.cli import main, parse_spec

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def run_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def commands(group: Any = main, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses_and_speaks_json(command: tuple[str, ...]) -> None:
    text = run(*command, "--help").output
    assert "--json" in text
    example = re.search(r"Example:\n\s+parallax-compile (.*)", text)
    assert example is not None and example[1].startswith(" ".join(command))
    words = example[1].split()[len(command) :]
    found: Any = main
    for name in command:
        found = found.commands[name]
    assert found.make_context(command[-1], words) is not None  # options exist, values are sound


def test_specs_by_name_json_file_and_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = plx.PARALLAX.replace(covariance_mod=plx.mods.tanh_cap(8.0), mask_mod=plx.masks.sliding_window(64))
    (tmp_path / "mine.json").write_text(mine.to_json())
    (tmp_path / "my_variants.py").write_text(
        "import parallax_compile as plx\nCAPPED = plx.SOFTMAX\nclass Of: inner = plx.LLA\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert parse_spec("parallax") == plx.PARALLAX and parse_spec(mine.to_json()) == mine == parse_spec("mine.json")
    assert parse_spec("my_variants:CAPPED") == plx.SOFTMAX and parse_spec("my_variants:Of.inner") == plx.LLA
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "list.json").write_text("[]")
    wrong = {
        "nope": "SPEC must be one of SOFTMAX", "{": "no spec as JSON", "my_variants:missing": "cannot be imported",
        "no_such_module:x": "No module named", "my_variants:plx": "no AttentionSpec, but module",
        "none.json": "none.json, which cannot be read: No such file", "broken:x": "ZeroDivisionError: division by zero",
        ":x": "cannot be imported", '{"width": 1}': "no field width; it has bandwidth", "list.json": "but got list",
    }  # fmt: skip
    for text, message in wrong.items():
        with pytest.raises(plx.errors.InputError, match=message):
            parse_spec(text)
        assert re.fullmatch("error: .*\n", run("explain", text, code=2).stderr), "one line, like every other error"


def test_family() -> None:
    assert set(run_json("family")) == set(plx.family())
    assert "PARALLAX" in run("family").output


def test_explain() -> None:
    arguments = ("explain", "PARALLAX", "--mask", "causal", "--shape", "1,4:2,1024,64", "--target", "sm_90")
    data = run_json(*arguments)
    assert data["stages"][0]["stage"] == "core_forward" and data["floor_seconds"] > 0
    text = run(*arguments).output
    assert "floor of all stages" in text and "queries down" in text
    assert run_json("explain", "LINEAR", "--mask", "causal", "--target", "cpu")["target"] is None
    decoding = ("explain", "PARALLAX", "--decode", "--shape", "8,32:8,1:8192,128", "--target", "sm_90")
    (stage,) = run_json(*decoding)["stages"]
    assert stage["stage"] == "decode_split" and stage["bound"] == "memory bandwidth"
    (stage,) = run_json(*decoding, "--mask", "window:1024")["stages"]
    assert stage["floor_seconds"] < 12e-6
    assert "leave it out with --decode" in run(*decoding, "--kernels", code=2).stderr


def test_explain_with_kernels_tells_level_resources_and_advice(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    arguments = ["explain", "SOFTMAX", "--shape", "1,1,100,16", "--target", "sm_80", "--no-backward", "--kernels"]
    data = run_json(*arguments)
    (kernel,) = data["kernels"]
    assert kernel["stage"] == "core_forward" and kernel["level"] in ("heuristic", "shipped")
    assert kernel["resources"]["registers"] > 0 and kernel["predicted_seconds"] > data["floor_seconds"]
    assert any("parallax-compile tune SOFTMAX --shape 1,1,100,16" in text for text in kernel["advice"])
    text = run(*arguments).output
    assert "what would make it faster" in text and "registers" in text


def test_the_mask_as_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "mask.png"
    run("explain", "SOFTMAX", "--mask", "window:100", "--shape", "1,1,512,16", "--mask-png", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    run("explain", "SOFTMAX", "--shape", "1,1,512,16", "--mask-png", str(path), code=2)


def test_inspect(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    arguments = ("inspect", "SOFTMAX", "--shape", "1,1,64,16", "--no-backward", "--target", "sm_80")
    (kernel,) = run_json(*arguments, "--out", str(tmp_path))["kernels"]
    assert kernel["resources"]["registers"] > 0 and any(tmp_path.glob("*.ptx"))
    assert ".target sm_80" in run(*arguments, "--emit", "ptx", "--stage", "core_forward").output
    assert "tt.func" in next(iter(run_json(*arguments, "--emit", "ttir").values()))
    assert "--stage must be one of core_forward" in run(*arguments, "--stage", "typo", code=2).stderr
    (tmp_path / "file").touch()
    assert "cannot write the kernels" in run(*arguments, "--out", str(tmp_path / "file" / "x"), code=2).stderr


@WITHOUT_GPU
def test_tune_without_a_gpu_says_what_to_do() -> None:
    assert "measures='model'" in run("tune", "PARALLAX", code=3).stderr


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["explain", "PARALLAX", "--shape", "1,2"], 2),
        (["explain", "PARALLAX", "--dtype", "int8"], 2),
        (["explain", "PARALLAX", "--mask", "circle"], 2),
        (["explain", "PARALLAX", "--mask", "window:many"], 2),
        (["explain", "PARALLAX", "--mask", "causal", "--shape", "1,1,64,16", "--mask-png", "/nonexistent/mask.png"], 2),
        (["explain", "PARALLAX", "--target", "sm_1"], 2),
        (["explain", "PARALLAX", "--shape", "1,1,64,300"], 3),
        (["check", "--member", "NOBODY"], 2),
        (["store", "show", "nothing"], 2),
        (["store", "import", "/nonexistent.json"], 1),
        (["nonsense"], 2),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else str(x),
)
def test_exit_codes(arguments: list[str], code: int) -> None:
    result = run(*arguments, code=code)
    assert "rror" in result.stderr and "Traceback" not in result.output


def test_check_passes_and_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallax_compile import checking

    assert "1 passed, 0 failed" in run("check", "--member", "softmax", "--quick", "--device", "cpu").output
    wrong = checking.CheckResult("SOFTMAX", "s", "float32", True, {"out": 1e-7, "dq": 0.5}, 1e-5, 0.0)
    monkeypatch.setattr(checking, "_case", lambda *case: wrong)
    (result,) = run_json("check", "--member", "softmax", "--quick", "--device", "cpu", code=1)
    assert result["passed"] is False and result["errors"]["dq"] == 0.5


def test_bench_on_cpu() -> None:
    data = run_json(
        "bench",
        "SOFTMAX",
        "--shape",
        "1,1,64,16",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--repeats",
        "3",
        "--no-backward",
    )
    assert data["timings"][0]["milliseconds"] > 0


def test_env() -> None:
    data = run_json("env")
    assert data["torch"] == torch.__version__ and data["default target"]


def test_the_store_commands(tmp_path: Path) -> None:
    def entry(stage: str, **versions: str) -> Entry:
        current = {**tuned.versions(), **versions}
        key = {"stage": stage, "device": "Some GPU", "template": tuned.template_digest(stage), **current}
        return Entry(key, {"block_m": 64}, {"milliseconds": 0.5}, {"tested": True})

    pytest.importorskip("triton")
    with tuned.using(Store(tmp_path / "store")) as store:
        kept, stale = entry("core_forward"), entry("core_backward_key", torch="0.1")
        store.put([kept, stale])
        assert set(run_json("store", "list")) == {kept.digest, stale.digest}
        assert list(run_json("store", "list", "--stage", "core_forward")) == [kept.digest]
        assert "2 entries in" in run("store", "list").output
        assert run_json("store", "show", kept.digest[:8])["result"] == {"milliseconds": 0.5}
        assert run_json("store", "export", str(tmp_path / "all.json"))["entries"] == 2
        assert run_json("store", "prune")["removed"] == 1 and list(store.entries()) == [kept.digest]
        assert run_json("store", "import", str(tmp_path / "all.json"))["entries"] == 2 and len(store.entries()) == 2
        assert run_json("store", "prune", "--all")["removed"] == 2 and not store.entries()


def test_a_store_that_is_off_or_damaged_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_STORE", "off")
    Store(tmp_path).export(tmp_path / "none.exported")
    assert "no store: PARALLAX_STORE=off" in run("store", "list").output
    assert "no store to add to" in run("store", "import", str(tmp_path / "none.exported"), code=1).stderr
    monkeypatch.setenv("PARALLAX_STORE", str(tmp_path))
    (tmp_path / "gpu.json").write_text('{"format"')
    said = run("store", "list").stderr
    assert said.startswith("warning: parallax-compile's store: set aside") and said.count("\n") == 1


def test_decisions_go_to_the_log_and_to_tlparse(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from parallax_compile.lowering.codegen import generate
    from torch._logging import _internal

    traced: dict[str, Any] = {}

    def trace(name: str, metadata_fn: Any = dict, *, payload_fn: Any = lambda: None, **options: Any) -> None:
        about = metadata_fn()
        if str(about.get("name", "") if isinstance(about, dict) else "").startswith("parallax"):
            traced[about["name"]] = json.loads(payload_fn())

    monkeypatch.setattr(_internal, "trace_structured", trace)
    inputs = [torch.empty(1, 1, 64, 16, dtype=torch.float16, device="meta") for _ in range(3)]
    with caplog.at_level("INFO", logger="parallax_compile"):
        generate(lambda *tensors: plx.attention(*tensors), inputs, target="sm_90", backward=False)
    assert "one pass keeps no score" in caplog.text
    artifact = traced["parallax_core_forward_candidate"]
    assert artifact["question"]["stage"] == "core_forward" and artifact["candidates"] and artifact["why"]
    assert any(f"level {level}" in caplog.text for level in ("heuristic", "shipped"))


def test_what_has_no_plan_or_candidate_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    from parallax_compile.lowering.codegen import generate

    rows, keys, cpu = (torch.empty(1, 2, n, 16, dtype=torch.float16, device="meta") for n in (1, 2048, 64))
    causal_sums = plx.LINEAR.replace(mask_mod=plx.masks.causal())
    on_cpu = torch.zeros_like(cpu, dtype=torch.float32, device="cpu")
    with caplog.at_level("INFO", logger="parallax_compile"), torch.no_grad():
        generate(lambda q, k, v: plx.attention(q, k, v), [rows, keys, keys], target="sm_90", backward=False)
        generate(lambda *qkvr: plx.attention(*qkvr, spec=causal_sums), [cpu] * 4, target="sm_90", backward=False)
        torch.compile(lambda q: plx.attention(q, q, q) + plx.decode(q, q, q, cache_seqlens=64))(on_cpu)
    for said in (
        "decode: forward, row chunks",
        "decode_split: forward, split keys",
        "scan_product: forward, chunked scan",
        "core_forward: forward, row chunks",
    ):
        assert said in caplog.text


def test_the_page_of_transcripts_is_what_the_commands_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["cli_page.py", "--check"])
    monkeypatch.setenv("COLUMNS", "110")
    import cli_page

    assert cli_page.main() == 0, capsys.readouterr().out
