"""Everything that the package takes from torch's private modules, in one place.

The rest of the package imports private torch names from here and nowhere else, so that a new torch release breaks one
file, and breaks it loudly: :data:`FENCED` lists every private symbol with the parameters that we pass, and
``tests/test_torch_compat.py`` checks the list on each supported release. Differences between releases are probed by
feature (a signature, an attribute), never by version number.

Imports of :mod:`torch._inductor` are deferred into functions: they are heavy, and the operator must work without them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._higher_order_ops.flex_attention import create_fw_bw_graph
from torch._higher_order_ops.utils import (
    UnsupportedAliasMutationException,
    _has_potential_branch_input_mutation,
    _maybe_reenter_make_fx,
    redirect_to_mode,
    register_fake,
    save_values_for_backward,
    saved_values,
    validate_subgraph_args_types,
)
from torch._ops import HigherOrderOperator
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, set_original_aten_op, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import _vmap_for_bhqkv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from ..errors import InputTypeError, UnsupportedError
from .torch_compat_gluon import gluon_template

__all__ = [
    "FENCED",
    "HigherOrderOperator",
    "ProxyTorchDispatchMode",
    "TransformGetItemToIndex",
    "UnsupportedAliasMutationException",
    "check_arity",
    "compile_fx",
    "create_fw_bw_graph",
    "functionalized_mutates",
    "in_memory",
    "inductor",
    "inline_in_lowering",
    "length_hint",
    "mark_static",
    "missing_symbols",
    "outside_of_tracing",
    "raise_input",
    "redirect_checkpointing_modes",
    "register_dynamo_operator",
    "register_fake",
    "result_problem",
    "save_values_for_backward",
    "saved_values",
    "set_original_aten_op",
    "settled_when_traced",
    "skip_frames_of",
    "statically_known_true",
    "trace_artifact",
    "trace_mod",
    "traced_while_loop",
    "track_tensor_tree",
    "validate_subgraph_args_types",
    "vectorize_mod",
]

# Private symbol -> parameters that we pass by name or position. Kept as data so that one test covers them all.
FENCED: dict[str, tuple[str, ...]] = {
    "torch._guards:TracingContext.try_get": (),
    "torch._inductor.sizevars:SizeVarAllocator.optimization_hint": ("expr", "fallback"),
    "torch._logging._internal:trace_structured": ("name", "metadata_fn", "payload_fn", "expect_trace_id"),
    "torch._dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex": (),
    "torch._dynamo.variables.higher_order_ops:_hop_name_to_variable_class": (),
    "torch._dynamo.variables.higher_order_ops:FlexAttentionHigherOrderVariable.create_wrapped_node": (
        "tx",
        "query",
        "fn",
        "fn_name",
    ),
    "torch._dynamo.variables.higher_order_ops:FlexAttentionHigherOrderVariable.normalize_to_args": ("args", "kwargs"),
    "torch._dynamo.variables.constant:ConstantVariable.create": ("value",),
    "torch._dynamo.variables.dicts:ConstDictVariable": ("items",),
    "torch._dynamo.variables.lists:TupleVariable": ("items",),
    "torch._dynamo.variables.tensor:SymNodeVariable.evaluate_expr": ("output_graph",),
    "torch._dynamo.variables.builder:wrap_fx_proxy": ("tx", "proxy", "example_value"),
    "torch._dynamo.utils:proxy_args_kwargs": ("args", "kwargs"),
    "torch._dynamo.side_effects:SideEffects.clone": (),
    "torch.fx.experimental.symbolic_shapes:ShapeEnv.create_symintnode": ("sym", "hint"),
    "torch.fx.experimental.symbolic_shapes:statically_known_true": ("x",),
    "torch._dynamo.eval_frame:skip_code": (),
    "torch._higher_order_ops.flex_attention:create_fw_bw_graph": ("score_mod", "index_values", "other_buffers"),
    "torch._higher_order_ops.while_loop:while_loop_op": (),
    "torch._inductor.decomposition:select_decomp_table": (),
    "torch._inductor.fx_passes.post_grad:view_to_reshape": ("gm",),
    "torch._inductor.lowering:process_subgraph_nodes": ("graph_module", "args"),
    "torch._inductor.inductor_prims:force_stride_order": (),
    "torch._subclasses.fake_tensor:FakeTensor": (),
    "torch._higher_order_ops.utils:register_fake": ("hop", "fn"),
    "torch._higher_order_ops.utils:redirect_to_mode": ("hop", "mode"),
    "torch._higher_order_ops.utils:validate_subgraph_args_types": ("lifted_args",),
    "torch._higher_order_ops.utils:_maybe_reenter_make_fx": ("fn",),
    "torch._higher_order_ops.utils:_has_potential_branch_input_mutation": ("gm", "inputs", "pre_dispatch"),
    "torch._higher_order_ops.utils:save_values_for_backward": ("ctx", "args"),
    "torch._higher_order_ops.utils:saved_values": ("ctx",),
    "torch.fx.experimental.proxy_tensor:make_fx": (
        "f",
        "decomposition_table",
        "tracing_mode",
        "_allow_non_fake_inputs",
    ),
    "torch.utils._python_dispatch:_disable_current_modes": (),
    "torch.nn.attention.flex_attention:_vmap_for_bhqkv": ("fn", "prefix", "suffix", "out_dims"),
    "torch._higher_order_ops.flex_attention:flex_attention.__call__": (
        "query",
        "key",
        "value",
        "score_mod",
        "block_mask",
        "scale",
        "kernel_options",
    ),
    "torch.nn.attention.flex_attention:_identity": (),
    "torch.nn.attention.flex_attention:_LARGE_SPARSE_BLOCK_SIZE": (),
    "torch.nn.functional:multi_head_attention_forward.__globals__": (),
    "torch._inductor:list_mode_options": ("mode",),
    "torch._inductor.compile_fx:compile_fx": ("model_", "example_inputs_", "inner_compile", "config_patches"),
    "torch._inductor.ir:ComputedBuffer": (),
    "torch._inductor.ir:ExternKernelAlloc.__init__": ("layout", "inputs"),
    "torch._inductor.codegen.wrapper:PythonWrapperCodegen.writeline": ("line",),
    "torch._inductor.ir:FixedLayout.__init__": ("device", "dtype", "size", "stride"),
    "torch._inductor.ir:FlexibleLayout.contiguous_strides": ("sizes",),
    "torch._inductor.ir:IRNode": (),
    "torch._inductor.ir:Subgraph": (),
    "torch._inductor.ir:TensorBox": (),
    "torch._inductor.kernel.flex.common:build_subgraph_buffer": ("args", "subgraph"),
    "torch._inductor.kernel.flex.common:create_indices_fake": ("x",),
    "torch._inductor.kernel.flex.common:create_num_blocks_fake_generator": ("sparse_indices",),
    "torch._inductor.kernel.flex.common:create_placeholder": ("name", "dtype", "device"),
    "torch._inductor.kernel.flex.common:freeze_irnodes": ("tree",),
    "torch._inductor.kernel.flex.common:infer_dense_strides": ("size", "orig_strides"),
    "torch._inductor.kernel.flex.common:maybe_realize": ("args",),
    "torch._inductor.kernel.flex.flex_attention:process_joint_outputs": ("all_joint_outputs", "num_placeholders"),
    "torch._inductor.kernel.flex.flex_attention:validate_joint_graph": ("joint_graph",),
    "torch._inductor.lowering:empty_strided": ("size", "stride", "dtype", "device"),
    "torch._inductor.lowering:fallback_handler": ("kernel", "add_to_fallback_set"),
    "torch._inductor.lowering:lowerings": (),
    "torch._inductor.lowering:make_pointwise": ("fn",),
    "torch._inductor.lowering:register_lowering": ("aten_fn", "type_promotion_kind"),
    "torch._inductor.lowering:to_dtype": ("x", "dtype"),
    "torch._inductor.select_algorithm:SymbolicGridFn": ("fn",),
    "torch._inductor.select_algorithm:TritonTemplate.__init__": ("name", "grid", "source"),
    "torch._inductor.select_algorithm:TritonTemplate.maybe_append_choice": ("choices",),
    "torch._inductor.select_algorithm:TritonTemplate.kernel_type": (),
    "torch._inductor.select_algorithm:TritonTemplate._template_from_string": ("source",),
    "torch._inductor.select_algorithm:TritonTemplateKernel.jit_lines": (),
    "torch._inductor.select_algorithm:TritonTemplateKernel.modification": (),
    "torch._inductor.runtime.triton_heuristics:ASTSource": (),
    "torch._inductor.select_algorithm:autotune_select_algorithm": (
        "name",
        "choices",
        "input_nodes",
        "layout",
        "input_gen_fns",
    ),
    "torch._inductor.virtualized:V": (),
    "torch._inductor.virtualized:ops": (),
}


# --- operator -------------------------------------------------------------------------------------------------------


def trace_mod(mod: Callable[..., Any], *example: Any) -> Any:
    """Trace a mod (or its joint graph) to an FX graph on scalar ``example`` values."""
    with TransformGetItemToIndex():
        return _maybe_reenter_make_fx(mod)(*example)


def outside_of_tracing() -> Any:
    """A context in which operations on tensors that hold data are computed, not recorded, whatever traces around it."""
    return _disable_current_modes()


def functionalized_mutates(ctx: Any, mod: Callable[..., Any], example: Sequence[Any]) -> bool:
    """Whether ``mod`` writes into one of its inputs or captured tensors."""
    pre_dispatch = hasattr(ctx, "mode") and ctx.mode.pre_dispatch
    with TransformGetItemToIndex():
        return bool(_has_potential_branch_input_mutation(mod, list(example), pre_dispatch))


def redirect_checkpointing_modes(op: HigherOrderOperator) -> None:
    """Let selective activation checkpointing see ``op`` as one operator."""
    redirect_to_mode(op, _CachingTorchDispatchMode)
    redirect_to_mode(op, _CachedTorchDispatchMode)


def vectorize_mod(mod: Callable[..., Any], *, n_buffers: int = 0, kind: str = "score") -> Callable[..., Any]:
    """Lift a flex-style mod over 0-dim tensors to whole ``[B, H, Lq, Lk]`` tensors.

    Args:
        mod: ``score`` ``(score, b, h, q_idx, kv_idx, *buffers) -> score``, ``mask`` ``(b, h, q_idx, kv_idx, *buffers) ->
            bool``, or ``joint`` ``(score, b, h, q_idx, kv_idx, grad, *buffers) -> (grad_score, ..., *grad_buffers)``.
        n_buffers: number of captured tensors, which are not mapped over.
        kind: ``"score"``, ``"mask"`` or ``"joint"``.

    Returns:
        the same function over index vectors ``b [B]``, ``h [H]``, ``q_idx [Lq]``, ``kv_idx [Lk]`` and dense scores.
    """
    unmapped = (None,) * n_buffers
    if kind == "score":
        dense = _vmap_for_bhqkv(mod, prefix=(0,), suffix=unmapped)
    elif kind == "mask":
        dense = _vmap_for_bhqkv(mod, prefix=(), suffix=unmapped)
    else:
        out_dims: list[int | None] = [0, None, None, None, None, *unmapped]
        dense = _vmap_for_bhqkv(mod, prefix=(0,), suffix=(0, *unmapped), out_dims=out_dims)

    def run(*args: Any) -> Any:
        with TransformGetItemToIndex():
            return dense(*args)

    return run


def result_problem(value: Any, *, is_mask: bool, axes: int = 0) -> str | None:
    """What is wrong with the value that a mod returned, or None; ``axes`` are those that :func:`vectorize_mod` added."""
    if not isinstance(value, Tensor):
        return f"must return a tensor, but returned {type(value).__name__}."
    if is_mask and value.dtype != torch.bool:
        return f"must return bool, but returned {value.dtype}. Compare, do not subtract."
    if not is_mask and not value.is_floating_point():
        return f"must return a floating score, but returned {value.dtype}."
    if value.dim() != axes:
        shape = list(value.shape)[axes:]
        return f"must return one number for its pair of a query and a key, but returned a tensor of shape {shape}."
    return None


def sums_by_atomics(device: torch.device, captured: Sequence[Any]) -> bool:
    """Whether gradients of ``captured`` would be summed in an order that the user has forbidden to vary."""
    if device.type == "cpu" or not torch.is_grad_enabled() or not torch.are_deterministic_algorithms_enabled():
        return False
    if torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in captured)


@contextlib.contextmanager
def _side_effects_in_place(tx: Any) -> Iterator[None]:
    """Dynamo's record of side effects stays one object while a mod is traced.

    Tracing a mod ends by putting a copy of the record from before in its place. What a Python object's ``__dict__`` holds is
    looked up in the record that was there when it was first read (torch 2.13), so that attributes set after the call, as
    Hugging Face's caches do, would be lost.
    """
    record = tx.output.side_effects
    yield
    restored = tx.output.side_effects
    for name in ("id_to_variable", "store_attr_mutations", "attr_mutation_kinds", "keepalive"):
        if hasattr(restored, name):
            setattr(record, name, getattr(restored, name))
    tx.output.side_effects = record


def register_dynamo_operator(
    op: HigherOrderOperator, *, mods: dict[int, str], names: dict[int, str], on_trace: Callable[[], None]
) -> None:
    """Teach Dynamo to trace a call of ``op`` whose arguments hold mods.

    Args:
        op: the operator. Its arguments are positional; argument ``i`` in ``mods`` is a mod (or, for ``"mask_fn"``, a tuple
            whose last item is one). The tensors captured by the mods are lifted and appended as one tuple for each.
        mods: argument position -> ``"score_mod"`` or ``"mask_fn"``.
        names: argument position -> what the user calls the mod.
        on_trace: called before each trace (we register our lowerings there).
    """
    from torch._dynamo import exc
    from torch._dynamo.utils import proxy_args_kwargs
    from torch._dynamo.variables import higher_order_ops
    from torch._dynamo.variables.builder import wrap_fx_proxy
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lists import TupleVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    def _check_result(graph: torch.fx.GraphModule, position: int) -> None:
        (result,) = list(graph.graph.nodes)[-1].args
        while isinstance(result, (list, tuple)) and len(result) == 1:
            (result,) = result
        value = result.meta.get("example_value") if isinstance(result, torch.fx.Node) else result
        problem = result_problem(value, is_mask=mods[position] == "mask_fn")
        if problem is not None:
            raise _traced_error(InputTypeError, exc)(f"{names[position]} {problem}")

    def _check_deterministic(query: Any, captured: Sequence[Any], position: int) -> None:
        values = [proxy.node.meta.get("example_value") for proxy in captured]
        if mods[position] == "score_mod" and sums_by_atomics(query.device, values):
            raise _traced_error(UnsupportedError, exc)(
                f"the gradient of a tensor captured by {names[position]} is summed by atomic additions on a GPU, whose order "
                "differs between runs, which torch.use_deterministic_algorithms(True) forbids. Detach the tensor, or pass "
                "warn_only=True."
            )

    def _specialized(argument: Any, tx: Any) -> Any:
        # Dynamo makes a number that changed between calls a symbol. Scale, switches and kernel options are constants of the
        # kernels: another value is another kernel.
        if isinstance(argument, SymNodeVariable):
            return ConstantVariable.create(argument.evaluate_expr(tx.output))
        if isinstance(argument, ConstDictVariable):
            items = {key: _specialized(item, tx) for key, item in argument.items.items()}
            return argument.clone(items=items)
        return argument

    class ParallaxOperatorVariable(higher_order_ops.FlexAttentionHigherOrderVariable):
        _HOP_NAME = op.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            on_trace()
            arguments = self.normalize_to_args(list(args), kwargs)
            query = arguments[0]
            # Mods act on scores, which are float32 (float64 for float64 inputs) whatever the inputs are: traced on
            # low-precision scalars they would round back at every decomposed operation.
            score_like = query
            if query.dtype in (torch.bfloat16, torch.float16):
                score_like = query.call_method(tx, "float", [], {})
            nodes: dict[int, Any] = {}
            lifted: list[Any] = []
            plain = [_specialized(argument, tx) for argument in arguments]
            for position, name in mods.items():
                mod = arguments[position]
                if name == "mask_fn":
                    plain[position] = TupleVariable(mod.items[:-1], source=mod.source)
                    mod = mod.items[-1]
                with _side_effects_in_place(tx):
                    nodes[position], captured = self.create_wrapped_node(tx, score_like, mod, name)
                _check_result(tx.output.nn_modules[nodes[position].node.target], position)
                _check_deterministic(query, captured, position)
                lifted.append(captured)
            keep = [i for i in range(len(plain)) if mods.get(i) != "score_mod"]
            proxies, _ = proxy_args_kwargs([plain[i] for i in keep], {})
            final: list[Any] = [None] * len(plain)
            for i, proxy in zip(keep, proxies, strict=True):
                final[i] = proxy
            for position, node in nodes.items():
                final[position] = (*final[position], node) if mods[position] == "mask_fn" else node
            with set_original_aten_op(self.value):
                proxy = tx.output.create_proxy("call_function", self.value, args=(*final, *lifted), kwargs={})
                return wrap_fx_proxy(tx=tx, proxy=proxy, example_value=None)

    higher_order_ops._hop_name_to_variable_class[op.__name__] = ParallaxOperatorVariable


mark_static = torch._dynamo.mark_static  # heads and widths stay constants, so that grids and scales do


# --- inductor -------------------------------------------------------------------------------------------------------


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
            raise AttributeError(f"torch_compat.inductor has no {name!r}: add it to _SOURCES and FENCED")
        found = _resolve(self._SOURCES[name])
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
        template = _resolve("torch._inductor.select_algorithm:TritonTemplate")
        if gluon:
            template = gluon_template(template)
        parsed = template._template_from_string
        deferred = {"_template_from_string": staticmethod(lambda text: _DeferredText(functools.partial(parsed, text)))}
        kind: Any = type("DeferredTemplate", (template,), deferred)
        options = {}
        if "always_freeze_layout" in inspect.signature(kind.__init__).parameters:
            options["always_freeze_layout"] = True
        return kind(name=name, grid=grid, source=source, **options)

    def autotune(self, name: str, choices: list[Any], inputs: list[Any], layout: Any, input_gen_fns: dict) -> Any:
        """``autotune_select_algorithm``; newer releases return ``(node, choice)``, older ones the node."""
        select = _resolve("torch._inductor.select_algorithm:autotune_select_algorithm")
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


class _DeferredText:
    """A template's text, which Jinja parses when it is rendered for the first time: a tenth of a second for each of ours.

    A process whose kernels are in torch's caches renders none, and one call renders a few of them.
    """

    def __init__(self, parsed: Callable[[], Any]) -> None:
        self._parsed = functools.cache(parsed)

    def render(self, **values: Any) -> str:
        return self._parsed().render(**values)


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
    settings = _resolve("torch._inductor:list_mode_options")(mode) if mode not in (None, "default") else {}
    settings |= {name.replace("-", "_"): option for name, option in options.items()}
    return _resolve("torch._inductor.compile_fx:compile_fx")(graph, inputs, config_patches=settings or None)


def _resolve(source: str) -> Any:
    module_name, _, symbol = source.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in filter(None, symbol.split(".")):
        found = getattr(found, part)
    return found


def missing_symbols() -> list[str]:
    """The entries of :data:`FENCED` that this torch release lacks, or whose signature differs from what we call."""
    problems = []
    for source, parameters in FENCED.items():
        try:
            symbol = _resolve(source)
        except (ImportError, AttributeError) as error:
            problems.append(f"{source}: {error}")
            continue
        if not parameters:
            continue
        known = inspect.signature(symbol).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            continue
        problems += [f"{source}: no parameter {p!r}" for p in parameters if p not in known]
    return problems


# --- inlining a traced function (CPU) --------------------------------------------------------------------------------


def traced_while_loop(
    condition: Callable[..., Tensor], body: Callable[..., tuple], carried: Sequence[Tensor], operands: Sequence[Any]
) -> Any:
    """Torch's ``while_loop`` with explicit operands, as a node of the graph being traced."""
    while_loop_op = _resolve("torch._higher_order_ops.while_loop:while_loop_op")
    given = len(carried) + len(operands)
    # A body whose operand has the size s + 1 must be told s: where no operand has that size, s is one more operand.
    needed, alone = _symbols_of([*carried, *operands])
    symbols = [_inlined_symbols[s] for s in needed if s not in alone and s in _inlined_symbols]
    return while_loop_op(
        lambda *state: condition(*state[:given]),
        lambda *state: body(*state[:given]),
        tuple(carried),
        (*operands, *symbols),
    )


