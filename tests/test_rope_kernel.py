"""The kernels that rotate and normalise queries and keys, against float64 by nanochat/gpt.py's equations."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanochat.attention import CausalSelfAttention, apply_rotary, rotary_tables
from nanochat.kernels.train.rope import rope, rope_, rope_backward
from nanochat.layers import NORM_EPS, norm
from nanochat.train.fused_layers import fused_attention_inputs
from tests.helpers.kernels import error, on_gpu, poison
from tests.helpers.models import small_config

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # relative Frobenius error


def tables(T, D, device):
    """cos and sin of the first T positions of more, as the model gives them."""
    return [table[:T] for table in rotary_tables(T + 5, D, torch.device(device))]


def projection(device, dtype, B, T, width):
    """packed, each token of another size; eps is most of the first one's mean square."""
    sizes = torch.logspace(-4, 1, B * T, device=device).view(B, T, 1)
    return (sizes * torch.randn(B, T, width, device=device)).to(dtype)


def reference(packed, cos, sin, H):
    heads = packed.unflatten(2, (-1, 2 * cos.size(1)))
    n_kv_head = (heads.size(2) - H) // 2
    q, k, v = heads.split([H, n_kv_head, n_kv_head], dim=2)
    turned = [norm(apply_rotary(x, cos, sin)) for x in (q, k)]
    return [x.transpose(1, 2) for x in (*turned, v)]


def laid_out(gradient, order, margin):
    """The gradient (B,heads,T,D) with its dimensions in this order in memory, and NaN around each."""
    shape = [gradient.size(i) + 2 * margin for i in order]
    memory = poison(*shape, dtype=gradient.dtype, device=gradient.device)
    inner = memory[(slice(margin, -margin),) * 4]
    return inner.permute(*(order.index(i) for i in range(4))).copy_(gradient)


@pytest.mark.parametrize(
    ("H", "H_kv", "D"),
    [
        (3, 3, 16), (1, 1, 32), (6, 2, 16), (5, 1, 128),
        on_gpu(10, 10, 128), on_gpu(6, 6, 64), on_gpu(13, 1, 128), on_gpu(16, 4, 256),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("B", "T"), [(2, 1), (1, 2), (3, 7), (1, 129), on_gpu(2, 2048), on_gpu(32, 1000), on_gpu(70, 31)]
)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 2, 3)], ids=["BTHD", "BHTD"])
def test_rope(device, dtype, H, H_kv, D, B, T, order):
    """q, k, v and the gradient of packed, whose values are copies, from gradients of either layout."""
    cos, sin = tables(T, D, device)
    packed = projection(device, dtype, B, T, (H + 2 * H_kv) * D).requires_grad_()
    expected = reference(packed.double(), cos, sin, H)
    randoms = [torch.randn_like(x).to(dtype) for x in expected]
    gradients = [laid_out(x, order, margin) for x, margin in zip(randoms, (8, 16, 3), strict=True)]
    (expected_gradient,) = torch.autograd.grad(expected, packed, [g.double() for g in gradients])
    made = packed.clone()  # stands for the product: the op writes over it
    poison(B, T, H + H_kv, device=device, dtype=torch.float32)  # freed: the op is likely to be given it
    results = rope(made, cos, sin, H, H_kv, NORM_EPS)
    poison(*packed.shape, device=device, dtype=dtype)
    (gradient,) = torch.autograd.grad(results, packed, gradients)
    for result, value in zip(results[:2], expected[:2], strict=True):
        assert error(result, value) < TOLERANCE[dtype]
        assert result.shape == value.shape
    assert torch.equal(results[2], expected[2].to(dtype))
    assert all(x.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() for x in results)
    parts = [(H + H_kv) * D, H_kv * D]
    turned, copied = gradient.split(parts, dim=2)
    expected_turned, _ = expected_gradient.split(parts, dim=2)
    # token by token, or the small gradients of large tokens would be lost in the sum
    size = expected_turned.double().norm(dim=2, keepdim=True)
    assert error(turned / size, expected_turned / size) < TOLERANCE[dtype]
    assert torch.equal(copied.unflatten(2, (-1, D)).transpose(1, 2), gradients[2])


