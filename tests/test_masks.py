"""Library masks: their block masks say the same as their dense form, and are made without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import parallax_compile as plx
from parallax_compile.block_masks import block_kinds, combined_block_mask

MASKS = {
    "full": plx.masks.full(),
    "causal": plx.masks.causal(),
    "causal+5": plx.masks.causal(5),
    "causal-40": plx.masks.causal(-40),
    "window": plx.masks.sliding_window(37),
    "window+3": plx.masks.sliding_window(20, offset=3),
    "prefix": plx.masks.prefix_lm(50),
    "documents": plx.masks.document(torch.arange(400) // 61),
    "batched": plx.masks.document(torch.stack([torch.arange(400) // 61, torch.arange(400) // 20])),
    "both": plx.masks.causal() & plx.masks.document(torch.arange(400) // 61),
}


def dense(mask: Any, batch: int, q_length: int, kv_length: int) -> Tensor:
    b, h = torch.arange(batch)[:, None, None, None], torch.zeros((), dtype=torch.int64)
    return mask(b, h, torch.arange(q_length)[:, None], torch.arange(kv_length)).expand(batch, 1, q_length, kv_length)


def covered(kinds: Tensor, block: int, q_length: int, kv_length: int) -> Tensor:
    rows = kinds.repeat_interleave(block, -2)[..., :q_length, :]
    return rows.repeat_interleave(block, -1)[..., :kv_length]


@pytest.mark.parametrize("lengths", [(128, 128), (200, 200), (77, 333), (256, 40), (1, 130)])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_agree_with_the_dense_mask(name: str, block: int, lengths: tuple[int, int]) -> None:
    mask = MASKS[name]
    allowed = dense(mask, 2, *lengths)
    found = plx.masks.block_mask(mask, None, None, *lengths, "cpu", BLOCK_SIZE=block)
    assert found.seq_lengths == lengths
    kinds = covered(block_kinds(found), block, *lengths).expand(2, 1, *lengths)
    assert allowed[kinds == 2].all(), "a full block holds a pair that is not allowed"
    assert not allowed[kinds == 0].any(), "an allowed pair lies in no block"
    # The lists that the backward walks hold the same blocks, transposed.
    transposed = torch.zeros_like(block_kinds(found).mT)
    for value, counts, indices in (
        (1, found.q_num_blocks, found.q_indices),
        (2, found.full_q_num_blocks, found.full_q_indices),
    ):
        for b in range(counts.size(0)):
            for row in range(counts.size(2)):
                transposed[b, 0, row, indices[b, 0, row, : counts[b, 0, row]].long()] = value
    assert torch.equal(transposed.mT, block_kinds(found))


@pytest.mark.parametrize("lengths", [(300, 500), (64, 0), (0, 64)])
def test_lists_hold_every_block_once_in_order_and_no_index_outside(lengths: tuple[int, int]) -> None:
    found = plx.masks.block_mask(plx.masks.sliding_window(100), None, None, *lengths, "cpu", BLOCK_SIZE=32)
    for counts, indices in ((found.kv_num_blocks, found.kv_indices), (found.full_q_num_blocks, found.full_q_indices)):
        assert counts.dtype == indices.dtype == torch.int32 and counts.shape == indices.shape[:-1]
        assert ((indices >= 0) & (indices < max(1, indices.size(-1)))).all(), "kernels read one index ahead"
        for row, count in zip(indices.flatten(0, -2), counts.flatten(), strict=True):
            assert row[:count].tolist() == sorted(set(row[:count].tolist()))


@pytest.mark.parametrize("name", ["causal", "window", "prefix"])
def test_blocks_are_exact_for_single_library_masks(name: str) -> None:
    found = plx.masks.block_mask(MASKS[name], None, None, 256, 256, "cpu", BLOCK_SIZE=32)
    tiles = dense(MASKS[name], 1, 256, 256).unflatten(-2, (8, 32)).unflatten(-1, (8, 32))
    some, every = tiles.any(-1).any(-2), tiles.all(-1).all(-2)
    assert torch.equal(block_kinds(found), some.to(torch.int8) + every.to(torch.int8))


def test_no_tensor_of_all_pairs_is_made() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.elements = max(self.elements, leaf.numel())
            return out

    length = 8192
    with Largest() as largest:
        plx.masks.block_mask(MASKS["causal"] & plx.masks.sliding_window(900), None, None, length, length, "cpu")
    assert 0 < largest.elements <= 2 * (length // 128) ** 2


def test_traced_once_for_every_length() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mask = plx.masks.causal() & plx.masks.sliding_window(50)

    def build(x: Tensor) -> tuple[Tensor, Tensor]:
        found = plx.masks.block_mask(mask, None, None, x.size(0), x.size(0), x.device)
        return found.kv_num_blocks + 0, found.full_q_indices + 0

    compiled = torch.compile(build, backend=counter, fullgraph=True, dynamic=True)
    for length in (300, 520, 777):
        x = torch.zeros(length)
        for mine, want in zip(compiled(x), build(x), strict=True):
            assert torch.equal(mine, want)
    assert counter.frame_count == 1


def test_eager_block_masks_are_cached() -> None:
    make = lambda: plx.masks.block_mask(plx.masks.causal(), None, None, 640, 640, "cpu")
    assert make() is make()


def test_the_specs_mask_and_the_calls_combine_by_and() -> None:
    first, second = plx.masks.causal(), plx.masks.document(torch.arange(200) // 30)
    query = torch.zeros(1, 1, 200, 8)
    given = plx.masks.block_mask(second, None, None, 200, 200, "cpu", BLOCK_SIZE=32)
    both = combined_block_mask(first, given, query, query)
    allowed = dense(first, 1, 200, 200) & dense(second, 1, 200, 200)
    kinds = covered(block_kinds(both), 32, 200, 200)
    assert not allowed[kinds == 0].any()
    assert allowed[kinds == 2].all()
    index = torch.arange(200)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(both.mask_mod(zero, zero, index[:, None], index), allowed[0, 0])


def test_packed_sequences() -> None:
    ids = plx.masks.document_ids(torch.tensor([0, 3, 3, 7]), 9)
    assert ids.tolist() == [0, 0, 0, 2, 2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="cu_seqlens"):
        plx.masks.document_ids(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="multiple of 16"):
        plx.masks.block_mask(plx.masks.causal(), None, None, 64, 64, "cpu", BLOCK_SIZE=24)
