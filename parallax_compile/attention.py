"""The call: :func:`attention`, and :func:`flex_attention` with torch's exact signature.

Uncompiled, a call runs the dense reference and says once that it is not fused; under ``torch.compile`` it becomes one
operator, which the lowering turns into fused kernels. There is no third behaviour.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import masks, reference, validation
from .block_masks import as_mask_mod, check_mask_mod, combined_block_mask
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering import probes, scan
from .lowering.cache_key import cache_salt
from .lowering.dense import allowed_pairs
from .lowering.mlir import forms
from .lowering.operator import attention_forward
from .lowering.plan_scan import chunked_scan
from .lowering.plan_split import FEWEST_KEYS_TO_SPLIT, MOST_ROWS_TO_SPLIT, split_choice
from .lowering.scan import State
from .lowering.torch_compat_dynamo import mark_static
from .lowering.torch_compat_errors import raise_input
from .lowering.torch_compat_operator import result_problem, statically_known_true, vectorize_mod
from .spec import PARALLAX, SOFTMAX, AttentionSpec, Gradient, Solved

__all__ = ["AuxOutput", "AuxRequest", "attention", "flex_attention"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class AuxRequest(NamedTuple):
    """Which auxiliary outputs to return. torch's own ``AuxRequest`` is accepted in its place.

    Attributes:
        lse: log-sum-exp of the scores, natural logarithm.
        max_scores: refused (the core keeps no row maxima); the field is torch's.
        probe_mean: ``t = sum_j p_j s2_j``.
        value_mean: ``sum_j p_j v_j``, the softmax attention of the same scores.
        iterations, residual: of the solver, for members with a solved or gradient probe.
        state: the sums after the last key, a :class:`~parallax_compile.State` (infinite bandwidth without a
            covariance_mod, under a causal mask or none): what ``initial_state=`` takes for the keys that follow.
    """

    lse: bool = False
    max_scores: bool = False
    probe_mean: bool = False
    value_mean: bool = False
    iterations: bool = False
    residual: bool = False
    state: bool = False


class AuxOutput(NamedTuple):
    """The auxiliary outputs that were asked for; the others are None. Row statistics are ``[B, Hq, Lq]`` float32."""

    lse: Tensor | None = None
    max_scores: Tensor | None = None
    probe_mean: Tensor | None = None
    value_mean: Tensor | None = None
    iterations: Tensor | None = None
    residual: Tensor | None = None
    state: State | None = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    spec: AttentionSpec | None = None,
    score_mod: ScoreMod | None = None,
    covariance_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_aux: Any = None,
    ridge: Tensor | float | None = None,
    initial_state: State | None = None,
    kernel_options: dict[str, Any] | None = None,
) -> Any:
    """Attention of the local-linear family: ``out = value mean - Cov_p(s2, v)`` for Parallax, and its relatives.

    Args:
        query: ``[B, Hq, Lq, D]``, bfloat16, float16, float32 or float64.
        key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``; same dtype and device as query.
        probe: ``[B, Hq, Lq, D]``, the learned probe ``r``; None for members that take none.
        spec: the member; None means PARALLAX with a probe and SOFTMAX without.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, applied to ``scale * q.k`` after the spec's.
        covariance_mod: the same for the unscaled probe score ``r.k``.
        block_mask: a torch ``BlockMask`` for ``(Lq, Lk)``; combines with the spec's mask by and.
        scale: factor of the scores; None means ``1/sqrt(D)``.
        enable_gqa: allow ``Hq`` to be a multiple of ``Hkv``.
        return_lse: return ``(out, lse)``.
        return_aux: an :class:`AuxRequest`; return ``(out, AuxOutput)``.
        ridge: overrides the spec's ridge; broadcastable to ``[B, Hq, Lq]``, differentiable.
        initial_state: sums over keys before these, which every row of the first run (document) sees too: what an earlier call
            returned as ``state``. Differentiable.
        kernel_options: of the compiled kernels: ``BLOCK_M, BLOCK_N, num_warps, num_stages``; ``USE_TMA`` (bool): whether
            loops read through tensor descriptors; ``HELD_TILES``: how many of the tiles that stay are kept in registers;
            ``WARP_SPECIALIZED`` (bool): a stage by its kernel for Hopper, whose warps copy or compute (the gradient of wide
            keys becomes infinite where a weight times its scaled, centred probe score exceeds 255). Each also with
            the prefix ``fwd_``, ``bwd_``, ``bwd_query_``, ``bwd_key_`` or ``solve_``. ``SPLIT_KEYS`` (bool): whether the
            kernels of decoding make the output, which take a split of the keys each; left out, they do where no gradient is
            wanted, for up to 16 rows and 512 keys or more. ``DIRECT`` (bool): whether the systems
            of a solved probe are solved directly (``D`` up to 32) or by conjugate gradients, where the plan would choose.

    Returns:
        ``out [B, Hq, Lq, Dv]`` in query's dtype, alone or with what was asked for. A row with no allowed key gives 0,
        LSE -inf, ``t`` 0 and zero gradients.

    Raises:
        InputError: (a ValueError) an impossible value, shape or combination.
        InputTypeError: (a TypeError) a wrong type or dtype.
        UnsupportedError: the compiled path does not cover the call.

    Sources: arXiv 2605.29157 (Parallax), arXiv 2510.01450 (LLA); the mods and ``BlockMask`` follow flex_attention.
    """
    if spec is None:
        spec = SOFTMAX if probe is None else PARALLAX
    validation.check_spec(spec)
    query, key, value, probe = _autocast(query, key, value, probe)
    validation.check_tensors(query, key, value, probe, spec, enable_gqa)
    validation.check_scale(scale, spec)
    validation.check_mods(spec, score_mod, covariance_mod)
    validation.check_block_mask(block_mask, query, key)
    validation.check_ridge(ridge, spec, query)
    validation.check_kernel_options(kernel_options)
    validation.check_solver_options(kernel_options, spec, query)
    request = _aux_request(return_lse, return_aux, spec)

    own_mods = any(given is not None for given in (score_mod, covariance_mod, block_mask))
    score_mod = _compose(spec.score_mod, score_mod)
    covariance_mod = _compose(spec.covariance_mod, covariance_mod)
    prefix = None
    if block_mask is None and chunked_scan(spec.bandwidth.kind == "infinite", covariance_mod is not None):
        prefix = masks.prefix(spec.mask_mod, query.size(2), key.size(2))
    stateful = request.state or initial_state is not None
    if stateful:
        validation.check_state(initial_state, spec, query, key, value, prefix is not None)
    if torch.compiler.is_dynamo_compiling():
        run = _compiled
    elif forms.current() is not None:
        run = _portable
    else:
        _warn_unfused()
        # A state is sums, of which the reference knows nothing; the same sums in plain torch.
        run = _summed if stateful else _uncompiled
    call = _Call(query, key, value, probe, spec, score_mod, covariance_mod, block_mask, scale, ridge, kernel_options)
    call = call._replace(prefix=prefix, initial=initial_state, request=request, own_mods=own_mods)
    out, aux = run(call)
    if request.value_mean and aux.value_mean is None:
        # The value mean is the softmax member on the same scores and mask; asking for it is rare, so it is a call.
        softmax = SOFTMAX.replace(mask_mod=spec.mask_mod, bandwidth=spec.bandwidth)
        mean, _ = run(call._replace(probe=None, spec=softmax, covariance_mod=None, ridge=None))
        aux = aux._replace(value_mean=mean)
    if return_lse:
        return out, aux.lse
    if return_aux is not None:
        return out, AuxOutput(
            lse=aux.lse if request.lse else None,
            probe_mean=aux.probe_mean if request.probe_mean else None,
            value_mean=aux.value_mean if request.value_mean else None,
            iterations=aux.iterations if request.iterations else None,
            residual=aux.residual if request.residual else None,
            state=aux.state if request.state else None,
        )
    return out


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Softmax attention with the signature of ``torch.nn.attention.flex_attention.flex_attention``.

    For code that moves over by changing an import: the softmax member of :func:`attention`, which see.
    """
    return attention(
        query,
        key,
        value,
        spec=SOFTMAX,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        return_aux=return_aux,
        kernel_options=kernel_options,
    )


