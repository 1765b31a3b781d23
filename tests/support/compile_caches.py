"""A process of ``test_compile_caches.py``: compiles calls with torch's caches on, and prints what they said as JSON.

    python compile_caches.py cold|warm

On the CPU for real; for a GPU that is not here up to the launch: generated, compiled and cached, but loaded by stand-ins.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from parallax_compile.lowering import cache_key, codegen, torch_compat_backward, tuned
from parallax_compile.lowering import torch_compat_codegen as compat
from parallax_compile.lowering.store import Entry, Store
from parallax_compile.lowering.targets import resolve
from torch import Tensor
from torch._dynamo.utils import counters

import parallax_compile as plx

LENGTH, WIDTH = 128, 32


def answers(run: Callable[[], Any]) -> dict[str, int]:
    """What the caches said while ``run`` compiled and ran a call."""
    torch.compiler.reset()
    counters.clear()
    run()
    names = {"aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")}
    names |= {"inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")}
    return {name: counters[group][name] for group in names for name in names[group]}


# --- on the CPU -----------------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, LENGTH, width, dtype=dtype, requires_grad=True) for _ in range(4)]


def call(
    slope: float = 0.5,
    bias: float = 1.0,
    spec: plx.AttentionSpec = plx.PARALLAX,
    mask: Any = None,
    **options: Any,
) -> Callable[[], None]:
    """A call whose mod has a number and a captured tensor, checked against the uncompiled reference, with its gradients."""
    values = torch.linspace(-bias, bias, LENGTH)

    def attention(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score - slope * (q_idx - kv_idx).abs() / LENGTH + values[kv_idx]

        return plx.attention(
            q, k, v, r, spec=spec.replace(mask_mod=mask or plx.masks.causal()), score_mod=score_mod, **options
        )

    def run() -> None:
        inputs = operands()
        results = []
        for function in (torch.compile(codegen.fresh(attention), fullgraph=True), attention):
            out = function(*inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)

    return run


class MissedError(Exception):
    """Raised in place of a compilation."""


@contextlib.contextmanager
def nothing_compiles() -> Iterator[None]:
    """Whatever the caches do not have raises :class:`MissedError`."""
    with mock.patch("torch._inductor.compile_fx.fx_codegen_and_compile", side_effect=MissedError):
        yield


def missed(run: Callable[[], Any]) -> bool:
    """Whether the caches lack a graph of ``run``."""
    torch.compiler.reset()
    try:
        run()
    except Exception as error:
        if MissedError.__name__ not in repr(error):
            raise
        return True
    return False


def variants() -> dict[str, bool]:
    """What differs from the call that was compiled -> whether the caches lack it."""
    spec = plx.PARALLAX.replace(intercept=False)
    with nothing_compiles():
        found = {
            "nothing": missed(call()),
            "values of a captured tensor": missed(call(bias=2.0)),
            "a mod's constant": missed(call(slope=0.25)),
            "covariance_mod": missed(call(covariance_mod=plx.mods.tanh_cap(8.0))),
            "mask_mod": missed(call(mask=plx.masks.sliding_window(16))),
            "scale": missed(call(scale=0.125)),
            "spec": missed(call(spec=spec)),
            "kernel_options": missed(call(kernel_options={"num_warps": 8})),
        }
        with tuned.using(Store(None)) as store:
            found["an empty store"] = missed(call())
            store.put([Entry({"stage": "core_forward"}, {"block_m": 64})])
            found["a tuned candidate"] = missed(call())
        with mock.patch.object(cache_key, "CACHE_SALT", "another version"):
            found["the package's version"] = missed(call())
    return found


# --- for a GPU that is not here -------------------------------------------------------------------------------------


@contextlib.contextmanager
def loaded_by_stand_ins(launched: list[tuple[Any, ...]] | None = None) -> Iterator[list[str]]:
    """The names of kernels, in the order in which their cubins were "loaded" meanwhile; ``launched`` gets what was."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import static_triton_launcher as launcher

    loaded: list[str] = []
    returns_module = hasattr(launcher.StaticallyLaunchedTritonKernel, "close")

    class Driver:
        @staticmethod
        def _load_kernel(path: str, name: str, shared: int, device: int) -> tuple[int, ...]:
            loaded.append(name)
            return (1,) * returns_module + (1, 32, 0)

        @staticmethod
        def _unload_kernel(module: int) -> None:
            pass

        @staticmethod
        def _launch_kernel(*arguments: Any) -> None:
            assert launched is not None
            launched.append(arguments)

    stay = staticmethod(lambda index: index)
    with (
        mock.patch.object(launcher.StaticallyLaunchedCudaKernel, "C_impl", Driver),
        mock.patch.object(CudaInterface, "exchange_device", stay),
        mock.patch.object(CudaInterface, "maybe_exchange_device", stay),
    ):
        yield loaded


def on_a_gpu(*, dynamic: bool = False, covariance_mod: Any = None, **options: Any) -> list[str]:
    """Compile a call and its gradients for an H100, through torch's caches; our kernels that were loaded for it.

    ``options`` are Inductor's, over one thread.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: Any, inputs: Any, **how: Any) -> Any:
        there, inputs_there = compat.move_graph(graph, inputs)
        backward = torch_compat_backward._backwards.pop(graph, None)
        if backward is not None:
            torch_compat_backward._backwards[there] = compat.move_graph(backward, [])[0]
        return compile_fx_inner(there, inputs_there, **how)

    def backend(graph: Any, inputs: Any) -> Any:
        compile_fx(graph, inputs, inner_compile=inner)
        return graph.forward

    def attention(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return plx.attention(q, k, v, r, covariance_mod=covariance_mod, kernel_options={"USE_TMA": True})

    with (
        compat.pretend_gpu(resolve("sm_90")),
        loaded_by_stand_ins() as loaded,
        # The backward is compiled with the forward, which nobody runs.
        functorch.patch(force_non_lazy_backward_lowering=True),
        inductor.patch({"compile_threads": 1, **options}),
    ):
        call = torch.compile(codegen.fresh(attention), fullgraph=True, dynamic=dynamic, backend=backend)
        call(*operands(torch.bfloat16, 64))
    return [name for name in loaded if name.startswith("parallax_")]


def main() -> None:
    found: dict[str, Any] = {}
    warm = sys.argv[1] == "warm"
    if warm:
        found["variants"] = variants()
    found["cpu"] = answers(call())
    with mock.patch("triton.compile", side_effect=MissedError) if warm else contextlib.nullcontext():
        found["sm_90"] = answers(lambda: found.update(loaded=on_a_gpu()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
