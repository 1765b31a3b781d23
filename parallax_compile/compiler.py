"""``parallax_compile``, the decorator, and ``torch.compile(..., backend="parallax")``, the same by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn

from .errors import InputError, InputTypeError
from .replacement import check_member, replacing, without_fast_path
from .spec import AttentionSpec

__all__ = ["backend", "parallax_compile"]

T = TypeVar("T")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_OWN_OPTIONS = "parallax."


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend named "parallax": Inductor, with our operator lowered through our templates.

    Args:
        gm, example_inputs: what Dynamo captured.
        options: Inductor's options; keys that start with ``parallax.`` are ours and none is known yet.
        mode: one of Inductor's modes; ``"max-autotune"`` times every candidate kernel.

    Raises:
        InputError: an unknown mode or an unknown ``parallax.`` option.
    """
    from .lowering import register_lowerings
    from .lowering.torch_compat_inductor import compile_fx

    if mode is not None and mode not in _MODES:
        raise InputError(f"mode must be one of {', '.join(_MODES)}, but got {mode!r}.")
    for name in options or {}:
        if name.startswith(_OWN_OPTIONS):
            raise InputError(f"options has an unknown name {name!r}: there are no {_OWN_OPTIONS} options yet.")
    register_lowerings()
    return compile_fx(gm, example_inputs, mode=mode, options=options or {})


@overload
def parallax_compile(obj: T, **options: Any) -> T: ...
@overload
def parallax_compile(obj: None = None, **options: Any) -> Callable[[T], T]: ...


def parallax_compile(  # type: ignore[misc]
    obj: Any = None,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    replace_sdpa: AttentionSpec | None = None,
) -> Any:
    """Compile a function, a module class or a module instance, so that its attention runs fused.

    Args:
        obj: a function (a compiled function comes back), an ``nn.Module`` subclass (the class comes back, its instances
            run a compiled ``forward``; names, pickling and ``state_dict`` keys stay), or an instance (a compiled shallow
            twin that shares parameters comes back; the instance itself stays as it is). None when used with arguments:
            ``@parallax_compile(mode="max-autotune")``.
        fullgraph, dynamic, options: as for ``torch.compile``.
        mode: as for ``torch.compile``; ``"max-autotune"`` times every candidate kernel.
        replace_sdpa: a member without a learned probe, by which every ``F.scaled_dot_product_attention``, ``flex_attention``
            and ``nn.MultiheadAttention`` inside is computed: masks, mods, causality, scale and grouped queries are kept;
            dropout, attention weights and what else cannot be kept raise. ``flex_attention``'s kernel options are not read.

    Raises:
        InputTypeError: ``obj`` is none of these, or ``replace_sdpa`` is no spec.
        InputError: an unknown mode; a ``replace_sdpa`` whose probe is learned.
    """
    if mode is not None and mode not in _MODES:
        raise InputError(f"mode must be one of {', '.join(_MODES)} or None, but got {mode!r}.")
    if replace_sdpa is not None:
        check_member(replace_sdpa)
    settings = {
        "replace_sdpa": replace_sdpa,
        "fullgraph": fullgraph,
        "dynamic": dynamic,
        "options": {**(options or {})},
        "mode": mode,
    }
    if obj is None:
        return functools.partial(
            parallax_compile,
            fullgraph=fullgraph,
            dynamic=dynamic,
            mode=mode,
            options=options,
            replace_sdpa=replace_sdpa,
        )
    if isinstance(obj, type):
        if not issubclass(obj, nn.Module):
            raise InputTypeError(f"parallax_compile takes nn.Module classes, but got the class {obj.__qualname__}.")
        return _compile_class(obj, settings)
    if isinstance(obj, nn.Module):
        return _compile_instance(obj, settings)
    if callable(obj):
        return functools.wraps(obj)(_compiled(obj, settings))
    raise InputTypeError(
        f"parallax_compile takes a function, an nn.Module class or instance, but got {type(obj).__name__}."
    )


def _compiled(fn: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    options = dict(settings["options"])
    mode = settings["mode"]
    replace = settings["replace_sdpa"]
    compiled = torch.compile(
        fn if replace is None else replacing(fn, replace),
        backend=functools.partial(backend, options=options, mode=mode),
        fullgraph=settings["fullgraph"],
        dynamic=settings["dynamic"],
    )
    return compiled if replace is None else without_fast_path(compiled)


_CLASS_FORWARD = "_parallax_eager_forward"


def _compile_class(cls: type[nn.Module], settings: dict[str, Any]) -> type[nn.Module]:
    # The class is changed in place: a subclass or a wrapper would change its name, its pickles or its isinstance.
    eager = cls.forward
    compiled = _compiled(eager, settings)

    @functools.wraps(eager)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(eager)  # type: ignore[attr-defined]
    setattr(cls, _CLASS_FORWARD, eager)
    cls.forward = forward  # type: ignore[method-assign]
    return cls


def _compile_instance(module: nn.Module, settings: dict[str, Any]) -> nn.Module:
    # A twin that shares every parameter, buffer and submodule: same class, same state_dict keys, another forward.
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    eager = getattr(type(module), _CLASS_FORWARD, type(module).forward)
    compiled = _compiled(eager, settings)
    twin.__dict__["forward"] = _InstanceForward(compiled, twin)
    return twin


class _InstanceForward:
    """A twin's compiled forward; pickles as nothing, because compiled code does not travel."""

    def __init__(self, compiled: Callable[..., Any], owner: nn.Module) -> None:
        self._compiled = compiled
        self._owner = owner
        functools.update_wrapper(self, type(owner).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(self._owner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._owner, "_call_impl"))