# --- the two behaviours ---------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A checked call: the arguments of :func:`attention`, with the mods of the spec and of the call composed.

    Attributes:
        prefix: the keys of each row, where the member's sums run; else None.
        own_mods: whether the call adds mods or a mask to the spec's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probe: Tensor | None
    spec: AttentionSpec
    score_mod: ScoreMod | None
    covariance_mod: ScoreMod | None
    block_mask: BlockMask | None
    scale: float | None
    ridge: Tensor | float | None
    kernel_options: dict[str, Any] | None
    prefix: scan.Prefix | None = None
    initial: State | None = None
    request: AuxRequest = AuxRequest()
    own_mods: bool = False


def _uncompiled(call: _Call) -> tuple[Tensor, AuxOutput]:
    query, key, spec, block_mask = call.query, call.key, call.spec, call.block_mask
    index = [torch.arange(n, device=query.device) for n in (*query.shape[:3], key.size(2))]

    def dense(mod: ScoreMod | None, name: str) -> Callable[[Tensor], Tensor] | None:
        if mod is None:
            return None
        vectorized = vectorize_mod(mod)

        def run(scores: Tensor) -> Tensor:
            modified = vectorized(scores, *index) if scores.numel() else scores
            _check_result(name, modified, is_mask=False)
            return modified.to(scores.dtype)

        return run

    def dense_mask(mask_mod: Callable[..., Tensor]) -> Tensor | None:
        if any(n.numel() == 0 for n in index):
            return None
        keep = vectorize_mod(mask_mod, kind="mask")(*index)
        _check_result("mask_mod", keep, is_mask=True)
        return keep

    mask = None
    if block_mask is not None:
        mask = dense_mask(block_mask.mask_mod)
        if mask is not None:
            mask = allowed_pairs(_operands(block_mask), mask, query.size(2), key.size(2))
    if spec.mask_mod is not None:
        own = dense_mask(spec.mask_mod)
        mask = own if mask is None or own is None else mask & own
    result = reference.attention(
        query,
        key,
        call.value,
        call.probe,
        spec=spec,
        score_mod=dense(call.score_mod, "score_mod"),
        covariance_mod=dense(call.covariance_mod, "covariance_mod"),
        mask=mask,
        scale=call.scale,
        ridge=call.ridge,
    )
    return result.out, AuxOutput(
        lse=result.lse,
        probe_mean=result.probe_mean,
        value_mean=result.value_mean,
        iterations=result.iterations,
        residual=result.residual,
    )