_inlined_symbols: dict[Any, torch.SymInt] = {}
"""The symbols in sizes of the node that is being inlined, as numbers of its graph."""


def _symbols_of(values: Sequence[Any]) -> tuple[list[Any], set[Any]]:
    """The symbols of sizes, strides and numbers among ``values``, in order, and those of them that are one of these alone."""
    numbers = [value for value in values if isinstance(value, torch.SymInt)]
    for value in values:
        if isinstance(value, Tensor):
            numbers += [n for n in (*value.shape, *value.stride()) if isinstance(n, torch.SymInt)]
    expressions = [number.node.expr for number in numbers]
    symbols = {symbol for expression in expressions for symbol in expression.free_symbols}
    return sorted(symbols, key=str), {expression for expression in expressions if expression.is_Symbol}


def inline_in_lowering(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Trace ``function`` on the fake tensors of the node being lowered and lower the result in the node's place.

    Args:
        function: plain torch code with the node's arguments; mods arrive as FX graphs.
        arguments: the node's arguments as the lowering got them.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch.fx.experimental.proxy_tensor import make_fx

    graph, ir = inductor.V.graph, inductor.ir
    root = graph.module

    def fake(argument: Any) -> Any:
        if not isinstance(argument, torch.fx.Node):
            return argument
        if argument.op == "get_attr" and isinstance(getattr(root, str(argument.target), None), torch.fx.GraphModule):
            return getattr(root, str(argument.target))
        return argument.meta["val"]

    given, structure = pytree.tree_flatten(
        list(arguments), is_leaf=lambda leaf: isinstance(leaf, (ir.Subgraph, ir.IRNode))
    )
    node_arguments = pytree.tree_leaves(
        list(graph.current_node.args), is_leaf=lambda leaf: leaf is None or isinstance(leaf, torch.fx.Node)
    )
    fakes = [fake(argument) for argument in node_arguments]
    fake_mode = next(leaf.fake_mode for leaf in fakes if isinstance(leaf, Tensor))
    names, _ = _symbols_of(fakes)
    symbols = [fake_mode.shape_env.create_symintnode(symbol, hint=None) for symbol in names]
    dynamic = [i for i, leaf in enumerate(fakes) if isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat))]

    def call(*values: Any) -> Any:
        leaves = list(fakes)
        for position, leaf in zip(dynamic, values[: len(dynamic)], strict=True):
            leaves[position] = leaf
        _inlined_symbols.clear()
        _inlined_symbols.update(zip(names, values[len(dynamic) :], strict=True))
        return function(*pytree.tree_unflatten(leaves, structure))

    with fake_mode, inductor.V.set_fake_mode(fake_mode):
        traced = make_fx(call, decomposition_table=select_decomp_table())(*[fakes[i] for i in dynamic], *symbols)
    _lift_subgraphs(traced, root)
    _views_as_reshapes(traced)
    with _no_donated_buffers():
        return process_subgraph_nodes(traced, [*(given[i] for i in dynamic), *names])


