"""The portable lowering: emitted in every dialect, run by IREE against float64, compiled for machines that are not here."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parallax_compile.lowering.mlir import emission, forms, scalars, solver, toolchain
from support.oracle import jvp_oracle, low_precision, relative_error
from test_family import MEMBERS, operands
from torch import Tensor

import parallax_compile as plx
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError

ROOT = Path(__file__).resolve().parents[1]
CAUSAL = plx.masks.causal()
SHAPES = ((1, 4, 21, 6), (1, 2, 26, 6), (1, 2, 26, 5), (1, 4, 21, 6))
OPEN = tuple((*shape[:2], None, shape[3]) for shape in SHAPES)

needs_importer = pytest.mark.skipif(
    bool(toolchain.missing(toolchain.IMPORTER)), reason="torch-mlir is not installed (parallax-compile[mlir])"
)
needs_iree = pytest.mark.skipif(
    bool(toolchain.missing(toolchain.IMPORTER, toolchain.COMPILER, toolchain.RUNTIME)),
    reason="torch-mlir or IREE is not installed (parallax-compile[mlir])",
)


def tensors(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, probe: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = 4 if probe else 3
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes[:count]]


def with_gradients(spec: plx.AttentionSpec, inputs: list[Tensor], grad: Tensor, **call: Any) -> tuple[Tensor, ...]:
    """Output and gradients of the reference in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out = plx.attention(*leaves, spec=spec, enable_gqa=True, **call)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.double(), materialize_grads=True))


# --- what is traced (no MLIR) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
def test_blockwise_and_solver_are_the_reference(name: str) -> None:
    """Values and gradients of every member, rows without a key among them, by blocks that do not divide the keys."""
    spec = MEMBERS[name].replace(mask_mod=plx.masks.causal(offset=-5), score_mod=None)
    inputs = operands(spec, rows=21, columns=26, width=6)
    grad = torch.randn(2, 4, 21, 6, dtype=torch.float64)
    want = with_gradients(spec, inputs, grad)
    for form in (forms.Form("dense"), forms.Form("blockwise", 8)):
        with forms.tracing(form):
            got = with_gradients(spec, inputs, grad)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12, form.name


def test_the_sweep_inverts_and_differentiates_as_a_solve() -> None:
    for width in (1, 2, 7):
        spread = torch.randn(3, width, width + 2, dtype=torch.float64)
        matrix = (spread @ spread.mT + 0.1 * torch.eye(width)).requires_grad_()
        right = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
        x, exact = solver.solve(matrix, right), torch.linalg.solve(matrix, right[..., None])[..., 0]
        assert relative_error(x.detach(), exact.detach()) < 1e-12
        weights = torch.randn_like(x)
        for got, want in zip(
            *(torch.autograd.grad((y * weights).sum(), (matrix, right)) for y in (x, exact)), strict=True
        ):
            assert relative_error(got, want) < 1e-11


def test_a_state_and_auxiliary_outputs_are_refused_where_they_are_not_traced() -> None:
    q, k, v, r = tensors()
    with forms.tracing(forms.Form("dense")):
        _, lse = plx.attention(q, k, v, r, enable_gqa=True, return_lse=True)
        request = plx.AuxRequest(state=True)
        with pytest.raises(UnsupportedError, match="state"):
            plx.attention(q, k, v, r, spec=plx.LINEAR, enable_gqa=True, return_aux=request)
    assert relative_error(lse, plx.attention(q, k, v, r, enable_gqa=True, return_lse=True)[1]) < 1e-6
    with forms.tracing(forms.Form("blockwise")), pytest.raises(UnsupportedError, match='form="dense"'):
        plx.attention(q, k, v, r, enable_gqa=True, return_lse=True)


# --- emitted --------------------------------------------------------------------------------------------------------


