"""Beyond NVIDIA: a call as MLIR, for any compiler that reads it, and compiled by IREE for CPUs and GPUs of other makers.

No claim of speed is made: the point is reach, and an oracle that shares no kernel with the Triton path. Needs the extra
``parallax-compile[mlir]``. The same spec, mods and masks as everywhere; ``docs/portable.md`` has the table of targets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import validation
from .attention import attention
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.mlir import emission, forms, toolchain
from .spec import AttentionSpec

__all__ = ["FORMS", "MlirInspection", "export_mlir", "inspect_mlir"]

FORMS = ("dense", "blockwise", "streaming")


@dataclass(frozen=True)
class MlirInspection:
    """A call as MLIR. ``str()`` of it is a table; :attr:`modules` holds the texts.

    Attributes:
        spec: what was traced.
        dialect: ``"linalg"``, ``"torch"`` or ``"stablehlo"``.
        modules: ``"forward"`` -> a module with ``@attention(query, key, value[, probe]) -> out``, and where it was asked for
            ``"backward"`` -> one with ``@attention_backward(query, key, value[, probe], grad_out) -> (out, gradients)``.
        forms: the same names -> ``"dense"``, ``"blockwise"``, ``"streaming"`` or ``"opaque"``.
        differentiated: the inputs whose gradients ``@attention_backward`` returns, in this order.
        notes: what was not done as asked, and why.
    """

    spec: AttentionSpec
    dialect: str
    modules: Mapping[str, str] = field(repr=False, hash=False)
    forms: Mapping[str, str] = field(hash=False)
    differentiated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """Lines and operations of each module, by dialect."""
        from tabulate import tabulate

        rows = [
            [name, self.forms[name], len(text.splitlines()), _operations(text)] for name, text in self.modules.items()
        ]
        return tabulate(rows, headers=["module", "form", "lines", "operations"], disable_numparse=True)

    def write(self, directory: str | Path) -> list[Path]:
        """Write ``forward.<dialect>.mlir``, ``backward.<dialect>.mlir`` and ``summary.txt`` into ``directory`` (made)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {f"{name}.{self.dialect}.mlir": text for name, text in self.modules.items()}
        texts["summary.txt"] = f"{self}\n"
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]

    def __str__(self) -> str:
        lines = [f"{self.spec.name or 'variant'} as {self.dialect}", "", self.table()]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])


def _operations(text: str) -> str:
    """``linalg 12, arith 20, ...``: how many operations of each dialect a module has."""
    named = re.findall(r"(?:=|^)\s*\"?([a-z_]+)\.[a-z_.]+", text, re.MULTILINE)
    return ", ".join(f"{dialect} {count}" for dialect, count in Counter(named).most_common() if dialect != "func")


def inspect_mlir(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    score_mod: Any = None,
    covariance_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    backward: bool = True,
    dialect: str = "linalg",
    form: str = "dense",
    dynamic: bool = False,
    opaque: bool = False,
    block_size: int = 128,
) -> MlirInspection:
    """What :func:`~parallax_compile.inspect` does for ``emit="mlir"``, which see."""
    emission.check_dialect(dialect)
    check_form(form, block_size)
    toolchain.require(toolchain.IMPORTER)
    call = _Traced(spec, score_mod, covariance_mod, block_mask, scale)
    call.check(query, key, value, probe)
    tensors = [query, key, value] if probe is None else [query, key, value, probe]
    if dynamic and block_mask is not None:
        raise InputError(
            "block_mask is for fixed lengths, but dynamic=True. Put the mask into the spec (mask_mod=plx.masks...)."
        )
    notes: list[str] = []
    chosen = forms.Form("opaque" if opaque else form, block_size)
    modules = {"forward": call.forward(tensors, chosen, dialect, dynamic)}
    named = {"forward": chosen.name}
    names = ("query", "key", "value", "probe")[: len(tensors)]
    differentiated = tuple(n for n, t in zip(names, tensors, strict=True) if t.requires_grad) or names
    if backward:
        modules["backward"] = call.backward(tensors, differentiated, chosen, dialect, dynamic)
        named["backward"] = chosen.name
    return MlirInspection(spec, dialect, modules, named, differentiated if backward else (), tuple(notes))


def check_form(form: Any, block_size: Any) -> None:
    """``form`` is one of :data:`FORMS` and ``block_size`` a positive integer."""
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, but got {form!r}.")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise InputError(f"block_size must be a positive integer (keys of a block), but got {block_size!r}.")


