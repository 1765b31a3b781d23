"""Layers: multi-head attention of the family with rotary embedding, to be compiled with the model that holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import masks
from .attention import attention
from .decoding import decode
from .errors import InputError
from .spec import PARALLAX, AttentionSpec

__all__ = ["ParallaxAttention", "RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (arXiv 2104.09864) on ``[B, L, H, D]``; angles in float32.

    Args:
        head_dim: ``D``, even.
        base: wavelength base.
    """

    inverse_frequency: Tensor

    def __init__(self, head_dim: int, base: float = 10000.0, device: Any = None) -> None:
        super().__init__()
        if head_dim % 2:
            raise InputError(
                f"head_dim must be even for a rotary embedding, but got {head_dim}. Or pass rope_base=None."
            )
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self.register_buffer("inverse_frequency", base**-exponent, persistent=False)

    def angles(self, length: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions ``offset .. offset + length``, ``[L, 1, D / 2]``."""
        return self.angles_at(torch.arange(offset, offset + length, device=self.inverse_frequency.device))

    def angles_at(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions ``[L]`` or ``[B, L]``: ``[..., L, 1, D / 2]``."""
        angle = (position[..., None].float() * self.inverse_frequency)[..., None, :]
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """``tensor [B, L, H, D]`` rotated by the angles; same shape and dtype."""
        first, second = tensor.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
        return rotated.to(tensor.dtype)


class ParallaxAttention(nn.Module):
    """Multi-head attention of a member with a learned (or zero) probe: ``[B, L, E] -> [B, L, E]``.

    The probe projection ``W_R`` starts at zero: a fresh layer *is* softmax attention, and a pretrained Transformer converts by
    adding it. The rotary embedding acts on the probe as on the query (arXiv 2605.29157). The layer computes ``[B, L, H, D]``
    projections and attends over views of them, so nothing is transposed in memory.

    Args:
        embed_dim: ``E``.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; None is ``num_heads``.
        head_dim: ``D``; None is ``embed_dim // num_heads``.
        spec: the member; its mask combines with ``causal`` by and.
        bias: whether the projections have biases.
        rope_base: base of the rotary embedding; None leaves it out.
        causal: attend to the own and earlier positions only.
        qk_norm: RMS normalisation of query and key per head.
        device, dtype: of the parameters.

    Raises:
        InputError: sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        spec: AttentionSpec = PARALLAX,
        bias: bool = False,
        rope_base: float | None = 10000.0,
        causal: bool = True,
        qk_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise InputError(f"num_heads must be a multiple of num_kv_heads, but got {num_heads} and {num_kv_heads}.")
        if head_dim is None:
            if embed_dim % num_heads:
                raise InputError(
                    f"embed_dim must be a multiple of num_heads, but got {embed_dim} and {num_heads}. Or pass head_dim."
                )
            head_dim = embed_dim // num_heads
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.spec = _causal(spec) if causal else spec
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, **made)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, **made)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, **made)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, **made)
        self.r_proj = nn.Linear(embed_dim, num_heads * head_dim, **made) if spec.probe.kind == "learned" else None
        self.rotary = None if rope_base is None else RotaryEmbedding(head_dim, rope_base, device)
        self.q_norm = nn.RMSNorm(head_dim, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, device=device, dtype=dtype) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The probe projection to zero; the others as ``nn.Linear`` starts them."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()
        if self.r_proj is not None:
            nn.init.zeros_(self.r_proj.weight)
            if self.r_proj.bias is not None:
                nn.init.zeros_(self.r_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``x [B, L, E]``."""
        query, key, value, probe = self._projected(x, torch.arange(x.size(1), device=x.device))
        out = attention(query, key, value, probe, spec=self.spec, enable_gqa=self.num_heads != self.num_kv_heads)
        return self._joined(out)

    def decode(
        self,
        x: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_seqlens: Tensor,
        page_table: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Attend over new positions ``x [B, L, E]`` behind those in a cache, which they are appended to in place.

        Args:
            key_cache, value_cache, cache_seqlens, page_table: as for :func:`~parallax_compile.decode`,
            ``cache_seqlens`` a tensor;
                keys are cached as the rotary embedding leaves them.
            more: ``k_scale``, ``v_scale``, ``kernel_options``.
        """
        position = cache_seqlens[:, None] + torch.arange(x.size(1), device=x.device)
        query, key, value, probe = self._projected(x, position)
        caches: dict[str, Any] = {"cache_seqlens": cache_seqlens, "page_table": page_table, "key": key, "value": value}
        return self._joined(decode(query, key_cache, value_cache, probe, spec=self.spec, **caches, **more))

    def _projected(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and probe, ``[B, H, L, D]``, of ``x [B, L, E]`` at positions ``[L]`` or ``[B, L]``."""
        batch, length, _ = x.shape

        def heads(projection: nn.Linear, count: int) -> Tensor:
            return projection(x).view(batch, length, count, self.head_dim)

        query, key = heads(self.q_proj, self.num_heads), heads(self.k_proj, self.num_kv_heads)
        value = heads(self.v_proj, self.num_kv_heads)
        probe = None if self.r_proj is None else heads(self.r_proj, self.num_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            cosine, sine = self.rotary.angles_at(position)
            query, key = self.rotary.rotate(query, cosine, sine), self.rotary.rotate(key, cosine, sine)
            probe = None if probe is None else self.rotary.rotate(probe, cosine, sine)
        probe = None if probe is None else probe.transpose(1, 2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), probe

    def _joined(self, out: Tensor) -> Tensor:
        """``[B, H, L, D]`` through the output projection: ``[B, L, E]``."""
        return self.o_proj(out.transpose(1, 2).reshape(out.size(0), out.size(2), -1))

    def extra_repr(self) -> str:
        """Sizes and member."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, spec={self.spec!r}"
        )


def _causal(spec: AttentionSpec) -> AttentionSpec:
    """``spec`` with a causal mask beside its own."""
    own, causal = spec.mask_mod, masks.causal()
    if own is None:
        return spec.replace(mask_mod=causal)
    if isinstance(own, masks.LibraryMask):
        return spec.replace(mask_mod=causal & own)

    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return causal(b, h, q_idx, kv_idx) & own(b, h, q_idx, kv_idx)

    return spec.replace(mask_mod=both)
