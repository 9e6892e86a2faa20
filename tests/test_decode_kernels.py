"""The decode kernels against their references: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

from nanochat.attention import apply_rotary, rotary_tables
from nanochat.kernels.decode import sampling as kernel_sampling
from nanochat.kernels.decode.attention import attend, attend_causal, attend_reference, rope_append
from nanochat.kernels.decode.linear import (
    COUNTERS,
    batch_linear_add,
    batch_linear_relu2,
    linear_reference,
    row_linear,
)
from nanochat.kernels.decode.pointwise import embed, norm_relu2
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
