"""The fence around torch's private modules: what the package takes from them, and whether a torch release has it.

The ``torch_compat_*`` modules import private torch names, and the rest of the package imports them from there and nowhere else,
so that a new torch release breaks in one place, and loudly: :data:`FENCED` lists every private symbol with the parameters that
we pass, and ``tests/test_torch_compat.py`` checks the list on each supported release. Differences between releases are probed
by feature (a signature, an attribute), never by version number.

| module | what it holds |
|---|---|
| :mod:`.torch_compat_operator` | operators with mods: their registration, tracing and lifting |
| :mod:`.torch_compat_dynamo` | how Dynamo traces such an operator |
| :mod:`.torch_compat_errors` | user errors that read the same compiled or not |
| :mod:`.torch_compat_inductor` | the parts of Inductor that a lowering needs |
| :mod:`.torch_compat_inlining` | plain torch code lowered in a node's place |
| :mod:`.torch_compat_launch` | how a generated kernel is launched from its cubin |
| :mod:`.torch_compat_threads` | kernels compiled side by side before Inductor's workers are up |
| :mod:`.torch_compat_backward` | a backward's kernels begun while the forward's are compiled |
| :mod:`.torch_compat_gluon` | Gluon kernels through Inductor |
| :mod:`.torch_compat_calls` | torch's own attention calls, taken apart |
| :mod:`.torch_compat_codegen` | Inductor under a pretended GPU; has a list of its own |
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["FENCED", "missing_symbols", "once_imported", "resolve"]

# Private symbol -> parameters that we pass by name or position. Kept as data so that one test covers them all.
FENCED: dict[str, tuple[str, ...]] = {
    "torch._guards:CompileContext.current_compile_id": (),
    "torch._guards:detect_fake_mode": ("inputs",),
    "torch._guards:TracingContext.try_get": (),
    "torch._inductor.async_compile:AsyncCompile.use_process_pool": (),
    "torch._inductor.async_compile:CompiledTritonKernels.get": ("kernel_src",),
    "torch._inductor.async_compile:CompiledTritonKernels.key": ("kernel_src",),
    "torch._inductor.async_compile:CompiledTritonKernels.remove_future": ("kernel_src",),
    "torch._inductor.async_compile:CompiledTritonKernels.save": ("kernel_src", "future"),
    "torch._inductor.async_compile:_load_triton_kernel_from_source": ("kernel_name", "source_code"),
    "torch._inductor.async_compile:_set_triton_ptxas_path": (),
    "torch._inductor.async_compile:get_compile_threads": (),
    "torch._inductor.codecache:LambdaFuture.__init__": ("result_fn", "future"),
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner.precompile": (
        "warm_cache_only",
        "static_triton_bundle_key",
    ),
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner.set_compile_info": ("compile_id", "is_backward"),
    "torch._inductor.select_algorithm:TritonTemplateKernel.emit_kernel_override": (
        "wrapper",
        "src_code",
        "kernel_name",
    ),
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
    "torch._dynamo.variables.user_defined:UserDefinedObjectVariable.is_supported_random": (),
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
    "torch._inductor.compile_fx:partition_fn": (),
    "torch._inductor.graph:GraphLowering.__init__": ("gm", "example_inputs", "is_backward"),
    "torch._inductor.graph:GraphLowering.codegen": (),
    "torch._inductor.graph:GraphLowering.run": (),
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
    "torch._inductor.select_algorithm:TritonTemplateKernel.__init__": ("kernel_name",),
    "torch._inductor.select_algorithm:TritonTemplateKernel.jit_lines": (),
    "torch._inductor.select_algorithm:TritonTemplateKernel.render": ("template", "kwargs"),
    "torch._inductor.select_algorithm:TritonTemplateKernel.modification": (),
    "torch._inductor.runtime.static_triton_launcher:StaticallyLaunchedCudaKernel.__init__": ("kernel",),
    "torch._inductor.runtime.static_triton_launcher:StaticallyLaunchedCudaKernel.load_kernel": ("device",),
    "torch._inductor.runtime.static_triton_launcher:StaticallyLaunchedCudaKernel.run": (
        "grid_x",
        "grid_y",
        "grid_z",
        "stream",
    ),
    "torch._inductor.runtime.triton_heuristics:ASTSource": (),
    "torch._inductor.runtime.triton_heuristics:statically_launched_kernel_by_device": ("kernel", "device_type"),
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


def resolve(source: str) -> Any:
    """What ``"module:symbol"`` names, imported now."""
    module_name, _, symbol = source.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in filter(None, symbol.split(".")):
        found = getattr(found, part)
    return found


def once_imported(name: str, action: Callable[[], None]) -> None:
    """Run ``action`` as soon as module ``name`` is there: now, or when somebody imports it.

    What we teach Dynamo has to be there before it traces a call of ours, but ``import torch`` does without Dynamo, whose own
    import takes as long as that of all else in torch, and so does ``import parallax_compile``.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Awaited(name, action))


class _Awaited:
    """Finds one module as Python does, and runs an action at the end of its import."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action, self.asking = name, action, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or self.asking:
            return None
        self.asking = True  # those who find it come after this one
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:  # who only looks for the module does not import it
                    sys.meta_path.remove(self)
                    self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def missing_symbols() -> list[str]:
    """The entries of :data:`FENCED` that this torch release lacks, or whose signature differs from what we call."""
    problems = []
    for source, parameters in FENCED.items():
        try:
            symbol = resolve(source)
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
