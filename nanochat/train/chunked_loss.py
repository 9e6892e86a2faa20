"""Loss of the output head in training, in chunks of tokens: the logits of all tokens never exist at once.

For a chunk of tokens, one matrix product gives the logits l, and cross_entropy_ turns each row of them into

    s = CAP * tanh(l / CAP);  loss = log(sum_v exp(s_v)) - s_target
    dl = (softmax(s) - onehot) * (1 - (s / CAP)^2)       in place of l

so that two more products give the chunk's part of the gradients of x and of the weight. The forward does all
of this while it holds the logits; the backward only scales (Liger Kernel, Hsu et al. 2024). Since |s| <= CAP
the sum needs no running maximum: it is at most V e^CAP.

On GPUs cross_entropy_ is a kernel (kernels/train/cross_entropy.py) and chunks are large. On CPUs it is the
function below, and a chunk stays in the cache from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_BYTES = {"cuda": 2**31, "cpu": 2**22}  # of logits
MIN_ROWS = 128  # of a chunk: every chunk reads the weight and updates its gradient


def cross_entropy_(logits: Tensor, targets: Tensor, losses: Tensor, cap: float, has_grad: bool) -> None:
    """Write the loss of each row of logits (N,V) to losses (N,); if has_grad, its gradient to logits.

    targets (N,) int64; a row whose target is negative has loss and gradient 0.
    """
    is_counted, at = targets >= 0, targets.clamp(min=0)[:, None]
    capped = logits.div_(cap).tanh_()
    p = (capped * cap).exp_()
    total = p.sum(1)
    torch.mul(total.log() - cap * capped.gather(1, at)[:, 0], is_counted, out=losses)
    if has_grad:
        p /= total[:, None]
        p.scatter_add_(1, at, p.new_full((1, 1), -1.0).expand_as(at))
        capped.square_().neg_().add_(1.0).mul_(p).mul_(is_counted[:, None])


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str,
    *,
    cap: float,
    cross_entropy_: Callable[..., None] = cross_entropy_,
    narrow_head: Callable | None = None,
) -> Tensor:
    """Return the cross-entropy in nats of x (B,T,E), weight (V,E) float32 and targets (B,T); -1 is ignored.

    reduction: "sum", "mean" over counted targets (0 if none), or, without gradient, "none": (B*T,).
    With narrow_head (kernels.train.fp8.Head), logits and dx of a training forward are products in 8 bits; x
    must then be an rms_norm. Raise ValueError for "none" with a gradient.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    if not torch.is_grad_enabled():
        losses, cast = x.new_empty(len(x), dtype=torch.float32), weight.to(x.dtype)
        for rows in _chunks(x, weight):
            cross_entropy_(x[rows] @ cast.T, targets[rows], losses[rows], cap, has_grad=False)
        if reduction == "none":
            return losses
        loss = losses.sum()
    elif reduction == "none":
        raise ValueError('reduction "none" has no gradient in chunks: use the plain loss')
    else:
        loss = _SummedHeadLoss.apply(x, weight, targets, cap, cross_entropy_, narrow_head)
    return loss / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else loss


class _SummedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float, cross_entropy_, narrow_head):
        losses = x.new_empty(len(x), dtype=torch.float32)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        head, cast = (narrow_head(x, weight), None) if narrow_head else (None, weight.to(x.dtype))
        for rows in _chunks(x, weight):
            if head is not None:
                logits, narrow = head.logits(rows)
                cross_entropy_(logits, targets[rows], losses[rows], cap, has_grad=True, narrow=narrow)
                dx[rows] = head.gradient(narrow)
            else:
                assert cast is not None, "without a narrow head"
                logits = x[rows] @ cast.T
                cross_entropy_(logits, targets[rows], losses[rows], cap, has_grad=True)
                torch.mm(logits, cast, out=dx[rows])
            if x.dtype == dweight.dtype:
                dweight.addmm_(logits.T, x[rows])
            else:  # summed over the chunks in float32
                torch.addmm(dweight, logits.T, x[rows], out_dtype=dweight.dtype, out=dweight)
            del logits  # free them before the next chunk's
        ctx.save_for_backward(dx, dweight)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    rows = max(MIN_ROWS, CHUNK_BYTES[x.device.type] // (len(weight) * x.element_size()))
    return [slice(start, start + rows) for start in range(0, len(x), rows)]
