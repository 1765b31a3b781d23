"""What code generation takes from torch's private modules: Inductor under a pretended GPU, and its generated kernels.

Part of :mod:`.torch_compat` (same rule: private torch names are imported here and nowhere else). The private symbols are
listed in :data:`FENCED`, which one test checks on each supported release.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import fx

from .targets import Target

__all__ = [
    "FENCED",
    "CompileArguments",
    "InductorHooks",
    "choice_grid",
    "choice_source",
    "compile_arguments",
    "compile_backend",
    "deterministic_tracing",
    "launch_arguments",
    "load_kernel",
    "move_graph",
    "nothing_donated",
    "pretend_gpu",
    "record_kernels",
    "run_without_values",
    "triton_source",
    "wrapper_on_cpu",
]

FENCED: dict[str, tuple[str, ...]] = {
    "torch._dynamo.config:patch": (),
    "torch._dynamo.device_interface:CudaInterface": (),
    "torch._dynamo.device_interface:caching_worker_current_devices": (),
    "torch._dynamo.device_interface:caching_worker_device_properties": (),
    "torch._functorch.config:donated_buffer": (),
    "torch._functorch.config:enable_autograd_cache": (),
    "torch._inductor.autotune_process:TritonBenchmarkRequest.__init__": ("kernel_name", "extra_args", "module_path"),
    "torch._inductor.async_compile:AsyncCompile.triton": ("kernel_name", "source_code", "device_str"),
    "torch._inductor.async_compile:_load_triton_kernel_from_source": ("kernel_name", "source_code"),
    "torch._inductor.compile_fx:compile_fx": ("model_", "example_inputs_", "inner_compile"),
    "torch._inductor.compile_fx:compile_fx_inner": ("gm", "example_inputs"),
    "torch._inductor.config:allow_buffer_reuse": (),
    "torch._inductor.config:compile_threads": (),
    "torch._inductor.config:epilogue_fusion": (),
    "torch._inductor.config:force_disable_caches": (),
    "torch._inductor.config:inplace_buffers": (),
    "torch._inductor.config:fx_graph_cache": (),
    "torch._inductor.config:joint_graph_constant_folding": (),
    "torch._inductor.config:max_autotune": (),
    "torch._inductor.graph:GraphLowering.save_output_code": (),
    "torch._inductor.runtime.hints:DeviceProperties": (),
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner._create_compile_meta": ("cfg",),
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner._create_compile_options": ("cfg", "compile_meta"),
    "torch._inductor.runtime.triton_heuristics:CachingAutotuner._interpret_args_grid": ("args", "cfg"),
    "torch._inductor.runtime.triton_helpers:set_driver_to_gpu": (),
    "torch._inductor.select_algorithm:get_algorithm_selector_cache": (),
    "torch._subclasses.fake_tensor:FakeTensor": (),
    "torch._subclasses.fake_tensor:FakeTensorMode": ("allow_non_fake_inputs",),
}

_GPU = torch.device("cuda", 0)

# Modules whose cached functions remember what the device is.
_PROBING_MODULES = ("torch.utils._triton", "torch._inductor.utils")


# --- a pretended GPU ------------------------------------------------------------------------------------------------


def _properties(target: Target) -> SimpleNamespace:
    """What ``torch.cuda.get_device_properties`` would say on the target, as far as Inductor asks."""
    return SimpleNamespace(
        name=target.product,
        major=target.capability[0],
        minor=target.capability[1],
        total_memory=target.memory_bytes,
        multi_processor_count=target.sm_count,
        is_integrated=0,
        is_multi_gpu_board=0,
        max_threads_per_multi_processor=target.threads_per_sm,
        max_threads_per_block=1024,
        warp_size=32,
        regs_per_multiprocessor=target.registers_per_sm,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=target.shared_memory_per_block,
        shared_memory_per_multiprocessor=target.shared_memory_per_sm,
        L2_cache_size=target.l2_bytes,
        gcnArchName="",
        uuid="0",
    )


class _PretendedDriver:
    """Stands in for Triton's active driver; an attribute that we do not know of fails loudly."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", target.arch, 32)
        self._capability = target.capability
        properties = {
            "max_shared_mem": target.shared_memory_per_block,
            "max_num_regs": target.registers_per_sm,
            "multiprocessor_count": target.sm_count,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return _GPU

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return self._capability

    def set_current_device(self, device: int) -> None:
        pass

    @staticmethod
    def is_active() -> bool:
        return True


def _no_stream(*args: Any) -> int:
    """Answers for everything that would touch a device."""
    return 0


def _forget_probes() -> None:
    from torch._inductor.runtime.hints import DeviceProperties

    for name in _PROBING_MODULES:
        for function in vars(importlib.import_module(name)).values():
            if hasattr(function, "cache_clear") and getattr(function, "__module__", None) == name:
                function.cache_clear()
    if hasattr(DeviceProperties.create, "cache_clear"):
        DeviceProperties.create.cache_clear()


def _forget_templates() -> None:
    """Drop instances of templates that Inductor keeps: their text holds the device that they were made for."""
    from torch._inductor.select_algorithm import TritonTemplate

    for template in getattr(TritonTemplate, "all_templates", {}).values():
        cache = getattr(template, "_generated_code_cache", None)
        if cache is not None:
            cache.cache_clear()


@contextlib.contextmanager
def pretend_gpu(target: Target) -> Iterator[None]:
    """Let Inductor and Triton see one GPU of kind ``target``, whatever this machine has. Nothing may run on it.

    Process-wide; everything is as it was on exit, also after an error.
    """
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers

    properties = _properties(target)
    driver = triton.runtime.driver
    active = driver.__dict__.get("_active")
    workers = (device_interface.caching_worker_device_properties, device_interface.caching_worker_current_devices)
    saved = [dict(worker) for worker in workers]
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *args, **kwargs: properties,
        "get_device_capability": lambda *args, **kwargs: target.capability,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
    }
    interface: dict[str, Callable[..., Any]] = {
        "get_device_properties": answers["get_device_properties"],
        "current_device": answers["current_device"],
        "device_count": answers["device_count"],
        "is_available": lambda: True,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "get_compute_capability": lambda device=None: target.arch,
        "get_raw_stream": _no_stream,
        "synchronize": lambda *args: None,
        "is_bf16_supported": lambda *args, **kwargs: True,
    }
    with contextlib.ExitStack() as stack:
        _forget_probes()
        _forget_templates()
        stack.callback(_forget_templates)
        stack.callback(_forget_probes)
        for worker, before in zip(workers, saved, strict=True):
            stack.callback(worker.update, before)
            stack.callback(worker.clear)
        workers[0]["cuda"] = [properties]
        workers[1]["cuda"] = 0
        stack.callback(setattr, driver, "_active", active)
        driver.set_active(_PretendedDriver(target))
        # Generated kernels call this when they are imported.
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", _no_stream))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name, answer in interface.items():
            stack.enter_context(mock.patch.object(device_interface.CudaInterface, name, staticmethod(answer)))
        # Builds without CUDA lack what the generated wrapper imports (and never calls here).
        for name in ("_cuda_getCurrentRawStream", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
            stack.enter_context(mock.patch.object(torch._C, name, _no_stream, create=True))
        yield


# --- graphs ---------------------------------------------------------------------------------------------------------


def _mover() -> Callable[[Any], Any]:
    """A function that replaces CPU fake tensors and CPU devices by those of the pretended GPU, the same for the same."""
    from torch._subclasses.fake_tensor import FakeTensor

    moved: dict[int, tuple[Any, Any]] = {}  # the original is kept alive: its id is the key

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "cpu":
            return _GPU
        if not isinstance(leaf, FakeTensor) or leaf.device.type != "cpu":
            return leaf
        if id(leaf) not in moved:
            with leaf.fake_mode:
                there = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=_GPU)
            moved[id(leaf)] = (leaf, there)
        return moved[id(leaf)][1]

    return move


