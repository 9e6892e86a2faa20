"""The functions that a forward is computed with: those outside of the mixers, and `Ops`, which lists all.

Letters: B batch, T time, E n_embd, V vocabulary, K taps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import attention_inputs
from nanochat.layers import norm, residual_conv
from nanochat.slc2 import slc2_mix

SOFTCAP = 15.0


def embed(idx: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the initial residual stream (B,T,E), in dtype, of token ids idx (B,T); weight (V,E)."""
    return norm(F.embedding(idx, weight).to(dtype))


def look_up_values(idx: Tensor, weight: Tensor, n: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return value embeddings, n times (B,T,W) in dtype, of token ids idx (B,T); weight (V,n*W)."""
    # copies: of compiled views of one result the gradients would be padded with zeros and added
    return [part.contiguous() for part in F.embedding(idx, weight).to(dtype).chunk(n, dim=-1)]


def share(x0: Tensor, resid_scales: Tensor, x0_scales: Tensor) -> Sequence[Tensor]:
    """Return x0 (B,T,E) for the join to each layer, whose scales are in the other two (n_layer,)."""
    return [x0] * len(x0_scales)


class Link(NamedTuple):
    """What joins a layer to the one before, besides the residual stream; None: the model lacks it."""

    conv: Tensor | None = None  # taps (E,1,K) on the output of the MLP before
    window: Tensor | None = None  # their state in decoding (B,K-1,E), updated in place
    mix: tuple[Tensor, Tensor, Tensor] | None = None  # scale of the stream (1,), that of x0 (1,), x0 (B,T,E)


def join(
    x: Tensor, delta: Tensor, link: Link, norm: Callable[[Tensor], Tensor] = norm
) -> tuple[Tensor, Tensor]:
    """Return the residual stream (B,T,E) of x and the MLP's output delta, and its norm."""
    if link.conv is not None:
        delta = residual_conv(delta, link.conv, link.window)
    x = x + delta
    if link.mix is not None:
        resid_scale, x0_scale, x0 = link.mix
        x = (resid_scale * x + x0_scale * x0).to(x.dtype)  # by float32 factors, rounded once
    return x, norm(x)


def relu2_mlp(h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """Return relu(h Wfc^T)^2 Wproj^T (B,T,E) of h (B,T,E), Wfc (4E,E) and Wproj (E,4E), in h's dtype."""
    return F.linear(F.relu(F.linear(h, w_fc.to(h.dtype))).square(), w_proj.to(h.dtype))


def head_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return soft-capped logits (..., V), float32 or wider, of the final hidden state x (..., E)."""
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Return the cross-entropy in nats of the logits of x (B,T,E) and targets (B,T), ignoring target -1.

    reduction: "none" gives (B*T,) with 0 at ignored targets; "sum"; "mean" over counted targets, 0 if none.
    """
    logits = head_logits(x, weight)
    count_all = "none" if reduction == "none" else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=count_all)
    return loss / (targets != -1).sum().clamp(min=1) if reduction == "mean" else loss


@dataclass(frozen=True)
class Ops:
    """The functions that a forward without decode state is computed with.

    The defaults are the equations of this file and of slc2.py. nanochat/train/accelerate.py replaces them by
    kernels of the same signatures, or by compiled functions. Decoding always uses the defaults.
    """

    embed: Callable[..., Tensor] = embed
    look_up_values: Callable[..., Sequence[Tensor]] = look_up_values
    share: Callable[..., Sequence[Tensor]] = share  # that of the kernels needs their join, and theirs it
    join: Callable[..., tuple[Tensor, Tensor]] = join
    norm: Callable[[Tensor], Tensor] = norm
    attention_inputs: Callable[..., tuple[Tensor, ...]] = attention_inputs
    residual_conv: Callable[..., Tensor] = residual_conv
    slc2_mix: Callable[..., Tensor] = slc2_mix
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] = relu2_mlp
    loss: Callable[..., Tensor] = head_loss


PLAIN = Ops()
