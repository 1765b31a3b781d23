"""Gluon kernels through Inductor: what has to be told to torch, which knows of Triton's own language only.

The private symbols are fenced in :mod:`.torch_compat`.
"""

from __future__ import annotations

import functools
import importlib
import re
import textwrap
from typing import Any

__all__ = ["compile_gluon", "gluon_template", "has_gluon", "source_type"]

# What a Gluon kernel's module starts with. It is compiled in worker processes too, which know of Gluon only through it.
_GLUON_IMPORTS = """\
from parallax_compile.lowering.torch_compat_gluon import compile_gluon
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
compile_gluon()
"""
# What Triton's language and Gluon's call differently.
_NAMES = {"libdevice.exp2(": "gl.exp2(", "tl.inline_asm_elementwise(": "gl.inline_asm_elementwise("}
_ONE_ELEMENT = re.compile(r"tl\.full\(\[1\], (.+?), tl\.\w+\)")


def gluon_template(template: Any) -> Any:
    """A subclass of Inductor's ``TritonTemplate`` whose texts are Gluon."""
    kernel_type = template.kernel_type

    class GluonKernel(kernel_type):  # type: ignore[valid-type, misc]
        def jit_lines(self) -> str:
            return _GLUON_IMPORTS + textwrap.dedent(super().jit_lines()).replace("@triton.jit", "@gluon.jit")

        def modification(self, *arguments: Any, **named: Any) -> str:
            return _in_gluon(super().modification(*arguments, **named))

        def store_output(self, *arguments: Any, **named: Any) -> str:
            # With the epilogue that Inductor fuses into the kernel, once it knows it.
            name = super().store_output(*arguments, **named)
            text = self.render_hooks[name]
            self.render_hooks[name] = lambda: _in_gluon(text())
            return str(name)

    return type("GluonTemplate", (template,), {"kernel_type": GluonKernel})


def _in_gluon(text: str) -> str:
    """Elementwise code as Inductor writes it for Triton, where a constant is a tensor: of one element, without a layout."""
    text = _ONE_ELEMENT.sub(r"\1", text)
    for triton, gluon in _NAMES.items():
        text = text.replace(triton, gluon)
    return text


def compile_gluon() -> None:
    """Let Inductor compile Gluon kernels too: it takes every kernel's function for one of Triton's own language."""
    heuristics: Any = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    triton_source = heuristics.ASTSource
    if getattr(triton_source, "knows_gluon", False):
        return

    def source(function: Any, *arguments: Any, **named: Any) -> Any:
        return source_type(function, triton_source)(function, *arguments, **named)

    source.knows_gluon = True  # type: ignore[attr-defined]
    heuristics.ASTSource = source


def source_type(function: Any, otherwise: Any) -> Any:
    """What Triton compiles ``function`` as: Gluon's kind of source for Gluon's functions, else ``otherwise``."""
    if not getattr(function, "is_gluon", bool)():
        return otherwise
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


@functools.cache
def has_gluon() -> bool:
    """Whether this process can compile Gluon for Hopper: a Triton that has it, and not Triton's interpreter."""
    try:
        from triton import knobs
        from triton.experimental.gluon.language.nvidia.hopper import tma

        return not knobs.runtime.interpret and hasattr(tma, "make_tensor_descriptor")
    except (ImportError, AttributeError):
        return False