def in_memory(tensor: Tensor) -> Tensor:
    """``tensor``, which Inductor is to keep in memory and not to compute where it is read, while it inlines.

    For chunks that are read as rows and cut to a length: on a CPU Inductor splits a loop whose index it divides by the chunk
    into whole chunks, and loses the rows that are left (``CppScheduling.try_loop_split``, torch 2.11 to 2.13).
    """
    if not isinstance(tensor, _resolve("torch._subclasses.fake_tensor:FakeTensor")):
        return tensor
    found: Tensor = _resolve("torch._inductor.inductor_prims:force_stride_order")(tensor, tensor.stride())
    return found


@contextlib.contextmanager
def _no_donated_buffers() -> Iterator[None]:
    """Keep loop bodies from overwriting their operands.

    AOTAutograd lists by position which inputs of the *backward graph* may be overwritten, and Inductor reads the list for
    the inputs of each loop body too.
    """
    context = _resolve("torch._guards:TracingContext").try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        yield
        return
    donated, metadata.bw_donated_idxs = metadata.bw_donated_idxs, None
    try:
        yield
    finally:
        metadata.bw_donated_idxs = donated


def _lift_subgraphs(traced: torch.fx.GraphModule, root: torch.fx.GraphModule) -> None:
    """Hang the loop bodies of an inlined graph on the graph that Inductor lowers, where it looks for them."""
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            name = f"parallax_inlined_{len(root._modules)}_{node.target}"
            value = getattr(traced, node.target)
            if isinstance(value, torch.fx.GraphModule):
                _views_as_reshapes(value)
            setattr(root, name, value)
            node.target = name


