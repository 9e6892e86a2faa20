import itertools
import math

import pytest
import torch

from nanochat.layers import short_conv
from nanochat.slc2 import SLC2, gate
from tests.helpers.models import small_config


def silu(v):
    return v / (1 + math.exp(-v))


def slc2_loop(h, layer):
    """The equations of nanochat/slc2.py in Python floats (float64), element by element, with no tensors."""
    weights = {name: p.detach().double().tolist() for name, p in layer.named_parameters()}
    conv = weights.pop("conv1d.weight")
    B, T, E = h.shape
    H, D, K = len(weights["alpha_proj.weight"]), len(weights["A_proj.weight"]), len(conv[0][0])
    h = h.double().tolist()

    def project(name, b, t):
        return [sum(w * v for w, v in zip(row, h[b][t], strict=True)) for row in weights[f"{name}.weight"]]

    y = torch.zeros(B, T, E, dtype=torch.float64)
    for b in range(B):
        u, gates = [], []
        for t in range(T):
            x, al, a = (project(name, b, t) for name in ("x_proj", "alpha_proj", "A_proj"))
            gates.append(project("B_proj", b, t))
            u.append([silu(silu(al[n]) * a[d]) * x[n * D + d] for n in range(H) for d in range(D)])
        for t in range(T):
            mixed = []
            for c in range(E):
                z = sum(conv[c][0][w] * u[t - (K - 1) + w][c] for w in range(K) if t - (K - 1) + w >= 0)
                mixed.append(gates[t][c] * silu(z))
            for row, out in enumerate(weights["c_proj.weight"]):
                y[b, t, row] = sum(w * v for w, v in zip(out, mixed, strict=True))
    return y


def random_layer(**shape):
    layer = SLC2(small_config(**shape)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(
    ("shape", "T"),
    [
        ({"n_embd": 12, "n_head": 3, "n_kv_head": 1}, 7),
        ({"n_embd": 10, "n_head": 5, "n_kv_head": 5, "n_kernel": 4}, 6),
        ({"n_embd": 8, "n_head": 2, "n_kernel": 2}, 5),
        ({"n_embd": 8, "n_head": 2, "n_kernel": 1}, 3),
        ({"n_embd": 12, "n_head": 2}, 1),
    ],
)
def test_slc2_is_its_equation(shape, T):
    torch.manual_seed(T)
    layer = random_layer(**shape)
    h = torch.randn(2, T, shape["n_embd"], dtype=torch.float64)
    torch.testing.assert_close(layer(h), slc2_loop(h, layer), rtol=1e-10, atol=1e-10)


def test_slc2_gradients():
    """All gradients, of the input and of all six weights, against finite differences in float64."""
    torch.manual_seed(0)
    layer = random_layer(n_embd=6, n_head=3, n_kv_head=3)
    h = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)
    assert len(names) == 6

    def run(h, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), h)

    assert torch.autograd.gradcheck(run, (h, *weights))


def test_gate_order_of_nonlinearities():
    """silu(silu(alpha) A) x: not silu(alpha) A x, nor silu(A) x, the formulas that others print."""
    x, alpha, A = torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]), torch.tensor([[[5.0]]])
    assert gate(x, alpha, A).item() == pytest.approx(silu(silu(2.0) * 5.0) * 3.0)


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_short_conv_any_chunking_gives_equal_values_and_window(K, dtype):
    torch.manual_seed(K)
    u, weight = (
        torch.randn(2, 6, 5).to(dtype),
        torch.randn(5, 1, K).to(torch.promote_types(dtype, torch.float32)),
    )
    whole = short_conv(u, weight)
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 6), n) for n in range(6)):
        window = torch.zeros(2, K - 1, 5, dtype=dtype)
        parts = [short_conv(u[:, a:b], weight, window) for a, b in itertools.pairwise((0, *cuts, 6))]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert torch.equal(window, u[:, 6 - (K - 1) :])


def test_short_conv_window_longer_than_all_input():
    """A prompt shorter than the filter leaves zeros in front: the published code lost them."""
    u, window = torch.ones(1, 1, 2), torch.zeros(1, 3, 2)
    short_conv(u, torch.ones(2, 1, 4), window)
    assert window[0, :, 0].tolist() == [0, 0, 1]


def test_short_conv_sums_taps_in_float32():
    """1 + 2^-9 + 2^-9 needs more bits than bfloat16 keeps between the additions."""
    u = torch.tensor([2.0**-9, 2.0**-9, 1.0]).bfloat16().view(1, 3, 1)
    z = short_conv(u, torch.ones(1, 1, 3))
    assert z.dtype == torch.bfloat16
    assert z[0, 2, 0] == torch.tensor(1 + 2.0**-8).bfloat16()