def _portable(call: _Call) -> tuple[Tensor, AuxOutput]:
    """The call while it is traced for MLIR (:mod:`.portable`)."""
    from .lowering.mlir import opaque, programs

    form, request = forms.current(), call.request
    assert form is not None
    if call.initial is not None or request.state:
        raise UnsupportedError(
            "a state (initial_state, or return_aux with state) is not traced for MLIR. Leave it out."
        )
    mask_mod = as_mask_mod(call.spec.mask_mod, call.block_mask)
    mods = (call.score_mod, call.covariance_mod, mask_mod)
    declared = programs.Declared(*call[:5], *mods, call.scale, call.ridge)
    if form.name == "dense":
        found = programs.dense(declared)
        return found.out, AuxOutput(found.lse, None, *found[2:])
    if any(request):
        raise UnsupportedError(f'the {form.name} form has no auxiliary outputs. Emit the call with form="dense".')
    if form.name == "declared":
        form.handed_over.append(declared)
        return call.query.new_empty((*call.query.shape[:3], call.value.size(3))), AuxOutput()
    if form.name == "opaque":
        return opaque.attention(declared, own_mods=call.own_mods), AuxOutput()
    return programs.blockwise(declared, form.block_size), AuxOutput()


def _compiled(call: _Call) -> tuple[Tensor, AuxOutput]:
    query, key, value, probe, spec = call[:5]
    validation.check_compiled(query, value, spec)
    operands = (query, key, value) if probe is None else (query, key, value, probe)
    if query.numel() == 0 or key.numel() == 0:
        return _empty(call, operands)
    for tensor in operands:
        mark_static(tensor, -3)
        mark_static(tensor, -1)
    if call.prefix is not None:
        validation.check_scan_options(call.kernel_options)
        return _summed(call)
    if _needs_no_lists(call, operands):
        weights = _weights_of_few_rows(call)
    else:
        weights = _weights(call, combined_block_mask(spec.mask_mod, call.block_mask, query, key))
    stage = None
    if isinstance(spec.probe, Solved):
        # A covariance_mod acts after the solve: there the core makes the output.
        fused = call.covariance_mod is None
        given = (query, key, value if fused else None, _ridge(call, weights), weights)
        found = probes.solved(*given, spec.intercept, spec.probe.max_iterations)
        stage = found.stage
        if fused:
            aux = AuxOutput(lse=found.lse, probe_mean=found.mean)
            return found.out, aux._replace(iterations=stage.iterations, residual=stage.residual)
    elif isinstance(spec.probe, Gradient):
        stage = _gradient_stage(call, weights)
    if stage is not None:
        probe = stage.probe
    out, _, lse, probe_mean = attention_forward(
        query,
        key,
        value,
        probe,
        weights.score_mod,
        _identity if call.covariance_mod is None else call.covariance_mod,
        weights.block_mask,
        weights.scale,
        spec.intercept,
        False,
        weights.kernel_options,
    )
    aux = AuxOutput(lse=lse, probe_mean=probe_mean, value_mean=out if probe is None else None)
    return out, aux if stage is None else aux._replace(iterations=stage.iterations, residual=stage.residual)


