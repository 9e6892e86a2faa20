"""Tensors of one shape in one piece of memory, shared out over ranks: what the optimizer works on.

A stack has slots of one shape: one for each of several tensors, or one for each row of a single table. They
lie in buckets, the parts that are sent at a time, and in a bucket by rank:

    weights (buckets, ranks, m, *slot)      weights[b, r] is rank r's share of bucket b, m slots

with as many empty slots at the end as it takes to fill the last bucket. So any number of tensors or rows goes
with any number of ranks, and both collectives read and write whole buckets where they lie. The parameters
themselves become views into the weights: nothing is copied to or from a stack but gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 * 2**20  # of gradients; enough for full bandwidth, small beside all that is sent in a step


class Stack:
    """Weights, gradients in dtype, and this rank's share of the state `state_names`, zero at first.

    Takes over params, all of one shape, which lie in the stack in their order; with by_rows there is one,
    shared out by rows.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        state_names: Sequence[str],
        *,
        by_rows: bool,
        dtype: torch.dtype,
        rank: int,
        world_size: int,
    ):
        self.params, self.dtype, self.rank, self.world_size = params, dtype, rank, world_size
        shape = params[0].shape
        self.n_slots, slot = (shape[0], shape[1:]) if by_rows else (len(params), shape)
        share = -(-self.n_slots // world_size)
        n_bytes = world_size * slot.numel() * dtype.itemsize
        m = share if by_rows else slots_at_a_time(share, n_bytes)  # the gradient of a table comes at once
        self.weights = params[0].detach().new_zeros(-(-share // m), world_size, m, *slot)
        step = self.n_slots if by_rows else 1  # slots of one tensor
        self.places = {p: slice(i * step, (i + 1) * step) for i, p in enumerate(params)}
        for p, place in self.places.items():
            there = self.weights.flatten(0, 2)[place].view(shape)
            p.data = there.copy_(p.detach())
        size = world_size * m
        self.buckets = [params[i : i + size] for i in range(0, len(params), size)]
        self.grads: Tensor | None = None  # of all ranks' shares, laid out like weights
        self.own_grads: Tensor | None = None  # of this rank's share, summed over ranks
        self.reducing: list[dist.Work] = []
        self.n_steps = 0
        self.state = {name: torch.zeros_like(self.own_weights) for name in state_names}  # (buckets, m, *slot)

    @property
    def own_weights(self) -> Tensor:
        """This rank's share of the weights, (buckets, m, *slot), a view."""
        return self.weights[:, self.rank]

    # -----------------------------------------------------------------------------------------------------
    # From gradients to weights

    def take_gradient(self, p: Tensor) -> None:
        """Move the gradient of a parameter (None: zero) into the stack."""
        if self.grads is None:  # new in each step: the memory serves activations in between
            self.grads = torch.empty_like(self.weights, dtype=self.dtype)
            self.grads.flatten(0, 2)[self.n_slots :].zero_()
            self.own_grads = self.grads[:, 0]
            if self.world_size > 1:
                self.own_grads = torch.empty_like(self.own_weights, dtype=self.dtype)
        there = self.grads.flatten(0, 2)[self.places[p]]
        if p.grad is None:
            there.zero_()
        else:
            there.view(p.shape).copy_(p.grad)
        p.grad = None

    def reduce(self, b: int) -> None:
        """Begin to sum a bucket's gradients over ranks, each rank's share on that rank."""
        if self.world_size > 1:
            whole = self.grads[b].flatten(0, 1)
            self.reducing.append(dist.reduce_scatter_tensor(self.own_grads[b], whole, async_op=True))

    def finish_reduction(self) -> Tensor:
        """Wait for all sums; return the sum of squares of this rank's, 0-D float32."""
        for work in self.reducing:
            work.wait()
        self.reducing, self.grads = [], None
        return torch.linalg.vector_norm(self.own_grads, dtype=torch.float32).square()

    def gather(self) -> list[dist.Work]:
        """Begin to collect the weights that each rank has updated, the first of the forward before others."""
        self.own_grads = None
        self.n_steps += 1
        if self.world_size == 1:
            return []
        return [
            dist.all_gather_into_tensor(whole.flatten(0, 1), whole[self.rank], async_op=True)
            for whole in reversed(self.weights.unbind())
        ]

    # -----------------------------------------------------------------------------------------------------
    # State

    @property
    def own_slots(self) -> Tensor:
        """Numbers of the slots of this rank's share, int64 in rising order; the empty ones left out."""
        n_buckets, world_size, m = self.weights.shape[:3]
        slots = torch.arange(n_buckets * world_size * m).view(n_buckets, world_size, m)
        own = slots[:, self.rank].flatten()
        return own[own < self.n_slots]

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's share, (n, *slot) each, with the numbers of its n slots."""
        slots = self.own_slots
        tensors = {name: value.flatten(0, 1)[: len(slots)] for name, value in self.state.items()}
        return {"n_slots": self.n_slots, "slots": slots, "n_steps": self.n_steps, **tensors}

    def load_shards(self, shards: Sequence[dict[str, Any]]) -> None:
        """Take this rank's share out of the state of all ranks of a run; ValueError if it does not fit."""
        slots = self.own_slots
        is_loaded = torch.zeros(len(slots), dtype=torch.bool)
        for shard in shards:
            is_own = torch.isin(shard["slots"], slots)
            where = torch.searchsorted(slots, shard["slots"][is_own])
            is_loaded[where] = True
            for name, value in self.state.items():
                if shard["n_slots"] != self.n_slots or shard[name].shape[1:] != value.shape[2:]:
                    raise ValueError(
                        f"the optimizer state is of {shard['n_slots']} x {tuple(shard[name].shape[1:])}, "
                        f"the model has {self.n_slots} x {tuple(value.shape[2:])}"
                    )
                value.flatten(0, 1)[where] = shard[name][is_own].to(value)
            self.n_steps = shard["n_steps"]
        if not is_loaded.all():
            raise ValueError("the optimizer state lacks the share of a rank")


def slots_at_a_time(share: int, n_bytes: int) -> int:
    """How many of a rank's slots go into a bucket, if a slot for each rank takes n_bytes.

    As many as BUCKET_BYTES hold, or so many fewer that the last bucket is as good as full.
    """
    most = max(1, min(share, BUCKET_BYTES // n_bytes))
    return min(range(most, 0, -1), key=lambda m: -(-share // m) * m)
