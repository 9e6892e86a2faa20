"""What both mixers and the MLP are made of: linear layers, norm and short convolution.

Precision is explicit, by casts in place of autocast: a float64 input gives a float64 reference, a bfloat16
input runs on the tensor cores. Letters: B batch, T time, C channels, K taps.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 2.0**-23  # float32's epsilon, for activations of every dtype


class Linear(nn.Linear):
    """y = x W^T without bias, W cast to x's dtype. Weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features) in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


class ShortConv(nn.Module):
    """The taps (C,1,K) of a depthwise causal convolution, the last one for the current token."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))


def short_conv(u: Tensor, weight: Tensor, window: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution as K shifted multiply-adds, summed in float32 (float64 stays float64).

    u (B,T,C); weight (C,1,K); window (B,K-1,C) holds the values before u, oldest first (None: zeros), and is
    overwritten with the last K-1 values of [window, u]. Return z (B,T,C) in u's dtype.
    """
    return _taps_sum(u, weight, window).to(u.dtype)


def residual_conv(u: Tensor, weight: Tensor, window: Tensor | None = None) -> Tensor:
    """Return u + short_conv(u) (B,T,C), rounded once; see `short_conv` (Primer, So et al. 2021; Canon layers,
    Allen-Zhu 2025)."""
    return (u + _taps_sum(u, weight, window)).to(u.dtype)


def _taps_sum(u: Tensor, weight: Tensor, window: Tensor | None) -> Tensor:
    T, K = u.size(1), weight.size(-1)
    past = F.pad(u, (0, 0, K - 1, 0)) if window is None else torch.cat([window, u], dim=1)  # (B, K-1+T, C)
    # bf16 u times a float32 weight is float32: the sum of the taps is rounded once, at the end
    z = reduce(torch.add, (past[:, w : w + T] * weight[:, 0, w] for w in range(K)))
    if window is not None:
        window.copy_(past[:, T:])
    return z
