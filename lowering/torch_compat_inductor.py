"""The parts of Inductor that a lowering needs (private torch: :mod:`.torch_compat`).

Imports of :mod:`torch._inductor` are deferred into functions: they are heavy, and the operator must work without them.
"""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from .torch_compat import resolve
from .torch_compat_gluon import gluon_template
from .torch_compat_threads import start_compiling

__all__ = ["compile_fx", "inductor", "length_hint", "trace_artifact"]


class _Inductor:
    """The parts of Inductor that a lowering needs, imported on first use."""

    _SOURCES: ClassVar[dict[str, str]] = {
        "ir": "torch._inductor.ir",
        "config": "torch._inductor.config",
        "fallback_handler": "torch._inductor.lowering:fallback_handler",
        "lowerings": "torch._inductor.lowering:lowerings",
        "register_lowering": "torch._inductor.lowering:register_lowering",
        "make_pointwise": "torch._inductor.lowering:make_pointwise",
        "empty_strided": "torch._inductor.lowering:empty_strided",
        "to_dtype": "torch._inductor.lowering:to_dtype",
        "SymbolicGridFn": "torch._inductor.select_algorithm:SymbolicGridFn",
        "build_subgraph_buffer": "torch._inductor.kernel.flex.common:build_subgraph_buffer",
        "create_indices_fake": "torch._inductor.kernel.flex.common:create_indices_fake",
        "create_num_blocks_fake_generator": "torch._inductor.kernel.flex.common:create_num_blocks_fake_generator",
        "create_placeholder": "torch._inductor.kernel.flex.common:create_placeholder",
        "freeze_irnodes": "torch._inductor.kernel.flex.common:freeze_irnodes",
        "infer_dense_strides": "torch._inductor.kernel.flex.common:infer_dense_strides",
        "maybe_realize": "torch._inductor.kernel.flex.common:maybe_realize",
        "process_joint_outputs": "torch._inductor.kernel.flex.flex_attention:process_joint_outputs",
        "validate_joint_graph": "torch._inductor.kernel.flex.flex_attention:validate_joint_graph",
        "V": "torch._inductor.virtualized:V",
        "ops": "torch._inductor.virtualized:ops",
    }

    def __getattr__(self, name: str) -> Any:
        if name not in self._SOURCES:
            raise AttributeError(f"torch_compat_inductor has no {name!r}: add it to _SOURCES and FENCED")
        found = resolve(self._SOURCES[name])
        setattr(self, name, found)
        return found

    def template(self, name: str, grid: Callable[..., Any], source: str, *, gluon: bool = False) -> Any:
        """A ``TritonTemplate`` with frozen layouts (the option exists in newer releases only; older ones freeze).

        Args:
            name: of the template, unique in the process.
            grid: its launch grid, a ``SymbolicGridFn``.
            source: its text.
            gluon: whether the text is Gluon, Triton's language of explicit layouts, and not Triton.
        """
        template = _own_kernels(resolve("torch._inductor.select_algorithm:TritonTemplate"), name)
        if gluon:
            template = gluon_template(template)
        parsed = template._template_from_string
        deferred = {"_template_from_string": staticmethod(lambda text: _DeferredText(functools.partial(parsed, text)))}
        kind: Any = type("DeferredTemplate", (template,), deferred)
        options = {}
        if "always_freeze_layout" in inspect.signature(kind.__init__).parameters:
            options["always_freeze_layout"] = True
        # Jinja takes the last line break. Without the other, a kernel in the wrapper is not the one that was begun when its
        # text was complete (:mod:`.torch_compat_threads`), and Inductor compiles it twice.
        return kind(name=name, grid=grid, source=f"{source}\n\n{{{{asked_for}}}} = {name}\n\n", **options)

    def autotune(self, name: str, choices: list[Any], inputs: list[Any], layout: Any, input_gen_fns: dict) -> Any:
        """``autotune_select_algorithm``; newer releases return ``(node, choice)``, older ones the node."""
        select = resolve("torch._inductor.select_algorithm:autotune_select_algorithm")
        found = select(name, choices, inputs, layout, input_gen_fns=input_gen_fns)
        return found[0] if isinstance(found, tuple) else found

    def found_at_each_call(self, expression: str, header: Sequence[str], layout: Any) -> Any:
        """A buffer that generated code gets from ``expression``, and whose memory it neither frees nor gives to others.

        Args:
            expression: Python, in a wrapper that has ``device`` and ``get_raw_stream``.
            header: lines that stand once where the wrapper imports.
            layout: of the buffer.
        """
        ir, graph = self.ir, self.V.graph

        class Found(ir.ExternKernelAlloc):  # type: ignore[name-defined, misc]
            def codegen(self, wrapper: Any) -> None:
                for line in header:
                    wrapper.add_import_once(line)
                wrapper.writeline(f"{self.get_name()} = {expression}")

        found = Found(layout, [])
        graph.never_reuse_buffers.add(found.get_name())
        return ir.TensorBox.create(found)


