"""The kernels of the second generation in training, against float64 by the plain equations."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nanochat import ops
from nanochat.attention import CausalSelfAttention, attention_inputs, rotary_tables
from nanochat.kernels.train import join as join_kernel
from nanochat.kernels.train import look_up as look_up_kernel
from nanochat.kernels.train import residual_conv as conv_kernel
from nanochat.kernels.train.share import share
from nanochat.layers import NORM_EPS, residual_conv
from nanochat.train.fused import fused_ops
from nanochat.train.fused_layers import fused_attention_inputs
from tests.helpers.kernels import error, on_gpu, poison
from tests.helpers.models import SECOND, random_model, small_config

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 1e-2)}  # relative error of values, gradients
SIZES = [(2, 1), (3, 7), on_gpu(1, 2), on_gpu(2, 37), on_gpu(3, 300), on_gpu(32, 2048)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that the interpreter can take its time with; on a GPU those of training."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(join_kernel, "BACKWARD", 4)
        monkeypatch.setattr(look_up_kernel, "CHUNK", 4)


def gradients(function, dys, *inputs):
    """Return results and gradients of inputs for gradients dys of the results."""
    inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    dys = [dy.to(y.dtype) for y, dy in zip(results, dys, strict=True)]
    found = torch.autograd.grad(results, [x for x in inputs if x is not None], dys)
    # the scales' are one number each, in which terms cancel: compared as one vector
    scales = [g for g in found if g.numel() == 1]
    return results, [g for g in found if g.numel() > 1] + ([torch.cat(scales)] if scales else [])


def same(found, expected, dtype):
    for kind, bound in enumerate(TOLERANCE[dtype]):
        for i, (value, reference) in enumerate(zip(found[kind], expected[kind], strict=True)):
            assert value.shape == reference.shape
            assert error(value, reference) < bound, (kind, i)


def rounded(dtype, device, *shape, scale=1.0):
    return (scale * torch.randn(*shape, device=device)).to(dtype)


@pytest.mark.parametrize(("B", "T"), SIZES)
@pytest.mark.parametrize(("C", "K"), [(40, 3), (130, 1), (16, 4), (128, 2), on_gpu(768, 3), on_gpu(1280, 4)])
def test_residual_conv(device, dtype, B, T, C, K):
    u, dy = rounded(dtype, device, B, T, C), rounded(dtype, device, B, T, C)
    conv = torch.randn(C, 1, K, device=device)
    expected = gradients(lambda u, w: [residual_conv(u, w)], [dy], u.double(), conv.double())
    poison(B, T, C, dtype=dtype, device=device)  # freed: the op is likely to be given it
    same(gradients(lambda u, w: [conv_kernel.residual_conv(u, w)], [dy], u, conv), expected, dtype)


def joined(x, m, conv, rho, lam, x0):
    """The stream and its norm by the kernels, x0 through a share."""
    shared = x0 if x0 is None else share(x0, rho, lam)[0]
    return join_kernel.join(x, m, conv, rho, lam, shared, NORM_EPS)[:2]


@pytest.mark.parametrize(("B", "T"), SIZES)
@pytest.mark.parametrize(
    ("E", "K"), [(40, 3), (24, 0), (16, 4), on_gpu(128, 2), on_gpu(768, 3), on_gpu(1280, 3)]
)
@pytest.mark.parametrize("is_mixed", [True, False])
def test_join(device, dtype, B, T, E, K, is_mixed):
    """The stream, its norm and all gradients; tokens of very different size."""
    sizes = torch.logspace(-2, 1, B * T, device=device).view(B, T, 1)
    x, m, x0, ds, dh = (rounded(dtype, device, B, T, E) for _ in range(5))
    x, ds = (x * sizes).to(dtype), ds + x0  # so that the sums over all tokens do not cancel
    conv = torch.randn(E, 1, K, device=device) if K else None
    scales = [torch.tensor([value], device=device) for value in (1.3, -0.7)] if is_mixed else [None] * 2
    inputs = [x, m, conv, *scales, x0 if is_mixed else None]

    def plain(x, m, conv, rho, lam, x0):
        return ops.join(x, m, ops.Link(conv, None, None if x0 is None else (rho, lam, x0)))

    expected = gradients(plain, [ds, dh], *(v if v is None else v.double() for v in inputs))
    poison(B, T, E, dtype=dtype, device=device)
    same(gradients(joined, [ds, dh], *inputs), expected, dtype)
    # the head reads the norm alone
    expected = gradients(lambda *v: plain(*v)[1:], [dh], *(v if v is None else v.double() for v in inputs))
    same(gradients(lambda *v: joined(*v)[1:], [dh], *inputs), expected, dtype)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_join_of_any_tile(device, rows, monkeypatch):
    """Neighbours of the next tile, and of several; a last tile that is not full; other sequences' tokens."""
    monkeypatch.setattr(join_kernel, "BACKWARD", rows)
    test_join(device, torch.float32, 3, 7, 40, 4, True)