def move_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a traced CPU graph, and of its fake inputs, on the pretended GPU."""
    move = _mover()
    there = copy.deepcopy(graph)
    for module in there.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, move)
            node.kwargs = fx.node.map_aggregate(node.kwargs, move)
            for key in ("val", "example_value", "eager_input_vals"):
                if key in node.meta:
                    node.meta[key] = pytree.tree_map(move, node.meta[key])
            node.meta.pop("tensor_meta", None)
        module.recompile()
    return there, [move(value) for value in inputs]


def run_without_values(graph: fx.GraphModule, arguments: Sequence[Any]) -> list[Any]:
    """Results of ``graph`` of the right shapes, strides, dtypes and devices, with undefined values; integers are exact."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        results = graph(*fakes)

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, FakeTensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)

    return [real(result) for result in results]


# --- Inductor -------------------------------------------------------------------------------------------------------


@dataclass
class InductorHooks:
    """What a run of Inductor tells.

    Attributes:
        on_kernel: ``(name, source)`` of each Triton kernel of the graph.
        on_wrapper: the source of the graph's wrapper.
        on_choices: the candidates of one choice -> those to keep.
    """

    on_kernel: Callable[[str, str], None]
    on_wrapper: Callable[[str], None]
    on_choices: Callable[[list[Any]], list[Any]]


class _NotCompiled:
    """A kernel of a wrapper that is generated and not run."""

    def run(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this kernel was generated for inspection and is not compiled")


@contextlib.contextmanager
def record_kernels(make: Callable[[str, str], Any]) -> Iterator[None]:
    """Let the kernels of wrappers that are imported meanwhile be ``make(name, source)`` instead of compiled kernels."""
    from torch._inductor.async_compile import AsyncCompile

    def triton(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        return make(kernel_name, source_code)

    with mock.patch.object(AsyncCompile, "triton", triton):
        yield


def triton_source(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    target: Target,
    hooks: InductorHooks,
    options: dict[str, Any],
    **kwargs: Any,
) -> None:
    """Let Inductor generate the code of ``graph`` (on a GPU) for ``target``; nothing is compiled.

    Args:
        options: Inductor options to set meanwhile.
        kwargs: what ``compile_fx`` hands to its inner compiler.
    """
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.select_algorithm import get_algorithm_selector_cache

    def record(name: str, source: str) -> _NotCompiled:
        hooks.on_kernel(name, source)
        return _NotCompiled()

    def preprocess(choices: list[Any]) -> list[Any]:
        return hooks.on_choices(list(choices))

    # One thread: the hooks are not seen by Inductor's worker processes.
    options = {"compile_threads": 1, "force_disable_caches": True, "fx_graph_cache": False, **options}
    selector = get_algorithm_selector_cache()
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretend_gpu(target))
        stack.enter_context(config.patch(options))
        stack.enter_context(record_kernels(record))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(hooks.on_wrapper)))
        selector.preprocessing_fns.append(preprocess)
        stack.callback(selector.preprocessing_fns.remove, preprocess)
        compile_fx_inner(graph, inputs, **kwargs)