inductor = _Inductor()


_LAUNCH_IMPORTS = """\
from parallax_compile.lowering.torch_compat_launch import launch_from_cubin
launch_from_cubin()
"""


def _own_kernels(template: Any, name: str) -> Any:
    """A subclass of Inductor's ``TritonTemplate`` whose kernels are called ``name``, and tell how to launch them.

    Inductor calls a kernel after the graph around it, and Triton's cache tells kernels apart by their names too. Called after
    their template, equal kernels of all graphs are one, and a profile shows what they compute; the name that Inductor asks
    for stands behind the kernel. The process that compiles it may be one of Inductor's workers, which know of this package
    only through the kernel's text.
    """

    class Kernel(template.kernel_type):  # type: ignore[name-defined, misc]
        def __init__(self, kernel_name: str, *arguments: Any, **named: Any) -> None:
            super().__init__(name, *arguments, **named)
            self.asked_for = kernel_name

        def render(self, template: Any, kwargs: dict[str, Any], *tracked: Any, **named: Any) -> Any:
            return super().render(template, kwargs | {"asked_for": self.asked_for}, *tracked, **named)

        def jit_lines(self) -> str:
            return _LAUNCH_IMPORTS + textwrap.dedent(super().jit_lines())

        def emit_kernel_override(self, wrapper: Any, src_code: str, kernel_name: str, *arguments: Any) -> bool:
            """Called when the kernel's text is complete; False, because Inductor writes it into the wrapper."""
            start_compiling(name, src_code)
            return super().emit_kernel_override(wrapper, src_code, kernel_name, *arguments)

    return type("OwnKernels", (template,), {"kernel_type": Kernel})


class _DeferredText:
    """A template's text, which Jinja parses when it is rendered for the first time: a tenth of a second for each of ours.

    A process whose kernels are in torch's caches renders none, and one call renders a few of them.
    """

    def __init__(self, parsed: Callable[[], Any]) -> None:
        self._parsed = functools.cache(parsed)

    def render(self, **values: Any) -> str:
        return str(self._parsed().render(**values))


def length_hint(length: Any) -> int:
    """A length as a number while Inductor lowers: of a symbol what it was in the first call, without a guard on it."""
    return int(inductor.V.graph.sizevars.optimization_hint(length, fallback=1024))


def trace_artifact(name: str, payload: Callable[[], Any]) -> None:
    """Put JSON into torch's structured trace, where tlparse shows it beside the graph; free when no trace is written."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=lambda: json.dumps(payload(), default=str),
        expect_trace_id=False,
    )


def compile_fx(graph: torch.fx.GraphModule, inputs: list[Any], *, mode: str | None, options: dict[str, Any]) -> Any:
    """Inductor on a Dynamo graph, with ``mode``'s settings under the given ones."""
    settings = resolve("torch._inductor:list_mode_options")(mode) if mode not in (None, "default") else {}
    settings |= {name.replace("-", "_"): option for name, option in options.items()}
    return resolve("torch._inductor.compile_fx:compile_fx")(graph, inputs, config_patches=settings or None)
