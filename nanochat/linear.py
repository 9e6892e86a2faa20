"""The one linear layer of the model: a float32 master weight, computed in the dtype of its input.

Explicit casts stand where autocast would hide them, so that a float64 input gives a float64 reference and a
bfloat16 input runs on the tensor cores.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T without bias, W cast to x's dtype. Weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features) in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))


def joint_linear(
    h: Tensor, layers: list[Linear], product: Callable[[Tensor, Tensor], Tensor], multiple: int = 1
) -> Tensor:
    """What the layers make of h (..., E), side by side, in one product; zeros up to a multiple of columns.

    The parameters stay apart, so that the optimizer and checkpoints never see that they are laid together.
    """
    weight = torch.cat([layer.weight for layer in layers])
    weight = F.pad(weight, (0, 0, 0, -len(weight) % multiple))
    return product(h, weight.to(h.dtype))
