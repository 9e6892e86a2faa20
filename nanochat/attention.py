"""Causal self-attention, the mixer that sees the whole context.

Rotary positions (RoPE, Su et al. 2021), then rms_norm on queries and keys (Henry et al. 2020), grouped
key-value heads allowed. The second generation adds to it

    k += conv(k) before the rotation;  y += conv(y) before c_proj           (residual_conv)
    v += 2 sigmoid(Wg h[:12]) * table[token], a gate a head                 (value_embeds; Zhou et al. 2024)

and a factor on the scores. Letters: B batch, T time, E n_embd, H heads, D head_dim, K taps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.cache import LayerState, Span
from nanochat.config import GATE_INPUTS, GPTConfig
from nanochat.layers import Linear, ShortConv, norm, residual_conv


@lru_cache(maxsize=8)
def rotary_tables(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin (length, D/2) of RoPE angles with base 10000, rounded to bfloat16 as published."""
    with torch.inference_mode(False):  # the cached tables must serve training too
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        angles = torch.arange(length, device=device, dtype=torch.float32).outer(10000.0**-exponents)
        return angles.cos().bfloat16(), angles.sin().bfloat16()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B,T,H,D), its halves as coordinates, by the angles of cos, sin (T,D/2) or (B,T,D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def attention_inputs(
    attn: CausalSelfAttention,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    value_embeds: Tensor | None = None,
    window: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B,H,T,D) and k (B,H_kv,T,D), rotated and normalised, and v (B,H_kv,T,D) of h (B,T,E).

    value_embeds (B,T,H_kv*D), if the layer has a gate, are added to v. window (B,K-1,H_kv*D) is the state of
    the convolution on k, updated in place.
    """
    B, T, _ = h.shape
    q, k, v = attn.c_q(h), attn.c_k(h), attn.c_v(h)
    if attn.k_conv is not None:
        k = residual_conv(k, attn.k_conv.weight, window)
    q, k, v = (x.view(B, T, -1, attn.head_dim) for x in (q, k, v))
    if attn.value_gate is not None:
        assert value_embeds is not None, "the model looks value embeddings up for layers with a gate"
        gate = 2 * torch.sigmoid(attn.value_gate(h[..., :GATE_INPUTS]))
        v = v + gate.unsqueeze(-1) * value_embeds.view_as(v)
    q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.is_grouped = config.n_kv_head != config.n_head
        self.scale = None if config.score_scale == 1 else config.score_scale * self.head_dim**-0.5
        width = config.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, width)
        self.c_v = Linear(config.n_embd, width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        taps = config.residual_conv
        self.k_conv = ShortConv(width, taps) if taps else None
        self.y_conv = ShortConv(config.n_embd, taps) if taps else None
        self.value_gate = Linear(GATE_INPUTS, config.n_kv_head) if config.value_embeds else None

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        value_embeds: Tensor | None = None,
        state: LayerState | None = None,
        span: Span | None = None,
        inputs: Callable[..., tuple[Tensor, ...]] = attention_inputs,
        conv: Callable[..., Tensor] = residual_conv,
    ) -> Tensor:
        """Map h (B,T,E) to (B,T,E); with a state, attend also to the tokens that it holds.

        inputs and conv compute what `attention_inputs` and `residual_conv` do.
        """
        q, k, v = inputs(self, h, cos, sin, value_embeds, state and state.window("k"))
        mask, is_causal = None, True
        if state is not None and span is not None:
            mask, is_causal = span.mask, span.is_causal
            past = state.append(k, v, span)
            k, v = (k, v) if is_causal else past
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale, enable_gqa=self.is_grouped
        )
        y = y.transpose(1, 2).reshape(h.shape)
        if self.y_conv is not None:
            y = conv(y, self.y_conv.weight, state and state.window("y"))
        return self.c_proj(y)
