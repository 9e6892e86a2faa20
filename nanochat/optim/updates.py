"""Update rules for stacked parameters: Muon (Jordan et al. 2024), AdamW (Loshchilov & Hutter 2019).

Muon has two options: NorMuon (Li et al. 2025) and cautious weight decay (Chen et al. 2025).
"""

import torch
from torch import Tensor

NEWTON_SCHULZ_STEPS = 5
# steep at 0, flat around 1: singular values land in about [0.7, 1.2] after five steps (Jordan et al. 2024)
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SECOND_MOMENT_BETA = 0.9  # of NorMuon


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


def second_moment_shape(rows: int, cols: int) -> tuple[int, int]:
    """Return the shape of NorMuon's state for a matrix: a number for each index of its longer side."""
    return (rows, 1) if rows >= cols else (1, cols)


def normalize_neurons(direction: Tensor, second_moment: Tensor) -> Tensor:
    """NorMuon: divide a direction (n, rows, cols) by the root of second_moment, and keep its Frobenius norm.

    second_moment (n, *second_moment_shape), the running mean of the squares over the shorter side, is updated
    in place. Rows, or columns, that were long in recent steps become as long as the others. The result has
    the dtype of second_moment; zeros stay zeros.
    """
    direction = direction.to(second_moment.dtype)
    rows, cols = direction.shape[-2:]
    squares = direction.square().mean(dim=-1 if rows >= cols else -2, keepdim=True)
    second_moment.lerp_(squares, 1 - SECOND_MOMENT_BETA)
    inverse = 1 / (second_moment + 1e-10)
    # both norms follow from the means: the matrix is read twice, not three times
    before, after = (x.sum(dim=(-2, -1), keepdim=True) for x in (squares, squares * inverse))
    return direction * (inverse * before / (after + 1e-20)).sqrt()


def muon_update(
    grads: Tensor, buffer: Tensor, momentum: Tensor, dtype: torch.dtype, second_moment: Tensor | None = None
) -> Tensor:
    """Return the direction of a Muon step for a stack of matrices, (n, rows, cols), orthogonalized in dtype.

    buffer, the running mean of the gradients with decay `momentum` (0-D), is updated in place; so is
    second_moment, see `normalize_neurons` (None: plain Muon). The step uses Nesterov momentum, and is scaled
    by max(1, rows/cols)^0.5, so that the change of an output does not depend on the shape.
    """
    grads = grads.to(buffer.dtype)
    buffer.mul_(momentum).add_(grads * (1 - momentum))
    ahead = grads * (1 - momentum) + buffer * momentum
    direction = orthogonalize(ahead, dtype)
    if second_moment is not None:
        direction = normalize_neurons(direction, second_moment)
    return direction * max(1.0, grads.size(-2) / grads.size(-1)) ** 0.5


def decayed(update: Tensor, weights: Tensor, decay: Tensor | None) -> Tensor:
    """Return the update with cautious weight decay (None: without).

    decay W is added where update and weight do not have opposite signs: where the step, which subtracts the
    update, moves the weight towards 0 anyway.
    """
    return update if decay is None else update + decay * weights * (update * weights >= 0)


def muon_step(
    weights: Tensor,
    grads: Tensor,
    buffer: Tensor,
    rate: Tensor,
    momentum: Tensor,
    second_moment: Tensor | None = None,
    decay: Tensor | None = None,
) -> None:
    """Update weights and buffer (..., rows, cols) in place; orthogonalize in the dtype of the gradients.

    rate (learning rate), momentum and decay are 0-D. Options: NorMuon with its state second_moment
    (..., *second_moment_shape), updated in place, and cautious weight decay.
    """
    second_moment = None if second_moment is None else second_moment.flatten(0, -3)
    flat = grads.flatten(0, -3), buffer.flatten(0, -3)
    update = muon_update(*flat, momentum, grads.dtype, second_moment)
    update = update.view(grads.shape).to(weights.dtype)
    weights.sub_(rate * decayed(update, weights, decay))


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
