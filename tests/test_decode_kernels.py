"""The decode kernels against their references: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from nanochat.attention import apply_rotary, rotary_tables
from nanochat.kernels.decode import sampling as kernel_sampling
from nanochat.kernels.decode.attention import attend, attend_causal, attend_reference
from nanochat.kernels.decode.linear import (
    COUNTERS,
    batch_linear_add,
    batch_linear_relu2,
    linear_reference,
    row_linear,
)
from nanochat.kernels.decode.pointwise import embed, norm_relu2
from nanochat.kernels.decode.residual_conv import (
    Conv,
    Mix,
    residual_conv_reference,
    residual_conv_rows,
)
from nanochat.kernels.decode.rope import Values, rope_append
from nanochat.kernels.decode.slc2 import slc2_mix, slc2_mix_reference, slc2_row
from nanochat.layers import norm
from nanochat.sampling import SamplingParams, sample_rows
from tests.helpers.kernels import error, on_gpu, poison

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3}  # relative Frobenius error of an output


def linear_case(device, dtype, R, N, K):
    x = (3 * torch.randn(R, K, device=device)).to(dtype)
    weight = (torch.randn(N, K, device=device) * K**-0.5).to(dtype)
    return x, weight, torch.randn(R, N, device=device).to(dtype)


@pytest.mark.parametrize(("N", "K"), [(37, 256), (33, 96), on_gpu(10, 5120), on_gpu(2698, 1280)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"relu2": True}, {"add": True}], ids=str)
def test_row_linear(device, dtype, N, K, norm, options):
    x, weight, before = linear_case(device, dtype, 1, N, K)
    is_added = "add" in options
    out = before.clone() if is_added else torch.full_like(before, torch.nan)
    row_linear(x, weight, out, norm=norm, **options)
    reference = linear_reference(
        x.double(),
        weight.double(),
        norm=norm,
        relu2="relu2" in options,
        residual=before.double() if is_added else None,
    )
    assert error(out, reference) < TOLERANCE[dtype]


BATCHES = [(2, 33, 96), (17, 16, 512), on_gpu(8, 2752, 1280), on_gpu(32, 1280, 5120), on_gpu(31, 5120, 1280)]


@pytest.mark.parametrize(("R", "N", "K"), BATCHES)
def test_batch_linear_relu2(device, dtype, R, N, K):
    x, weight, out = linear_case(device, dtype, R, N, K)
    scale = poison(R, dtype=torch.float32, device=device)
    batch_linear_relu2(x, weight, out.fill_(torch.nan), scale)
    assert error(out, linear_reference(x.double(), weight.double(), relu2=True)) < TOLERANCE[dtype]
    assert error(scale, torch.rsqrt(x.double().square().mean(1) + 2.0**-23)) < 1e-6


@pytest.mark.parametrize(("R", "N", "K"), BATCHES)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_batch_linear_add(device, dtype, R, N, K, is_scaled):
    """Two runs with the same counters, which are reset to zero, give the same bits."""
    x, weight, before = linear_case(device, dtype, R, N, K)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    scale = torch.rand(R, device=device) if is_scaled else None
    added = linear_reference(x.double(), weight.double())
    reference = before.double() + (added * scale.double().square()[:, None] if is_scaled else added)
    outs = [before.clone(), before.clone()]
    for out in outs:
        batch_linear_add(x, weight, out, counters, scale)
        assert not counters.any()
    assert error(outs[0], reference) < TOLERANCE[dtype]
    assert torch.equal(outs[0], outs[1])


def as_int(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def conv_case(device, dtype, C, K):
    """Return a convolution of K taps with windows of six slots; None for no taps."""
    if not K:
        return None
    return Conv(torch.randn(K, C, device=device), torch.randn(6, K - 1, C, device=device).to(dtype))


def check_one_token(run, u, before, conv, mix, slots, tolerance):
    """run(out, conv) adds rows u (R,C), each convolved at its slot, to out, and mixes; other slots stay."""
    u, windows = u.double(), None if conv is None else conv.windows.double()
    for i, slot in enumerate(slots if conv is not None else ()):
        u[i : i + 1], windows[slot] = residual_conv_reference(
            u[i : i + 1], conv.taps.double(), conv.windows[slot].double()
        )
    expected = before.double() + u
    if mix is not None:
        expected = mix.scales[0].double() * expected + mix.scales[1].double() * mix.x0.double()
    out, state = before.clone(), conv and conv._replace(windows=conv.windows.clone())
    run(out, state)
    assert error(out, expected) < tolerance
    if conv is not None:
        others = [slot for slot in range(6) if slot not in slots]
        assert error(state.windows[slots], windows[slots]) < tolerance
        assert torch.equal(state.windows[others], conv.windows[others])


SECOND = pytest.mark.parametrize(("taps", "is_mixed"), [(2, False), (3, True), (4, True), (0, True)])


@SECOND
@pytest.mark.parametrize(("N", "K"), [(37, 256), (33, 96), on_gpu(1280, 5120)])
def test_row_linear_convolves_and_mixes(device, dtype, N, K, taps, is_mixed):
    x, weight, before = linear_case(device, dtype, 1, N, K)
    mix = Mix(torch.randn_like(before), torch.tensor([1.3, -0.4], device=device)) if is_mixed else None
    slots = as_int([4], device)

    def run(out, conv):
        row_linear(x, weight, out, add=True, slots=slots, conv=conv, mix=mix)

    u, conv = linear_reference(x.double(), weight.double()), conv_case(device, dtype, N, taps)
    check_one_token(run, u, before, conv, mix, [4], 2 * TOLERANCE[dtype])


@SECOND
@pytest.mark.parametrize(
    ("R", "N", "K"), [(3, 33, 96), (5, 64, 512), on_gpu(2, 1280, 5120), on_gpu(5, 1280, 1280)]
)
def test_batch_linear_add_convolves_and_mixes(device, dtype, R, N, K, taps, is_mixed):
    x, weight, before = linear_case(device, dtype, R, N, K)
    mix = Mix(torch.randn_like(before), torch.tensor([1.3, -0.4], device=device)) if is_mixed else None
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    scale, slots = torch.rand(R, device=device), [4, 0, 5, 1, 2][:R]

    def run(out, conv):
        batch_linear_add(x, weight, out, counters, scale, as_int(slots, device), conv, mix)
        assert not counters.any()

    u = linear_reference(x.double(), weight.double()) * scale.double().square()[:, None]
    check_one_token(run, u, before, conv_case(device, dtype, N, taps), mix, slots, 2 * TOLERANCE[dtype])


@SECOND
def test_residual_conv_rows_of_one_token(device, dtype, taps, is_mixed):
    u, before = torch.randn(2, 3, 45, device=device).to(dtype)
    mix = Mix(torch.randn_like(before), torch.tensor([1.3, -0.4], device=device)) if is_mixed else None
    slots = as_int([4, 0, 5], device)

    def run(out, conv):
        residual_conv_rows(u, out, slots, torch.ones_like(slots), conv, mix, add=True)

    check_one_token(run, u, before, conv_case(device, dtype, 45, taps), mix, [4, 0, 5], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(("counts", "T"), [([2], 2), ([3, 1], 3), ([1, 2], 5), on_gpu([900], 1024)])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_residual_conv_rows(device, dtype, counts, T, K):
    """Padded prefill from non-zero windows, which do not change: the next ones are written to tails."""
    B, C = len(counts), 45
    u, conv = torch.randn(B * T, C, device=device).to(dtype), conv_case(device, dtype, C, K)
    before, slots = conv.windows.clone(), [4, 1][:B]
    tails, out = (poison(*shape, dtype=dtype, device=device) for shape in ((B, K - 1, C), (B * T, C)))
    conv = conv._replace(tails=tails)
    residual_conv_rows(u, out, as_int(slots, device), as_int(counts, device), conv)
    assert torch.equal(conv.windows, before)
    for i, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        rows = slice(i * T, i * T + count)
        y, window = residual_conv_reference(u[rows].double(), conv.taps.double(), before[slot].double())
        assert error(out[rows], y) < TOLERANCE[dtype]
        assert torch.equal(tails[i], window.to(dtype))


@pytest.mark.parametrize(("H", "D", "K"), [(3, 16, 3), (2, 32, 2), (1, 16, 4), on_gpu(10, 128, 3)])
@pytest.mark.parametrize(
    ("counts", "T"), [([1], 1), ([1, 1, 1], 1), ([2], 2), ([3, 1], 3), ([2, 3], 5), on_gpu([900], 1024)]
)
def test_slc2(device, dtype, H, D, K, counts, T):
    """Single tokens and padded prefill, from non-zero windows; other slots do not change."""
    B = len(counts)
    E = H * D
    weight = (torch.randn(2 * E + D + H, E, device=device) * 2 * E**-0.5).to(dtype)
    conv = torch.randn(E, 1, K, device=device)
    before = torch.randn(6, K - 1, E, device=device).to(dtype)
    slots = torch.tensor([4, 1, 3][:B], dtype=torch.int32, device=device)
    x = (2 * torch.randn(B * T, E, device=device)).to(dtype)
    packed = (x.double() @ weight.double().T).to(dtype)
    packed = torch.nn.functional.pad(packed, (0, 6), value=torch.nan)  # columns that must not be read
    expected, windows = [], before.double()
    for i, slot in enumerate(slots.tolist()):
        rows = slice(i * T, i * T + counts[i])
        y, windows[slot] = slc2_mix_reference(
            packed[rows].double(), x[rows].double(), conv.double(), before[slot].double(), H
        )
        expected.append(y)

    def check(run):
        state, y = before.clone(), poison(B * T, E, dtype=dtype, device=device)
        run(state, y)
        real = torch.cat([y[i * T : i * T + count] for i, count in enumerate(counts)])
        assert error(real, torch.cat(expected)) < 3 * TOLERANCE[dtype]
        assert error(state[slots.long()], windows[slots.long()]) < 3 * TOLERANCE[dtype]
        assert torch.equal(state[[0, 2, 5]], before[[0, 2, 5]])

    def mix(state, y):
        real = torch.tensor(counts, dtype=torch.int32, device=device)
        tails = poison(B, K - 1, E, dtype=dtype, device=device)
        slc2_mix(packed, x, conv, state, slots, real, tails, y, H)
        if T > 1:
            assert torch.equal(state, before)
            state[slots.long()] = tails

    check(mix)
    if B * T == 1:
        check(lambda state, y: slc2_row(x, weight, conv, state, slots, y, H))


HEADS = [(3, 3, 32), (6, 2, 16), on_gpu(10, 10, 128)]


@pytest.mark.parametrize(("H", "H_kv", "D"), HEADS)
@pytest.mark.parametrize("T", [1, 5])
def test_rope_append(device, dtype, H, H_kv, D, T):
    E, slots, positions = 48, [3, 0], [0, 130]
    x = (2 * torch.randn(2 * T, E, device=device)).to(dtype)
    packed = (x.double() @ torch.randn((H + 2 * H_kv) * D + 8, E, device=device).double().T).to(dtype)
    tables = rotary_tables(200, D, x.device)
    q = poison(2 * T, H, D, dtype=dtype, device=device)
    k, v = (poison(4, H_kv, 200, D, dtype=dtype, device=device) for _ in "kv")
    as_int = {"dtype": torch.int32, "device": device}
    rope_append(packed, x, tables, torch.tensor(slots, **as_int), torch.tensor(positions, **as_int), q, k, v)
    scaled = packed.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 2.0**-23)
    for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        rows, places = slice(i * T, i * T + T), slice(position, position + T)
        cos, sin = (table[places] for table in tables)
        parts = scaled[None, rows, :-8].split([H * D, H_kv * D, H_kv * D], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, D)) for part in parts)
        assert error(q[rows], norm(apply_rotary(query, cos, sin))[0]) < TOLERANCE[dtype]
        assert (
            error(k[slot, :, places], norm(apply_rotary(key, cos, sin))[0].transpose(0, 1)) < TOLERANCE[dtype]
        )
        assert error(v[slot, :, places], value[0].transpose(0, 1)) < TOLERANCE[dtype]
    assert k[[1, 2]].isnan().all()
    assert v[0, :, :130].isnan().all()


@pytest.mark.parametrize(("H", "H_kv", "D"), HEADS)
@pytest.mark.parametrize(
    ("counts", "T", "K"), [([1, 1], 1, 3), ([3, 1], 3, 3), ([2, 5], 5, 2), ([1, 1], 1, 4)]
)
def test_rope_append_of_the_second_generation(device, dtype, H, H_kv, D, counts, T, K):
    """Keys are convolved across rows and windows, values get those of tokens, given or drawn last."""
    E, V, W, slots, positions = 48, 60, H_kv * D, [3, 0], [0, 130]
    x = (2 * torch.randn(2 * T, E, device=device)).to(dtype)
    packed = (x.double() @ torch.randn(H * D + 2 * W + 8, E, device=device).double().T).to(dtype)
    tables = rotary_tables(200, D, x.device)
    q = poison(2 * T, H, D, dtype=dtype, device=device)
    k, v = (poison(4, H_kv, 200, D, dtype=dtype, device=device) for _ in "kv")
    conv = conv_case(device, dtype, W, K)
    before, tails = conv.windows.clone(), poison(2, K - 1, W, dtype=dtype, device=device)
    tokens, latest = torch.arange(2 * T, device=device).int() * 7 % V, as_int([50, 51, 52, 53], device)
    known = tokens.clone()
    tokens[0], known[0] = -1, 53
    all_tables = torch.randn(V, 3 * W, device=device).to(dtype)
    values = Values(tokens, latest, all_tables[:, W : 2 * W], torch.randn(H_kv, 12, device=device).to(dtype))
    rope_append(
        packed, x, tables, as_int(slots, device), as_int(positions, device), q, k, v, values,
        as_int(counts, device), conv._replace(tails=None if T == 1 else tails),
    )  # fmt: skip
    h = norm(x.double())
    scaled = packed.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 2.0**-23)
    for i, (slot, position, count) in enumerate(zip(slots, positions, counts, strict=True)):
        rows, places = slice(i * T, i * T + count), slice(position, position + count)
        cos, sin = (table[places] for table in tables)
        query, key, value, _ = scaled[rows].split([H * D, W, W, 8], dim=-1)
        key, window = residual_conv_reference(key, conv.taps.double(), before[slot].double())
        gate = 2 * torch.sigmoid(h[rows, :12] @ values.gate.double().T)[..., None]
        value = value.unflatten(-1, (-1, D)) + gate * values.table[known[rows]].double().unflatten(
            -1, (-1, D)
        )
        query, key = (
            norm(apply_rotary(part.unflatten(-1, (-1, D))[None], cos, sin))[0] for part in (query, key)
        )
        assert error(q[rows], query) < TOLERANCE[dtype]
        assert error(k[slot, :, places], key.transpose(0, 1)) < 2 * TOLERANCE[dtype]
        assert error(v[slot, :, places], value.transpose(0, 1)) < TOLERANCE[dtype]
        assert error(conv.windows[slot] if T == 1 else tails[i], window) < TOLERANCE[dtype]
    others = [1, 2, 4, 5] if T == 1 else range(6)
    assert all(torch.equal(conv.windows[slot], before[slot]) for slot in others)


def test_padding_beyond_the_context_is_not_appended(device):
    k, v = (poison(2, 2, 8, 16, dtype=torch.float32, device=device) for _ in "kv")
    as_int = {"dtype": torch.int32, "device": device}
    slot, position, q = (
        torch.tensor([0], **as_int),
        torch.tensor([6], **as_int),
        torch.empty(4, 2, 16, device=device),
    )
    packed, x = torch.randn(4, 96, device=device), torch.randn(4, 32, device=device)
    rope_append(packed, x, rotary_tables(8, 16, x.device), slot, position, q, k, v)
    for state in (k, v):
        assert not state[0, :, 6:].isnan().any()
        assert state[0, :, :6].isnan().all()
        assert state[1].isnan().all()


@pytest.mark.parametrize(("H", "H_kv", "D"), HEADS)
@pytest.mark.parametrize(
    ("position", "T"), [(0, 3), (70, 20), on_gpu(0, 130), on_gpu(61, 128), on_gpu(1024, 1000)]
)
def test_attend_causal(device, dtype, H, H_kv, D, position, T):
    """Prefill of a first and of a later chunk, whose ends are not multiples of a block."""
    k, v = (poison(3, H_kv, 2048, D, dtype=dtype, device=device) for _ in "kv")
    S = position + T
    k[1, :, :S] = norm(torch.randn(H_kv, S, D, device=device)).to(dtype)
    v[1, :, :S] = torch.randn(H_kv, S, D, device=device).to(dtype)
    q = (2 * torch.randn(T, H, D, device=device)).to(dtype)
    y = poison(T, H, D, dtype=dtype, device=device)
    as_int = {"dtype": torch.int32, "device": device}
    attend_causal(q, k, v, torch.tensor([1], **as_int), torch.tensor([position], **as_int), y)
    reference = [
        attend_reference(
            q[t].double(), k[1, :, : position + t + 1].double(), v[1, :, : position + t + 1].double()
        )
        for t in range(T)
    ]
    assert error(y, torch.stack(reference)) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize(("H", "H_kv", "D"), HEADS)
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_attend(device, dtype, H, H_kv, D, splits):
    """Memory beyond a sequence, here NaN, is never read; empty splits do not change the result."""
    slots, lengths = [2, 0, 3], [1, 131, 64]
    k, v = (poison(4, H_kv, 200, D, dtype=dtype, device=device) for _ in "kv")
    for slot, length in zip(slots, lengths, strict=True):
        k[slot, :, :length] = norm(torch.randn(H_kv, length, D, device=device)).to(dtype)
        v[slot, :, :length] = torch.randn(H_kv, length, D, device=device).to(dtype)
    q = (2 * torch.randn(3, H, D, device=device)).to(dtype)
    y = poison(3, H, D, dtype=dtype, device=device)
    as_int = {"dtype": torch.int32, "device": device}
    attend(q, k, v, torch.tensor(slots, **as_int), torch.tensor(lengths, **as_int) - 1, y, splits)
    for i, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        reference = attend_reference(
            q[i].double(), k[slot, :, :length].double(), v[slot, :, :length].double()
        )
        assert error(y[i], reference) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("K", [2, 3, 4])
def test_attend_convolves_its_output(device, dtype, K):
    """Scores are scaled, too; the windows of other slots do not change."""
    (H, H_kv, D), slots, lengths = (4, 2, 16), [2, 0, 5], [1, 131, 64]
    k, v = (torch.randn(6, H_kv, 140, D, device=device).to(dtype) for _ in "kv")
    q, conv = (2 * torch.randn(3, H, D, device=device)).to(dtype), conv_case(device, dtype, H * D, K)
    u = torch.stack(
        [
            attend_reference(q[i].double(), k[slot, :, :n].double(), v[slot, :, :n].double(), 1.7)
            for i, (slot, n) in enumerate(zip(slots, lengths, strict=True))
        ]
    )

    def run(out, conv):
        y = poison(3, H, D, dtype=dtype, device=device)
        attend(q, k, v, as_int(slots, device), as_int(lengths, device) - 1, y, 3, 1.7, conv)
        out += y.view_as(out)

    before = torch.zeros(3, H * D, dtype=dtype, device=device)
    check_one_token(run, u.view_as(before), before, conv, None, slots, 2 * TOLERANCE[dtype])


def test_attend_causal_scales_scores(device, dtype):
    k, v = (torch.randn(2, 2, 40, 16, device=device).to(dtype) for _ in "kv")
    q = (2 * torch.randn(3, 4, 16, device=device)).to(dtype)
    y = poison(3, 4, 16, dtype=dtype, device=device)
    attend_causal(q, k, v, as_int([1], device), as_int([30], device), y, 1.7)
    reference = [
        attend_reference(q[t].double(), *(state[1, :, : 31 + t].double() for state in (k, v)), 1.7)
        for t in range(3)
    ]
    assert error(y, torch.stack(reference)) < 1.5 * TOLERANCE[dtype]


def test_embed_mixes(device, dtype):
    wte, tokens, slots = torch.randn(50, 48, device=device).to(dtype), [3, 49, 0], as_int([1, 0, 2], device)
    x, x0 = poison(2, 3, 48, dtype=dtype, device=device)
    seen = torch.zeros(3, 50, dtype=torch.uint8, device=device)
    mix = Mix(x0, torch.tensor([1.3, -0.4], device=device))
    embed(as_int(tokens, device), wte, slots, torch.ones_like(slots), slots, seen, x, mix)
    assert error(x0, norm(wte[tokens].double())) < TOLERANCE[dtype]
    assert error(x, 0.9 * x0.double()) < TOLERANCE[dtype]


def test_embed_and_relu2(device, dtype):
    wte = torch.randn(50, 48, device=device).to(dtype)
    as_int = {"dtype": torch.int32, "device": device}
    tokens = torch.tensor([3, 49, 0, 7, -1, 9], **as_int)
    slots, counts = torch.tensor([4, 1, 0], **as_int), torch.tensor([2, 1, 2], **as_int)
    latest, seen = (
        torch.tensor([30, 31, 32, 33, 34], **as_int),
        torch.zeros(5, 50, dtype=torch.uint8, device=device),
    )
    x = poison(6, 48, dtype=dtype, device=device)
    embed(tokens, wte, slots, counts, latest, seen, x)
    assert error(x, norm(wte[[3, 49, 0, 7, 30, 9]].double())) < TOLERANCE[dtype]
    assert seen.nonzero().tolist() == [[0, 9], [0, 30], [1, 0], [4, 3], [4, 49]]
    h = torch.randn(6, 193, device=device).to(dtype)
    scaled = h.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 2.0**-23)
    norm_relu2(h, x)
    assert error(h, scaled.relu().square()) < 2 * TOLERANCE[dtype]


PARAMS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.8},
    {"seed": 7},
    {"temperature": 0.7, "top_k": 3, "seed": 5},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.6, "seed": 2**32 - 3},
    {"top_p": 0.9, "repetition_penalty": 1.5, "seed": 11},
    {"top_k": 1, "seed": 3},
    {"top_k": 100_000, "seed": 9},
]


@pytest.mark.parametrize("V", [700, 3000, on_gpu(65_536)])
def test_sampling_is_sample_rows(device, V):
    B, blocks = len(PARAMS), -(-V // kernel_sampling.BLOCK)
    params = [SamplingParams(**fields) for fields in PARAMS]
    columns = {
        name: torch.tensor([getattr(p, name) for p in params], dtype=torch.float32, device=device)
        for name in ("temperature", "top_p", "repetition_penalty")
    }
    columns["top_k"] = torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device)
    seeds = torch.tensor([p.seed or 0 for p in params], device=device)
    columns["seed"] = seeds.to(torch.int32)  # its low 32 bits
    drawn = set()
    for trial in range(4):
        logits = torch.randn(B, V, device=device) * 6
        capped = 15 * torch.tanh(logits / 15)
        seen = (torch.rand(B + 2, V, device=device) < 0.02).to(torch.uint8)
        slots = torch.randperm(B + 2, device=device)[:B].int()
        places = torch.arange(B, device=device) + 7 * trial
        seen_tokens = [seen[slot].nonzero()[:, 0].tolist() for slot in slots.tolist()]
        expected = sample_rows(capped.clone(), params, places.tolist(), seen_tokens)
        out, latest = torch.full((2, B + 2), -1, dtype=torch.int32, device=device)
        buffers = (
            poison(B, V, dtype=torch.float32, device=device),
            poison(B, blocks, dtype=torch.float32, device=device),
            torch.full((B, blocks), -1, dtype=torch.int32, device=device),
        )
        kernel_sampling.sample_rows(
            logits, seen, slots, {**columns, "place": places.int()}, buffers, latest, out[:B], cap=15.0
        )
        assert out.tolist() == [*expected, -1, -1]
        assert latest[slots.long()].tolist() == expected
        assert (latest == -1).sum() == 2
        assert torch.allclose(logits, capped, atol=1e-5)
        drawn.add(tuple(expected))
    assert len(drawn) == 4


def test_tokens_of_equal_score_are_kept_together(device):
    """Four tokens tie for the best score; top_k=3 or top_p=0.2 would keep fewer: all four are drawn."""
    logits = torch.full((40, 900), -9.0, device=device)
    logits[:, 100:104] = 2.0
    columns = {name: torch.ones(40, device=device) for name in ("temperature", "top_p", "repetition_penalty")}
    for name in ("top_k", "seed", "place"):
        columns[name] = torch.arange(40, dtype=torch.int32, device=device)
    columns["top_k"][:20], columns["top_k"][20:], columns["top_p"][20:] = 3, 0, 0.2
    out = torch.full((40,), -1, dtype=torch.int32, device=device)
    buffers = (torch.empty_like(logits), torch.empty(40, 1, device=device), out[:, None].clone())
    slots = torch.zeros(40, dtype=torch.int32, device=device)
    seen = torch.zeros(1, 900, dtype=torch.uint8, device=device)
    kernel_sampling.sample_rows(logits, seen, slots, columns, buffers, out[:1].clone(), out, cap=15.0)
    assert set(out[:20].tolist()) == set(out[20:].tolist()) == set(range(100, 104))
