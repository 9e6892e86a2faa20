"""Look rows of tables up by token in training, with a gradient of sums in a fixed order.

The n tables lie side by side in one weight (V, n*W). The tokens' ids are sorted once, for the forward and
for the gradients of all tables:

    embeds_j[t] = weight[id_t, j]          dweight[v, j] = sum over t with id_t = v of dembeds_j[t]

In order of ids each row of the weight is read from memory once. One program sums the gradient of an id, in
float32 and in the order of its tokens, and writes it once, zero where no token has the id. Ids with more than
CHUNK tokens would keep their program busy for long: for them the sorted tokens are cut into tiles of CHUNK,
whose sums another kernel has computed before. A tile meets at most two such ids, one at each end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS, WARPS = 4, 512, 4  # of a program of the forward
CHUNK = 64  # tokens whose gradients a program sums, in turn
AT_ONCE, BACKWARD_COLUMNS, BACKWARD_WARPS = 2, 256, 1  # tokens in flight, columns of each table


@triton.jit
def _look_up(
    weight_ptr,
    ids_ptr,
    tokens_ptr,
    embeds_ptr,
    N,
    W: tl.constexpr,
    TABLES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.load(ids_ptr + place, mask=place < N, other=0).to(tl.int64)[:, None]
    token = tl.load(tokens_ptr + place, mask=place < N, other=0).to(tl.int64)[:, None]
    is_in = (place < N)[:, None] & (c < TABLES * W)
    embeds = tl.load(weight_ptr + row * (TABLES * W) + c, mask=is_in, other=0.0)
    tl.store(embeds_ptr + (c // W * N + token) * W + c % W, embeds, mask=is_in)


@triton.jit
def _zeros(tables, BLOCK: tl.constexpr):
    """Return zeros (1,BLOCK) for each of tables; in two dimensions, as what is loaded and added to them."""
    sums = ()
    for _ in tl.static_range(len(tables)):
        sums += (tl.zeros((1, BLOCK), tl.float32),)
    return sums


@triton.jit
def _sum_tokens(dembeds, tokens_ptr, start, end, c, W, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of columns c of each of dembeds over the sorted tokens start to end."""
    sums = _zeros(dembeds, BLOCK)
    for first in range(start, end, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        token = tl.load(tokens_ptr + place, mask=place < end, other=0).to(tl.int64)
        at, is_in = token[:, None] * W + c, (place < end)[:, None] & (c < W)
        more = ()
        for j in tl.static_range(len(dembeds)):
            found = tl.load(dembeds[j] + at, mask=is_in, other=0.0).to(tl.float32)
            more += (sums[j] + tl.sum(found, 0, keep_dims=True),)
        sums = more
    return sums


@triton.jit
def _sum_tiles(
    dembeds,
    ids_ptr,
    tokens_ptr,
    starts_ptr,
    tiles_ptr,
    N,
    W,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    side, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = side // 2 * CHUNK
    last = tl.minimum(first + CHUNK, N) - 1
    is_last = side % 2 == 1
    v = tl.load(ids_ptr + tl.where(is_last, last, first))
    start, end = tl.load(starts_ptr + v), tl.load(starts_ptr + v + 1)
    if (end - start > CHUNK) & ((start > first) | (not is_last)):
        start, end = tl.maximum(start, first), tl.minimum(end, last + 1)
        sums = _sum_tokens(dembeds, tokens_ptr, start, end, c, W, AT_ONCE, BLOCK)
        row = side.to(tl.int64) * len(dembeds)
        for j in tl.static_range(len(dembeds)):
            tl.store(tiles_ptr + (row + j) * W + c, sums[j], mask=c < W)


@triton.jit
def _sum_ids(
    dembeds,
    tokens_ptr,
    starts_ptr,
    tiles_ptr,
    dweight_ptr,
    W,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    start, end = tl.load(starts_ptr + v), tl.load(starts_ptr + v + 1)
    if end - start > CHUNK:
        sums = _zeros(dembeds, BLOCK)
        for tile in range(start // CHUNK, (end - 1) // CHUNK + 1):
            row = (2 * tile + (start > tile * CHUNK)).to(tl.int64) * len(dembeds)
            more = ()
            for j in tl.static_range(len(dembeds)):
                more += (sums[j] + tl.load(tiles_ptr + (row + j) * W + c, mask=c < W, other=0.0),)
            sums = more
    else:
        sums = _sum_tokens(dembeds, tokens_ptr, start, end, c, W, AT_ONCE, BLOCK)
    for j in tl.static_range(len(dembeds)):
        tl.store(dweight_ptr + (v.to(tl.int64) * len(dembeds) + j) * W + c, sums[j], mask=c < W)


def sort_ids(idx: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids idx (B,T) in order (N,), the token of each (N,) and the place of each id's first (V+1,)."""
    ids, tokens = idx.flatten().int().sort(stable=True)
    every = torch.arange(vocab_size + 1, dtype=torch.int32, device=idx.device)
    return ids, tokens.int(), torch.searchsorted(ids, every, out_int32=True)


@torch.library.custom_op("nanochat::look_up_sorted", mutates_args=())
def look_up_sorted(weight: Tensor, ids: Tensor, tokens: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return the embeddings (n,N,W), in dtype, of sorted ids (N,) from weight (V,n*W), contiguous."""
    N, W = ids.numel(), weight.size(1) // n
    embeds = weight.new_empty(n, N, W, dtype=dtype)
    grid = (triton.cdiv(N, TOKENS), triton.cdiv(n * W, COLUMNS))
    _look_up[grid](weight, ids, tokens, embeds, N, W, n, TOKENS, COLUMNS, num_warps=WARPS)
    return embeds


@look_up_sorted.register_fake
def _(weight, ids, tokens, n, dtype):
    return weight.new_empty(n, ids.numel(), weight.size(1) // n, dtype=dtype)


@torch.library.custom_op("nanochat::look_up_backward", mutates_args=())
def look_up_backward(dembeds: Sequence[Tensor], ids: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    """Return the gradient of the weight (V,n*W), float32, from dembeds, n times (B,T,W), contiguous."""
    N, W, n, V = ids.numel(), dembeds[0].size(-1), len(dembeds), starts.numel() - 1
    sides, columns = 2 * triton.cdiv(N, CHUNK), triton.cdiv(W, BACKWARD_COLUMNS)
    tiles = dembeds[0].new_empty(sides, n, W, dtype=torch.float32)
    dweight = tiles.new_empty(V, n * W)
    sizes = (W, CHUNK, AT_ONCE, BACKWARD_COLUMNS)
    _sum_tiles[(sides, columns)](
        tuple(dembeds), ids, tokens, starts, tiles, N, *sizes, num_warps=BACKWARD_WARPS
    )
    _sum_ids[(V, columns)](tuple(dembeds), tokens, starts, tiles, dweight, *sizes, num_warps=BACKWARD_WARPS)
    return dweight


@look_up_backward.register_fake
def _(dembeds, ids, tokens, starts):
    width = len(dembeds) * dembeds[0].size(-1)
    return dembeds[0].new_empty(starts.numel() - 1, width, dtype=torch.float32)


def look_up(idx: Tensor, weight: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the embeddings, n times (B,T,W) in dtype, of token ids idx (B,T); weight (V,n*W) is float32."""
    return _LookUp.apply(idx, weight, n, dtype)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight, n, dtype):
        ids, tokens, starts = sort_ids(idx, weight.size(0))
        ctx.save_for_backward(ids, tokens, starts)
        return look_up_sorted(weight, ids, tokens, n, dtype).view(n, *idx.shape, -1).unbind()

    @staticmethod
    def backward(ctx, *dembeds):
        return None, look_up_backward([d.contiguous() for d in dembeds], *ctx.saved_tensors), None, None