@needs_importer
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dialect", list(emission.DIALECTS))
def test_every_dialect_with_static_and_open_lengths(dialect: str, dynamic: bool, tmp_path: Path) -> None:
    spec = plx.PARALLAX.replace(mask_mod=CAUSAL, score_mod=plx.mods.alibi(4))
    inputs = [tensor.to("meta") for tensor in tensors()]
    found = plx.inspect(spec, *inputs, emit="mlir", dialect=dialect, dynamic=dynamic)
    assert found.forms == {"forward": "dense", "backward": "dense"}
    assert found.differentiated == ("query", "key", "value", "probe")
    length = "?" if dynamic else "21"
    kind = f"[1,4,{length},6],f32" if dialect == "torch" else f"1x4x{length}x6xf32"
    signature = re.search(r"func\.func @attention_backward\((.*)$", found.modules["backward"], re.MULTILINE)
    assert signature is not None and signature[1].count(kind) == 4  # query and probe, and their gradients
    assert f"{'linalg' if dialect == 'linalg' else dialect}." in found.modules["forward"]
    assert dialect == "torch" or "torch." not in found.modules["backward"]
    names = [path.name for path in found.write(tmp_path)]
    assert names == [f"forward.{dialect}.mlir", f"backward.{dialect}.mlir", "summary.txt"]
    assert f"{dialect} " in (tmp_path / "summary.txt").read_text(encoding="utf-8")


@needs_importer
def test_a_member_with_a_solver_has_no_solve_in_any_dialect() -> None:
    inputs = tensors(probe=False)
    for form in ("dense", "blockwise"):
        found = plx.inspect(plx.LLA.replace(mask_mod=CAUSAL), *inputs, emit="mlir", form=form, backward=False)
        assert "linalg.generic" in found.modules["forward"] and found.forms == {"forward": form}


@needs_importer
def test_only_the_gradients_that_are_wanted() -> None:
    q, k, v, r = tensors()
    found = plx.inspect(plx.PARALLAX, q, k.requires_grad_(), v, r.requires_grad_(), emit="mlir", dialect="torch")
    assert found.differentiated == ("key", "probe")
    returned = re.search(r"-> \((.*?)\) ", found.modules["backward"])
    assert returned is not None and returned[1].count("vtensor") == 3


@needs_importer
def test_an_opaque_call_stays_whole_in_every_dialect() -> None:
    spec = plx.PARALLAX.replace(mask_mod=CAUSAL, covariance_mod=plx.mods.tanh_cap(8.0, approx=True))
    told = {
        "torch": 'torch.operator "torch.parallax_compile.attention"',
        "linalg": "call @parallax_compile_attention_0",
        "stablehlo": "stablehlo.custom_call @parallax_compile.attention(",
    }
    for dialect, call in told.items():
        found = plx.inspect(spec, *tensors(), emit="mlir", dialect=dialect, opaque=True, scale=0.3, dynamic=True)
        forward, backward = found.modules["forward"], found.modules["backward"]
        assert call in forward and "attention_backward" in backward
        assert "tanh_cap" in forward and "mask.causal" in forward, "the spec travels with it"
        assert ("3.000000e-01" in forward) or ("0.3" in forward) or ("float 2.99" in forward), "and the scale"
        assert "tanh(" not in forward and "math.tanh" not in forward
    closure = spec.replace(score_mod=lambda s, b, h, q, k: s)
    with pytest.raises(UnsupportedError, match="JSON"):
        plx.inspect(closure, *tensors(), emit="mlir", opaque=True)
    with pytest.raises(UnsupportedError, match="of its own"):
        plx.inspect(spec, *tensors(), emit="mlir", opaque=True, score_mod=plx.mods.alibi(4))


