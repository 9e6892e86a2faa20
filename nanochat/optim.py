"""Muon for the matrices, AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024) replaces the gradient of a matrix by the nearest orthogonal one: with G = U S V^T it
steps along U V^T, which five steps of a quintic Newton-Schulz iteration approximate by matrix products alone.
Matrices of one shape are stacked and updated together: a few large batched products instead of hundreds of
small ones, and a stack is also what a rank would own if the work were shared out.

AdamW (Loshchilov & Hutter 2019) without weight decay takes the embedding, the head and the convolutions: rows
of a table and taps of a filter are not linear maps whose singular values mean something.
"""

from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nanochat.gpt import GPT
from nanochat.schedule import LearningRates

NEWTON_SCHULZ_STEPS = 5
# steep at 0, flat around 1: singular values land in about [0.7, 1.2] after five steps (Jordan et al. 2024)
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U V^T of each matrix U S V^T in stack (n, rows, cols), in dtype; zeros stay zeros."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = stack.size(-2) > stack.size(-1)
    X = stack.mT if is_tall else stack
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        XXt = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(XXt, XXt, XXt, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


def muon_update(grads: Tensor, buffer: Tensor, momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """Direction of a Muon step for a stack of matrices, (n, rows, cols) in dtype.

    buffer is the running mean of the gradients, updated in place; momentum, 0-D, is how much of it stays.
    Nesterov: the step looks one gradient ahead. Scaled by max(1, rows/cols)^0.5, so that the change of an
    output does not depend on the shape.
    """
    buffer.mul_(momentum).add_(grads * (1 - momentum))
    ahead = grads * (1 - momentum) + buffer * momentum
    return orthogonalize(ahead, dtype) * max(1.0, grads.size(-2) / grads.size(-1)) ** 0.5


@cache
def _compiled_muon_update():
    return torch.compile(muon_update, dynamic=False)


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups carry `kind`: "muon" (one shape; `momentum`) or "adamw" (`betas`, `eps`)."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._step_muon(group)
            else:
                self._step_adamw(group)

    def _step_muon(self, group: dict) -> None:
        params = group["params"]
        grads = torch.stack([p.grad for p in params])
        state = self.state[params[0]]  # one buffer for the whole stack, kept under its first parameter
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grads)
        on_cuda = grads.is_cuda
        update = (_compiled_muon_update() if on_cuda else muon_update)(
            grads,
            state["momentum_buffer"],
            torch.tensor(group["momentum"]),  # 0-D: a new value is no new graph
            torch.bfloat16 if on_cuda else torch.float32,
        )
        torch._foreach_add_(params, list(update.to(grads.dtype).unbind()), alpha=-group["lr"])

    def _step_adamw(self, group: dict) -> None:
        params = group["params"]
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")),
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(model: GPT, rates: LearningRates) -> MuonAdamW:
    """Group the parameters by role; `initial_lr` of each group is what a schedule multiplies."""
    scale = (model.config.n_embd / 768) ** -0.5
    taps = [p for p in model.transformer.h.parameters() if p.ndim == 3]  # conv1d.weight (E,1,K)
    matrices: dict[torch.Size, list[Tensor]] = {}
    for p in model.transformer.h.parameters():
        if p.ndim == 2:
            matrices.setdefault(p.shape, []).append(p)
    groups = [
        {"kind": "adamw", "params": params, "lr": lr * scale, "betas": (0.8, 0.95), "eps": 1e-10}
        for params, lr in (
            ([model.transformer.wte.weight], rates.embedding_lr),
            ([model.lm_head.weight], rates.unembedding_lr),
            (taps, rates.conv_lr),
        )
        if params  # a model of attention layers only has no taps
    ]
    groups += [
        {"kind": "muon", "params": params, "lr": rates.matrix_lr, "momentum": 0.95}
        for params in matrices.values()
    ]
    return MuonAdamW([{**group, "initial_lr": group["lr"]} for group in groups])
