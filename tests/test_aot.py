"""Ahead of time: artifacts for a GPU that is not here, AOTInductor's packages on CPU, and how often a call is compiled."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import parallax_compile as plx
from parallax_compile.cli import main
from parallax_compile.errors import InputError, StoreError, UnsupportedError

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are compiled here")

CAUSAL = plx.PARALLAX.replace(mask_mod=plx.masks.causal())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("aot") / "parallax.plxa"
    command = [
        "aot",
        "PARALLAX",
        "--mask",
        "causal",
        "--shape",
        "1,4:2,128,16",
        "--target",
        "sm_90",
        "--out",
        str(path),
    ]
    result = CliRunner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calls"] == [
        {"shape": [1, 4, 2, 128, 128, 16, 16], "dtype": "bfloat16", "kernels": 6}
    ]
    return path


def memory_of(step: dict[str, Any]) -> list[str]:
    return [value[0] for value in step.get("arguments", []) if isinstance(value, list)]


def test_an_artifact_is_data_whose_programs_only_use_what_is_there(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("metadata.json"))
        assert all(name.endswith((".cubin", ".bin", ".json")) for name in archive.namelist()), "no code"
        assert all(archive.read(n).startswith(b"\x7fELF") for n in archive.namelist() if n.endswith(".cubin"))
    (call,) = about["calls"]
    there = {*(f"input{i}" for i in range(4)), *call["constants"]}
    assert len(call["constants"]) == 8, "the lists of blocks, of rows and of columns"
    for direction in ("forward", "backward"):
        for step in call[direction]["steps"]:
            if "allocate" in step:
                there.add(step["allocate"])
                continue
            assert set(memory_of(step)) <= there
            launch = call["launches"][step["launch"]]
            assert len(step["arguments"]) == len(launch["parameters"]) and launch["hidden"] >= 0
            for value, kind in zip(step["arguments"], launch["parameters"], strict=True):
                assert isinstance(value, list) == kind.startswith("*")
            assert len(step["grid"]) == 3 and min(step["grid"]) >= 1
        assert {result["of"][0] for result in call[direction]["results"] if result} <= there
        there.add("grad")
    assert call["forward"]["results"][0]["size"] == [1, 4, 128, 16]
    sizes = [call["backward"]["results"][index]["size"] for index in call["grads"]]
    assert sizes == [[1, 4, 128, 16], [1, 2, 128, 16], [1, 2, 128, 16], [1, 4, 128, 16]]


def test_the_backward_writes_only_what_it_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    # It may run twice (retain_graph=True): nothing that the forward saved may be overwritten.
    pytest.importorskip("triton")
    from parallax_compile.lowering import ahead
    from parallax_compile.lowering.targets import resolve

    compiled = {}
    monkeypatch.setattr(ahead, "compile_kernel", lambda kernel, *_, **__: compiled.setdefault(kernel.name, kernel))
    inputs = [torch.empty(1, 2, 64, 16, dtype=torch.bfloat16, device="meta") for _ in range(4)]
    found = ahead.ahead_of_time(lambda *t: plx.attention(*t), inputs, resolve("sm_90"), backward=True)
    assert found.backward is not None
    own = {step["allocate"] for step in found.backward.steps if "allocate" in step}
    written = 0
    for step in found.backward.steps:
        if "launch" in step:
            source = found.kernels[step["launch"]].source  # type: ignore[attr-defined]
            (names,) = re.findall(r"^def \w+\((.*?)\):", source, re.MULTILINE)[:1]
            for name, value in zip(names.split(", "), step["arguments"], strict=False):
                if re.match(r"(in_)?out_ptr|arg_DR|arg_DV_OUT", name):
                    assert value[0] in own, name
                    written += 1
    assert written >= 4
    assert all(result["of"][0] in own for result in found.backward.results if result)


def test_few_rows_are_merged_without_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact has no memory that outlives a call."""
    pytest.importorskip("triton")
    from parallax_compile.lowering import ahead
    from parallax_compile.lowering.targets import resolve

    monkeypatch.setattr(ahead, "compile_kernel", lambda kernel, *_, **__: kernel)
    inputs = [torch.empty(1, 2, n, 16, dtype=torch.bfloat16, device="meta") for n in (1, 2048, 2048, 1)]
    found = ahead.ahead_of_time(lambda *t: plx.attention(*t), inputs, resolve("sm_90"), backward=False)
    sources = [found.kernels[step["launch"]].source for step in found.forward.steps if "launch" in step]  # type: ignore[attr-defined]
    assert len(sources) == 2 and "merged_rows(" in sources[1] and not any("COUNTERS" in source for source in sources)