@needs_iree
def test_the_streaming_form_is_one_loop_in_which_no_tensor_has_both_lengths() -> None:
    spec = plx.PARALLAX.replace(mask_mod=CAUSAL)
    found = plx.inspect(spec, *tensors(), emit="mlir", form="streaming", block_size=16)
    text = found.modules["forward"]
    assert found.forms == {"forward": "streaming", "backward": "blockwise"} and not found.notes
    assert text.count("scf.for") == 1 and "iree_linalg_ext" not in text
    carried = re.search(r"iter_args\((.*?)\) -> \((.*?)\) \{", text)
    assert carried is not None
    row, wide = "tensor<1x2x2x21xf32>", "tensor<1x2x2x21x5xf32>"
    assert carried[2] == ", ".join([row, row, row, wide, wide]), "m, d1, d2, O1, O2"
    assert not re.search(r"x21x26x|x26x21x", text)
    ordered = re.findall(r'stage = "(\w+)"', text)
    assert ordered == [
        "score_products_zero", "score_products", "scores", "probe_products_zero", "probe_products", "probe_scores", "output",
    ]  # fmt: skip
    softmax = plx.inspect(
        plx.SOFTMAX, *tensors(probe=False), emit="mlir", form="streaming", dynamic=True, backward=False
    )
    assert softmax.modules["forward"].count("linalg.generic") < text.count("linalg.generic"), "parts are left out"


@needs_iree
def test_what_does_not_fit_into_a_loop_falls_back_and_says_why() -> None:
    call = {
        "emit": "mlir",
        "form": "streaming",
        "backward": False,
        "score_mod": lambda s, b, h, q, k: s * torch.sign(s),
    }
    for dynamic, form in ((False, "blockwise"), (True, "dense")):
        found = plx.inspect(plx.PARALLAX, *tensors(), dynamic=dynamic, **call)  # type: ignore[arg-type]
        assert found.forms == {"forward": form}
        assert "sign is not known" in found.notes[0]
    solved = plx.inspect(plx.MESA, *tensors(probe=False), emit="mlir", form="streaming", backward=False)
    assert solved.forms == {"forward": "blockwise"} and "a solved probe needs" in solved.notes[0]


@needs_importer
def test_the_layer_with_its_cache_of_rotations_is_exported_whole() -> None:
    layer = plx.nn.ParallaxAttention(32, 2).eval()
    text = plx.export_mlir(layer, [torch.randn(1, 20, 32)], opaque=True, dialect="stablehlo", name="layer")
    assert "func.func @layer(%arg0: tensor<1x20x32xf32>)" in text
    assert text.count("stablehlo.custom_call @parallax_compile.attention(") == 1


# --- run by IREE ----------------------------------------------------------------------------------------------------


@functools.cache
def compiled(member: str, form: str, backward: bool = False, shapes: Any = SHAPES, dtype: Any = torch.float32) -> Any:
    spec = MEMBERS[member].replace(mask_mod=CAUSAL)
    count = 4 if spec.probe.kind == "learned" else 3
    return plx.compile_portable(spec, shapes[:count], dtype=dtype, form=form, backward=backward, block_size=16)


@needs_iree
@pytest.mark.parametrize("member", ["SOFTMAX", "PARALLAX", "learned, no intercept"])
def test_finite_bandwidth_within_1e6_of_float64(member: str) -> None:
    """float32, streaming forward and blockwise gradients; PARALLAX also against an oracle that shares no formula."""
    artifact = compiled(member, "streaming", backward=True)
    assert [program.form for program in artifact.programs.values()] == ["streaming", "blockwise"]
    inputs = tensors(probe=artifact.spec.probe.kind == "learned")
    grad = torch.randn(1, 4, 21, 5)
    want = with_gradients(artifact.spec, inputs, grad)
    out = artifact.run(*inputs)
    assert relative_error(out, want[0]) <= 1e-6
    for got, expected in zip(artifact.run_backward(*inputs, grad_out=grad), want, strict=True):
        assert relative_error(got, expected) <= 1e-6
    with pytest.raises(InputTypeError, match="grad_out"):
        artifact.run_backward(*inputs, grad_out=None)
    mask = torch.ones(21, 26, dtype=torch.bool).tril()
    wide = [tensor.double() for tensor in inputs]
    if member == "PARALLAX":
        assert relative_error(out, jvp_oracle(*wide, mask, 6**-0.5)) <= 1e-6
    else:
        probe = wide[3] if len(wide) == 4 else None
        assert relative_error(out, low_precision(*wide[:3], probe, intercept=member == "SOFTMAX", mask=mask)) <= 1e-6


