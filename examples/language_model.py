"""A small decoder-only language model over bytes, compiled as a whole by one decorator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import parallax_compile as plx


class Block(nn.Module):
    """Pre-normalised attention and feed-forward."""

    def __init__(self, spec: plx.AttentionSpec, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = plx.nn.ParallaxAttention(width, heads, spec=spec)
        self.feed_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return self._fed(x)

    def decode(self, x: Tensor, cache: tuple[Tensor, Tensor], lengths: Tensor, page_table: Tensor) -> Tensor:
        """New positions behind those in a cache of pages, which they are appended to."""
        x = x + self.attention.decode(self.attention_norm(x), *cache, lengths, page_table)
        return self._fed(x)

    def _fed(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.feed_norm(x))))


@plx.parallax_compile
class LanguageModel(nn.Module):
    """Bytes ``[B, L]`` to logits ``[B, L, 256]``; causal."""

    def __init__(self, *, spec: plx.AttentionSpec, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(spec, width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def decode(
        self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]], lengths: Tensor, page_table: Tensor
    ) -> Tensor:
        """Logits ``[B, L, 256]`` of new tokens ``[B, L]`` behind the ``lengths [B]`` ones in the caches of the blocks."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.decode(x, cache, lengths, page_table)
        return self.head(self.norm(x))

    def loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy, nats per byte, of predicting ``window[:, 1:]`` from ``window[:, :-1]``."""
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