class _Traced:
    """A declared call, emitted in one direction after the other."""

    def __init__(
        self,
        spec: AttentionSpec,
        score_mod: Any,
        covariance_mod: Any,
        block_mask: BlockMask | None,
        scale: float | None,
    ) -> None:
        self.spec = spec
        self.options = {
            "spec": spec,
            "score_mod": score_mod,
            "covariance_mod": covariance_mod,
            "block_mask": block_mask,
            "scale": scale,
            "enable_gqa": True,
        }

    def check(self, query: Any, key: Any, value: Any, probe: Any) -> None:
        """What is wrong with the tensors and mods, and lengths of 0, which MLIR's tensors do not have."""
        if not isinstance(self.spec, AttentionSpec):
            raise InputTypeError(f"spec must be an AttentionSpec, but got {type(self.spec).__name__}.")
        validation.check_tensors(query, key, value, probe, self.spec, enable_gqa=True)
        validation.check_mods(self.spec, self.options["score_mod"], self.options["covariance_mod"])
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.numel() == 0:
                raise InputError(f"{name} must not be empty to be emitted, but has shape {tuple(tensor.shape)}.")

    def call(self, *tensors: Tensor) -> Tensor:
        return attention(*tensors, **self.options)

    def forward(self, tensors: Sequence[Tensor], form: forms.Form, dialect: str, dynamic: bool) -> str:
        with forms.tracing(form):
            graph = emission.trace(self.call, emission.example(tensors, _symbols(len(tensors), dynamic)))
        return emission.emit_graph(graph, dialect, "attention")

    def backward(
        self, tensors: Sequence[Tensor], differentiated: Sequence[str], form: forms.Form, dialect: str, dynamic: bool
    ) -> str:
        batch, heads, rows, _ = tensors[0].shape
        grad = torch.empty(batch, heads, rows, tensors[2].size(3), dtype=tensors[0].dtype, device="meta")
        wanted = [("query", "key", "value", "probe").index(name) for name in differentiated]

        def both(*arguments: Tensor) -> tuple[Tensor, ...]:
            *inputs, grad_out = (tensor.detach() for tensor in arguments)
            leaves = [inputs[number].requires_grad_() for number in wanted]
            out = self.call(*inputs)
            if not out.requires_grad:
                return (out.detach(), *(torch.zeros_like(leaf) for leaf in leaves))
            return (out.detach(), *torch.autograd.grad(out, leaves, grad_out, materialize_grads=True))

        symbols = [*_symbols(len(tensors), dynamic), *_symbols(1, dynamic)]
        with forms.tracing(form):
            graph = emission.trace(both, emission.example([*tensors, grad], symbols))
        trainable = [
            name for name, tensor in vars(graph).items() if isinstance(tensor, Tensor) and tensor.requires_grad
        ]
        if trainable:
            raise UnsupportedError(
                "a mod captures a tensor that requires a gradient, which @attention_backward does not return. "
                "Detach it, or emit the forward alone (backward=False)."
            )
        return emission.emit_graph(graph, dialect, "attention_backward")


def _symbols(count: int, dynamic: bool) -> list[dict[int, str]]:
    """The dynamic dimensions of query, key, value and probe."""
    rows, keys = {2: "query_length"}, {2: "key_length"}
    return [rows, keys, keys, rows][:count] if dynamic else [{}] * count


def export_mlir(
    module: torch.nn.Module,
    args: Sequence[Any],
    *,
    dialect: str = "linalg",
    opaque: bool = False,
    dynamic_shapes: Any = None,
    name: str = "main",
) -> str:
    """A whole model as MLIR, its attention decomposed or opaque.

    Args:
        module: whose ``forward`` calls :func:`~parallax_compile.attention`; parameters become literals.
        args: example inputs of ``forward``.
        dialect: ``"linalg"``, ``"torch"`` or ``"stablehlo"``.
        opaque: keep each call whole: ``torch.operator "torch.parallax_compile.attention"`` in the torch dialect, elsewhere a
            ``func.call`` of a private function whose attributes carry the spec as JSON and the scale.
        dynamic_shapes: as for ``torch.export.export``.
        name: of the function.

    Raises:
        InputTypeError, InputError: a wrong argument.
        UnsupportedError: torch-mlir is not installed; an operator that it would import wrongly or not at all
            (``while_loop``, ``torch.linalg.solve``), with the way round; an opaque call that its spec does not tell whole.
    """
    emission.check_dialect(dialect)
    if not isinstance(module, torch.nn.Module):
        raise InputTypeError(f"module must be a torch.nn.Module, but got {type(module).__name__}.")
    toolchain.require(toolchain.IMPORTER)
    with forms.tracing(forms.Form("opaque" if opaque else "dense")):
        program = torch.export.export(module, tuple(args), dynamic_shapes=dynamic_shapes, strict=False)
    return emission.emit_exported(program, dialect, name)
