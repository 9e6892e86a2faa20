"""Sharding of tensors over simulated ranks; test_ranks runs real ones."""

import dataclasses

import pytest
import torch

from nanochat.common import Runtime
from nanochat.optim import stack as stack_module
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.optim.stack import Stack, slots_per_bucket
from tests.helpers.models import SECOND, random_model, small_config

# the second generation has stacks of scalars, and state of other shapes than the weights
GENERATIONS = [(small_config(n_embd=32), OptimizerConfig())]
GENERATIONS += [(small_config(n_embd=32, n_kv_head=1, **SECOND), OptimizerConfig(normuon=True))]


@pytest.fixture(params=GENERATIONS, ids=["published", "second"])
def generation(request):
    return request.param


def optimizers(world_size, generation):
    """Return a model and an optimizer for each rank; the models are equal."""
    config, settings = generation
    runtimes = [dataclasses.replace(Runtime.cpu(), rank=r, world_size=world_size) for r in range(world_size)]
    models = [random_model(config) for _ in runtimes]
    return models, [build_optimizer(m, settings, r) for m, r in zip(models, runtimes, strict=True)]


@pytest.mark.parametrize("share", [1, 2, 7, 34, 100])
@pytest.mark.parametrize("mib", [1, 3, 13, 100])
def test_buckets_are_full_and_within_the_size_limit(share, mib):
    m = slots_per_bucket(share, mib * 2**20)
    assert m == 1 or m * mib <= 32
    assert m <= share
    assert -(-share // m) * m == share  # buckets of one slot always fit, so no slot needs to stay empty


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("bucket_bytes", [0, 2**30])
def test_every_slot_has_one_owner_and_a_parameter_keeps_its_values(
    monkeypatch, world_size, bucket_bytes, generation
):
    monkeypatch.setattr(stack_module, "BUCKET_BYTES", bucket_bytes)
    reference = random_model(generation[0])
    models, ranks = optimizers(world_size, generation)
    for model in models:
        for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.is_contiguous()
            assert torch.equal(p, expected)
    for shares in zip(*(optimizer.stacks for optimizer in ranks), strict=True):
        owned = torch.cat([share.own_slots for share in shares])
        assert sorted(owned.tolist()) == list(range(shares[0].n_slots))
        assert {p for bucket in shares[0].buckets for p in bucket} == set(shares[0].params)
        for share in shares:
            slots = share.weights.flatten(0, 2)[share.own_slots]
            assert torch.equal(slots, share.own_weights.flatten(0, 1)[: len(slots)])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2), (2, 5), (8, 8)])
def test_state_moves_between_any_numbers_of_ranks(before, after, generation):
    _, old = optimizers(before, generation)
    for i, optimizer in enumerate(old):
        for stack in optimizer.stacks:
            stack.n_steps = 7
            for value in stack.state.values():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)))
    shards = [optimizer.state_dict() for optimizer in old]
    _, new = optimizers(after, generation)
    for optimizer in new:
        optimizer.load_shards(shards)
        for i, stack in enumerate(optimizer.stacks):
            found = stack.state_dict()
            assert found["n_steps"] == 7
            values_of = [found[name] for name in stack.state]
            for slot, *values in zip(found["slots"].tolist(), *values_of, strict=True):
                (shard,) = (s["state"][i] for s in shards if slot in s["state"][i]["slots"])
                place = shard["slots"].tolist().index(slot)
                assert all(torch.equal(v, shard[n][place]) for v, n in zip(values, stack.state, strict=True))
    with pytest.raises(ValueError, match="lacks the share of a rank"):
        new[0].load_shards(shards[1:])


def test_the_state_of_normuon_is_small():
    """A number a row of a tall matrix, a column of a wide one; kept in float32."""
    _, (optimizer,) = optimizers(1, GENERATIONS[1])
    found = {
        tuple(stack.params[0].shape): tuple(stack.state["second_moment"].shape[2:])
        for stack in optimizer.stacks
        if "second_moment" in stack.state
    }
    assert found == {
        (32, 32): (32, 1),
        (16, 32): (1, 32),
        (2, 32): (1, 32),
        (128, 32): (128, 1),
        (32, 128): (1, 128),
    }


class Done:
    def wait(self):
        pass


def test_order_of_communication_during_the_backward(monkeypatch):
    """The head's gradient is sent first and the embedding's last; weights return in reverse order."""
    events = []

    class Collectives:
        def reduce_scatter_tensor(self, out, whole, async_op):
            events.append(("reduce", n_gradients[0], tuple(whole.shape)))
            return Done()

        def all_gather_into_tensor(self, whole, own, async_op):
            events.append(("gather", None, tuple(whole.shape)))
            return Done()

    monkeypatch.setattr(stack_module, "dist", Collectives())
    monkeypatch.setattr(stack_module, "BUCKET_BYTES", 0)  # one matrix per rank and bucket
    n_gradients = [0]
    take = Stack.take_gradient
    monkeypatch.setattr(
        Stack,
        "take_gradient",
        lambda self, p: (n_gradients.__setitem__(0, n_gradients[0] + 1), take(self, p)),
    )
    model = random_model(small_config(n_embd=32, n_layer=6))
    optimizer = build_optimizer(
        model, OptimizerConfig(), dataclasses.replace(Runtime.cpu(), rank=0, world_size=2)
    )
    idx = torch.randint(0, 50, (2, 9))
    for _ in range(2):
        model(idx, idx).backward()
    assert events == []
    assert all(p.grad is not None for p in model.parameters())
    optimizer.begin_reduction()
    model(idx, idx).backward()
    assert all(p.grad is None for p in model.parameters())
    n = len(list(model.parameters()))
    assert events[0] == ("reduce", 1, (50, 32))
    assert events[-1] == ("reduce", n, (50, 32))
    assert sum(done < n / 2 for _, done, _ in events) > len(events) / 4
    reduced = [shape for _, _, shape in events]
    events.clear()
    optimizer.finish_reduction()
    assert events == []
    optimizer.step()
    gathered = [shape for _, _, shape in events]
    assert gathered[0] == gathered[-1] == (50, 32)
    assert sorted(gathered) == sorted(reduced)


def test_reductions_have_the_same_order_on_a_rank_without_gradients(monkeypatch):
    orders = []
    for has_gradients in (True, False):
        model = random_model(small_config(n_embd=32))
        optimizer = build_optimizer(model, OptimizerConfig())
        order = []
        for number, stack in enumerate(optimizer.stacks):
            monkeypatch.setattr(
                stack, "reduce", lambda b, number=number, order=order: order.append((number, b))
            )
        if has_gradients:
            idx = torch.randint(0, 50, (2, 9))
            optimizer.begin_reduction()
            model(idx, idx).backward()
        squared_norm = optimizer.finish_reduction()
        assert (squared_norm > 0) == has_gradients
        orders.append(order)
    assert orders[0] == orders[1]


def test_the_norm_is_that_of_all_gradients():
    model = random_model(small_config())
    optimizer = build_optimizer(model, OptimizerConfig())
    idx = torch.randint(0, 50, (2, 9))
    model(idx, idx).backward()
    expected = sum(p.grad.square().sum() for p in model.parameters())
    torch.testing.assert_close(optimizer.finish_reduction(), expected)