def _views_as_reshapes(traced: torch.fx.GraphModule) -> None:
    """Views become reshapes: Inductor chooses layouts that the traced strides do not foresee."""
    _resolve("torch._inductor.fx_passes.post_grad:view_to_reshape")(traced)


# --- user errors inside traced code ---------------------------------------------------------------------------------


class _RaiseInput(HigherOrderOperator):
    """Raises a user error; under Dynamo it does so at trace time, as itself.

    A ``raise`` that Dynamo traces surfaces as "Unsupported: Observed exception" under ``fullgraph=True``. This operator's
    Dynamo handler raises the very exception instead, so that a wrong argument reads the same compiled or not.
    """

    def __init__(self) -> None:
        super().__init__("parallax_raise_input")

    def __call__(self, error: type[Exception], message: str) -> None:
        raise error(message)


raise_input = _RaiseInput()


class _SettledWhenTraced(HigherOrderOperator):
    """Calls a function of no arguments; under Dynamo once, when the call is traced, and what it gave is a constant then.

    There is no guard on it: what is compiled already stays as it is.
    """

    def __init__(self) -> None:
        super().__init__("parallax_settled_when_traced")

    def __call__(self, function: Callable[[], str]) -> str:
        return function()


settled_when_traced = _SettledWhenTraced()


