"""What a call of :func:`~parallax_compile.attention` may be: every user error, found before anything is compiled.

The checks are plain Python that Dynamo can trace; :func:`~parallax_compile.lowering.torch_compat_errors.raise_input` makes a
failed one surface as itself, compiled or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .block_masks import own_lists
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.plan_solve import WIDEST_DIRECT
from .lowering.plan_split import ONLY_OF_THE_CORE
from .lowering.torch_compat_errors import check_arity, raise_input
from .spec import AttentionSpec
from .states import check_parts

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_WIDTH = 256
MOST_WARPS = 32  # of a program: 1024 threads
_SCORE_ARGUMENTS = ("score", "b", "h", "q_idx", "kv_idx")
KERNEL_OPTIONS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "USE_TMA", "HELD_TILES", "WARP_SPECIALIZED")
CALL_OPTIONS = ("SPLIT_KEYS",)  # of the whole call: without a prefix
SOLVER_OPTIONS = ("DIRECT", "solve_DIRECT")
KERNEL_OPTION_PREFIXES = ("", "fwd_", "bwd_", "bwd_query_", "bwd_key_", "solve_")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, probe: Any, spec: AttentionSpec, enable_gqa: bool) -> None:
    """Ranks, devices, dtypes, widths, heads and lengths of the operands, and whether the spec takes a probe."""
    if probe is not None and not isinstance(probe, Tensor):
        if callable(probe):
            raise_input(
                InputTypeError, "probe must be a tensor, but got a callable. To pass a score mod write score_mod=..."
            )
        raise_input(InputTypeError, f"probe must be a tensor or None, but got {type(probe).__name__}.")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("probe", probe)):
        if tensor is None and name == "probe":
            continue
        if not isinstance(tensor, Tensor):
            raise_input(InputTypeError, f"{name} must be a tensor, but got {type(tensor).__name__}.")
        check_strided(name, tensor)
        if tensor.dim() != 4:
            raise_input(
                InputError, f"{name} must be 4-D, [batch, heads, length, width], but got shape {tuple(tensor.shape)}."
            )
        if tensor.dtype not in FLOATING:
            raise_input(
                InputTypeError,
                f"{name} must be bfloat16, float16, float32 or float64, but got {tensor.dtype}. Cast it first.",
            )
        if tensor.dtype != query.dtype:
            raise_input(
                InputTypeError,
                f"{name} must have query's dtype {query.dtype}, but got {tensor.dtype}. Cast it, or use torch.autocast.",
            )
        if tensor.device != query.device:
            raise_input(
                InputError, f"{name} must be on query's device {query.device}, but got {tensor.device}. Move it first."
            )
        if tensor.size(0) != query.size(0):
            raise_input(
                InputError,
                f"{name} must have query's batch size {query.size(0)}, but got {tensor.size(0)}. "
                "Expand it (an expanded tensor is not copied).",
            )
    takes_probe = spec.probe.kind == "learned"
    if takes_probe and probe is None:
        raise_input(
            InputError,
            "the spec has a learned probe, so probe must be a tensor [batch, query heads, query length, width]; "
            "got None. Pass it, or use plx.SOFTMAX.",
        )
    if not takes_probe and probe is not None:
        raise_input(
            InputError,
            f"the spec's probe is {spec.probe.kind}, which takes no probe tensor, but one was given. "
            "Drop it, or use a spec with plx.Learned().",
        )
    if key.size(3) != query.size(3):
        raise_input(
            InputError, f"key must have query's width D = {query.size(3)}, but got {key.size(3)} (the last dimension)."
        )
    if probe is not None and probe.shape != query.shape:
        raise_input(
            InputError,
            f"probe must have query's shape {tuple(query.shape)}, but got {tuple(probe.shape)}.",
        )
    if value.size(1) != key.size(1) or value.size(2) != key.size(2):
        raise_input(
            InputError,
            "value must have key's heads and length, "
            f"({key.size(1)}, {key.size(2)}), but got ({value.size(1)}, {value.size(2)}).",
        )
    if query.size(3) < 1 or value.size(3) < 1:
        raise_input(InputError, "query and value must have a width of at least 1, but got 0 (the last dimension).")
    if query.size(1) != key.size(1):
        if not enable_gqa:
            raise_input(
                InputError,
                f"query has {query.size(1)} heads and key has {key.size(1)}. "
                "For grouped-query attention pass enable_gqa=True.",
            )
        if key.size(1) == 0 or query.size(1) % key.size(1) != 0:
            raise_input(
                InputError,
                f"query's heads must be a multiple of key's for grouped-query attention, "
                f"but got {query.size(1)} and {key.size(1)}.",
            )


def check_strided(name: str, tensor: Tensor) -> None:
    """``tensor`` is dense, with strides: neither sparse nor nested."""
    if tensor.is_nested or tensor.layout != torch.strided:
        found = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise_input(
            InputTypeError,
            f"{name} must be a dense, strided tensor, but got {found}. Make it dense: pad sequences, "
            "or pack them under plx.masks.document.",
        )


def check_flag(name: str, flag: Any) -> None:
    """A switch is a bool: a tensor, or text, would be taken for True."""
    if not isinstance(flag, bool):
        raise_input(InputTypeError, f"{name} must be a bool, but got {type(flag).__name__}.")


def check_spec(spec: Any) -> None:
    """``spec`` is a declaration."""
    if not isinstance(spec, AttentionSpec):
        raise_input(InputTypeError, f"spec must be an AttentionSpec, but got {type(spec).__name__}.")


def check_scale(scale: Any, spec: AttentionSpec) -> None:
    """``scale`` is a finite number, and is not given at infinite bandwidth, where there is no score to scale."""
    if scale is None:
        return
    if isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise_input(InputTypeError, f"scale must be a number or None, but got {type(scale).__name__}.")
    if isinstance(scale, float) and not -math.inf < scale < math.inf:  # math.isfinite takes no symbolic float
        raise_input(InputError, f"scale must be finite, but got {scale}. None means 1/sqrt(D).")
    if spec.bandwidth.kind == "infinite":
        raise_input(InputError, f"scale must be None at infinite bandwidth, which has no scores to scale; got {scale}.")


def check_mods(spec: AttentionSpec, score_mod: Any, covariance_mod: Any) -> None:
    """The call's mods: callable, of five positional arguments, and meaningful for the spec."""
    for name, mod in (("score_mod", score_mod), ("covariance_mod", covariance_mod)):
        if mod is None:
            continue
        if not callable(mod):
            raise_input(InputTypeError, f"{name} must be callable or None, but got {type(mod).__name__}.")
        check_arity(name, mod, *_SCORE_ARGUMENTS)
    for name, mod in (("the spec's score_mod", spec.score_mod), ("the spec's covariance_mod", spec.covariance_mod)):
        if mod is not None:
            check_arity(name, mod, *_SCORE_ARGUMENTS)
    if spec.mask_mod is not None:
        check_arity("the spec's mask_mod", spec.mask_mod, *_SCORE_ARGUMENTS[1:])
    if score_mod is not None and spec.bandwidth.kind == "infinite":
        raise_input(
            InputError, "score_mod has no effect at infinite bandwidth, where every allowed key weighs the same."
        )
    if covariance_mod is not None and spec.probe.kind == "zero":
        raise_input(InputError, "covariance_mod needs a probe, but the spec's probe is zero.")


