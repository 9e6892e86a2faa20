import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.utils import clip_grad_norm_

from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.optim.muon_adamw import MuonAdamW, build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.optim.updates import decayed, muon_step, muon_update, normalize_neurons, orthogonalize
from tests.helpers.models import SECOND, random_model, small_config

SECOND_SETTINGS = OptimizerConfig(normuon=True, weight_decay=0.1, table_beta2=0.99)


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


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 7), (7, 1)])
def test_neurons_are_normalized(shape):
    """Against the equation in float64, matrix by matrix, with a state from steps before."""
    torch.manual_seed(0)
    rows, cols = shape
    states = torch.rand(3, *((rows, 1) if rows >= cols else (1, cols)), dtype=torch.float64)
    found_states = states.float()
    for _ in range(2):
        directions = torch.randn(3, *shape, dtype=torch.float64) * torch.rand(rows, 1) * torch.rand(cols)
        found = normalize_neurons(directions.float(), found_states)
        for i, O in enumerate(directions):
            mean = (
                (O * O).sum(1, keepdim=True) / cols if rows >= cols else (O * O).sum(0, keepdim=True) / rows
            )
            states[i] = 0.9 * states[i] + 0.1 * mean
            U = O / (states[i] + 1e-10).sqrt()
            torch.testing.assert_close(found[i].double(), U * O.norm() / U.norm(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_states.double(), states, rtol=1e-5, atol=1e-7)


def test_neurons_of_a_first_step_have_one_length():
    """The state is in float32 whatever the direction is in; a direction of zeros stays zero."""
    torch.manual_seed(0)
    direction = (torch.randn(2, 6, 3) * torch.logspace(-2, 2, 6)[:, None]).bfloat16()
    direction[0] = 0
    state = torch.zeros(2, 6, 1)
    out = normalize_neurons(direction, state)
    assert out.dtype == torch.float32
    assert not out[0].any()
    lengths = out[1].norm(dim=1)
    torch.testing.assert_close(lengths, lengths.mean().expand(6), rtol=1e-4, atol=0)
    torch.testing.assert_close(out[1].norm(), direction[1].float().norm(), rtol=1e-4, atol=0)
    assert not state[0].any()


def test_weight_decay_is_cautious():
    weights = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 2.0])
    update = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5, 0.0])
    expected = torch.tensor([0.7, -0.5, 0.5, -0.7, 0.5, 0.2])  # 0.1 W more where the signs are equal
    torch.testing.assert_close(decayed(update, weights, torch.tensor(0.1)), expected)


@pytest.mark.parametrize("rows_cols", [(4, 9), (9, 4)])
def test_a_step_with_both_options(rows_cols):
    """The scale by shape comes after NorMuon; the decay is of the weights before the step."""
    torch.manual_seed(0)
    weights, grads = torch.randn(2, 1, 3, *rows_cols, dtype=torch.float64)
    buffer, state = torch.zeros_like(weights), torch.rand(1, 3, 9, 1, dtype=torch.float64)
    if rows_cols == (4, 9):
        state = state.mT.contiguous()
    rate, momentum, decay = torch.tensor(0.1), torch.tensor(0.9), torch.tensor(0.3)
    W, v = weights.clone(), state.clone()
    O = orthogonalize((1 - 0.9**2) * grads[0], torch.float64)[None]
    mean = O.square().mean(-1 if rows_cols == (9, 4) else -2, keepdim=True)
    v = 0.9 * v + 0.1 * mean
    U = O / (v + 1e-10).sqrt()
    U *= O.norm(dim=(-2, -1), keepdim=True) / U.norm(dim=(-2, -1), keepdim=True)
    U *= 1.5 if rows_cols == (9, 4) else 1.0
    expected = W - 0.1 * (U + 0.3 * W * (U * W >= 0))
    muon_step(weights, grads, buffer, rate, momentum, state, decay)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state, v, rtol=1e-6, atol=1e-7)


def test_without_options_muon_is_as_published():
    """Bit for bit; models and optimizer files of the first generation rely on it."""
    torch.manual_seed(0)
    weights, grads, buffer = torch.randn(3, 2, 2, 9, 4)
    W, b = weights.clone(), buffer.clone()
    rate, momentum = torch.tensor(0.02), torch.tensor(0.9)
    b.mul_(momentum).add_(grads * (1 - momentum))
    ahead = (grads * (1 - momentum) + b * momentum).flatten(0, 1)
    W.sub_(rate * (orthogonalize(ahead, torch.float32) * (9 / 4) ** 0.5).view(W.shape))
    muon_step(weights, grads, buffer, rate, momentum)
    assert torch.equal(weights, W)
    assert torch.equal(buffer, b)
    optimizer = build_optimizer(random_model(small_config()), OptimizerConfig())
    assert [list(stack.state) for stack in optimizer.stacks] == (
        3 * [["exp_avg", "exp_avg_sq"]] + 5 * [["momentum_buffer"]]
    )


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
    rates = OptimizerConfig(embedding_lr=0.3, unembedding_lr=0.3, conv_lr=0.3, matrix_lr=0.02)
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