@needs_iree
def test_solved_probes_within_1e5_of_float64() -> None:
    """Looser, because the systems are inverted in float32: the error grows with their condition."""
    artifact = compiled("LLA", "dense", backward=True)
    inputs, grad = tensors(probe=False), torch.randn(1, 4, 21, 5)
    want = with_gradients(artifact.spec, inputs, grad)
    for got, expected in zip(artifact.run_backward(*inputs, grad_out=grad), want, strict=True):
        assert relative_error(got, expected) <= 1e-5


@needs_iree
def test_open_lengths_in_memory_that_grows_with_the_length_and_not_its_square() -> None:
    artifact = compiled("PARALLAX", "streaming", shapes=OPEN)
    for lengths in ((21, 26), (1, 5), (40, 16)):
        shapes = [(*shape[:2], lengths[n in (1, 2)], shape[3]) for n, shape in enumerate(SHAPES)]
        inputs = tensors(shapes)
        want = plx.attention(*(tensor.double() for tensor in inputs), spec=artifact.spec, enable_gqa=True)
        assert relative_error(artifact.run(*inputs), want) <= 1e-6
    # One head's scores at 2048 are 16 MiB. The dense form shows that the measure would see them.
    scores = 4 * 2048 * 2048
    dense = compiled("PARALLAX", "dense", shapes=OPEN)
    grown = {a.programs["forward"].form: a.peak_memory(2048, 2048) - a.peak_memory(16, 16) for a in (artifact, dense)}
    assert grown["streaming"] < scores < 4 * scores < grown["dense"], grown


@needs_iree
def test_float64_stays_float64_with_every_kind_of_mod_and_mask() -> None:
    """Captured tensors, documents, a block mask with lists of blocks, and rows without a key; streaming."""
    slope, ids = torch.rand(4, dtype=torch.float64), torch.tensor([0] * 7 + [1] * 9 + [2] * 14)
    spec = plx.PARALLAX.replace(
        mask_mod=plx.masks.document(ids) & plx.masks.causal(offset=-1),
        covariance_mod=plx.mods.tanh_cap(3.0, approx=True),
        score_mod=lambda s, b, h, q, k: torch.where(k % 3 == 0, s - slope[h] * (q - k).abs(), s.sigmoid() * 2),
    )
    mask = plx.masks.block_mask(plx.masks.sliding_window(9), None, None, 21, 26, BLOCK_SIZE=16)
    inputs = tensors(dtype=torch.float64)
    artifact = plx.compile_portable(spec, SHAPES, dtype=torch.float64, block_mask=mask, block_size=8)
    assert artifact.programs["forward"].form == "streaming", artifact.notes
    want = plx.attention(*inputs, spec=spec, block_mask=mask, enable_gqa=True)
    assert not want[:, :, 0].any(), "a row without a key"
    assert relative_error(artifact.run(*inputs), want) < 1e-13


@needs_iree
def test_bfloat16_accumulates_in_float32_and_an_artifact_takes_what_it_was_compiled_for() -> None:
    artifact = compiled("LINEAR", "streaming", dtype=torch.bfloat16)
    q, k, v, r = inputs = tensors(dtype=torch.bfloat16)
    out = artifact.run(*inputs)
    want = plx.attention(*(tensor.double() for tensor in inputs), spec=artifact.spec, enable_gqa=True)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, want) < 2.0**-8
    with pytest.raises(InputError, match=r"query must have shape \(1, 4, 21, 6\)"):
        artifact.run(q[:, :, :20], k, v, r[:, :, :20])
    with pytest.raises(InputError, match="bfloat16 on cpu"):
        artifact.run(*(tensor.double() for tensor in inputs))
    with pytest.raises(InputError, match="backward=True"):
        artifact.run_backward(*inputs, grad_out=out)