def check_block_mask(block_mask: Any, query: Tensor, key: Tensor) -> None:
    """A ``BlockMask`` for these lengths, batch, heads and device."""
    if block_mask is None:
        return
    check_block_mask_of(block_mask, query)
    q_length, kv_length = block_mask.seq_lengths
    if q_length != query.size(2) or kv_length != key.size(2):
        raise_input(
            InputError,
            f"block_mask was made for lengths (q, kv) = ({q_length}, {kv_length}), "
            f"but query and key have ({query.size(2)}, {key.size(2)}). Make it for these lengths.",
        )


def check_block_mask_of(block_mask: Any, query: Tensor) -> None:
    """A ``BlockMask`` for query's batch, heads and device."""
    if not isinstance(block_mask, BlockMask):
        hint = (
            " A mask function goes into the spec (mask_mod=), or through plx.masks.block_mask."
            if callable(block_mask)
            else ""
        )
        raise_input(
            InputTypeError,
            f"block_mask must be a torch.nn.attention.flex_attention.BlockMask or None, "
            f"but got {type(block_mask).__name__}.{hint}",
        )
    if block_mask.kv_num_blocks.size(0) not in (1, query.size(0)):
        raise_input(
            InputError,
            f"block_mask must be for batch size 1 or {query.size(0)}, but got {block_mask.kv_num_blocks.size(0)}.",
        )
    if block_mask.kv_num_blocks.size(1) not in (1, query.size(1)):
        raise_input(
            InputError,
            f"block_mask must be for 1 or {query.size(1)} query heads, but got {block_mask.kv_num_blocks.size(1)}.",
        )
    if block_mask.kv_num_blocks.device != query.device:
        raise_input(
            InputError,
            f"block_mask must be on query's device {query.device}, but got {block_mask.kv_num_blocks.device}.",
        )


