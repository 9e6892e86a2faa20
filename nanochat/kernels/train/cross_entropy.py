"""cross_entropy_ of train/chunked_loss.py as one kernel: it reads a row of logits twice, writes it once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train import fp8 as fp8_kernels
from nanochat.kernels.train.instructions import has_instructions, tanh

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
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
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
    """Compute chunked_loss.cross_entropy_; losses (N,) float32.

    narrow (N,V) in 8 bits, if given, receives the gradient as well, times fp8.LOGIT_GRADIENT_SCALE. Each row
    is read twice, so enough threads work on a row that the L2 cache holds all rows in progress.
    """
    N, V = logits.shape
    block, is_approx = min(BLOCK_V, triton.next_power_of_2(V)), has_grad and has_instructions(logits)
    _cross_entropy[(N,)](
        logits, narrow, targets, losses, V, fp8_kernels.LOGIT_GRADIENT_SCALE, cap, block, has_grad,
        is_approx, num_warps=16 if narrow is None else 32,
    )  # fmt: skip
