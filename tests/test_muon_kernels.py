"""Muon's kernels against float64: interpreted on a CPU in float32, compiled on a GPU in bfloat16."""

import pytest
import torch

from nanochat.kernels.train import muon, newton_schulz
from nanochat.kernels.train.mlp import Tile
from nanochat.kernels.train.newton_schulz import fits, iterate, symmetric_product
from nanochat.optim import muon_adamw, updates
from tests.helpers.kernels import error, poison

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # one rounding of the result


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Use tiles small enough for the interpreter, and the same random numbers in each run."""
    torch.manual_seed(0)
    if "gpu" not in request.keywords:
        monkeypatch.setattr(newton_schulz, "TILE", Tile(16, 16, 16, 4, 1))
        monkeypatch.setattr(muon, "BLOCK", 512)


def polynomials(n, m, device, dtype):
    """Return a symmetric R (n,m,m) and another symmetric matrix that commutes with it."""
    half = torch.randn(n, m, m + 5, device=device, dtype=torch.float64)
    R = half @ half.mT / m
    return R.to(dtype), (3 * torch.eye(m, device=device) - R).to(dtype)


@pytest.mark.parametrize("shape", [(2, 48, 48), (3, 32, 80), (2, 80, 32), (1, 16, 16)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_symmetric_product_of_a_matrix_with_itself(shape, out_dtype):
    check_square(torch.randn(shape), out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(3, 1280, 1280), (2, 1280, 5120), (2, 5120, 1280), (13, 128, 1280), (1, 384, 1536)]
)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_symmetric_product_of_a_matrix_with_itself_on_a_gpu(shape, out_dtype):
    check_square(torch.randn(shape, device="cuda").bfloat16(), out_dtype)


def check_square(X, out_dtype):
    scale = 0.01 * torch.rand(len(X), device=X.device)
    m = min(X.shape[1:])
    poison(len(X), m, m, dtype=out_dtype, device=X.device)  # freed at once: the op likely reuses this memory
    R = symmetric_product(X, X, out_dtype, scale)
    wide = X.double().mT if X.size(1) > X.size(2) else X.double()
    assert R.dtype == out_dtype
    assert error(R, scale.double()[:, None, None] * (wide @ wide.mT)) < TOLERANCE[out_dtype]
    assert torch.equal(R, R.mT)


@pytest.mark.parametrize("m", [16, 48, 80])
def test_symmetric_polynomials(m):
    check_polynomials(m, "cpu", torch.float32, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [128, 384, 1280])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_symmetric_polynomials_on_a_gpu(m, out_dtype):
    check_polynomials(m, "cuda", torch.float16, out_dtype)


def check_polynomials(m, device, dtype, out_dtype):
    R, other = polynomials(2, m, device, dtype)
    Q = symmetric_product(R, R, out_dtype, alpha=0.5, beta=-2.5, gamma=1.75)
    exact = 0.5 * R.double() @ R.double() - 2.5 * R.double() + 1.75 * torch.eye(m, device=device)
    assert error(Q, exact) < TOLERANCE[out_dtype]
    assert torch.equal(Q, Q.mT)
    product = symmetric_product(R, other, out_dtype)
    assert error(product, R.double() @ other.double()) < TOLERANCE[out_dtype] + TOLERANCE[dtype]
    assert torch.equal(product, product.mT)


def test_tiles_above_the_diagonal_mirror_those_below_it():
    """The product here is not symmetric; tiles on the diagonal are the mean of both halves."""
    a, b = torch.randn(2, 1, 48, 64)
    exact, tile = a @ b.mT, torch.arange(48) // 16
    lower, upper = tile[:, None] > tile, tile[:, None] < tile
    expected = torch.where(lower, exact, torch.where(upper, exact.mT, (exact + exact.mT) / 2))
    torch.testing.assert_close(symmetric_product(a, b, torch.float32), expected)


def ill_conditioned(n, rows, cols, device):
    """Return matrices of very different norms, with singular values from 1 down to 1e-3."""
    U, _, Vh = torch.linalg.svd(torch.randn(n, rows, cols, device=device), full_matrices=False)
    values = torch.logspace(0, -3, min(rows, cols), device=device)
    return (U * values) @ Vh * torch.logspace(-6, 6, n, device=device)[:, None, None]


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 48), (3, 48, 16), (2, 48, 32)])
def test_iterate_is_orthogonalize(shape):
    """A matrix of zeros stays zero."""
    X = ill_conditioned(*shape, "cpu")
    X[0] = 0
    norm = X.norm(dim=(1, 2)) + 1e-7
    out = iterate(X, norm) / norm[:, None, None]
    exact = updates.orthogonalize(X.double(), torch.float64)
    assert not out[0].any()
    assert error(out, exact) < 1e-3  # errors in the small singular values are amplified a thousandfold


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 1280, 1280), (2, 1280, 5120), (2, 5120, 1280), (13, 128, 1280)])
def test_iterate_in_bfloat16_is_as_exact_as_orthogonalize(shape):
    X = ill_conditioned(*shape, "cuda")
    X[0] = 0
    exact = updates.orthogonalize(X.double(), torch.float64)
    plain = updates.orthogonalize(X, torch.bfloat16)
    X = X.bfloat16()
    norm = X.float().norm(dim=(1, 2)) + 1e-7
    out = iterate(X, norm) / norm[:, None, None]
    assert not out[0].any()
    assert error(out, exact) < 1.2 * error(plain, exact)


OPTIONS = [(False, False), (True, False), (False, True), (True, True)]  # NorMuon, weight decay


@pytest.mark.parametrize("rows_cols", [(16, 16), (16, 48), (48, 16)])
@pytest.mark.parametrize("options", OPTIONS)
def test_muon_step(rows_cols, options):
    check_muon_step("cpu", muon.muon_step, *rows_cols, torch.float32, 1e-4, *options)


@pytest.mark.parametrize("options", OPTIONS)
def test_muon_step_is_one_graph(options):
    step = torch.compile(muon.muon_step, backend="aot_eager", fullgraph=True, dynamic=False)
    check_muon_step("cpu", step, 48, 16, torch.float32, 1e-4, *options)


@pytest.mark.gpu
@pytest.mark.parametrize("rows_cols", [(128, 128), (128, 384), (384, 128), (10, 1280)])
@pytest.mark.parametrize("options", OPTIONS)
def test_muon_step_of_the_optimizer(rows_cols, options):
    """Compiled; with the kernels for matrices of whole tiles."""
    step = muon_adamw.fastest_muon_step(torch.empty(1, *rows_cols, device="cuda", dtype=torch.bfloat16))
    check_muon_step("cuda", step, *rows_cols, torch.bfloat16, 0.03, *options)


def test_muon_step_without_options_is_as_published():
    """The scaled rate times X, bit for bit."""
    weights, grads, buffer = torch.randn(3, 2, 2, 48, 16)
    expected, b = weights.clone(), buffer.clone()
    rate, momentum = torch.tensor(0.1), torch.tensor(0.9)
    X, norm = muon.look_ahead(grads.flatten(0, 1), b.flatten(0, 1), momentum)
    norm = norm + 1e-7
    scaled = rate * 3**0.5 / norm
    expected.sub_(scaled.view(2, 2, 1, 1) * iterate(X, norm).view(grads.shape))
    muon.muon_step(weights, grads, buffer, rate, momentum)
    assert torch.equal(weights, expected)


def check_muon_step(device, step, rows, cols, dtype, tolerance, normuon=False, decays=False):
    """Compare weights and state after two steps; the weights of another rank must not change."""
    # Weights and decay of their usual sizes: rounding decides the sign of the smallest updates, and with it
    # whether a weight decays.
    start = torch.randn(3, 2, 2, rows, cols, device=device) * cols**-0.5
    weights = start.clone()
    buffer = torch.randn(3, 2, rows, cols, device=device)
    state = torch.rand(3, 2, *updates.second_moment_shape(rows, cols), device=device) / max(rows, cols)
    expected, expected_buffer, expected_state = start[:, 1].double(), buffer.double(), state.double()
    for rate, momentum, decay in ((0.1, 0.85, 0.2), (0.05, 0.9, 0.1)):
        grads = torch.randn(3, 2, rows, cols, device=device).to(dtype)
        numbers = torch.tensor(rate), torch.tensor(momentum)
        decay = torch.tensor(decay) if decays else None
        step(weights[:, 1], grads, buffer, *numbers, state if normuon else None, decay)
        second = expected_state if normuon else None
        updates.muon_step(expected, grads.double(), expected_buffer, *numbers, second, decay)
    assert error(buffer, expected_buffer) < 1e-6
    assert error(state, expected_state) < tolerance
    assert error(weights[:, 1] - start[:, 1], expected - start[:, 1]) < tolerance
    assert torch.equal(weights[:, 0], start[:, 0])


def test_muon_operators():
    """The declared shapes, dtypes and in-place changes are correct: torch.compile relies on them."""
    R, other = polynomials(2, 32, "cpu", torch.float32)
    torch.library.opcheck(symmetric_product, (R, other, torch.float16, torch.rand(2), 0.5))
    torch.library.opcheck(symmetric_product, (torch.randn(2, 32, 16), torch.randn(2, 32, 16), torch.float32))
    torch.library.opcheck(
        muon.look_ahead, (torch.randn(2, 16, 24), torch.randn(2, 16, 24), torch.tensor(0.9))
    )


@pytest.mark.parametrize("shape", [(1280, 1280), (1280, 5120), (5120, 1280), (128, 1280), (128, 192)])
def test_whole_tiles_fit(shape, monkeypatch):
    monkeypatch.setattr(newton_schulz, "TILE", Tile(128, 128, 64, 8, 3))
    assert fits(*shape)


@pytest.mark.parametrize("shape", [(10, 1280), (1280, 10), (128, 1300), (320, 1280)])
def test_partial_tiles_do_not_fit(shape, monkeypatch):
    """A partial tile would read from and write to the next matrix of the stack."""
    monkeypatch.setattr(newton_schulz, "TILE", Tile(128, 128, 64, 8, 3))
    assert not fits(*shape)
