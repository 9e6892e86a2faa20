"""Stacks: tensors of one shape in contiguous memory, sharded over ranks for the optimizer.

A stack has slots of one shape: one per tensor, or one per row of a single table. Slots are grouped into
buckets, the units of communication, and within a bucket by rank:

    weights (buckets, ranks, m, *slot)      weights[b, r] is rank r's share of bucket b, m slots

Empty slots at the end fill up the last bucket. So any number of tensors or rows works with any number of
ranks, and both collectives read and write whole buckets in place. The parameters become views into the
weights: only gradients are copied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 * 2**20  # of gradients; enough for full bandwidth, and small compared with all of a step


class Stack:
    """Weights, gradients in dtype, and this rank's share of the optimizer state, initially 0.

    params, all of one shape, become views into the stack, in the given order. With by_rows there is a single
    parameter, a table that is sharded by rows. state names the tensors of the state, with the shape that each
    has for a slot (None: that of the slot).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        state: Mapping[str, Sequence[int] | None],
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
        m = share if by_rows else slots_per_bucket(share, n_bytes)  # a table has a single gradient
        self.weights = params[0].detach().new_zeros(-(-share // m), world_size, m, *slot)
        n = self.n_slots if by_rows else 1  # slots per parameter
        self.slots_of = {p: slice(i * n, (i + 1) * n) for i, p in enumerate(params)}
        for p, slots in self.slots_of.items():
            view = self.weights.flatten(0, 2)[slots].view(shape)
            p.data = view.copy_(p.detach())
        size = world_size * m
        self.buckets = [params[i : i + size] for i in range(0, len(params), size)]
        self.grads: Tensor | None = None  # this rank's gradients of all shares, in the layout of weights
        self._own_grads: Tensor | None = None
        self.reducing: list[dist.Work] = []
        self.n_steps = 0
        shapes = {name: slot if shape is None else shape for name, shape in state.items()}
        own = self.own_weights
        self.state = {name: own.new_zeros(*own.shape[:2], *shape) for name, shape in shapes.items()}

    @property
    def own_weights(self) -> Tensor:
        """This rank's share of the weights, a view (buckets, m, *slot)."""
        return self.weights[:, self.rank]

    @property
    def own_grads(self) -> Tensor:
        """The gradients of this rank's share, summed over ranks once finish_reduction has returned."""
        assert self._own_grads is not None, "no gradient has been taken in this step"
        return self._own_grads

    # -----------------------------------------------------------------------------------------------------
    # From gradients to weights

    def take_gradient(self, p: Tensor) -> None:
        """Move the gradient of a parameter (None: zero) into the stack."""
        if self.grads is None:  # allocated per step: activations use the memory in between
            self.grads = torch.empty_like(self.weights, dtype=self.dtype)
            self.grads.flatten(0, 2)[self.n_slots :].zero_()
            self._own_grads = self.grads[:, 0]
            if self.world_size > 1:
                self._own_grads = torch.empty_like(self.own_weights, dtype=self.dtype)
        target = self.grads.flatten(0, 2)[self.slots_of[p]]
        if p.grad is None:
            target.zero_()
        else:
            target.view(p.shape).copy_(p.grad)
        p.grad = None

    def reduce(self, b: int) -> None:
        """Start the reduce-scatter of a bucket's gradients: each rank receives the sum of its share."""
        if self.world_size > 1:
            assert self.grads is not None, "no gradient has been taken in this step"
            whole = self.grads[b].flatten(0, 1)
            work = dist.reduce_scatter_tensor(self.own_grads[b], whole, async_op=True)
            assert work is not None, "async_op returns the work"
            self.reducing.append(work)

    def finish_reduction(self) -> Tensor:
        """Wait for all reductions; return the sum of squares of this rank's gradients, 0-D float32."""
        for work in self.reducing:
            work.wait()
        self.reducing, self.grads = [], None
        return torch.linalg.vector_norm(self.own_grads, dtype=torch.float32).square()

    def gather(self) -> list[dist.Work]:
        """Start the all-gather of the updated weights, those that the forward needs first at the front."""
        self._own_grads = None
        self.n_steps += 1
        gathering: list[dist.Work] = []
        if self.world_size == 1:
            return gathering
        for whole in reversed(self.weights.unbind()):
            work = dist.all_gather_into_tensor(whole.flatten(0, 1), whole[self.rank], async_op=True)
            assert work is not None, "async_op returns the work"
            gathering.append(work)
        return gathering

    # -----------------------------------------------------------------------------------------------------
    # State

    @property
    def own_slots(self) -> Tensor:
        """Numbers of the slots of this rank's share, int64 in ascending order, without empty slots."""
        n_buckets, world_size, m = self.weights.shape[:3]
        slots = torch.arange(n_buckets * world_size * m).view(n_buckets, world_size, m)
        own = slots[:, self.rank].flatten()
        return own[own < self.n_slots]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's share, n slots of each tensor, and the numbers of these slots."""
        slots = self.own_slots
        tensors = {name: value.flatten(0, 1)[: len(slots)] for name, value in self.state.items()}
        return {"n_slots": self.n_slots, "slots": slots, "n_steps": self.n_steps, **tensors}

    def load_shards(self, shards: Sequence[dict[str, Any]]) -> None:
        """Load this rank's share from the state of all ranks of a run.

        Raise ValueError if the shapes differ or a slot of the share is missing.
        """
        slots = self.own_slots
        is_loaded = torch.zeros(len(slots), dtype=torch.bool)
        for shard in shards:
            is_own = torch.isin(shard["slots"], slots)
            where = torch.searchsorted(slots, shard["slots"][is_own])
            is_loaded[where] = True
            for name, value in self.state.items():
                if shard["n_slots"] != self.n_slots or shard[name].shape[1:] != value.shape[2:]:
                    raise ValueError(
                        f"the optimizer state has {shard['n_slots']} x {tuple(shard[name].shape[1:])}, "
                        f"the model needs {self.n_slots} x {tuple(value.shape[2:])}"
                    )
                value.flatten(0, 1)[where] = shard[name][is_own].to(value)
            self.n_steps = shard["n_steps"]
        if not is_loaded.all():
            raise ValueError("the optimizer state lacks the share of a rank")


def slots_per_bucket(share: int, n_bytes: int) -> int:
    """Return the number of a rank's slots per bucket, where one slot of every rank takes n_bytes.

    The largest number that fits into BUCKET_BYTES among those that leave the fewest slots empty.
    """
    limit = max(1, min(share, BUCKET_BYTES // n_bytes))
    return min(range(limit, 0, -1), key=lambda m: -(-share // m) * m)
