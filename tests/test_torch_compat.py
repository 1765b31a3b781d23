"""Every private symbol of torch that we call exists in the installed release, with the parameters that we pass."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from parallax_compile.lowering import cache_key, torch_compat, torch_compat_inductor, torch_compat_threads
from parallax_compile.lowering.torch_compat_dynamo import sums_by_atomics


def test_every_fenced_symbol_is_there() -> None:
    assert torch_compat.missing_symbols() == []


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_compat.FENCED, "torch._inductor.ir:NoSuchNode", ())
    monkeypatch.setitem(torch_compat.FENCED, "torch._inductor.lowering:to_dtype", ("no_such_parameter",))
    missing = torch_compat.missing_symbols()
    assert any("NoSuchNode" in line for line in missing)
    assert any("no_such_parameter" in line for line in missing)


def test_what_inductor_gives_is_listed() -> None:
    for name, source in torch_compat_inductor._Inductor._SOURCES.items():
        if ":" in source:
            assert any(source in fenced for fenced in torch_compat.FENCED), f"{name} is not in FENCED"
        assert getattr(torch_compat_inductor.inductor, name) is not None


def test_the_cache_salt_follows_templates_and_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_key._digest()
    assert before == cache_key.CACHE_SALT
    texts = cache_key.templates.texts()
    monkeypatch.setattr(cache_key.templates, "texts", lambda: [texts[0] + b" ", *texts[1:]])
    assert cache_key._digest() != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_compiler_threads_of_its_own() -> None:
    threads = torch_compat_threads._threads
    assert threads(1).submit(int).result() == 0
    child = os.fork()
    if not child:
        failed = 1
        try:
            failed = threads(1).submit(int).result(timeout=10)
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0


def test_a_template_is_parsed_when_it_is_rendered_first() -> None:
    template = torch_compat_inductor.inductor.template(
        "parallax_test_deferred", lambda *_: (1, 1, 1), "{{ x }} {% nonsense"
    )
    with pytest.raises(Exception, match="nonsense"):
        template.template.render(x=1)
    parsed: list[int] = []
    text = torch_compat_inductor._DeferredText(lambda: parsed.append(1) or mock.Mock(render=lambda x: f"x={x}"))
    assert not parsed
    assert [text.render(x=1), text.render(x=2)] == ["x=1", "x=2"] and parsed == [1]


@pytest.mark.parametrize(
    ("device", "requires_grad", "warn_only", "refused"),
    [
        ("cuda", True, False, True),
        ("cuda", False, False, False),
        ("cuda", True, True, False),
        ("cpu", True, False, False),
    ],
)
def test_captured_gradients_are_refused_where_their_order_may_not_vary(
    device: str, requires_grad: bool, warn_only: bool, refused: bool
) -> None:
    captured = [torch.ones(2, requires_grad=requires_grad), 3]
    assert not sums_by_atomics(torch.device(device), captured)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert sums_by_atomics(torch.device(device), captured) == refused
    finally:
        torch.use_deterministic_algorithms(False)