@needs_iree
def test_the_example_links_a_kernel_in_the_place_of_an_opaque_call(capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.util.spec_from_file_location("portable_example", ROOT / "examples" / "portable.py")
    assert module is not None and module.loader is not None
    example = importlib.util.module_from_spec(module)
    module.loader.exec_module(example)
    assert max(example.main().values()) < 1e-6
    assert "opaque, linked" in capsys.readouterr().out


# --- compiled for others --------------------------------------------------------------------------------------------


@needs_iree
@pytest.mark.parametrize(
    "target, text, told",
    [
        ("rocm:gfx942", ".rocmasm", "gfx942"),
        ("vulkan", ".mlir", "spirv"),
        ("metal", ".metal", "kernel void"),
        ("cpu:aarch64", ".s", "fmla"),
    ],
)
def test_other_machines(target: str, text: str, told: str, tmp_path: Path) -> None:
    spec = plx.PARALLAX.replace(mask_mod=CAUSAL)
    artifact = plx.compile_portable(spec, [(1, 2, 16, 8)] * 4, target)
    program = artifact.programs["forward"]
    assert program.form == "streaming" and len(program.binary) > 1000, artifact.notes
    assert any(told in content for name, content in program.texts.items() if name.endswith(text))
    assert any(path.suffix == ".vmfb" for path in artifact.write(tmp_path))
    with pytest.raises(UnsupportedError, match=r"target=.cpu."):
        artifact.run(*(torch.randn(1, 2, 16, 8) for _ in range(4)))


# --- bad input ------------------------------------------------------------------------------------------------------


class Loop(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        start = torch.zeros((), dtype=torch.int64)
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (start, x))[1]


class Calls(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@needs_importer
@pytest.mark.parametrize(
    "module, said",
    [
        (Loop(), "drops the condition.*Unroll"),
        (Calls(lambda x: torch.linalg.solve(x @ x.mT + torch.eye(4), x)), "linalg_solve.*fixed number of steps"),
        (Calls(torch.linalg.inv), "linalg_inv.*fixed number of steps"),
        (Calls(lambda x: torch.linalg.cholesky(x @ x.mT)), "cholesky.*fixed number of steps"),
        (Calls(lambda x: torch.view_as_complex(x.reshape(4, 2, 2)).abs()), "complex64.*real and imaginary"),
    ],
    ids=["while_loop", "solve", "inv", "cholesky", "complex"],
)
def test_graphs_that_would_be_imported_wrongly_are_refused(module: torch.nn.Module, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        plx.export_mlir(module, [torch.randn(4, 4)])


def test_arguments_of_the_wrong_emitter_dialect_form_or_type() -> None:
    inputs = tensors()
    for wrong, error, said in (
        ({"emit": "ptx"}, InputError, "'triton' or 'mlir'"),
        ({"emit": "mlir", "target": "sm_90"}, InputError, "target"),
        ({"dialect": "linalg"}, InputError, "dialect.*triton"),
        ({"emit": "mlir", "dialect": "tosa"}, InputError, "linalg, torch, stablehlo"),
        ({"emit": "mlir", "dialect": 3}, InputTypeError, "string"),
        ({"emit": "mlir", "form": "tiled"}, InputError, "dense, blockwise, streaming"),
        ({"emit": "mlir", "block_size": 0}, InputError, "block_size"),
    ):
        with pytest.raises(error, match=said):
            plx.inspect(plx.PARALLAX, *inputs, **wrong)  # type: ignore[arg-type]


@needs_importer
def test_calls_that_cannot_be_emitted_say_why() -> None:
    inputs = tensors()
    mask = plx.masks.block_mask(CAUSAL, None, None, 21, 26, BLOCK_SIZE=16)
    trainable = torch.rand(4, requires_grad=True)
    for options, error, said in (
        ({"block_mask": mask, "dynamic": True}, InputError, "fixed lengths"),
        ({"form": "blockwise", "dynamic": True}, InputError, "static"),
        ({"form": "streaming", "dialect": "torch"}, InputError, "linalg"),
        ({"form": "blockwise", "opaque": True}, InputError, "no form"),
        ({"score_mod": lambda s, b, h, q, k: s * trainable[h]}, UnsupportedError, "backward=False"),
        ({"score_mod": lambda s, b, h, q, k: q}, InputTypeError, "floating score"),
    ):
        with pytest.raises(error, match=said):
            plx.inspect(plx.PARALLAX, *inputs, emit="mlir", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        plx.inspect(plx.PARALLAX, *(t[:, :, :0] for t in inputs), emit="mlir")
    with pytest.raises(InputTypeError, match="int64"):
        plx.inspect(plx.PARALLAX, *(t.to(torch.int64) for t in inputs), emit="mlir")


def test_targets_dtypes_and_shapes_are_refused_before_anything_is_compiled() -> None:
    for target, dtype, error, said in (
        ("cuda:sm_90", torch.float32, UnsupportedError, "newer than IREE.*torch.compile"),
        ("sm_100a", torch.float32, UnsupportedError, "newer than IREE"),
        ("rocm", torch.float32, InputError, "rocm:gfx942"),
        (90, torch.float32, InputTypeError, "string"),
        ("metal", torch.float64, UnsupportedError, "no float64"),
        ("vulkan", torch.float16, UnsupportedError, "vulkan:rdna3"),
    ):
        with pytest.raises(error, match=said):
            plx.compile_portable(plx.PARALLAX, SHAPES, target, dtype=dtype)  # type: ignore[arg-type]
    for shapes, error, said in (
        (SHAPES[:2], InputTypeError, "3 or 4"),
        ([(1, 2, 3)] * 4, InputError, "batch, heads, length, width"),
        ([(1, 2, 0, 4)] * 4, InputError, "positive"),
        ([OPEN[0], *SHAPES[1:]], InputError, "for all"),
        (SHAPES[:3], InputError, "learned probe"),
    ):
        with pytest.raises(error, match=said):
            plx.compile_portable(plx.PARALLAX, shapes)  # type: ignore[arg-type]


@needs_iree
def test_a_run_of_iree_is_limited() -> None:
    with pytest.raises(UnsupportedError, match=r"stopped after 0\.01 s"):
        plx.compile_portable(plx.SOFTMAX, SHAPES[:3], form="dense", time_limit=0.01)
    with pytest.raises(UnsupportedError, match="iree-compile"):
        plx.compile_portable(plx.SOFTMAX, SHAPES[:3], form="dense", memory_limit=64 << 20)


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_has", lambda module: False)
    with pytest.raises(UnsupportedError, match=r"torch-mlir.*parallax-compile\[mlir\]"):
        plx.inspect(plx.PARALLAX, *tensors(), emit="mlir")
    with pytest.raises(UnsupportedError, match="iree-base-compiler"):
        plx.compile_portable(plx.PARALLAX, SHAPES)


# --- mods as scalar code --------------------------------------------------------------------------------------------


def test_a_mod_becomes_a_loop_body_or_says_what_does_not_fit() -> None:
    def body(mod: Any) -> list[str]:
        made = scalars.Body(torch.float32, scalars.Literals())
        names = ("%s", "%b", "%h", "%q", "%k")
        arguments = [scalars.Scalar(n, torch.int32 if n != "%s" else torch.float32) for n in names]
        made.mod(mod, arguments)
        return made.lines

    assert body(lambda s, b, h, q, k: s - (q - k)) == [
        "%x0 = arith.subi %q, %k : i32",
        "%x1 = arith.sitofp %x0 : i32 to f32",
        "%x2 = arith.subf %s, %x1 : f32",
    ]
    with pytest.raises(scalars.UnfitError, match="lgamma"):
        body(lambda s, b, h, q, k: torch.lgamma(s))
    large = torch.zeros(1 << 21)
    with pytest.raises(scalars.UnfitError, match="too large"):
        body(lambda s, b, h, q, k: s + large[q])