def _summed(call: _Call) -> tuple[Tensor, AuxOutput]:
    """Members whose sums run along the sequence, in linear time."""
    query, key, value, probe, spec = call[:5]
    assert call.prefix is not None
    weights, stage = _weights(call, None), None
    if isinstance(spec.probe, Solved):
        lam = _ridge(call, weights)
        stage = probes.summed(query, key, lam, weights, spec.intercept, spec.probe.max_iterations)
    elif isinstance(spec.probe, Gradient):
        stage = _gradient_stage(call, weights)
    if stage is not None:
        probe = stage.probe
    found = scan.attention(
        query, key, value, probe, call.prefix, spec.intercept,
        moment=call.request.probe_mean, initial=call.initial, save_state=call.request.state,
    )  # fmt: skip
    aux = AuxOutput(
        lse=found.lse,
        probe_mean=found.mean if call.request.probe_mean else None,
        value_mean=found.out if probe is None else None,
        state=found.state,
    )
    if stage is None:
        return found.out, aux
    if found.state is not None:
        aux = aux._replace(state=found.state._replace(key_key=scan.final_products(key, call.prefix, call.initial)))
    return found.out, aux._replace(iterations=stage.iterations, residual=stage.residual)


def _weights(call: _Call, block_mask: BlockMask | None) -> probes.Weights:
    options = dict(call.kernel_options) if call.kernel_options is not None else {}
    options["cache_salt"] = cache_salt()
    score_mod = _identity if call.score_mod is None else call.score_mod
    return probes.Weights(
        _uniform if call.spec.bandwidth.kind == "infinite" else score_mod,
        _operands(block_mask),
        1.0 / math.sqrt(call.query.size(3)) if call.scale is None else float(call.scale),
        options,
        call.prefix,
        call.initial,
    )


def _needs_no_lists(call: _Call, operands: tuple[Tensor, ...]) -> bool:
    """Whether the plan will split the keys (:func:`.plan_split.splits_keys`), and the spec's mask needs no lists of blocks.

    Where a mod captures what needs a gradient the lists are left out for the core too, which reads every key for its few rows.
    """
    query, key, spec = call.query, call.key, call.spec
    choice = split_choice(call.kernel_options)
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
    if choice:
        validation.check_split_keys(spec, call.covariance_mod is not None, gradient, call.block_mask, query, key)
    # Without a guard on lengths that are symbols: they are what an export leaves open.
    short = statically_known_true(key.size(2) < FEWEST_KEYS_TO_SPLIT)
    few = statically_known_true(query.size(2) <= MOST_ROWS_TO_SPLIT) and not short
    alone = spec.mask_mod is not None and call.block_mask is None and spec.probe.kind != "solved"
    return alone and not gradient and (few if choice is None else choice)


def _weights_of_few_rows(call: _Call) -> probes.Weights:
    """Without lists of blocks: the kernels ask the mask for each key, within the bounds that a library mask has."""
    weights, mask_mod = _weights(call, None), call.spec.mask_mod
    assert mask_mod is not None
    check_mask_mod(mask_mod, call.query)
    options = weights.kernel_options | {"keys": masks.band(mask_mod)}
    return weights._replace(block_mask=(*weights.block_mask[:-1], mask_mod), kernel_options=options)


def _ridge(call: _Call, weights: probes.Weights) -> Tensor:
    """The ridge of each row, for members whose probe is not given."""
    kind = call.spec.probe
    assert isinstance(kind, (Solved, Gradient))
    given = kind.ridge if call.ridge is None else call.ridge
    return probes.ridge_of_rows(call.query, call.key, given, kind.ridge_scale, weights)


def _gradient_stage(call: _Call, weights: probes.Weights) -> probes.ProbeStage:
    """The stage in front of the core that finds a gradient probe."""
    kind = call.spec.probe
    assert isinstance(kind, Gradient)
    lam = _ridge(call, weights)
    return probes.gradient(call.query, call.key, lam, weights, call.spec.intercept, kind.steps, kind.step_size)