@pytest.mark.parametrize(("B", "T", "E"), [(2, 3, 40), on_gpu(32, 2048, 768)])
@pytest.mark.parametrize("rho", [(1.3, -0.2, 1e-3), (0.7,) * 12], ids=len)
def test_share(device, dtype, B, T, E, rho):
    """The gradient of an embedding in every layer of a stack, the first of which it also enters as stream."""
    n = len(rho)
    x0, *deltas, ds, dh = (rounded(dtype, device, B, T, E) for _ in range(n + 3))
    rho, lam = torch.tensor(rho, device=device), torch.linspace(-1.5, 2.0, n, device=device)

    def stack(join, share, rho, lam, x0):
        shares, x = share(x0, rho, lam), x0
        for delta, shared, *scales in zip(deltas, shares, rho.split(1), lam.split(1), strict=False):
            x, h = join(x, delta.to(x.dtype), (*scales, shared))
        return x, h

    def kernel(x, delta, mix):
        return join_kernel.join(x, delta, None, *mix, NORM_EPS)[:2]

    def plain(x, delta, mix):
        return ops.join(x, delta, ops.Link(mix=mix))

    plain = partial(stack, plain, ops.share, rho.double(), lam.double())
    expected = gradients(plain, [ds, dh], x0.double())
    poison(B, T, E, dtype=dtype, device=device)
    same(gradients(partial(stack, kernel, share, rho, lam), [ds, dh], x0), expected, dtype)


def test_share_of_a_layer_without_stream(device):
    """The stream's gradient tells nothing then: not finite, so that no update follows."""
    x0, rho = torch.randn(1, 2, 16, device=device), torch.tensor([1.0, 0.0], device=device)
    _, (dx0,) = gradients(lambda x0: share(x0, rho, rho + 1), [x0, 0 * x0], x0)
    assert dx0.isnan().all()


