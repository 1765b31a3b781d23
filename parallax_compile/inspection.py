""":func:`inspect`: what a call is compiled to, on any machine: Triton, every intermediate text, SASS, and the resources."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import validation
from .attention import attention
from .errors import InputError
from .lowering.codegen import GeneratedCode, generate
from .lowering.cubin import CompiledKernel, Resources, compile_kernel
from .lowering.targets import Target
from .portable import inspect_mlir
from .spec import AttentionSpec

__all__ = ["InspectedKernel", "Inspection", "inspect"]

_TEXTS = {"triton": "py", "ttir": "ttir", "ttgir": "ttgir", "llir": "llir", "ptx": "ptx", "sass": "sass"}


@dataclass(frozen=True)
class InspectedKernel:
    """One kernel. A text that could not be made is None, and :attr:`missing` says why.

    Attributes:
        name: the kernel's function.
        direction: ``"forward"`` or ``"backward"``.
        stage: the stage of the plan that it computes; None for what Inductor fused around the stages.
        triton: its Triton source, as Inductor wrote it.
        ttir, ttgir, llir, ptx, sass: the texts that it passes through on its way to the GPU.
        cubin: what is loaded on the GPU.
        resources: registers, spills, shared memory, warps, stages.
        instructions: families of matrix instructions in it: ``mma``, ``wgmma``, ``tcgen05``.
        parameters: what the stage's template was filled with: tile sizes, switches.
        fits: whether the target has the shared memory that it needs.
        missing: text -> why there is none.
    """

    name: str
    direction: str
    stage: str | None
    triton: str = field(repr=False)
    ttir: str | None = field(repr=False)
    ttgir: str | None = field(repr=False)
    llir: str | None = field(repr=False)
    ptx: str | None = field(repr=False)
    sass: str | None = field(repr=False)
    cubin: bytes | None = field(repr=False)
    resources: Resources
    instructions: frozenset[str]
    parameters: Mapping[str, Any] = field(repr=False, hash=False)
    fits: bool
    missing: Mapping[str, str] = field(repr=False, hash=False)


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found. ``str()`` of it is the table; the kernels hold the texts.

    Attributes:
        spec, target: what was compiled, and for which GPU.
        kernels: in the order in which they run, forward first.
        wrappers: ``"forward"``, ``"backward"`` -> the Python module that launches the graph's kernels.
        offered: stage -> the candidates that ``mode="max-autotune"`` would choose from, as far as they were asked for.
    """

    spec: AttentionSpec
    target: Target
    kernels: tuple[InspectedKernel, ...]
    wrappers: Mapping[str, str] = field(repr=False, hash=False)
    offered: Mapping[str, tuple[Mapping[str, Any], ...]] = field(repr=False, hash=False)

    def stage(self, name: str) -> InspectedKernel:
        """The kernel of a stage.

        Raises:
            KeyError: the call has no such stage.
        """
        for kernel in self.kernels:
            if kernel.stage == name:
                return kernel
        raise KeyError(f"no stage {name!r}; there are {', '.join(k.stage for k in self.kernels if k.stage)}")

    def table(self) -> str:
        """Registers, spills (bytes of each thread, stores + loads), shared memory (bytes of each block), by kernel."""
        from tabulate import tabulate

        headers = [
            "stage",
            "direction",
            "tile",
            "warps",
            "stages",
            "registers",
            "spills",
            "shared memory",
            "instructions",
            "",
        ]
        rows = [
            [
                kernel.stage or _short(kernel.name),
                kernel.direction,
                _tile(kernel.parameters),
                kernel.resources.num_warps,
                kernel.resources.num_stages,
                _or_dash(kernel.resources.registers),
                _spills(kernel.resources),
                kernel.resources.shared_memory,
                " ".join(sorted(kernel.instructions)) or "-",
                "" if kernel.fits else "exceeds the target's shared memory",
            ]
            for kernel in self.kernels
        ]
        return tabulate(rows, headers=headers, disable_numparse=True)

    def write(self, directory: str | Path) -> list[Path]:
        """Write every text, the wrappers, the table and ``resources.json`` into ``directory``, which is made.

        Returns:
            the paths of the files, in the order of the kernels.

        Raises:
            InputError: the directory cannot be made or written.
        """
        folder = Path(directory)
        try:
            return self._write(folder)
        except OSError as error:
            raise InputError(f"cannot write the kernels to {folder}: {error.strerror or error}.") from error

    def _write(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        written: list[Path] = []

        def put(name: str, content: str | bytes) -> None:
            path = folder / name
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            written.append(path)

        for number, kernel in enumerate(self.kernels):
            stem = f"{number:02d}_{kernel.direction}_{kernel.stage or 'fused'}"
            for text, extension in _TEXTS.items():
                content = getattr(kernel, text)
                if content is not None:
                    put(f"{stem}.{extension}", content)
            if kernel.cubin is not None:
                put(f"{stem}.cubin", kernel.cubin)
        for direction, wrapper in self.wrappers.items():
            put(f"wrapper_{direction}.py", wrapper)
        put("resources.txt", f"{self}\n")
        put("resources.json", json.dumps(self._summary(), indent=2) + "\n")
        return written

    def __str__(self) -> str:
        lines = [f"{self.spec.name or 'variant'} on {self.target.name} ({self.target.product})", "", self.table()]
        reasons = {f"{text}: {why}" for kernel in self.kernels for text, why in kernel.missing.items()}
        return "\n".join([*lines, *(["", *sorted(reasons)] if reasons else [])])

    def _summary(self) -> dict[str, Any]:
        kernels = [
            {
                "name": kernel.name,
                "stage": kernel.stage,
                "direction": kernel.direction,
                "resources": dataclasses.asdict(kernel.resources),
                "instructions": sorted(kernel.instructions),
                "parameters": dict(kernel.parameters),
                "missing": dict(kernel.missing),
            }
            for kernel in self.kernels
        ]
        return {"spec": repr(self.spec), "target": self.target.name, "product": self.target.product, "kernels": kernels}


def inspect(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    target: str = "auto",
    score_mod: Any = None,
    covariance_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    backward: bool = True,
    candidate: int | Mapping[str, int] = 0,
    kernel_options: dict[str, Any] | None = None,
    emit: str = "triton",
    dialect: str | None = None,
    form: str | None = None,
    dynamic: bool = False,
    opaque: bool = False,
    block_size: int | None = None,
) -> Any:
    """The kernels of ``attention(query, key, value, probe, spec=spec, ...)`` compiled for ``target``, which need not be here.

    With ``emit="mlir"`` the call as MLIR, for no target in particular (``docs/portable.md``).

    Nothing is run, and no GPU is needed: values do not matter, and tensors may be without data (``device="meta"``).
    Takes seconds for each kernel the first time.

    Args:
        spec, query, key, value, probe, score_mod, covariance_mod, block_mask, scale, kernel_options: as for
            :func:`~parallax_compile.attention`.
        target: ``"sm_80"`` (A100), ``"sm_89"`` (L4), ``"sm_90"`` (H100), ``"sm_100"`` (B200), or ``"auto"``: this machine's
            GPU, else sm_90.
        backward: include the backward, of the inputs that require a gradient, or of all where none does.
        candidate: which of a stage's candidate configurations to compile: 0 is the one that the default mode takes; an
            index for all stages (a stage with fewer takes its last), or stage name -> index.
        emit: ``"triton"``, or ``"mlir"``, to which alone the following belong; ``target``, ``candidate`` and
            ``kernel_options`` belong to Triton. Needs the extra ``parallax-compile[mlir]``.
        dialect: ``"linalg"`` (the default), ``"torch"`` or ``"stablehlo"``.
        form: ``"dense"`` (the default), whole score matrices; ``"blockwise"``, unrolled over blocks of keys; ``"streaming"``,
            a loop over blocks, in linalg, for the forward of members without a solver. What does not fit into the loop, and
            the backward, are unrolled (with open lengths: dense).
        dynamic: leave the lengths ``Lq`` and ``Lk`` open. Not for the blockwise form.
        opaque: keep the call whole, for a compiler that brings a kernel of its own.
        block_size: keys of a block, 128 by default.

    Returns:
        an :class:`Inspection`; with ``emit="mlir"`` a :class:`~parallax_compile.MlirInspection`.

    Raises:
        InputError, InputTypeError: (a ValueError, a TypeError) a wrong argument, as the call itself would say; an unknown
            target or candidate.
        UnsupportedError: the compiled path does not cover the call; or triton, or torch-mlir, is not installed.
    """
    if emit not in ("triton", "mlir"):
        raise InputError(f"emit must be 'triton' or 'mlir', but got {emit!r}.")
    of_triton = {"target": target != "auto", "candidate": candidate != 0, "kernel_options": bool(kernel_options)}
    of_mlir: dict[str, Any] = {"dialect": dialect, "form": form, "block_size": block_size}
    of_mlir |= {"dynamic": dynamic or None, "opaque": opaque or None}
    of_mlir = {name: given for name, given in of_mlir.items() if given is not None}
    foreign = [name for name, given in of_triton.items() if given] if emit == "mlir" else list(of_mlir)
    if foreign:
        raise InputError(f"{', '.join(foreign)} do not belong to emit={emit!r}. Leave them out.")
    if emit == "mlir":
        return inspect_mlir(
            spec,
            query,
            key,
            value,
            probe,
            score_mod=score_mod,
            covariance_mod=covariance_mod,
            block_mask=block_mask,
            scale=scale,
            backward=backward,
            **of_mlir,
        )

    def call(query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None) -> Tensor:
        return attention(
            query,
            key,
            value,
            probe,
            spec=spec,
            score_mod=score_mod,
            covariance_mod=covariance_mod,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=True,
            kernel_options=kernel_options,
        )

    validation.check_spec(spec)
    code = generate(call, (query, key, value, probe), target=target, candidate=candidate, backward=backward)
    return _inspection(spec, code)


def _inspection(spec: AttentionSpec, code: GeneratedCode) -> Inspection:
    return Inspection(
        spec=spec,
        target=code.target,
        kernels=tuple(_inspected(compile_kernel(kernel, code.target)) for kernel in code.kernels),
        wrappers={graph.direction: graph.wrapper for graph in code.graphs},
        offered=code.offered,
    )


def _inspected(compiled: CompiledKernel) -> InspectedKernel:
    def text(name: str) -> str | None:
        content = compiled.asm.get(name)
        return content if isinstance(content, str) else None

    cubin = compiled.asm.get("cubin")
    kernel = compiled.kernel
    return InspectedKernel(
        name=kernel.name,
        direction=kernel.direction,
        stage=kernel.stage,
        triton=kernel.source,
        ttir=text("ttir"),
        ttgir=text("ttgir"),
        llir=text("llir"),
        ptx=text("ptx"),
        sass=text("sass"),
        cubin=cubin if isinstance(cubin, bytes) else None,
        resources=compiled.resources,
        instructions=compiled.instructions,
        parameters=kernel.parameters,
        fits=compiled.fits,
        missing=compiled.missing,
    )


def _short(name: str) -> str:
    """The name of a kernel that Inductor fused by itself, which lists all its operations, in a column's width."""
    name = name.removeprefix("triton_")
    return f"({name})" if len(name) <= 30 else f"({name[:24]}..{name[-4:]})"


def _tile(parameters: Mapping[str, Any]) -> str:
    if "BLOCK_M" not in parameters or "BLOCK_N" not in parameters:
        return "-"
    return f"{parameters['BLOCK_M']}x{parameters['BLOCK_N']}"


def _spills(resources: Resources) -> str:
    if resources.spills is None:
        return "-"
    return f"{resources.spill_stores} + {resources.spill_loads}" if resources.spills else "0"


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)
