"""The kernels of training against float64: interpreted on a CPU, compiled on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.train import cross_entropy, fp8, mlp, norm
from nanochat.kernels.train.slc2 import PACKED_ALIGN, slc2_mix, slc2_reference
from nanochat.layers import NORM_EPS
from nanochat.ops import PLAIN, SOFTCAP
from nanochat.ops import head_loss as plain_head_loss
from nanochat.train import chunked_loss
from nanochat.train.accelerate import accelerate, why_not_fused
from nanochat.train.fused import fused_ops
from tests.helpers.kernels import error, on_gpu, poison
from tests.helpers.models import SECOND, random_model

pytestmark = pytest.mark.slow

# relative Frobenius error of values and gradients; of sums over all tokens, which are kept in float32
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 2e-3)}
head_loss = partial(chunked_loss.head_loss, cap=SOFTCAP, cross_entropy_=cross_entropy.cross_entropy_)
SMALL_TILE = mlp.Tile(16, 16, 16, 4, 1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that the interpreter can take its time with."""
    monkeypatch.setattr(mlp, "FORWARD", SMALL_TILE)
    monkeypatch.setattr(mlp, "BACKWARD", SMALL_TILE._replace(halves=True))


def slc2_case(device, dtype, N, H, D, K):
    E = H * D
    used = 2 * E + D + H
    packed = poison(N, -(-used // PACKED_ALIGN) * PACKED_ALIGN, device=device, dtype=dtype)
    packed[:, :used] = torch.randn(N, used, device=device)
    return packed, torch.randn(E, 1, K, device=device), torch.randn(N, E, device=device).to(dtype)


def gradients(function, dy, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(dy)
    return y.detach(), [x.grad for x in inputs]


def bounded(bound, rounded, expected):
    """The error allowed for: bound, or that of PyTorch with the same roundings.

    Of few elements one may be larger than all others, and so its rounding, to bfloat16 at most 2^-8 twice.
    """
    if rounded.dtype == torch.bfloat16 and rounded.numel() < 2000:
        bound = 2**-7
    return max(bound, 1.2 * error(rounded, expected))


@pytest.mark.parametrize(
    ("H", "D", "K"),
    [
        (3, 16, 3), (1, 16, 4), (2, 32, 2), (2, 16, 1),
        on_gpu(1, 128, 3), on_gpu(6, 128, 3), on_gpu(10, 128, 3), on_gpu(13, 128, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("B", "T"),
    [(2, 1), (1, 3), (3, 7), on_gpu(1, 37), on_gpu(3, 31), on_gpu(5, 64), on_gpu(2, 2048)],
)  # fmt: skip
def test_slc2(device, dtype, H, D, K, B, T):
    """y and all gradients; the columns that nobody reads hold NaN and get zeros; twice the same bits.

    The interpreter runs a kernel's programs one after the other: it could not but give the same.
    """
    packed, conv, dy = slc2_case(device, dtype, B * T, H, D, K)
    poison(*packed.shape, device=device, dtype=dtype)  # freed: the op is likely to be given it
    y, (dpacked, dconv) = gradients(lambda p, c: slc2_mix(p, c, T, H), dy, packed, conv)
    expected_y, (expected, expected_conv) = gradients(
        lambda p, c: slc2_reference(p, c, T, H, dtype), dy.double(), packed.double(), conv.double()
    )
    rounded_y, (rounded, _) = gradients(lambda p, c: slc2_reference(p, c, T, H, dtype), dy, packed, conv)
    used = 2 * H * D + D + H
    bound, sum_bound = TOLERANCE[dtype]
    assert error(y, expected_y) < bounded(bound, rounded_y, expected_y)
    parts = (gradient[:, :used].split([H * D, H * D, D, H], 1) for gradient in (dpacked, rounded, expected))
    for part, rounded_part, expected_part in zip(*parts, strict=True):
        assert error(part, expected_part) < bounded(bound, rounded_part, expected_part)
    assert not dpacked[:, used:].any()
    assert error(dconv, expected_conv) < sum_bound
    if device == "cuda":
        again, (dpacked_again, dconv_again) = gradients(lambda p, c: slc2_mix(p, c, T, H), dy, packed, conv)
        assert torch.equal(again, y)
        assert torch.equal(dpacked_again, dpacked)
        assert torch.equal(dconv_again, dconv)


def test_slc2_is_an_operator(device):
    """torch.compile may rely on what it declares: shapes, no mutation, gradients."""
    packed, conv, _ = slc2_case(device, torch.float32, 4, 2, 16, 3)
    packed = packed.nan_to_num_().requires_grad_()
    torch.library.opcheck(slc2_mix, (packed, conv.requires_grad_(), 4, 2))


def head_case(device, dtype, N, E, V):
    x = torch.randn(1, N, E, device=device).to(dtype)
    weight = 15 * E**-0.5 * torch.randn(V, E, device=device)  # logits up to a few times the soft-cap
    targets = torch.randint(0, V, (1, N), device=device)
    targets[0, :3] = torch.tensor([-1, 0, V - 1])
    return x, weight, targets


@pytest.mark.parametrize(
    ("N", "E", "V"), [(7, 16, 50), (5, 16, 4099), on_gpu(512, 128, 65_536), on_gpu(1000, 1280, 50_257)]
)
@pytest.mark.parametrize("rows", [2, 10_000])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_head_loss(device, dtype, N, E, V, rows, reduction, monkeypatch):
    check_head_loss(head_loss, device, dtype, N, E, V, rows, reduction, monkeypatch)


@pytest.mark.parametrize(("N", "E", "V", "rows"), [(7, 16, 50, 2), (7, 16, 50, 10_000), (5, 16, 4099, 2)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_head_loss_of_a_cpu(N, E, V, rows, reduction, monkeypatch):
    head_loss = partial(chunked_loss.head_loss, cap=SOFTCAP)
    check_head_loss(head_loss, "cpu", torch.float32, N, E, V, rows, reduction, monkeypatch)


def check_head_loss(head_loss, device, dtype, N, E, V, rows, reduction, monkeypatch):
    x, weight, targets = head_case(device, dtype, N, E, V)
    if rows < N and N > 10:
        rows = N // 3
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, device, rows * V * dtype.itemsize)
    monkeypatch.setattr(chunked_loss, "MIN_ROWS", 1)
    cast = weight.to(dtype)  # both sides see the weight as the product does
    scale = torch.tensor(1.7, device=device)
    loss, (dx, dweight) = gradients(lambda x, w: head_loss(x, w, targets, reduction), scale, x, cast.float())
    expected, (expected_dx, expected_dweight) = gradients(
        lambda x, w: plain_head_loss(x, w, targets, reduction), scale.double(), x.double(), cast.double()
    )
    _, (rounded_dx, rounded_dweight) = gradients(
        lambda x, w: plain_head_loss(x, w, targets, reduction), scale, x, cast
    )
    bound, sum_bound = TOLERANCE[dtype]
    assert error(loss, expected) < bound / 4
    assert error(dx, expected_dx) < bounded(bound, rounded_dx, expected_dx)
    assert error(dweight, expected_dweight) < bounded(sum_bound, rounded_dweight, expected_dweight)
    assert not dx[0, 0].any()
    with torch.no_grad():
        losses = head_loss(x, cast.float(), targets, "none")
        assert error(losses, plain_head_loss(x.double(), cast.double(), targets, "none")) < bound / 4
        assert losses[0] == 0


@pytest.mark.gpu
def test_head_loss_fp8():
    """Chunks of rows and the last one shorter; rms_norms of any scale of weights."""
    x, weight, targets = head_case("cuda", torch.bfloat16, 1000, 256, 4096)
    x, weight = F.rms_norm(x, (256,)), weight / 7
    loss, (dx, dweight) = gradients(
        lambda x, w: head_loss(x, w, targets, "sum", narrow_head=fp8.Head),
        torch.tensor(1.0, device="cuda"), x, weight,
    )  # fmt: skip
    expected, (expected_dx, expected_dweight) = gradients(
        lambda x, w: plain_head_loss(x, w, targets, "sum"),
        torch.tensor(1.0).cuda().double(),
        x.double(),
        weight.double(),
    )
    assert error(loss, expected) < 0.02
    assert error(dx, expected_dx) < 0.2
    assert error(dweight, expected_dweight) < 0.2


def test_head_loss_of_no_targets_is_zero(device):
    x, weight, targets = head_case(device, torch.float32, 4, 16, 50)
    loss = head_loss(x.requires_grad_(), weight, targets.fill_(-1), "mean")
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_head_loss_of_each_token_has_no_gradient(device):
    with pytest.raises(ValueError, match="none"):
        head_loss(*head_case(device, torch.float32, 4, 16, 50), "none")


@pytest.mark.parametrize(
    ("M", "E", "dtype"),
    [
        (33, 24, torch.float32),
        (5, 16, torch.float32),
        on_gpu(1000, 768, torch.bfloat16),
        on_gpu(4096, 1280, torch.bfloat16),
    ],
)
def test_mlp(M, E, dtype, request):
    torch.manual_seed(0)
    device = "cuda" if dtype == torch.bfloat16 else "cpu"
    if device == "cpu":
        request.getfixturevalue("small_tiles")
    h = torch.randn(1, M, E, device=device).to(dtype)
    weights = [(torch.randn(s, device=device) * s[1] ** -0.5).to(dtype) for s in ((4 * E, E), (E, 4 * E))]
    dy = torch.randn_like(h)
    poison(M, 4 * E, device=device, dtype=dtype)  # freed: the op is likely to be given it
    y, grads = gradients(mlp.mlp, dy, h, *weights)

    def reference(h, w_fc, w_proj):
        return F.linear(F.linear(h, w_fc).relu().square(), w_proj)

    doubles = [t.double() for t in (h, *weights)]
    expected, expected_grads = gradients(reference, dy.double(), *doubles)
    rounded, rounded_grads = gradients(reference, dy, h, *weights)
    for value, rounded_value, reference_value in zip(
        [y, *grads], [rounded, *rounded_grads], [expected, *expected_grads], strict=True
    ):
        assert error(value, reference_value) < bounded(TOLERANCE[dtype][0], rounded_value, reference_value)


def test_rms_norm(device, dtype):
    x = (3 * torch.randn(5, 7, 48, device=device)).to(dtype)
    dh = torch.randn_like(x)
    h, (dx,) = gradients(lambda x: norm.rms_norm(x, NORM_EPS), dh, x)
    expected_h, (expected_dx,) = gradients(
        lambda x: F.rms_norm(x, (48,), eps=NORM_EPS), dh.double(), x.double()
    )
    assert error(h, expected_h) < TOLERANCE[dtype][0]
    assert error(dx, expected_dx) < TOLERANCE[dtype][0]


def fp8_case(device, M, E):
    """h as the norm leaves it, float32 weights of training's size, a gradient of any size."""
    h = F.rms_norm(torch.randn(M, E, device=device), (E,)).bfloat16()
    shapes = ((4 * E, E), (E, 4 * E))
    weights = [torch.randn(shape, device=device) * shape[1] ** -0.5 for shape in shapes]
    return h, *weights, (1e-6 * torch.randn(M, E, device=device)).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_clips(device, dtype):
    """Else e4m3 makes NaN, and e5m2 infinity, of what is too large."""
    limit = torch.finfo(dtype).max
    x = torch.tensor([1e6, -1e6, 0.01], device=device)
    assert fp8.narrow(x, torch.tensor(100.0, device=device), dtype).tolist() == [limit, -limit, 1]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("M", "N"), [(5, 130), (128, 256), on_gpu(1280, 5120), on_gpu(70_000, 1280), on_gpu(65_536, 5120)]
)
def test_transpose(device, dtype, M, N):
    """Every element written, whatever the layout of what comes."""
    x = torch.randn(N, M, device=device).T.to(dtype)
    poison(N, M, device=device, dtype=dtype)  # freed: the op is likely to be given it
    assert torch.equal(fp8.transpose(x).float(), x.float().T)
    assert torch.equal(fp8.transpose(x.contiguous()).float(), x.float().T)


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "E"), [(33, 256), (1000, 768), (4096, 1280)])
def test_mlp_fp8_products(M, E):
    """Both products and what follows them against float64 on the same 8-bit inputs."""
    h, w_fc, w_proj, dy = fp8_case("cuda", M, E)
    h8, fc8 = fp8.narrow(h, fp8.H_SCALE), fp8.narrow(w_fc, 100.0)
    scale = torch.tensor(fp8.POST_SCALE**0.5 / (fp8.H_SCALE * 100.0), device="cuda")
    post8 = fp8.linear_relu2_fp8(h8, fc8, scale)
    assert error(post8, fp8_launch(h8, fc8, scale=scale)) < 0.04

    dy8, proj8 = fp8.narrow(dy, 1e6, torch.float8_e5m2), fp8.narrow(w_proj, 100.0).T.contiguous()
    dpre8 = fp8.linear_relu2_backward_fp8(dy8, proj8, post8, scale)
    assert error(dpre8, fp8_launch(dy8, proj8, post=post8, scale=scale)) < 0.08


def fp8_launch(a, b, post=None, *, scale):
    """What mlp.launch is to compute in 8 bits, in float64 and not rounded."""
    product = scale.double() * F.linear(a.double(), b.double())
    return product.relu().square() if post is None else 2 * product * post.double().sqrt()


@pytest.fixture
def emulated_fp8(device, monkeypatch):
    """On a CPU, PyTorch instead of the kernels, as the interpreter knows no floats of 8 bits."""
    if device == "cuda":
        return

    def launch(a, b, out, tile, post=None, *, scale):
        out.copy_(fp8.narrow(fp8_launch(a, b, post, scale=scale), 1.0, out.dtype))

    monkeypatch.setattr(fp8, "launch", launch)


@pytest.mark.parametrize(("M", "E"), [(1008, 240), on_gpu(4096, 768)])
def test_mlp_fp8(device, emulated_fp8, M, E):
    """As near to float64 as 8 bits are."""
    h, w_fc, w_proj, dy = fp8_case(device, M, E)
    y, grads = gradients(fp8.mlp, dy, h, w_fc, w_proj)
    expected, expected_grads = gradients(
        lambda h, w_fc, w_proj: F.linear(F.linear(h, w_fc).relu().square(), w_proj),
        *(t.double() for t in (dy, h, w_fc, w_proj)),
    )
    assert error(y, expected) < 0.06
    for gradient, reference, bound in zip(grads, expected_grads, (0.1, 0.1, 0.085), strict=True):
        assert error(gradient, reference) < bound
    w_fc = w_fc.bfloat16()
    linear, (dh, dweight) = gradients(fp8.linear, dy @ w_fc.T, h, w_fc)
    reference, (expected_dh, expected_dweight) = gradients(
        F.linear, (dy @ w_fc.T).double(), h.double(), w_fc.double()
    )
    assert error(linear, reference) < 0.05
    assert error(dh, expected_dh) < 4e-3
    assert error(dweight, expected_dweight) < 4e-3


@pytest.mark.parametrize("generation", [{}, SECOND], ids=["published", "second"])
@pytest.mark.parametrize("has_large_tiles", [True, False])
def test_fused_model_is_the_plain_one(has_large_tiles, generation, small_tiles):
    """Loss and gradients of every parameter, in float32; the decode state is kept as before."""
    torch.manual_seed(0)
    model = random_model(GPTConfig(16, 50, 3, 2, 2, 32, 3, 3, **generation))
    idx = torch.randint(0, 50, (2, 6))

    def run():
        model.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    plain_loss, plain_gradients = run()
    logits = model(idx).detach()
    model.use(fused_ops(large_tiles=has_large_tiles))
    assert (model.ops.mlp is mlp.mlp) == has_large_tiles
    loss, grads = run()
    assert error(loss, plain_loss) < 1e-5
    for gradient, expected in zip(grads, plain_gradients, strict=True):
        assert error(gradient, expected) < 1e-4
    with torch.no_grad():
        cache = model.new_cache(2, 6)
        parts = torch.cat([model(idx[:, a:b], cache=cache) for a, b in ((0, 3), (3, 4), (4, 6))], dim=1)
    torch.testing.assert_close(parts, logits, rtol=1e-4, atol=1e-4)


def test_kernels_that_do_not_run_here_are_refused():
    model = random_model(GPTConfig(16, 50, 3, 2, 2, 32, 3, 3))
    with pytest.raises(ValueError, match="NVIDIA"):
        accelerate(model, compile=False, fused=True)
    with pytest.raises(ValueError, match="fp8"):
        accelerate(model, compile=False, fused=False, fp8=True)
    accelerate(model, compile=False, fused=False)
    assert model.ops == PLAIN


@pytest.mark.gpu
def test_models_that_the_kernels_do_not_serve():
    def reason(dtype=torch.bfloat16, fp8=False, T=24, **shape):
        config = GPTConfig(T, 64, 2, **{"n_head": 3, "n_kv_head": 3, "n_embd": 384, **shape})
        return why_not_fused(GPT(config, dtype).cuda(), fp8)

    assert not reason()
    assert not reason(fp8=True, T=32)
    assert "sequences, 24" in reason(fp8=True)
    assert "n_kernel=5" in reason(n_kernel=5)
    assert "96 channels" in reason(n_embd=288)
    assert "float32" in reason(torch.float32)
