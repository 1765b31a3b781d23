"""Who is measured: our members and what others offer, all called through one signature on the same tensors.

Peers that are not installed are reported with the reason and left out; none is vendored. Their wheels, for a machine that
has torch and triton: ``parallax-kernel==0.1.1`` and ``helion==1.2.0`` (official), ``fla-core==0.6.0`` (fla's operators).
FlashLLA has no package: put its checkout on ``PYTHONPATH``. Their autotuners compile for minutes a case, one configuration
after the other, unless ``peers.py`` did so ahead.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from parallax_compile.lowering.codegen import fresh
from torch import Tensor

import parallax_compile as plx

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

PRODUCTS = {"softmax": {"forward": 2, "both": 7}, "parallax": {"forward": 4, "both": 12}}
"""Matrix products that a method needs at least, in the forward and in forward and backward."""


@dataclass(frozen=True)
class Case:
    """One problem, in the layout ``[B, H, L, D]``.

    Attributes:
        mask: the library mask, causal or narrower.
        pairs: allowed (query, key) pairs of one head, of which the work is counted.
        mods: whether the mods of the issue are on: ALiBi scores, and a tanh cap of the probe score.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    length: int
    width: int
    mask: Any = field(default_factory=plx.masks.causal, compare=False)
    pairs: int = 0
    mods: bool = False

    @property
    def plain_causal(self) -> bool:
        """Whether it is what every contender can do."""
        return self.mask == plx.masks.causal() and not self.mods

    @property
    def visible(self) -> int:
        """Allowed pairs of one head, counted as the literature does for a causal mask: half of all."""
        return self.pairs or self.length**2 // 2

    def flops(self, method: str, direction: str) -> float:
        """Floating-point operations that the method needs at least."""
        products = PRODUCTS[method][direction]
        return products * 2.0 * self.batch * self.q_heads * self.visible * self.width

    def forward_bytes(self, method: str) -> float:
        """Bytes that the forward moves at least, in bf16: query, key, value, out, and Parallax's probe, each once."""
        heads = self.q_heads * (2 if method == "softmax" else 3) + 2 * self.kv_heads
        return 2.0 * self.batch * heads * self.length * self.width


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        method: ``softmax`` (2 products forward, 5 backward) or ``parallax`` (4 and 8).
        build: makes the call for a case; raises where it cannot.
        module: what must be importable.
        plain_only: whether it can do plain causal masks alone.
        on_cpu: whether it runs without a GPU.
    """

    name: str
    method: str
    build: Callable[[Case, str], Call]
    module: str | None = None
    plain_only: bool = True
    on_cpu: bool = False

    def absent(self, case: Case, device: str) -> str | None:
        """Why this one does not take part in ``case``; None if it does."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.plain_only and not case.plain_causal:
            return "causal masks only"
        if device == "cpu" and not self.on_cpu:
            return "needs a GPU"
        return None


def _ours(spec: plx.AttentionSpec, options: dict[str, Any] | None = None) -> Callable[[Case, str], Call]:
    def build(case: Case, device: str) -> Call:
        mask = plx.masks.block_mask(case.mask, None, None, case.length, case.length, device)
        chosen = spec
        if case.mods:
            chosen = chosen.replace(score_mod=plx.mods.alibi(case.q_heads))
            if spec.probe.kind != "zero":
                chosen = chosen.replace(covariance_mod=plx.mods.tanh_cap(20.0, approx=True))
        gqa = case.q_heads != case.kv_heads

        def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
            probe = None if chosen.probe.kind == "zero" else r
            return plx.attention(q, k, v, probe, spec=chosen, block_mask=mask, enable_gqa=gqa, kernel_options=options)

        return torch.compile(fresh(call), fullgraph=True)  # contenders share the code of `call`: not its compile cache

    return build


def _flex(case: Case, device: str) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    score_mod = plx.mods.alibi(case.q_heads) if case.mods else None
    mask = create_block_mask(case.mask, None, None, case.length, case.length, device=device)
    gqa = case.q_heads != case.kv_heads
    return torch.compile(lambda q, k, v, r: flex_attention(q, k, v, score_mod, mask, enable_gqa=gqa), fullgraph=True)