@pytest.mark.parametrize(
    ("B", "T", "V", "n", "W"),
    [
        (1, 1, 3, 1, 24),
        (3, 30, 50, 3, 40),
        on_gpu(32, 2048, 32_768, 5, 768),
        on_gpu(2, 1000, 60_000, 7, 1280),
    ],
)
@pytest.mark.parametrize("kind", ["even", "frequent", "one"])
def test_look_up(device, dtype, B, T, V, n, W, kind):
    """Values and the table's gradient, zeros where no token has an id; whole tiles and the ends of two."""
    idx = torch.randint(0, V, (B, T), device=device)
    if kind == "frequent":  # half of all tokens, in ids beside each other and apart
        few = torch.tensor([0, 1, 2, V // 2, V - 1], device=device)
        idx = torch.where(torch.rand(B, T, device=device) < 0.5, few[idx % 5], idx)
    elif kind == "one":
        idx = torch.full_like(idx, V - 1)
    weight = torch.randn(V, n * W, device=device)
    dys = [rounded(dtype, device, B, T, W) for _ in range(n)]

    def plain(weight):
        return ops.look_up_values(idx, weight, n, torch.float64)

    def kernel(weight):
        return look_up_kernel.look_up(idx, weight, n, dtype)

    expected = gradients(plain, dys, weight.double())
    poison(V, n * W, dtype=torch.float32, device=device)
    found = gradients(kernel, dys, weight)
    same(found, expected, dtype)
    assert not found[1][0][~torch.isin(torch.arange(V, device=device), idx)].any()
    if device == "cuda":
        assert torch.equal(gradients(kernel, dys, weight)[1][0], found[1][0])


@pytest.mark.parametrize(("B", "T"), [*SIZES[:-2], on_gpu(3, 300), on_gpu(4, 2048)])
@pytest.mark.parametrize(
    ("H", "H_kv", "D"), [(3, 3, 16), (4, 2, 16), on_gpu(2, 1, 32), on_gpu(6, 6, 128), on_gpu(10, 2, 128)]
)
@pytest.mark.parametrize(
    "parts",
    [{"residual_conv": 3, "value_embeds": True}, {"residual_conv": 2}, {"value_embeds": True}],
    ids=str,
)
def test_attention_inputs(device, dtype, B, T, H, H_kv, D, parts):
    """Queries, keys and values, and the gradients of the layer's input, weights and value embeddings."""
    attn = CausalSelfAttention(small_config(n_head=H, n_kv_head=H_kv, n_embd=H * D, **parts)).to(device)
    with torch.no_grad():
        for p in attn.parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5).copy_(p.to(dtype))
    cos, sin = (table[:T] for table in rotary_tables(T + 5, D, torch.device(device)))
    h = rounded(dtype, device, B, T, H * D)
    wide = poison(B, T, 3 * H_kv * D, dtype=dtype, device=device)  # the layer's share of a wider table
    embeds = wide[..., H_kv * D : 2 * H_kv * D].copy_(rounded(dtype, device, B, T, H_kv * D))
    embeds = embeds if attn.value_gate is not None else None
    dys = [rounded(dtype, device, B, heads, T, D) for heads in (H, H_kv, H_kv)]
    names = [name for name, _ in attn.named_parameters() if not name.startswith(("c_proj", "y_conv"))]

    def run(inputs, h, embeds, *weights):
        made = dict(zip(names, weights, strict=True))
        for name in names:
            module, _ = name.split(".")
            owner = getattr(attn, module)
            del owner._parameters["weight"]
            owner.weight = made[name]
        results = inputs(attn, h, cos, sin, embeds)
        for name in names:
            owner = getattr(attn, name.split(".")[0])
            value = owner.__dict__.pop("weight")
            owner._parameters["weight"] = torch.nn.Parameter(value.detach().float())
        return results

    weights = [attn.get_parameter(name).detach() for name in names]
    wide_inputs = [v if v is None else v.double() for v in (h, embeds, *weights)]
    expected = gradients(lambda *v: run(attention_inputs, *v), dys, *wide_inputs)
    poison(B, T, (H + 2 * H_kv) * D + 64, dtype=dtype, device=device)

    def fused(*args):
        return fused_attention_inputs(*args, product=torch.nn.functional.linear)

    same(gradients(lambda *v: run(fused, *v), dys, h, embeds, *weights), expected, dtype)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize(("compiled", "checkpointing"), [(False, True), (True, False)])
def test_blocks_compiled_or_computed_twice(device, monkeypatch, compiled, checkpointing):
    """Gradients of two micro-batches, added, after an evaluation; no buffer of one is left to the other.

    With checkpoints the kernels of attention's inputs failed: their backward read what was saved twice.
    """
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/test_gpu.py has models in bfloat16")
    model = random_model(small_config(n_layer=2, n_embd=32, n_kv_head=1, slc_rate=3, **SECOND))
    batches = torch.randint(0, 50, (2, 2, 5))

    def gradients_of_all():
        model.zero_grad()
        with torch.no_grad():
            model(batches[0])
        for idx in batches:
            model(idx, idx.roll(-1, 1)).backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    expected = gradients_of_all()
    model.use(replace(fused_ops(large_tiles=False), slc2_mix=ops.PLAIN.slc2_mix, loss=ops.PLAIN.loss))
    model.checkpoints_activations = checkpointing
    if compiled:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        model.compile_blocks()
    found = gradients_of_all()
    for name, gradient in found.items():
        assert error(gradient, expected[name]) < 1e-4, name
