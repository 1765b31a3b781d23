"""A Hugging Face causal language model with random weights: its attention replaced, prefill and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import relative_error
from torch import Tensor

import parallax_compile as plx
from parallax_compile.replacement import replacing

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra 'test'")


def model(attention: str = "sdpa", layers: int = 1) -> Any:
    """Grouped heads, rotary positions; made from its configuration, nothing is loaded."""
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def batch() -> dict[str, Tensor]:
    """Two prompts, the first shorter and padded on its left."""
    ids = torch.randint(3, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def as_traced(layer: Any, spec: plx.AttentionSpec, fullgraph: bool = True) -> Any:
    """The model with its attention replaced in a graph that nothing lowers: exact in float64, and at once."""
    forward = torch.compile(replacing(type(layer).forward, spec), backend="aot_eager", fullgraph=fullgraph)
    twin = layer.__class__.__new__(layer.__class__)
    twin.__dict__.update(layer.__dict__)
    twin.__dict__["forward"] = lambda *args, **kwargs: forward(twin, *args, **kwargs)
    return twin


GREEDY = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
def test_softmax_in_its_own_place_changes_no_logits() -> None:
    plain, inputs = model(layers=2), batch()
    same = as_traced(plain, plx.SOFTMAX)
    real = inputs["attention_mask"].bool()
    assert relative_error(same(**inputs).logits[real], plain(**inputs).logits[real]) < 1e-12
    want, got = plain.generate(**inputs, **GREEDY), same.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    assert relative_error(torch.stack(got.logits), torch.stack(want.logits)) < 1e-12


@torch.no_grad()
def test_local_linear_attention_is_what_the_member_gives_with_and_without_a_cache() -> None:
    plain, inputs = model(), batch()
    linear = as_traced(plain, plx.LLA)
    generated = linear.generate(**inputs, **GREEDY)
    assert torch.stack(generated.logits).isfinite().all()
    ids, mask = generated.sequences, torch.ones_like(generated.sequences)
    mask[0, :3] = 0
    whole = linear(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # The logits of each step (in float32), from the cache, are those of the whole sequence at once.
    assert relative_error(torch.stack(generated.logits, 1), whole[:, 8:-1]) < 1e-6
    assert relative_error(whole[:, 8:-1], plain(input_ids=ids, attention_mask=mask).logits[:, 8:-1]) > 1e-3


@torch.no_grad()
def test_a_model_of_flex_attention() -> None:
    plain, inputs = model(), batch()
    flexible = model("flex_attention")
    flexible.load_state_dict(plain.state_dict())
    inputs.pop("attention_mask")
    want = as_traced(plain, plx.LLA)(**inputs, use_cache=False).logits
    # Hugging Face makes its block mask in a way that breaks the graph.
    got = as_traced(flexible, plx.LLA, fullgraph=False)(**inputs, use_cache=False).logits
    assert relative_error(got, want) < 1e-9


@torch.no_grad()
def test_compiled_for_real() -> None:
    plain, inputs = model().float(), batch()
    twin = plx.parallax_compile(plain, replace_sdpa=plx.SOFTMAX)
    assert list(twin.state_dict()) == list(plain.state_dict())
    want, got = (layer.generate(**inputs, **(GREEDY | {"max_new_tokens": 2})) for layer in (plain, twin))
    assert torch.equal(got.sequences, want.sequences)
    assert relative_error(torch.stack(got.logits), torch.stack(want.logits)) < 1e-5