def _empty(call: _Call, operands: tuple[Tensor, ...]) -> tuple[Tensor, AuxOutput]:
    """No rows or no keys: zeros, connected to the operands so that their gradients are zeros too."""
    query, value = call.query, call.value
    if call.initial is not None or call.request.state:
        raise_input(InputError, "a state needs at least one row and one key; got none.")
    connection = sum(tensor[..., :0].sum() for tensor in operands)
    out = query.new_zeros((*query.shape[:3], value.size(3))) + connection
    rows = torch.zeros(query.shape[:3], dtype=torch.float32, device=query.device)
    none = rows.to(torch.int32)
    return out, AuxOutput(lse=rows - float("inf"), probe_mean=rows, value_mean=out, iterations=none, residual=rows)


# --- parts ----------------------------------------------------------------------------------------------------------


def _identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _uniform(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The scores at infinite bandwidth: none, so that every allowed key weighs the same and the product drops out."""
    return torch.zeros_like(score)


def _everything(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return b.new_ones((), dtype=torch.bool)


def _compose(first: ScoreMod | None, then: ScoreMod | None) -> ScoreMod | None:
    """One plain function that Dynamo can trace, whatever kinds of callables the mods are."""
    if first is None and then is None:
        return None

    def composed(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if first is not None:
            score = first(score, b, h, q_idx, kv_idx)
        if then is not None:
            score = then(score, b, h, q_idx, kv_idx)
        return score

    return composed


def _operands(block_mask: BlockMask | None) -> tuple:
    """A block mask as the operator's plain tuple, read by attribute (``as_tuple`` changes length between releases)."""
    if block_mask is None:
        return (*(None,) * 8, 1, 1, _everything)
    return (
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
        block_mask.q_num_blocks,
        block_mask.q_indices,
        block_mask.full_q_num_blocks,
        block_mask.full_q_indices,
        block_mask.BLOCK_SIZE[0],
        block_mask.BLOCK_SIZE[1],
        block_mask.mask_mod,
    )


def _autocast(query: Any, key: Any, value: Any, probe: Any) -> tuple:
    """Under ``torch.autocast``, the operands in its dtype, as scaled_dot_product_attention has them."""
    if not isinstance(query, Tensor):
        return query, key, value, probe
    kind = query.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return query, key, value, probe
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value), cast(probe)


def _aux_request(return_lse: bool, return_aux: Any, spec: AttentionSpec) -> AuxRequest:
    validation.check_flag("return_lse", return_lse)
    if return_aux is None:
        return AuxRequest(lse=return_lse)
    if return_lse:
        raise_input(InputError, "return_lse and return_aux exclude each other. Ask return_aux for lse.")
    if not hasattr(return_aux, "lse"):  # as torch's own has, in every release
        raise_input(
            InputTypeError, f"return_aux must be a plx.AuxRequest or None, but got {type(return_aux).__name__}."
        )
    request = AuxRequest(
        lse=getattr(return_aux, "lse", False),
        max_scores=getattr(return_aux, "max_scores", False),
        probe_mean=getattr(return_aux, "probe_mean", False),
        value_mean=getattr(return_aux, "value_mean", False),
        iterations=getattr(return_aux, "iterations", False),
        residual=getattr(return_aux, "residual", False),
        state=getattr(return_aux, "state", False),
    )
    if request.max_scores:
        raise_input(InputError, "return_aux asks for max_scores, which the core does not keep. Ask for lse.")
    if (request.iterations or request.residual) and spec.probe.kind not in ("solved", "gradient"):
        raise_input(
            InputError,
            "return_aux asks for iterations or residual, which only solved and gradient probes have; "
            f"the spec's probe is {spec.probe.kind}.",
        )
    return request


def _check_result(name: str, result: Any, *, is_mask: bool) -> None:
    problem = result_problem(result, is_mask=is_mask, axes=4)
    if problem is not None:
        raise InputTypeError(f"{name} {problem}")


_warned = False


def _warn_unfused(call: str = "plx.attention") -> None:
    global _warned
    if _warned or torch.compiler.is_exporting():
        return
    _warned = True
    warnings.warn(
        f"{call} was called without torch.compile: it runs the dense reference, which holds the whole score "
        "matrix. For fused kernels compile the caller: torch.compile(fn) or @plx.parallax_compile.",
        stacklevel=3,
    )