def test_rope_of_gradients_that_are_not_dense(device):
    """A sum's gradient is one number for all."""
    packed = projection(device, torch.float32, 1, 5, 96)
    cos, sin = tables(5, 32, device)

    def gradient(function, packed, *settings):
        packed.requires_grad_()
        q, k, v = function(packed * 1, cos, sin, 1, *settings)
        return torch.autograd.grad(2 * q.sum() - k.sum() + 3 * v.sum(), packed)[0]

    expected = gradient(reference, packed.double())
    assert error(gradient(rope, packed, 1, NORM_EPS), expected) < 1e-5


@pytest.mark.parametrize("compiled", [False, on_gpu(True)])
def test_rope_keeps_one_copy(device, dtype, compiled):
    """Of the product, and of queries, keys and values, which attention keeps: they are the same memory."""
    B, T, H, D = 1, 32, 6, 64
    cos, sin = tables(T, D, device)

    def attend(h, weight):
        q, k, v = rope(F.linear(h, weight), cos, sin, H, H, NORM_EPS)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    h = torch.randn(B, T, 16, device=device).to(dtype)
    weight = torch.randn(3 * H * D, 16, device=device).to(dtype).requires_grad_()
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = (torch.compile(attend) if compiled else attend)(h, weight)
    kept.pop(weight.data_ptr(), None)
    assert 4 * y.nbytes < sum(kept.values()) < 5 * y.nbytes  # the product, y, and small things


def attention(device, H, H_kv, D):
    layer = CausalSelfAttention(small_config(n_head=H, n_kv_head=H_kv, n_embd=H * D)).to(device)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=weight.size(1) ** -0.5)
    return layer


def run(function, layer, h, dy, *tables):
    """y, and the gradients of h and of all weights."""
    h = h.detach().requires_grad_()
    y = function(h, *tables)
    return y.detach(), *torch.autograd.grad(y, [h, *layer.parameters()], dy)


@pytest.mark.parametrize(("H", "H_kv", "D"), [(3, 3, 16), (4, 2, 16), on_gpu(10, 10, 128), on_gpu(6, 2, 64)])
@pytest.mark.parametrize("compiled", [False, True])
def test_rope_in_a_layer(device, dtype, H, H_kv, D, compiled):
    """As near to float64 as the plain layer is; traced in one piece."""
    layer, T = attention(device, H, H_kv, D), 37
    h = torch.randn(2, T, H * D, device=device).to(dtype)
    dy, positions = torch.randn_like(h), tables(T, D, device)
    expected = run(layer, layer, h.double(), dy.double(), *positions)
    plain = run(layer, layer, h, dy, *positions)
    fused_layer = partial(layer, inputs=partial(fused_attention_inputs, product=F.linear))
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled_layer = torch.compile(fused_layer, backend=backend, fullgraph=True, dynamic=False)
    fused = run(compiled_layer if compiled else fused_layer, layer, h, dy, *positions)
    for value, rounded, reference_value in zip(fused, plain, expected, strict=True):
        assert error(value, reference_value) < max(TOLERANCE[dtype], 1.2 * error(rounded, reference_value))


def test_rope_is_an_operator(device):
    """torch.compile may rely on what they declare: shapes, and what they write over."""
    cos, sin = tables(3, 16, device)
    more = [torch.randn(*shape, device=device) for shape in ((2, 3, 16), (16, 1, 3), (2, 3, 16))]
    gradients = [torch.randn(2, heads, 3, 16, device=device) for heads in (3, 1, 1)]
    for keys, conv, embeds in ((None, None, None), more):
        packed = projection(device, torch.float32, 2, 3, 80 if embeds is None else 128)
        copies = packed.clone(), keys if keys is None else keys.clone()
        torch.library.opcheck(rope_, (*copies, embeds, cos, sin, 3, 1, NORM_EPS))
        scales = rope_(packed, keys, embeds, cos, sin, 3, 1, NORM_EPS)
        torch.library.opcheck(rope_backward, (*gradients, packed, keys, conv, embeds, scales, cos, sin))