def check_ridge(ridge: Any, spec: AttentionSpec, query: Tensor) -> None:
    """A tensor ridge goes with a solved or gradient probe and broadcasts to ``[B, Hq, Lq]``; its values are not read."""
    if ridge is None:
        return
    if spec.probe.kind not in ("solved", "gradient"):
        raise_input(
            InputError, f"ridge needs a solved or gradient probe, but the spec's probe is {spec.probe.kind}. Drop it."
        )
    if isinstance(ridge, (int, float)) and not isinstance(ridge, bool):
        if not (math.isfinite(ridge) and ridge > 0):
            raise_input(InputError, f"ridge must be positive and finite, but got {ridge}.")
        return
    if not isinstance(ridge, Tensor) or not ridge.is_floating_point():
        raise_input(InputTypeError, f"ridge must be a floating tensor or a number, but got {type(ridge).__name__}.")
    rows = tuple(query.shape[:3])
    if ridge.dim() > 3 or any(
        have not in (1, want) for have, want in zip(reversed(ridge.shape), reversed(rows), strict=False)
    ):
        raise_input(
            InputError,
            f"ridge must broadcast to [batch, query heads, query length] = {rows}, but got shape {tuple(ridge.shape)}.",
        )


def check_state(state: Any, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, runs: bool) -> None:
    """A state is given or asked for: the member has one, and the given one has its parts and shapes.

    Args:
        runs: whether the sums of the call run along the sequence.
    """
    if spec.bandwidth.kind != "infinite":
        raise_input(InputError, "a state (initial_state, or return_aux with state) needs infinite bandwidth.")
    if not runs:
        raise_input(
            InputError,
            "a state (initial_state, or return_aux with state) needs a mask that is a causal prefix, or none: "
            "plx.masks.causal() in the spec, plx.masks.document(ids, contiguous=True) with it, no block_mask and no "
            "covariance_mod; and "
            f"equal lengths under a causal mask (got {query.size(2)} and {key.size(2)}).",
        )
    if state is not None:
        check_parts("initial_state", state, spec, key, value)


def check_kernel_options(options: Any) -> None:
    """``kernel_options``: known names (with an optional stage prefix), positive integers, and bools for switches."""
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise_input(InputTypeError, f"kernel_options must be a dict or None, but got {type(options).__name__}.")
    for name, option in options.items():
        known = name in (*CALL_OPTIONS, *SOLVER_OPTIONS)
        for prefix in KERNEL_OPTION_PREFIXES:
            for known_name in KERNEL_OPTIONS:
                if name == prefix + known_name:
                    known = True
        if not known:
            raise_input(
                InputError,
                f"kernel_options has an unknown name {name}. Known: {', '.join(KERNEL_OPTIONS)}, "
                "each also with the prefix fwd_, bwd_, bwd_query_, bwd_key_ or solve_; DIRECT, also with solve_; and "
                f"{', '.join(CALL_OPTIONS)}.",
            )
        if name.endswith(("USE_TMA", "WARP_SPECIALIZED", "SPLIT_KEYS", "DIRECT")):
            if not isinstance(option, bool):
                raise_input(InputTypeError, f"kernel_options[{name}] must be a bool, but got {option}.")
            continue
        if options.get("SPLIT_KEYS") and name.removeprefix("fwd_") in ONLY_OF_THE_CORE:
            raise_input(
                InputError,
                f"kernel_options[{name}] is of the kernel that takes all keys at once, but SPLIT_KEYS is True. Drop one.",
            )
        least = 0 if name.endswith("HELD_TILES") else 1
        if isinstance(option, bool) or not isinstance(option, int) or option < least:
            raise_input(InputError, f"kernel_options[{name}] must be an integer of at least {least}, but got {option}.")
        check_power_of_two(name, option)


