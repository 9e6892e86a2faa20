"""Update rules for stacked parameters: Muon (Jordan et al. 2024), AdamW (Loshchilov & Hutter 2019)."""

import torch
from torch import Tensor

NEWTON_SCHULZ_STEPS = 5
# steep at 0, flat around 1: singular values land in about [0.7, 1.2] after five steps (Jordan et al. 2024)
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of each matrix U S V^T in stack (n, rows, cols), in dtype; zeros stay zeros.

    Tall matrices are multiplied from the right: transposing them would make memory access strided.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = stack.size(-2) > stack.size(-1)
    X = (stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        R = X.mT @ X if is_tall else X @ X.mT
        P = torch.baddbmm(R, R, R, beta=b, alpha=c)
        X = torch.baddbmm(X, X, P, beta=a) if is_tall else torch.baddbmm(X, P, X, beta=a)
    return X


def muon_update(grads: Tensor, buffer: Tensor, momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the direction of a Muon step for a stack of matrices, (n, rows, cols) in dtype.

    buffer, the running mean of the gradients with decay `momentum` (0-D), is updated in place. The step uses
    Nesterov momentum, and is scaled by max(1, rows/cols)^0.5, so that the change of an output does not depend
    on the shape.
    """
    grads = grads.to(buffer.dtype)
    buffer.mul_(momentum).add_(grads * (1 - momentum))
    ahead = grads * (1 - momentum) + buffer * momentum
    return orthogonalize(ahead, dtype) * max(1.0, grads.size(-2) / grads.size(-1)) ** 0.5


def muon_step(weights: Tensor, grads: Tensor, buffer: Tensor, rate: Tensor, momentum: Tensor) -> None:
    """Update weights and buffer (..., rows, cols) in place; orthogonalize in the dtype of the gradients.

    rate (learning rate) and momentum are 0-D.
    """
    update = muon_update(grads.flatten(0, -3), buffer.flatten(0, -3), momentum, grads.dtype)
    weights.sub_(rate * update.view(grads.shape).to(weights.dtype))


def adamw_step(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rate: Tensor,
    bias_sq: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update weights, the running mean of the gradients and that of their squares in place.

    rate, the learning rate divided by the bias correction of exp_avg, and bias_sq, the bias correction of
    exp_avg_sq, are 0-D. The weights are not decayed.
    """
    grads = grads.to(weights.dtype)
    exp_avg.lerp_(grads, 1 - betas[0])
    exp_avg_sq.lerp_(grads.square(), 1 - betas[1])
    weights.sub_(rate * exp_avg / ((exp_avg_sq / bias_sq).sqrt() + eps))