def test_groups_of_the_second_generation():
    """Each parameter is in one group, with the rate of its role; taps of other shapes are in other groups."""
    config = small_config(n_embd=192, n_head=4, n_kv_head=2, n_layer=7, n_kernel=4, **SECOND)
    model = random_model(config)
    settings = OptimizerConfig(normuon=True, weight_decay=0.1, table_beta2=0.99, matrix_lr=0.03)
    optimizer = build_optimizer(model, settings)
    names = {p: name for name, p in model.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names) == len(groups)
    expected = {  # the part of a name: learning rate and second beta
        "wte": (0.2 * 2, 0.99),
        "lm_head": (0.004 * 2, 0.99),
        "value_embeds": (0.1, 0.99),
        "value_gate": (0.02, 0.95),
        "resid_scales": (0.005, 0.95),
        "x0_scales": (0.1, 0.95),
        "conv": (0.02 * 2, 0.95),
    }
    for name, group in groups.items():
        roles = [role for role in expected if role in name]
        assert len(roles) == (group["kind"] == "adamw"), name
        if roles:
            rate, beta2 = expected[roles[0]]
            assert group["lr"] == pytest.approx(rate), name
            assert group["betas"] == (0.8, beta2), name
        else:
            assert (group["lr"], group["normuon"], group["weight_decay"]) == (0.03, True, 0.1), name
    taps = [group for group in optimizer.param_groups if group["params"][0].ndim == 3]
    assert {tuple(g["params"][0].shape) for g in taps} == {(96, 1, 3), (192, 1, 3), (192, 1, 4)}
    assert len(taps) == 3


@pytest.mark.parametrize("settings", [OptimizerConfig(), SECOND_SETTINGS], ids=["published", "second"])
def test_state_survives_saving(settings):
    """Two steps, with and without saving and loading in between, give bitwise equal weights."""
    config = small_config(**(SECOND if settings.normuon else {}))

    def gradients(model, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)

    def step(model, optimizer, seed):
        gradients(model, seed)
        optimizer.step()

    model = random_model(config)
    optimizer = build_optimizer(model, settings)
    step(model, optimizer, 1)
    model2 = random_model(config, seed=9)
    model2.load_state_dict(model.state_dict())
    optimizer2 = build_optimizer(model2, settings)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (model2, optimizer2)):
        step(m, o, 2)
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_without_second_moments_is_refused():
    """Momentum alone cannot continue NorMuon; the other way round nothing is missing."""
    plain, normuon = (
        build_optimizer(random_model(small_config()), s) for s in (OptimizerConfig(), SECOND_SETTINGS)
    )
    with pytest.raises(ValueError, match=r"'second_moment'.* --no-warm-start"):
        normuon.load_state_dict(plain.state_dict())
    plain.load_state_dict(normuon.state_dict())


def clipped(rank, world_size, folder, grad_clip):
    """On one of several ranks, compare the clipped gradients of its share with torch's of the whole."""
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 32, "vocab_size": 64, **SECOND}
    model, whole = (GPT(small_config(**shape)) for _ in range(2))
    settings = OptimizerConfig(grad_clip=grad_clip)
    runtime = replace(Runtime.cpu(), rank=rank, world_size=world_size)
    optimizer = build_optimizer(model, settings, runtime)
    grads = [[torch.randn(p.shape) for p in model.parameters()] for _ in range(world_size)]
    for p, q, *parts in zip(model.parameters(), whole.parameters(), *grads, strict=True):
        p.grad, q.grad = parts[rank].clone(), sum(parts)
    squared_norm = runtime.sum_(optimizer.finish_reduction())
    norm = clip_grad_norm_(whole.parameters(), grad_clip) if grad_clip else torch.tensor(0.0)
    optimizer.clip(squared_norm.item() ** 0.5)
    if grad_clip:
        torch.testing.assert_close(squared_norm.sqrt(), norm)
    expected = dict(zip(model.parameters(), (q.grad for q in whole.parameters()), strict=True))
    for stack in optimizer.stacks:
        of_stack = [expected[p] for p in stack.params]
        slots = of_stack[0] if stack.n_slots != len(of_stack) else torch.stack(of_stack)
        own = stack.own_grads.flatten(0, 1)[: len(stack.own_slots)]
        torch.testing.assert_close(own, slots[stack.own_slots])


@pytest.mark.parametrize("grad_clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_is_torchs(world_size, grad_clip, tmp_path):
    """The norm is that of the sum over ranks, of which each has a share; a larger limit changes nothing."""
    if world_size == 1:
        clipped(0, 1, tmp_path, grad_clip)
    else:
        spawn(clipped, (world_size, tmp_path, grad_clip), nprocs=world_size)
