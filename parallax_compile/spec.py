"""The declaration: a member of the local-linear family, as frozen data.

A member is a choice on three axes (FAMILY.md): *bandwidth*, *probe* and *intercept*, plus FlexAttention-style mods. Specs
hash and compare by value, print readably, and round-trip through JSON. This module imports nothing of the package.

Sources: arXiv 2605.29157 (Parallax), arXiv 2510.01450 (Local Linear Attention).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

Mod = Callable[..., Any]
C = TypeVar("C", bound=type)

_REGISTRY: dict[str, type] = {}


def register_mod(name: str) -> Callable[[C], C]:
    """Make a frozen dataclass a library mod or mask: it serialises as ``name`` and its fields."""

    def register(cls: C) -> C:
        _REGISTRY[name] = cls
        cls.mod_name = name  # type: ignore[attr-defined]
        return cls

    return register


# --- bandwidth ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finite:
    """Weights are the softmax of the scaled scores."""

    kind: ClassVar[str] = "finite"


@dataclass(frozen=True)
class Infinite:
    """Every allowed key weighs the same; the query only gives shapes, unless a solved probe reads it."""

    kind: ClassVar[str] = "infinite"


# --- probe ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zero:
    """No probe: the estimate is locally constant."""

    kind: ClassVar[str] = "zero"


@dataclass(frozen=True)
class Learned:
    """The probe is a tensor of the call, a second query-like projection (Parallax)."""

    kind: ClassVar[str] = "learned"


def _check_ridge(ridge: Any, ridge_scale: Any) -> None:
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)):
        raise TypeError(
            f"ridge must be a positive number, but got {type(ridge).__name__}. A tensor ridge is the call's: ridge=."
        )
    if not math.isfinite(ridge) or ridge <= 0:
        raise ValueError(f"ridge must be positive and finite, but got {ridge}.")
    if ridge_scale not in ("mean", "sum"):
        raise ValueError(f"ridge_scale must be 'mean' or 'sum', but got {ridge_scale!r}.")


@dataclass(frozen=True)
class Solved:
    """The probe solves each row's ridge regression: ``(C + ridge I)^-1 (mean key - query)`` with intercept (LLA).

    Attributes:
        ridge: positive; the call's ``ridge=`` takes its place.
        ridge_scale: ``"mean"``, on normalised weights; ``"sum"``, divided by the sum of unnormalised weights (or by n).
        max_iterations: steps of conjugate gradients that the compiled solver takes at most; None is ``4 D``. Rows stop by their
            residual, which is in the auxiliary outputs. A row whose system is not positive definite (a tensor ridge of 0 or
            less) stops where it shows: it keeps what it has found, at worst the zero probe, and its residual says so.
    """

    ridge: float = 0.1
    ridge_scale: str = "mean"
    max_iterations: int | None = None
    kind: ClassVar[str] = "solved"

    def __post_init__(self) -> None:
        _check_ridge(self.ridge, self.ridge_scale)
        if self.max_iterations is None:
            return
        if isinstance(self.max_iterations, bool) or not isinstance(self.max_iterations, int):
            raise TypeError(f"max_iterations must be an int or None, but got {type(self.max_iterations).__name__}.")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, but got {self.max_iterations}. For none use Zero().")


@dataclass(frozen=True)
class Gradient:
    """The probe takes a fixed number of gradient steps from zero towards the solved one.

    Attributes:
        steps: at least 1.
        ridge, ridge_scale: as in :class:`Solved`.
        step_size: positive; None is ``1 / (ridge + trace C)`` for each row.
    """

    steps: int
    ridge: float = 0.1
    step_size: float | None = None
    ridge_scale: str = "mean"
    kind: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        _check_ridge(self.ridge, self.ridge_scale)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an int, but got {type(self.steps).__name__}.")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, but got {self.steps}. For none use Zero().")
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be positive and finite, or None, but got {self.step_size}.")


_BANDWIDTHS: dict[str, type] = {cls.kind: cls for cls in (Finite, Infinite)}
_PROBES: dict[str, type] = {cls.kind: cls for cls in (Zero, Learned, Solved, Gradient)}


# --- spec -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class AttentionSpec:
    """A member of the family.

    Attributes:
        bandwidth: :class:`Finite` or :class:`Infinite`.
        probe: :class:`Zero`, :class:`Learned`, :class:`Solved` or :class:`Gradient`.
        intercept: affine estimate (True) or linear (False).
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score`` on the scaled score.
        covariance_mod: the same on the unscaled probe score.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``.

    Raises:
        ValueError: a combination that is impossible or trivial, with the reason.
        TypeError: a field of the wrong type.
    """

    bandwidth: Finite | Infinite = dataclasses.field(default_factory=Finite)
    probe: Zero | Learned | Solved | Gradient = dataclasses.field(default_factory=Learned)
    intercept: bool = True
    score_mod: Mod | None = None
    covariance_mod: Mod | None = None
    mask_mod: Mod | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bandwidth, tuple(_BANDWIDTHS.values())):
            raise TypeError(f"bandwidth must be Finite() or Infinite(), but got {self.bandwidth!r}.")
        if not isinstance(self.probe, tuple(_PROBES.values())):
            raise TypeError(f"probe must be Zero(), Learned(), Solved() or Gradient(steps), but got {self.probe!r}.")
        if not isinstance(self.intercept, bool):
            raise TypeError(f"intercept must be True or False, but got {self.intercept!r}.")
        for name in ("score_mod", "covariance_mod", "mask_mod"):
            mod = getattr(self, name)
            if mod is not None and not callable(mod):
                raise TypeError(f"{name} must be callable or None, but got {type(mod).__name__}.")
        if self.probe.kind == "zero" and not self.intercept:
            raise ValueError("a zero probe without intercept is identically 0. Use intercept=True, or another probe.")
        if self.probe.kind == "zero" and self.covariance_mod is not None:
            raise ValueError("covariance_mod acts on the probe score, and a zero probe has none. Drop one of them.")
        if self.bandwidth.kind == "infinite" and self.score_mod is not None:
            raise ValueError("score_mod has no effect at infinite bandwidth, where every allowed key weighs the same.")

    @property
    def name(self) -> str | None:
        """The member's name in :func:`family`, whatever its ridge and mods; None for the members without one."""
        for name, spec in family().items():
            if (spec.bandwidth, spec.probe.kind, spec.intercept) == (self.bandwidth, self.probe.kind, self.intercept):
                return name
        return None

    def replace(self, **changes: Any) -> AttentionSpec:
        """A spec with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        parts = [repr(self.bandwidth), repr(self.probe)]
        if not self.intercept:
            parts.append("intercept=False")
        for name in ("score_mod", "covariance_mod", "mask_mod"):
            mod = getattr(self, name)
            if mod is not None:
                parts.append(f"{name}={_mod_text(mod)}")
        return f"AttentionSpec({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """The canonical form: plain data, every field present.

        Raises:
            ValueError: a mod is a closure or a lambda, which has no name to store.
        """
        return {
            "bandwidth": {"kind": self.bandwidth.kind},
            "probe": {"kind": self.probe.kind, **dataclasses.asdict(self.probe)},
            "intercept": self.intercept,
            **{name: _mod_to_data(name, getattr(self, name)) for name in ("score_mod", "covariance_mod", "mask_mod")},
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionSpec:
        """The spec of :meth:`to_dict`.

        Raises:
            ValueError: an unknown key, kind, library mod or function.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a spec is an object of fields, but got {type(data).__name__}.")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(data) - set(known)))
        if unknown:
            raise ValueError(f"a spec has no field {', '.join(unknown)}; it has {', '.join(known)}.")
        return cls(
            bandwidth=_from_kind("bandwidth", data.get("bandwidth", {"kind": "finite"}), _BANDWIDTHS),
            probe=_from_kind("probe", data.get("probe", {"kind": "learned"}), _PROBES),
            intercept=data.get("intercept", True),
            **{name: _mod_from_data(name, data.get(name)) for name in ("score_mod", "covariance_mod", "mask_mod")},
        )

    @classmethod
    def from_json(cls, text: str) -> AttentionSpec:
        """The spec of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def _from_kind(field: str, data: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    kind = str(data.get("kind"))
    if kind not in kinds:
        raise ValueError(f"{field} must be of kind {', '.join(kinds)}, but got {kind!r}.")
    return kinds[kind](**{name: value for name, value in data.items() if name != "kind"})


def _mod_text(mod: Mod) -> str:
    return repr(mod) if dataclasses.is_dataclass(mod) else getattr(mod, "__qualname__", repr(mod))


def _plain(value: Any) -> Any:
    """A library mod's field as plain data: nested mods by name, tuples as lists."""
    if dataclasses.is_dataclass(value) or callable(value):
        return _mod_to_data("a nested mod", value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _mod_to_data(field: str, mod: Mod | None) -> dict[str, Any] | None:
    if mod is None:
        return None
    name = getattr(type(mod), "mod_name", None)
    if name is not None:
        params = {item.name: _plain(getattr(mod, item.name)) for item in dataclasses.fields(mod)}  # type: ignore[arg-type]
        return {"name": name, "params": params}
    module, qualname = getattr(mod, "__module__", None), getattr(mod, "__qualname__", "")
    if module and qualname and "<" not in qualname and _importable(module, qualname) is mod:
        return {"function": f"{module}:{qualname}"}
    raise ValueError(
        f"{field} {_mod_text(mod)!r} cannot be stored: it is not a library mod nor importable by name. "
        "Move it to the top level of a module."
    )


def _importable(module: str, qualname: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_plain(item) for item in value)
    if isinstance(value, Mapping):
        return _mod_from_data("a nested mod", value)
    return value


def _mod_from_data(field: str, data: Mapping[str, Any] | None) -> Mod | None:
    if data is None:
        return None
    if "function" in data:
        module, _, qualname = data["function"].partition(":")
        found = _importable(module, qualname)
        if found is None:
            raise ValueError(f"{field} names {data['function']!r}, which cannot be imported.")
        return found
    name = data.get("name")
    if name not in _REGISTRY:
        raise ValueError(
            f"{field} names the mod {name!r}, but the library has {', '.join(sorted(_REGISTRY)) or 'none'}."
        )
    return _REGISTRY[name](**{key: _from_plain(value) for key, value in data["params"].items()})


# --- the named members ----------------------------------------------------------------------------------------------

SOFTMAX = AttentionSpec(probe=Zero())
PARALLAX = AttentionSpec()
LLA = AttentionSpec(probe=Solved())
VALUE_AVERAGE = AttentionSpec(bandwidth=Infinite(), probe=Zero())
AFFINE_LINEAR = AttentionSpec(bandwidth=Infinite())
LINEAR = AttentionSpec(bandwidth=Infinite(), intercept=False)
AFFINE_MESA = AttentionSpec(bandwidth=Infinite(), probe=Solved())
MESA = AttentionSpec(bandwidth=Infinite(), probe=Solved(), intercept=False)


class Family(Mapping[str, AttentionSpec]):
    """Name -> spec of the named members; prints as a table."""

    def __init__(self, members: Mapping[str, AttentionSpec]) -> None:
        self._members = dict(members)

    def __getitem__(self, name: str) -> AttentionSpec:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [(name, s.bandwidth.kind, s.probe.kind, "yes" if s.intercept else "no") for name, s in self.items()]
        return tabulate(rows, headers=("member", "bandwidth", "probe", "intercept"))

    def __repr__(self) -> str:
        return f"Family({', '.join(self)})"


_FAMILY = Family(
    {
        "SOFTMAX": SOFTMAX,
        "PARALLAX": PARALLAX,
        "LLA": LLA,
        "VALUE_AVERAGE": VALUE_AVERAGE,
        "AFFINE_LINEAR": AFFINE_LINEAR,
        "LINEAR": LINEAR,
        "AFFINE_MESA": AFFINE_MESA,
        "MESA": MESA,
    }
)


def family() -> Family:
    """The named members, in the order of the paper's table."""
    return _FAMILY
