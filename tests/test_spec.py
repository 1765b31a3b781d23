"""Specs: values that hash, print, refuse nonsense, and survive a round trip through JSON."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parallax_compile as plx


def importable_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score * 2


ridges = st.floats(min_value=1e-6, max_value=1e6)
probes = st.one_of(
    st.just(plx.Zero()),
    st.just(plx.Learned()),
    st.builds(plx.Solved, ridge=ridges, ridge_scale=st.sampled_from(["mean", "sum"])),
    st.builds(plx.Gradient, steps=st.integers(1, 50), ridge=ridges, step_size=st.none() | ridges),
)
score_mods = st.sampled_from([None, importable_mod, plx.mods.alibi(4), plx.mods.tanh_cap(2.0)])
mask_mods = st.sampled_from(
    [None, plx.masks.causal(), plx.masks.causal(3) & plx.masks.sliding_window(7), plx.masks.prefix_lm(9)]
)


@st.composite
def specs(draw: Any) -> plx.AttentionSpec:
    bandwidth = draw(st.sampled_from([plx.Finite(), plx.Infinite()]))
    probe = draw(probes)
    return plx.AttentionSpec(
        bandwidth=bandwidth,
        probe=probe,
        intercept=True if probe.kind == "zero" else draw(st.booleans()),
        score_mod=draw(score_mods) if bandwidth.kind == "finite" else None,
        covariance_mod=None if probe.kind == "zero" else draw(score_mods),
        mask_mod=draw(mask_mods),
    )


@given(specs())
def test_round_trip_hash_and_equality(spec: plx.AttentionSpec) -> None:
    again = plx.AttentionSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()
    assert eval(repr(spec.replace(score_mod=None, covariance_mod=None, mask_mod=None)), vars(plx)) == spec.replace(
        score_mod=None, covariance_mod=None, mask_mod=None
    )


@given(specs(), specs())
def test_equal_exactly_when_the_canonical_forms_are(first: plx.AttentionSpec, second: plx.AttentionSpec) -> None:
    assert (first == second) == (first.to_json() == second.to_json())


def test_the_named_members() -> None:
    members = plx.family()
    assert list(members) == [
        "SOFTMAX", "PARALLAX", "LLA", "VALUE_AVERAGE", "AFFINE_LINEAR", "LINEAR", "AFFINE_MESA", "MESA",
    ]  # fmt: skip
    for name, spec in members.items():
        assert getattr(plx, name) == spec
        assert spec.name == name
        assert name in str(members)
    assert plx.PARALLAX.replace(mask_mod=plx.masks.causal()).name == "PARALLAX"
    assert plx.PARALLAX.replace(intercept=False).name is None


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: plx.AttentionSpec(probe=plx.Zero(), intercept=False), ValueError, "identically 0"),
        (lambda: plx.AttentionSpec(plx.Infinite(), plx.Zero(), intercept=False), ValueError, "identically 0"),
        (lambda: plx.SOFTMAX.replace(covariance_mod=importable_mod), ValueError, "zero probe has none"),
        (lambda: plx.LINEAR.replace(score_mod=importable_mod), ValueError, "infinite bandwidth"),
        (lambda: plx.Solved(ridge=0.0), ValueError, "positive"),
        (lambda: plx.Solved(ridge=-1.0), ValueError, "got -1.0"),
        (lambda: plx.Solved(ridge=math.nan), ValueError, "finite"),
        (lambda: plx.Solved(ridge="1"), TypeError, "number"),
        (lambda: plx.Solved(ridge_scale="max"), ValueError, "'mean' or 'sum'"),
        (lambda: plx.Gradient(0), ValueError, "at least 1"),
        (lambda: plx.Gradient(2.0), TypeError, "int"),
        (lambda: plx.Gradient(2, step_size=-1.0), ValueError, "step_size"),
        (lambda: plx.AttentionSpec(probe="learned"), TypeError, "Learned"),
        (lambda: plx.AttentionSpec(bandwidth=None), TypeError, "Finite"),
        (lambda: plx.AttentionSpec(intercept=1), TypeError, "True or False"),
        (lambda: plx.AttentionSpec(mask_mod=3), TypeError, "callable"),
        (lambda: plx.AttentionSpec.from_dict({"window": 3}), ValueError, "window"),
        (lambda: plx.AttentionSpec.from_dict({"probe": {"kind": "guessed"}}), ValueError, "guessed"),
        (lambda: plx.AttentionSpec.from_dict({"mask_mod": {"name": "nope", "params": {}}}), ValueError, "nope"),
        (lambda: plx.AttentionSpec.from_dict({"mask_mod": {"function": "no.such:mod"}}), ValueError, "imported"),
        (lambda: plx.masks.sliding_window(0), ValueError, "at least 1"),
        (lambda: plx.mods.tanh_cap(0.0), ValueError, "positive"),
    ],
)
def test_refusals_give_the_reason(make: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        make()


def test_closures_hash_by_identity_and_are_refused_by_name() -> None:
    factor = 3.0

    def scaled(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * factor

    spec = plx.PARALLAX.replace(score_mod=scaled)
    assert spec == plx.PARALLAX.replace(score_mod=scaled)
    assert spec != plx.PARALLAX.replace(score_mod=lambda s, *_: s * factor)
    with pytest.raises(ValueError, match=r"score_mod .*scaled"):
        spec.to_json()
