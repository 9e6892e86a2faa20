"""MuonAdamW: Muon for the matrices, AdamW for all other parameters, on one rank or sharded over many.

Muon (Jordan et al. 2024) replaces the gradient of a matrix by the nearest orthogonal one: with G = U S V^T it
steps along U V^T, which five steps of a quintic Newton-Schulz iteration approximate by matrix products alone.
Matrices of one shape are stacked and updated together: a few large batched products instead of hundreds of
small ones. On Hopper, nanochat/kernels/train/muon.py needs fewer and cheaper products. Options of the second
generation: NorMuon (Li et al. 2025) and cautious weight decay (Chen et al. 2025).

AdamW (Loshchilov & Hutter 2019) without weight decay updates tables, taps, gates and scales: rows of a table
and taps of a filter are not linear maps whose singular values have a meaning, and a gate reads few channels.

With several ranks, each updates a share of every stack and holds the optimizer state of that share only (ZeRO
stage 2, Rajbhandari et al. 2020):

    last backward of a step   each gradient is copied into its stack when it is ready; a full bucket of the
                              stack is reduce-scattered while the backward continues
    finish_reduction          waits for the reductions, and measures the gradients; `clip` may scale them
    step                      each rank updates its share; the weights are all-gathered, starting with those
                              that the next forward needs first, while the next stack is updated

A single rank runs the same code without the collectives. nanochat/optim/stack.py defines the layout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.hardware import compiled, has_large_tiles
from nanochat.optim.schedule import OptimizerConfig
from nanochat.optim.stack import Stack
from nanochat.optim.updates import adamw_step, muon_step, second_moment_shape


class MuonAdamW(torch.optim.Optimizer):
    """Optimizer over groups of `kind` "muon" (with `momentum`) or "adamw" (with `betas`, `eps`).

    A group of muon may have `normuon` (whether to normalise neurons) and `weight_decay`.
    All parameters of a group have one shape, and become views into the stack of the group. Gradients are
    reduced, and Muon's products computed, in dtype; `clip` limits their norm to grad_clip (0: off).
    forward_order lists the parameters in the order of use in a forward, which decides that of communication.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        forward_order: Sequence[Tensor] = (),
        *,
        dtype: torch.dtype = torch.float32,
        grad_clip: float = 0.0,
        runtime: Runtime | None = None,
    ):
        super().__init__(groups, defaults={})
        self.grad_clip = grad_clip
        runtime = runtime or Runtime.cpu()
        params = [p for group in self.param_groups for p in group["params"]]
        position = {p: i for i, p in enumerate(forward_order or params)}
        self.stacks = [
            Stack(
                sorted(group["params"], key=position.__getitem__, reverse=True),
                _state_shapes(group),
                by_rows=group["kind"] == "adamw" and len(group["params"]) == 1,
                dtype=dtype,
                rank=runtime.rank,
                world_size=runtime.world_size,
            )
            for group in self.param_groups
        ]
        self._stack_of = {p: stack for stack in self.stacks for p in stack.params}
        self._missing = set(params)  # parameters whose gradients are not in a stack yet
        # a fixed order, whichever gradient is ready first: all ranks must issue the same collectives
        buckets = [(stack, b) for stack in self.stacks for b in range(len(stack.buckets))]
        self._buckets = sorted(buckets, key=lambda item: -min(position[p] for p in item[0].buckets[item[1]]))
        self._n_reduced = 0  # buckets whose reduction has started
        self._is_last_backward = self._is_reduced = False
        for p in params:
            p.register_post_accumulate_grad_hook(self._on_gradient)

    def begin_reduction(self) -> None:
        """Announce the last backward of the step: from now on a ready gradient is complete."""
        self._is_last_backward = True

    def _on_gradient(self, p: Tensor) -> None:
        if self._is_last_backward:
            self._collect(p)

    @torch.no_grad()
    def _collect(self, p: Tensor) -> None:
        """Move the gradient of p into its stack, and start the reduction of every bucket that is full."""
        self._stack_of[p].take_gradient(p)
        self._missing.remove(p)
        while self._n_reduced < len(self._buckets):
            stack, b = self._buckets[self._n_reduced]
            if not self._missing.isdisjoint(stack.buckets[b]):
                break
            stack.reduce(b)
            self._n_reduced += 1

    @torch.no_grad()
    def finish_reduction(self) -> Tensor:
        """Move the remaining gradients into the stacks and sum over ranks; a missing gradient counts as 0.

        Return the sum of squares of this rank's share, 0-D float32; its sum over ranks is the squared norm of
        the whole gradient. Afterwards every parameter's `grad` is None.
        """
        self._is_last_backward = False
        for p in list(self._missing):
            self._collect(p)
        self._is_reduced = True
        return torch.stack([stack.finish_reduction() for stack in self.stacks]).sum()

    @torch.no_grad()
    def clip(self, norm: float) -> None:
        """Scale the reduced gradients down to a norm of grad_clip (0: do not), if `norm`, theirs, is larger.

        norm is that of the whole gradient, so every rank scales its share alike.
        """
        if 0 < self.grad_clip < norm:
            for stack in self.stacks:
                stack.own_grads.mul_(self.grad_clip / norm)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from the reduced gradients; call finish_reduction first if necessary."""
        if not self._is_reduced:
            self.finish_reduction()
        gathering = []
        for stack in dict.fromkeys(stack for stack, _ in reversed(self._buckets)):
            group = self.param_groups[self.stacks.index(stack)]
            (_update_muon if group["kind"] == "muon" else _update_adamw)(stack, group)
            gathering += stack.gather()
        for work in gathering:
            work.wait()
        self._missing = set(self._stack_of)
        self._n_reduced, self._is_reduced = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's share of the state, by group, with the numbers of its slots."""
        groups = [{**group, "params": len(group["params"])} for group in self.param_groups]
        state = {i: stack.state_dict() for i, stack in enumerate(self.stacks)}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a run on a single rank. Learning rates come from the settings, not from here."""
        self.load_shards([state_dict])

    def load_shards(self, shards: Sequence[dict[str, Any]]) -> None:
        """Load this rank's share from the state dicts of all ranks of a run with any number of ranks.

        Raise ValueError if they belong to other parameters or a part of the share is missing.
        """
        for i, stack in enumerate(self.stacks):
            try:
                stack.load_shards([shard["state"][i] for shard in shards])
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"the optimizer state is from another model or an older version ({error!r}): start over; "
                    "to start from another stage, pass --no-warm-start"
                ) from error


def _state_shapes(group: dict[str, Any]) -> dict[str, Sequence[int] | None]:
    """Return what a stack of this group keeps for each slot, None for the shape of the slot."""
    if group["kind"] == "adamw":
        return {"exp_avg": None, "exp_avg_sq": None}
    if not group.get("normuon"):
        return {"momentum_buffer": None}
    return {"momentum_buffer": None, "second_moment": second_moment_shape(*group["params"][0].shape)}


def fastest_muon_step(grads: Tensor) -> Callable[..., None]:
    """Return the fastest equivalent of muon_step for gradients (..., rows, cols) like these."""
    if not grads.is_cuda:
        return muon_step
    if grads.dtype == torch.bfloat16 and has_large_tiles(grads.device):
        from nanochat.kernels.train import muon, newton_schulz

        if newton_schulz.fits(*grads.shape[-2:]):
            return compiled(muon.muon_step)
    return compiled(muon_step)


def _update_muon(stack: Stack, group: dict[str, Any]) -> None:
    step = fastest_muon_step(stack.own_grads)
    rate, momentum = torch.tensor(group["lr"]), torch.tensor(group["momentum"])  # 0-D: new values, same graph
    decay = torch.tensor(group["weight_decay"]) if group.get("weight_decay") else None
    buffer, second_moment = stack.state["momentum_buffer"], stack.state.get("second_moment")
    step(stack.own_weights, stack.own_grads, buffer, rate, momentum, second_moment, decay)


def _update_adamw(stack: Stack, group: dict[str, Any]) -> None:
    step = compiled(adamw_step) if stack.weights.is_cuda else adamw_step
    bias, bias_sq = (1 - beta ** (stack.n_steps + 1) for beta in group["betas"])
    rate, bias_sq = torch.tensor(group["lr"] / bias), torch.tensor(bias_sq)
    exp_avg, exp_avg_sq = stack.state.values()
    betas, eps = group["betas"], group["eps"]
    step(stack.own_weights, stack.own_grads, exp_avg, exp_avg_sq, rate, bias_sq, betas, eps)


def build_optimizer(model: GPT, settings: OptimizerConfig, runtime: Runtime | None = None) -> MuonAdamW:
    """Group the parameters by role and shape; a schedule multiplies the `initial_lr` of each group."""
    scale = (model.config.n_embd / 768) ** -0.5
    usual, of_tables = (0.8, 0.95), (0.8, settings.table_beta2)
    by_adamw = {  # learning rate and betas by role
        "wte": (settings.embedding_lr * scale, of_tables),
        "lm_head": (settings.unembedding_lr * scale, of_tables),
        "taps": (settings.conv_lr * scale, usual),
        "value_embeds": (settings.value_embed_lr, of_tables),
        "value_gate": (settings.value_gate_lr, usual),
        "resid_scales": (settings.resid_scale_lr, usual),
        "x0_scales": (settings.x0_scale_lr, usual),
    }
    members: dict[tuple[str, torch.Size], list[Tensor]] = {}
    for name, p in model.named_parameters():
        named = (role for role in by_adamw if role in name.split("."))
        role = next(named, "taps" if p.ndim == 3 else "matrix")
        members.setdefault((role, p.shape), []).append(p)
    groups = [
        {"kind": "adamw", "params": params, "lr": lr, "betas": betas, "eps": 1e-10}
        for role, (lr, betas) in by_adamw.items()
        for (found, _), params in members.items()
        if found == role
    ]
    groups += [
        {
            "kind": "muon",
            "params": params,
            "lr": settings.matrix_lr,
            "momentum": settings.momentum,
            "normuon": settings.normuon,
            "weight_decay": settings.weight_decay,
            "initial_weight_decay": settings.weight_decay,
        }
        for (role, _), params in members.items()
        if role == "matrix"
    ]
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == set(model.parameters()), "a parameter is in no group"
    return MuonAdamW(
        [{**group, "initial_lr": group["lr"]} for group in groups],
        list(model.parameters()),
        dtype=model.activation_dtype,
        grad_clip=settings.grad_clip,
        runtime=runtime,
    )