def test_memory_is_given_back_after_its_last_use_and_not_before(path: Path) -> None:
    from parallax_compile.ahead_of_time import _names, _with_releases

    (call,) = plx.load_aot(path).calls
    assert call.backward is not None
    for program, results, kept in (
        (call.forward, call.forward["results"][:1], _names(call.backward)),
        (call.backward, call.backward["results"], set()),
    ):
        run = _with_releases(program, results, kept)
        alive: set[str] = set()
        for step in run["steps"]:
            if "allocate" in step:
                alive.add(step["allocate"])
            elif "release" in step:
                alive.remove(step["release"])
            else:
                own = {name for name in memory_of(step) if name.startswith("work")}
                assert own <= alive
        needed = {result["of"][0] for result in results if result} | kept
        allocated = {step["allocate"] for step in program["steps"] if "allocate" in step}
        assert alive == needed & allocated


def test_a_saved_artifact_is_read_back(path: Path, tmp_path: Path) -> None:
    first = plx.load_aot(path)
    second = plx.load_aot(first.save(tmp_path / "again"))
    assert (first.spec, first.target, first.versions) == (second.spec, second.target, second.versions)
    (a,), (b,) = first.calls, second.calls
    assert (a.forward, a.backward, a.launches, a.cubins, a.grads) == (
        b.forward,
        b.backward,
        b.launches,
        b.cubins,
        b.grads,
    )
    assert all(torch.equal(a.constants[name], b.constants[name]) for name in a.constants)
    mask = plx.masks.block_mask(plx.masks.causal(), None, None, 128, 128, "cpu")
    assert any(torch.equal(constant, mask.kv_indices) for constant in a.constants.values())
    assert "sm_90" in str(first) and "6 kernels" in str(first)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_file_that_is_no_artifact_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError):
        plx.load_aot(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"format": "another", "calls": []}))
    with pytest.raises(StoreError, match="does not say"):
        plx.load_aot(path)


def test_wrong_calls_are_refused(path: Path) -> None:
    artifact = plx.load_aot(path)
    inputs = [torch.randn(1, heads, 128, 16, dtype=torch.bfloat16) for heads in (4, 2, 2, 4)]
    with pytest.raises(UnsupportedError, match="query is on cpu"):
        artifact(*inputs)
    with pytest.raises(InputError, match=r"there are 1,4:2,128,16 bfloat16"):
        artifact(*(tensor.float() for tensor in inputs))
    with pytest.raises(InputError, match="no call of shapes"):
        artifact(*inputs[:3])
    with pytest.raises(InputError, match="target must be"):
        plx.aot(CAUSAL, "1,1,64,16", target="sm_1")


def test_a_graph_that_does_more_than_launch_is_named() -> None:
    pytest.importorskip("triton")
    from parallax_compile.lowering.ahead import _check

    wrapper = (
        "class Runner:\n    def call(self, args):\n        x = torch.ops.aten.sort.stable(args[0])\n        k.run(x)\n"
    )
    with pytest.raises(UnsupportedError, match=r"torch.ops.aten.sort.stable"):
        _check(wrapper)


# --- AOTInductor ----------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 4 * 2 * 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.project(x).unflatten(-1, (4, 2, 8)).permute(2, 0, 3, 1, 4)
        return plx.attention(*parts, spec=CAUSAL).transpose(1, 2).flatten(2)


def test_a_model_is_packaged_by_aotinductor_and_runs_on_cpu(tmp_path: Path) -> None:
    model, x = Model().eval(), torch.randn(1, 160, 8)
    with torch.no_grad():
        # AUTO: a range could not be proven of the number of the mask's blocks.
        exported = torch.export.export(model, (x,), strict=True, dynamic_shapes=({1: torch.export.Dim.AUTO},))
        assert any("parallax_attention" in str(node.target) for node in exported.graph.nodes), (
            "the operator is kept whole"
        )
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(package)
        for length in (160, 24, 333):
            x = torch.randn(1, length, 8)
            torch.testing.assert_close(packaged(x), model(x), rtol=1e-4, atol=1e-5)


# --- how often ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("varied", ["length", "batch"])
@pytest.mark.parametrize("spec", [CAUSAL, plx.LINEAR.replace(mask_mod=plx.masks.causal())], ids=["PARALLAX", "LINEAR"])
def test_six_sizes_are_at_most_two_compiles(spec: plx.AttentionSpec, varied: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda *tensors: plx.attention(*tensors, spec=spec), backend=counter, fullgraph=True)
    # Lengths of more than one block of the mask: up to 128 there is one block, a constant, which is a compile of its own.
    for size in (160, 200, 256, 400, 333, 520):
        batch, length = (1, size) if varied == "length" else (size // 40, 32)
        inputs = [torch.randn(batch, 2, length, 8, requires_grad=True) for _ in range(4)]
        call(*inputs).sum().backward()
        assert all(tensor.grad is not None for tensor in inputs)
    assert counter.frame_count <= 2
