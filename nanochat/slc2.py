"""SLC2, the gated short causal convolution that replaces two thirds of the attention layers.

With h the normalised residual stream, E channels c = n*D + d in H heads of size D, and K taps:

    x, al, a, b = h Wx^T, h Wal^T, h Wa^T, h Wb^T          (B,T,E) (B,T,H) (B,T,D) (B,T,E)
    A[b,t,n*D+d] = silu(al[b,t,n]) * a[b,t,d]              a is shared by all heads
    u = silu(A) * x
    z[b,t,c] = sum_{w<K} conv[c,0,w] * u[b, t-(K-1)+w, c]  zeros on the left, w = K-1 is the current token
    y = (b * silu(z)) Wc^T

(Rikka Botan, "Saint Iberis", 2025; the order of the nonlinearities is that of the published weights.)
The decode state is the last K-1 values of u. So one code path serves training, prefill, chunked prefill and
single tokens: it reads a window of K-1 past values and overwrites it with the next window.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.layers import Linear, short_conv


def gate(x: Tensor, alpha: Tensor, A: Tensor) -> Tensor:
    """Return u = silu(silu(alpha) outer A) * x; x (B,T,E), alpha (B,T,H), A (B,T,D) with E = H*D."""
    outer = F.silu(alpha).unsqueeze(-1) * A.unsqueeze(-2)  # (B, T, H, D)
    return F.silu(outer).flatten(-2) * x


def slc2_mix(layer: "SLC2", h: Tensor, window: Tensor | None = None) -> Tensor:
    """Return b * silu(z) (B,T,E) of h (B,T,E): all of the layer but c_proj.

    window (B,K-1,E), if given, is the conv state, updated in place.
    """
    u = gate(layer.x_proj(h), layer.alpha_proj(h), layer.A_proj(h))
    z = short_conv(u, layer.conv1d.weight, window)
    return layer.B_proj(h) * F.silu(z)


class SLC2(nn.Module):
    """The SLC2 mixer of one layer. It holds parameters only; decode state is an argument."""

    def __init__(self, config):
        super().__init__()
        E, H, K = config.n_embd, config.n_head, config.n_kernel
        self.x_proj = Linear(E, E)
        self.alpha_proj = Linear(E, H)
        self.A_proj = Linear(E, E // H)
        self.B_proj = Linear(E, E)
        # holds the (E,1,K) weight under its published key; short_conv reads it
        self.conv1d = nn.Conv1d(E, E, K, groups=E, bias=False)
        self.c_proj = Linear(E, E)
        self.n_head = H

    def forward(
        self, h: Tensor, window: Tensor | None = None, mix: Callable[..., Tensor] = slc2_mix
    ) -> Tensor:
        """Map h (B,T,E) to y (B,T,E); mix computes what `slc2_mix` does."""
        return self.c_proj(mix(self, h, window))