class _CheckArity(HigherOrderOperator):
    """Checks that a mod takes the arguments it will get; under Dynamo at trace time, on the function itself."""

    def __init__(self) -> None:
        super().__init__("parallax_check_arity")

    def __call__(self, name: str, mod: Callable[..., Any], *expected: str) -> None:
        problem = arity_problem(mod, expected)
        if problem is not None:
            raise InputTypeError(f"{name} {problem}")


check_arity = _CheckArity()


def arity_problem(mod: Callable[..., Any], expected: Sequence[str]) -> str | None:
    """What is wrong with the arguments that ``mod`` takes, or None."""
    try:
        inspect.signature(mod).bind(*expected)
    except TypeError as error:
        name = getattr(mod, "__qualname__", None) or type(mod).__qualname__
        return f"must take ({', '.join(expected)}), but {name} does not: {error}."
    except ValueError:  # a builtin without a signature: the trace will tell
        return None
    return None


def _register_user_errors() -> None:
    from torch._dynamo import exc, variables
    from torch._dynamo.variables import higher_order_ops

    def traced(error: type[Exception]) -> type[Exception]:
        return _traced_error(error, exc)

    class RaiseInputVariable(higher_order_ops.TorchHigherOrderOperatorVariable):
        _HOP_NAME = raise_input.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            error, message = args
            raise traced(error.as_python_constant())(_render(message))

        call_function = _call_function

    class SettledWhenTracedVariable(higher_order_ops.TorchHigherOrderOperatorVariable):
        _HOP_NAME = settled_when_traced.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            (function,) = args
            return variables.ConstantVariable.create(function.get_function()())

        call_function = _call_function

    class CheckArityVariable(higher_order_ops.TorchHigherOrderOperatorVariable):
        _HOP_NAME = check_arity.__name__

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            name, mod, *expected = args
            fn = _callable_of(mod)
            problem = None if fn is None else arity_problem(fn, [item.as_python_constant() for item in expected])
            if problem is not None:
                raise traced(InputTypeError)(f"{name.as_python_constant()} {problem}")
            return variables.ConstantVariable.create(None)

        call_function = _call_function

    registered = higher_order_ops._hop_name_to_variable_class
    registered[raise_input.__name__] = RaiseInputVariable
    registered[check_arity.__name__] = CheckArityVariable
    registered[settled_when_traced.__name__] = SettledWhenTracedVariable