def choice_source(choice: Any) -> tuple[str, str]:
    """Name and source of the kernel by which Inductor would time a choice: the template's own, without what is fused to it."""
    request = choice.bmreq
    return request.kernel_name, Path(request.module_path).read_text(encoding="utf-8")


def choice_grid(choice: Any) -> tuple[int, int, int]:
    """The blocks of that kernel's launch; lengths that are symbols count as in the first call."""
    x, y, z = (int(size) for size in choice.bmreq.extra_args[-3:])
    return x, y, z


def compile_backend(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A ``torch.compile`` backend: Inductor's, with ``inner(graph, inputs, is_backward=..., **kwargs)`` at its end."""
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    return backend


@contextlib.contextmanager
def deterministic_tracing() -> Iterator[None]:
    """No cache is read or written, and what was compiled before does not decide which sizes are dynamic."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    with (
        dynamo.patch(automatic_dynamic_shapes=False),
        functorch.patch(enable_autograd_cache=False),
        # Folding would evaluate constants on the CPU device of the trace.
        inductor.patch(joint_graph_constant_folding=False),
    ):
        yield


# --- generated kernels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompileArguments:
    """How Inductor would compile a generated kernel, in its first configuration: arguments of ``triton.compile``.

    ``arch`` is the GPU's, as Triton writes it (90).
    """

    function: Any
    arch: int
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: Any
    options: dict[str, Any]


def load_kernel(name: str, source: str) -> Any:
    """Import the source of a generated kernel: Inductor's launcher, which also runs it in Triton's interpreter."""
    from torch._inductor.async_compile import _load_triton_kernel_from_source

    with mock.patch.dict(os.environ):  # Inductor sets TRITON_CACHE_DIR here
        return _load_triton_kernel_from_source(name, source)


def launch_arguments(kernel: Any, arguments: Sequence[Any]) -> tuple[list[Any], tuple[int, int, int]]:
    """What a wrapper's launch of a kernel of :func:`load_kernel` hands to its first configuration, and the grid.

    The wrapper hands a size of 1 too, which is a constant of the kernel's.
    """
    handed, grid = kernel._interpret_args_grid(tuple(arguments), kernel.configs[0])
    x, y, z = (int(size) for size in grid)
    names = [name for name in kernel.fn.arg_names if name not in kernel.configs[0].kwargs]
    kinds = kernel.triton_meta["signature"]
    return [value for name, value in zip(names, handed, strict=True) if kinds[name] != "constexpr"], (x, y, z)


def nothing_donated() -> Any:
    """A context in which backward graphs do not overwrite what the forward saved, so that they can run again."""
    import torch._functorch.config as functorch

    return functorch.patch(donated_buffer=False)


@contextlib.contextmanager
def wrapper_on_cpu(
    wrapper: str, target: Target, make: Callable[[str, str], Any], empty: Callable[..., Any]
) -> Iterator[Any]:
    """The ``call`` of a wrapper for a GPU, to be run on CPU tensors meanwhile.

    Args:
        make: ``(name, source)`` -> what stands for a kernel; it has ``run(*arguments, stream)``.
        empty: ``(size, stride, dtype) -> tensor`` in place of allocations.
    """
    source = re.sub(r"device='cuda:\d+'", "device='cpu'", wrapper)
    source = re.sub(r"device\(type='cuda', index=\d+\)", "device(type='cpu')", source)
    module: dict[str, Any] = {"__name__": "generated_wrapper"}
    with (
        pretend_gpu(target),
        record_kernels(make),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device", _no_stream),
        torch.no_grad(),
    ):
        exec(compile(source, "<generated wrapper>", "exec"), module)
        module["get_raw_stream"] = _no_stream
        module["empty_strided_cuda"] = module["empty_strided_cpu"] = empty
        yield module["call"]


def compile_arguments(kernel: Any) -> CompileArguments:
    """What Inductor would hand to Triton for a kernel of :func:`load_kernel` (not in a process of the interpreter)."""
    configuration = kernel.configs[0]
    meta = kernel._create_compile_meta(configuration)
    return CompileArguments(
        function=kernel.fn,
        arch=meta["cc"],
        signature=dict(meta["signature"]),
        constants=dict(meta["constants"]),
        attributes=meta["configs"][0],
        options=kernel._create_compile_options(configuration, meta),
    )
