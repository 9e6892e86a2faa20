"""Fused Muon step, equivalent to nanochat/optim/updates.py.

Symmetric products take half the work, and memory is read in few passes. One kernel reads gradients and
momentum once and writes the direction X, in the dtype of the gradients, and its norm. X itself is never
normalised: a Newton-Schulz step is linear in X except for X X^T, which is scaled by 1 / norm^2, and the
learning rate is scaled by 1 / norm. NorMuon and weight decay, which are not linear, take X / norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train.newton_schulz import iterate
from nanochat.optim.updates import decayed, normalize_neurons

BLOCK = 4096


@triton.jit
def _look_ahead(grads_ptr, buffer_ptr, ahead_ptr, squares_ptr, momentum, SIZE, BLOCK: tl.constexpr):
    block, n = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    at += n.to(tl.int64) * SIZE
    new = tl.load(grads_ptr + at, mask=mask, other=0.0).to(tl.float32) * (1.0 - momentum)
    mean = tl.load(buffer_ptr + at, mask=mask, other=0.0) * momentum + new
    ahead = (mean * momentum + new).to(ahead_ptr.dtype.element_ty)
    tl.store(buffer_ptr + at, mean, mask=mask)
    tl.store(ahead_ptr + at, ahead, mask=mask)
    square = ahead.to(tl.float32) * ahead.to(tl.float32)
    tl.store(squares_ptr + n * tl.num_programs(0) + block, tl.sum(square, 0))


@torch.library.custom_op("nanochat::look_ahead", mutates_args=("buffer",))
def look_ahead(grads: Tensor, buffer: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Update buffer (n,rows,cols) as optim.updates.muon_update does; return the direction and its norm (n,).

    The direction has the dtype and shape of grads; norm and buffer are float32; momentum is 0-D on the CPU.
    """
    n, size = len(grads), grads[0].numel()
    programs = triton.cdiv(size, BLOCK)
    ahead, squares = torch.empty_like(grads), buffer.new_empty(n, programs)
    _look_ahead[(programs, n)](grads, buffer, ahead, squares, momentum.item(), size, BLOCK, num_warps=8)
    return ahead, squares.sum(1).sqrt()


@look_ahead.register_fake
def _(grads, buffer, momentum):
    return torch.empty_like(grads), buffer.new_empty(len(grads))


def muon_step(
    weights: Tensor,
    grads: Tensor,
    buffer: Tensor,
    rate: Tensor,
    momentum: Tensor,
    second_moment: Tensor | None = None,
    decay: Tensor | None = None,
) -> None:
    """Update weights, buffer (..., rows, cols) and second_moment in place, as optim.updates.muon_step does.

    Requires newton_schulz.fits(rows, cols).
    """
    X, norm = look_ahead(grads.flatten(0, -3), buffer.flatten(0, -3), momentum)
    norm = norm + 1e-7
    X = iterate(X, norm)
    scale = max(1.0, grads.size(-2) / grads.size(-1)) ** 0.5
    if second_moment is None and decay is None:
        rate = rate * scale / norm
        weights.sub_(rate.view(*grads.shape[:-2], 1, 1) * X.view(grads.shape))
        return
    direction = X / norm.view(-1, 1, 1)  # float32
    if second_moment is not None:
        direction = normalize_neurons(direction, second_moment.flatten(0, -3))
    weights.sub_(rate * decayed((direction * scale).view(grads.shape), weights, decay))