def _traced_error(error: type[Exception], exc: Any) -> type[Exception]:
    """``error`` as a class that Dynamo passes on unchanged (it rewraps exceptions that are not its own)."""

    class Traced(error, exc.UserError):  # type: ignore[misc, valid-type, name-defined]
        def __init__(self, message: str) -> None:
            exc.UserError.__init__(self, exc.UserErrorType.INVALID_INPUT, message)

    Traced.__name__, Traced.__qualname__, Traced.__module__ = error.__name__, error.__qualname__, error.__module__
    return Traced


def skip_frames_of(function: Callable[..., Any]) -> None:
    """Dynamo runs a call of ``function`` as it is; where it traces through one, it goes on to."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def _callable_of(variable: Any) -> Callable[..., Any] | None:
    """The Python callable behind a Dynamo variable; None where Dynamo holds only code that it made itself."""
    for attribute in ("value", "fn"):
        found = getattr(variable, attribute, None)
        if callable(found):
            return found
    code: Any = getattr(variable, "code", None)
    if hasattr(code, "as_python_constant"):
        code = code.as_python_constant()
    if not isinstance(code, types.CodeType) or code.co_freevars:
        return None
    return types.FunctionType(code, {})


def _render(message: Any) -> str:
    """The text of a traced string; sizes that are symbolic at trace time print as their symbols."""
    if message.is_python_constant():
        return str(message.as_python_constant())
    if hasattr(message, "format_string"):
        return str(message.format_string).format(*map(_render, message.sym_args))
    if hasattr(message, "items"):
        return "(" + ", ".join(map(_render, message.items)) + ")"
    return str(getattr(message, "sym_num", message))


_register_user_errors()
