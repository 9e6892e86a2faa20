"""Loss of the output head: lm_head, soft-cap and cross-entropy without a whole tensor of logits.

For a chunk of tokens, one matrix product gives the logits l, and one kernel turns each row of them into

    s = CAP * tanh(l / CAP);  loss = log(sum_v exp(s_v)) - s_target
    dl = (softmax(s) - onehot) * (1 - (s / CAP)^2)       in place of l

so that two more products give what the chunk adds to the gradients of x and of the weight. All this is done
while the logits are there, in the forward; the backward only scales (Liger Kernel, Hsu et al. 2024). Since
|s| <= CAP the sum needs no running maximum: it is at most V e^CAP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels import fp8 as fp8_kernels
from nanochat.kernels.instructions import has_instructions, tanh

CHUNK_BYTES = 2**31  # of logits
BLOCK_V = 8192


@triton.jit
def _cross_entropy(
    logits_ptr,
    narrow_ptr,
    targets_ptr,
    losses_ptr,
    V,
    NARROW_SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    APPROX: tl.constexpr,
):
    v = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * V
    target = tl.load(targets_ptr + row)
    is_counted = target >= 0
    at_target = tl.load(at + tl.maximum(target, 0)).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + v < V
        logits = tl.load(at + start + v, mask=inside, other=0.0, eviction_policy="evict_last")
        total += tl.where(inside, tl.exp(CAP * tanh(logits.to(tl.float32) / CAP, APPROX)), 0.0)
    log_total = tl.log(tl.sum(total, 0))
    loss = log_total - CAP * tanh(at_target / CAP, APPROX)
    tl.store(losses_ptr + row, tl.where(is_counted, loss, 0.0))
    if HAS_GRAD:
        tl.debug_barrier()  # all have read the target's logit before one writes there
        for start in range(0, V, BLOCK):
            inside = start + v < V
            logits = tl.load(at + start + v, mask=inside, other=0.0, eviction_policy="evict_first")
            capped = tanh(logits.to(tl.float32) / CAP, APPROX)
            p = tl.exp(CAP * capped - log_total)
            grad = tl.where(start + v == target, p - 1.0, p) * (1.0 - capped * capped)
            grad = tl.where(is_counted, grad, 0.0)
            tl.store(at + start + v, grad, mask=inside, eviction_policy="evict_first")
            if narrow_ptr is not None:
                narrow = narrow_ptr + row * V + start + v
                tl.store(narrow, grad * NARROW_SCALE, mask=inside, eviction_policy="evict_first")


def cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, cap: float, has_grad: bool, narrow: Tensor | None = None
) -> None:
    """Write the loss of each row of logits (N,V) to losses (N,) float32; if has_grad, its gradient to logits.

    targets (N,) int64; a row whose target is negative has loss and gradient 0. narrow (N,V) in 8 bits, if
    given, gets the gradient too, times fp8.LOGIT_GRADIENT_SCALE. So many threads work on a row that no more
    rows are under way than the L2 cache holds: each is read twice.
    """
    N, V = logits.shape
    block, is_approx = min(BLOCK_V, triton.next_power_of_2(V)), has_grad and has_instructions(logits)
    _cross_entropy[(N,)](
        logits, narrow, targets, losses, V, fp8_kernels.LOGIT_GRADIENT_SCALE, cap, block, has_grad,
        is_approx, num_warps=16 if narrow is None else 32,
    )  # fmt: skip


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str, cap: float, fp8: bool = False
) -> Tensor:
    """Cross-entropy in nats of x (B,T,E) under weight (V,E) float32 against targets (B,T); -1 does not count.

    reduction "sum", "mean" over counted targets (0 if none), or, where no gradient is wanted, "none": (B*T,).
    With fp8, where a gradient is wanted, logits and dx are products in 8 bits; x is then an rms_norm.
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
        raise ValueError('reduction "none" has no fused gradient: use the plain loss')
    else:
        loss = _SummedHeadLoss.apply(x, weight, targets, cap, fp8)
    return loss / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else loss


class _SummedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float, fp8: bool) -> Tensor:
        losses = x.new_empty(len(x), dtype=torch.float32)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
        head, cast = (fp8_kernels.Head(x, weight), None) if fp8 else (None, weight.to(x.dtype))
        for rows in _chunks(x, weight):
            if head is not None:
                logits, narrow = head.logits(rows)
                cross_entropy_(logits, targets[rows], losses[rows], cap, has_grad=True, narrow=narrow)
                dx[rows] = head.gradient(narrow)
            else:
                logits = x[rows] @ cast.T
                cross_entropy_(logits, targets[rows], losses[rows], cap, has_grad=True)
                torch.mm(logits, cast, out=dx[rows])
            if x.dtype == dweight.dtype:
                dweight.addmm_(logits.T, x[rows])
            else:  # summed over the chunks in float32
                torch.addmm(dweight, logits.T, x[rows], out_dtype=dweight.dtype, out=dweight)
            del logits  # before there are those of the next chunk
        ctx.save_for_backward(dx, dweight)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, CHUNK_BYTES // (len(weight) * x.element_size()))
    return [slice(start, start + rows) for start in range(0, len(x), rows)]
