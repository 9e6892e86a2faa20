import copy

import pytest
import torch

from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.optim.schedule import LearningRates
from nanochat.optim.updates import muon_update, orthogonalize
from tests.helpers.models import random_model, small_config


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (1, 7), (30, 31)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    stack = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    stack[0] += 3e-4  # one large singular value beside small ones
    out = orthogonalize(stack, torch.float32)
    assert out.shape == stack.shape
    U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
    well_conditioned = S / S.norm(dim=-1, keepdim=True) > 0.05
    values = torch.linalg.diagonal(U.mT @ out @ Vh.mT)
    assert ((values > 0.6) & (values < 1.3))[well_conditioned].all()
    off_diagonal = U.mT @ out @ Vh.mT - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 1e-3


def test_orthogonalize_of_zero_is_zero():
    """All gradients but the head's are zero at the first step; they must not become NaN."""
    assert not orthogonalize(torch.zeros(2, 3, 5), torch.float32).any()


def test_muon_update_is_nesterov_momentum_and_scales_by_the_original_shape():
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, 9, 4)
    buffer = torch.zeros(1, 9, 4)
    m = torch.tensor(0.9)
    muon_update(first, buffer, m, torch.float32)
    torch.testing.assert_close(buffer, 0.1 * first)
    update = muon_update(second, buffer, m, torch.float32)
    mean = 0.9 * 0.1 * first + 0.1 * second
    torch.testing.assert_close(buffer, mean)
    expected = orthogonalize(0.1 * second + 0.9 * mean, torch.float32) * (9 / 4) ** 0.5
    torch.testing.assert_close(update, expected)
    wide = muon_update(second.mT, torch.zeros(1, 4, 9), m, torch.float32)
    assert torch.linalg.matrix_norm(wide, 2) < 1.3  # not scaled up: rows < columns


def test_stacked_matrices_are_updated_independently():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4, 6), torch.randn(2, 3, 4, 6)

    def run(indices):
        params = [torch.nn.Parameter(start[i].clone()) for i in indices]
        optimizer = MuonAdamW([{"kind": "muon", "params": params, "lr": 0.1, "momentum": 0.9}])
        for gradient in gradients:
            for i, p in zip(indices, params, strict=True):
                p.grad = gradient[i].clone()
            optimizer.step()
        return [p.detach() for p in params]

    together = run([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(run([i])[0], together[i])


def test_adamw_equals_torchs():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    group = {"kind": "adamw", "params": [ours], "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-10}
    optimizer = MuonAdamW([group])
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    for _ in range(5):
        ours.grad = torch.randn(6)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_groups_by_role():
    """Equal rates must not merge or drop groups; taps go to AdamW, alpha_proj and A_proj to Muon."""
    model = random_model(small_config(n_embd=192, n_layer=7))
    rates = LearningRates(embedding_lr=0.3, unembedding_lr=0.3, conv_lr=0.3, matrix_lr=0.02)
    optimizer = build_optimizer(model, rates)
    names = {p: name for name, p in model.named_parameters()}
    kinds = {names[p]: group["kind"] for group in optimizer.param_groups for p in group["params"]}
    assert set(kinds) == set(names.values())
    for name, kind in kinds.items():
        by_adamw = name in ("transformer.wte.weight", "lm_head.weight") or "conv1d" in name
        assert kind == ("adamw" if by_adamw else "muon"), name
    for group in optimizer.param_groups:
        assert group["lr"] == group["initial_lr"]
        assert group["lr"] == pytest.approx(0.3 * 2 if group["kind"] == "adamw" else 0.02)  # (192/768)^-0.5
    assert (
        len(build_optimizer(GPT(small_config(slc_rate=0)), rates).param_groups) == 2 + 3
    )  # no empty taps group


def test_state_survives_saving():
    """Two steps, with and without saving and loading in between, give bitwise equal weights."""

    def gradients(model, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)

    def step(model, optimizer, seed):
        gradients(model, seed)
        optimizer.step()

    model = random_model(small_config())
    optimizer = build_optimizer(model, LearningRates())
    step(model, optimizer, 1)
    model2 = random_model(small_config(), seed=9)
    model2.load_state_dict(model.state_dict())
    optimizer2 = build_optimizer(model2, LearningRates())
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (model2, optimizer2)):
        step(m, o, 2)
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(a, b)
