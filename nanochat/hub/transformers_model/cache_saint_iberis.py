"""The decode state of a Saint Iberis model for Transformers, and the convolution that keeps its window in it.

Shapes: B batch, T new tokens, C channels, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache


class SaintIberisCache(DynamicCache):
    """The decode state of a batch: keys and values of attention layers, the last K-1 inputs of convolutions.

    DynamicCache holds the attention layers only, numbered in their order.
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        # (layer, input of a convolution) -> (B, K-1, channels), oldest first
        self.windows: dict[tuple[int, str], Tensor] = {}

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.windows.clear()

    def crop(self, *args, **kwargs) -> None:
        """Raise ValueError: the convolution inputs before a window are not stored."""
        raise ValueError(
            "a SaintIberisCache cannot be cropped, so assisted generation is not available; use a new cache"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by rows beam_idx (B,), for beam search."""
        super().reorder_cache(beam_idx)
        self._map_windows(lambda window: window[beam_idx.to(window.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; the copies are adjacent."""
        super().batch_repeat_interleave(repeats)
        self._map_windows(lambda window: window.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_windows(lambda window: window[indices.to(window.device)])

    def _map_windows(self, function) -> None:
        self.windows = {key: function(window) for key, window in self.windows.items()}


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SaintIberisConv(nn.Conv1d):
    """A depthwise causal convolution, z[t] = sum_w weight[w] u[t-(K-1)+w], or with a residual u + z.

    name: of its input u, under which the cache stores the last K-1 values.
    """

    def __init__(self, channels: int, taps: int, layer: int, name: str, is_residual: bool = True):
        super().__init__(channels, channels, taps, groups=channels, bias=False)
        self.key, self.is_residual = (layer, name), is_residual

    def forward(self, u: Tensor, is_token: Tensor | None, cache: SaintIberisCache | None) -> Tensor:
        """Map u (B,T,C) to (B,T,C), summed in float32; values where is_token (B,T,1) is 0 count as zeros."""
        T, K = u.size(1), self.kernel_size[0]
        if is_token is not None:
            u = u * is_token
        window = None if cache is None else cache.windows.get(self.key)
        past = F.pad(u, (0, 0, K - 1, 0)) if window is None else torch.cat([window, u], dim=1)
        if cache is not None:
            cache.windows[self.key] = past[:, T:].clone()  # a view would keep `past` in memory
        weight = at_least_float32(self.weight)
        z = sum(at_least_float32(past[:, w : w + T]) * weight[:, 0, w] for w in range(K))
        return (u + z if self.is_residual else z).to(u.dtype)