def check_power_of_two(name: str, option: int) -> None:
    """Sizes of tiles and numbers of warps, which Triton takes as powers of two only; ``name`` may have a stage's prefix."""
    power = not option & (option - 1)
    if "BLOCK" in name and not (power and option >= 16):
        raise_input(InputError, f"kernel_options[{name}] must be a power of two of at least 16, but got {option}.")
    if name.endswith("num_warps") and not (power and option <= MOST_WARPS):
        raise_input(
            InputError, f"kernel_options[{name}] must be a power of two of at most {MOST_WARPS}, but got {option}."
        )


def check_split_keys(
    spec: AttentionSpec, covariance_mod: bool, gradient: bool, block_mask: Any, query: Tensor, key: Tensor
) -> None:
    """A call that asks for its keys to be split can have it (:func:`.lowering.plan_split.splits_keys`)."""
    given = "kernel_options[SPLIT_KEYS] is True, but"
    if gradient:
        raise_input(
            UnsupportedError, f"{given} an input requires a gradient. Call it under torch.no_grad(), or leave it out."
        )
    if spec.probe.kind == "solved" and not covariance_mod:
        raise_input(UnsupportedError, f"{given} the output of a solved probe comes with the solve. Leave it out.")
    if block_mask is not None and own_lists(block_mask, query, key):
        raise_input(
            UnsupportedError,
            f"{given} block_mask has several lists of blocks for the rows of a key head (one for each query head, or for each "
            "block of rows). Make it with H=None and one block of rows, or leave the option out.",
        )


def check_solver_options(options: Mapping[str, Any] | None, spec: AttentionSpec, query: Tensor) -> None:
    """``DIRECT`` goes with a solved probe whose rows' matrices fit into registers."""
    for name in SOLVER_OPTIONS:
        option = (options or {}).get(name)
        if option is None:
            continue
        if spec.probe.kind != "solved":
            raise_input(
                InputError,
                f"kernel_options[{name}] is of solved probes, but the spec's probe is {spec.probe.kind}. Leave it out.",
            )
        if option and query.size(3) > WIDEST_DIRECT:
            raise_input(
                InputError,
                f"kernel_options[{name}] takes widths up to {WIDEST_DIRECT}, because each row's matrix is held in registers, "
                f"but got D = {query.size(3)}. Leave it out: wider heads are solved by conjugate gradients.",
            )


def check_scan_options(options: Any) -> None:
    """``kernel_options`` are of the streaming kernels."""
    if options:
        raise_input(
            UnsupportedError,
            "kernel_options do not reach the scan, which this call takes (infinite bandwidth under a causal mask or none). "
            "Leave them out.",
        )


def check_compiled(
    query: Tensor, value: Tensor, spec: AttentionSpec, on: str | None = None, call: str = "plx.attention"
) -> None:
    """What the compiled path covers on query's device, or on the kind ``on``; the rest is the reference's, uncompiled."""
    instead = f"Call {call} outside of torch.compile: the reference covers it."
    device = query.device.type if on is None else on
    if device not in ("cpu", "cuda"):
        raise_input(UnsupportedError, f"compiled attention runs on cpu and cuda, not on {device}. {instead}")
    if device == "cuda" and query.dtype == torch.float64:
        raise_input(UnsupportedError, f"compiled attention on cuda does not take float64. {instead}")
    if query.size(3) > MAX_WIDTH or value.size(3) > MAX_WIDTH:
        raise_input(
            UnsupportedError,
            f"compiled attention takes widths up to {MAX_WIDTH}, but got D = {query.size(3)}, Dv = {value.size(3)}. "
            f"{instead}",
        )