def _sdpa(backend: str) -> Callable[[Case, str], Call]:
    def build(case: Case, device: str) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)
        gqa = case.q_heads != case.kv_heads

        def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return call

    return build


def _official(module: str) -> Callable[[Case, str], Call]:
    def build(case: Case, device: str) -> Call:
        function = importlib.import_module(module).parallax_func
        return lambda q, k, v, r: function(q, r, k, v)

    return build


HELION_TILES = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64))
"""Queries and keys of a tile in the official Helion kernels; each with 4 and 8 warps and 2 and 3 stages."""


def _helion(case: Case, device: str) -> Call:
    """The official Helion kernels, each the best of a grid: their own tuning takes minutes for every shape."""
    import helion
    from parallax.helion import parallax_train as official

    if multiprocessing.current_process().daemon:
        raise RuntimeError("Helion compiles in processes of its own, which a job of --at-once may not have")
    grid = [
        helion.Config(block_sizes=list(tile), num_warps=warps, num_stages=stages)
        for tile in HELION_TILES
        for warps in (4, 8)
        for stages in (2, 3)
    ]
    for kernel in (official._fwd_kernel, official._fwd_kernel_split, official._bwd_rq, official._bwd_kv):
        kernel.configs = grid
    return _official("parallax.helion")(case, device)


def _fla(case: Case, device: str) -> Call:
    from fla.ops.parallax import parallel_parallax

    # Its layout is [B, L, H, D]: transposed views, which its wrapper copies where it has to.
    return lambda q, k, v, r: parallel_parallax(*(x.transpose(1, 2) for x in (q, r, k, v))).transpose(1, 2)


SPECIALIZED, TRITON = {"WARP_SPECIALIZED": True}, {"WARP_SPECIALIZED": False}
"""The two kernels of each stage on Hopper: what our default chooses between."""

CONTENDERS = (
    Contender("parallax, ours", "parallax", _ours(plx.PARALLAX), plain_only=False, on_cpu=True),
    Contender("softmax, ours", "softmax", _ours(plx.SOFTMAX), plain_only=False, on_cpu=True),
    Contender("parallax, ours, specialised", "parallax", _ours(plx.PARALLAX, SPECIALIZED)),
    Contender("parallax, ours, Triton", "parallax", _ours(plx.PARALLAX, TRITON)),
    Contender("softmax, ours, specialised", "softmax", _ours(plx.SOFTMAX, SPECIALIZED)),
    Contender("softmax, ours, Triton", "softmax", _ours(plx.SOFTMAX, TRITON)),
    Contender("softmax, flex_attention", "softmax", _flex, plain_only=False),
    Contender("softmax, cuDNN", "softmax", _sdpa("CUDNN_ATTENTION")),
    Contender("softmax, FA2", "softmax", _sdpa("FLASH_ATTENTION")),
    Contender("parallax, official Triton", "parallax", _official("parallax"), "parallax"),
    Contender("parallax, official Helion", "parallax", _helion, "helion"),
    Contender("parallax, fla", "parallax", _fla, "fla"),
)


def cases(device: str) -> dict[str, Case]:
    """Every case by name."""
    causal, window, length, count = plx.masks.causal(), 1024, 16384, 8
    document = length // count
    documents = plx.masks.document((torch.arange(length) // document).to(device))
    in_window = window * (window + 1) // 2 + (length - window) * window
    found = [
        Case("4k", 4, 16, 16, 4096, 128),
        Case("16k", 1, 16, 16, length, 128),
        Case("d64", 8, 16, 16, 2048, 64),
        Case("gqa", 2, 32, 8, 8192, 128),
        Case("mods", 4, 16, 16, 4096, 128, mods=True),
        Case("window", 1, 16, 16, length, 128, plx.masks.sliding_window(window), in_window),
        Case("documents", 1, 16, 16, length, 128, causal & documents, count * document**2 // 2),
        Case("tiny", 1, 2, 2, 64, 16),
    ]
    found += [Case(f"length {n}", length // n, 16, 16, n, 128) for n in (512, 1024, 2048, 8192)]
    return {case.name: case for case in found}
