"""Time the training kernels beside compiled plain PyTorch, at the shapes of a depth: one JSON line each.

    python -m scripts.bench_kernels                      # all kernels, and the products, of d20
    python -m scripts.bench_kernels --ops mlp --depth=12

Run it from the root of the checkout: each op must first pass its tests (those of TESTS with its name) on this
machine. If it fails, no speed is printed and the exit status is 1. `forward_ms` and `backward_ms` are medians
of whole calls. `products` are the matrix products of a layer and the head, in TFLOP/s of cuBLAS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from nanochat.common import parse, require_at_least, run, setup_runtime

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.config import GPTConfig

FILES = ("test_training_kernels.py", "test_rope_kernel.py", "test_second_kernels.py")
TESTS = [Path("tests") / name for name in FILES]
Op = Literal[
    "slc2", "rope", "attention_inputs", "residual_conv", "join", "share", "look_up", "head_loss", "mlp",
    "products",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchKernelsConfig:
    """Settings of the benchmark."""

    ops: tuple[Op, ...] = get_args(Op)
    """what to time"""
    depth: int = 20
    """depth of the model with these shapes"""
    vocab_size: int = 65_536
    """entries of the vocabulary"""
    tokens: int = 65_536
    """tokens of a micro-batch"""
    seq_len: int = 2048
    """tokens of a sequence"""

    def __post_init__(self) -> None:
        require_at_least(self, depth=1, vocab_size=1, tokens=1, seq_len=1)
        if self.tokens % self.seq_len:
            raise ValueError(f"tokens={self.tokens} must be a multiple of seq_len={self.seq_len}")


def passes_tests(op: Op) -> bool:
    """Run the op's tests on the GPU. Raise FileNotFoundError outside of a checkout."""
    if missing := [str(path) for path in TESTS if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]} is missing: run this from the root of the checkout")
    command = [sys.executable, "-m", "pytest", *map(str, TESTS), "-m", "gpu", "-k", op, "--tb=line"]
    return subprocess.run(command, stdout=sys.stderr).returncode == 0


def both_ways(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> dict[str, float]:
    """Return the times of forward and backward in ms, with random gradients."""
    import torch

    from nanochat.benchmark import seconds

    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y, device = function(*inputs), inputs[0].device
    dy = [torch.randn_like(part) for part in y] if isinstance(y, tuple) else torch.randn_like(y)

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, dy)

    both()
    forward = seconds(lambda: function(*inputs), device, 20)
    return {
        "forward_ms": round(1e3 * forward, 3),
        "backward_ms": round(1e3 * (seconds(both, device, 20) - forward), 3),
    }


def time_slc2(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the kernels and the layer's compiled equations."""
    import torch
    import torch.nn.functional as F

    from nanochat.kernels.train.slc2 import PACKED_ALIGN, slc2_mix
    from nanochat.layers import short_conv
    from nanochat.slc2 import gate

    E, H, D, T = shape.n_embd, shape.n_head, shape.head_dim, config.seq_len
    width = -(-(2 * E + D + H) // PACKED_ALIGN) * PACKED_ALIGN
    packed = torch.randn(config.tokens, width, device="cuda", dtype=torch.bfloat16)
    conv = torch.randn(E, 1, shape.n_kernel, device="cuda")

    @torch.compile(dynamic=False)
    def plain(packed: Tensor, conv: Tensor) -> Tensor:
        x, b, a, alpha, _ = packed.view(-1, T, width).split([E, E, D, H, width - 2 * E - D - H], dim=-1)
        return (b * F.silu(short_conv(gate(x, alpha, a), conv))).flatten(0, 1)

    yield {"by": "kernel", **both_ways(lambda p, c: slc2_mix(p, c, T, H), packed, conv)}
    yield {"by": "compiled", **both_ways(plain, packed, conv)}


def time_rope(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the step from the joint product to attention."""
    import torch

    from nanochat.attention import apply_rotary, rotary_tables
    from nanochat.kernels.train.rope import rope
    from nanochat.layers import NORM_EPS, norm

    H, H_kv, D, T = shape.n_head, shape.n_kv_head, shape.head_dim, config.seq_len
    packed = torch.randn(config.tokens // T, T, (H + 2 * H_kv) * D, device="cuda", dtype=torch.bfloat16)
    cos, sin = rotary_tables(T, D, packed.device)

    @torch.compile(dynamic=False)
    def plain(packed: Tensor) -> tuple[Tensor, ...]:
        q, k, v = packed.unflatten(2, (-1, D)).split([H, H_kv, H_kv], dim=2)
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    yield {"by": "kernel", **both_ways(lambda p: rope(p, cos, sin, H, H_kv, NORM_EPS), packed)}
    yield {"by": "compiled", **both_ways(plain, packed)}


def time_attention_inputs(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the same with a convolution on keys and value embeddings, the joint product included."""
    import torch
    import torch.nn.functional as F

    from nanochat.attention import CausalSelfAttention, attention_inputs, rotary_tables
    from nanochat.train.fused_layers import fused_attention_inputs

    attn = CausalSelfAttention(replace(shape, residual_conv=3, value_embeds=True)).cuda()
    h, embeds = random_stream(config, shape, 2)
    tables = rotary_tables(config.seq_len, shape.head_dim, h.device)
    fused = partial(fused_attention_inputs, product=F.linear)
    for by, function in (("kernel", fused), ("compiled", torch.compile(attention_inputs, dynamic=False))):
        yield {"by": by, **both_ways(lambda h, e, f=function: f(attn, h, *tables, e), h, embeds)}


def time_residual_conv(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the convolution of attention's output."""
    import torch

    from nanochat import layers
    from nanochat.kernels.train.residual_conv import residual_conv

    (u,) = random_stream(config, shape, 1)
    conv = torch.randn(shape.n_embd, 1, 3, device="cuda")
    yield {"by": "kernel", **both_ways(residual_conv, u, conv)}
    yield {"by": "compiled", **both_ways(torch.compile(layers.residual_conv, dynamic=False), u, conv)}


def time_join(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the step from one layer to the next, with its convolution and the mix with the embedding."""
    import torch

    from nanochat import ops
    from nanochat.kernels.train.join import join
    from nanochat.layers import NORM_EPS

    x, m, x0 = random_stream(config, shape, 3)
    conv, rho, lam = torch.randn(shape.n_embd, 1, 3, device="cuda"), *torch.ones(2, 1, device="cuda")

    @torch.compile(dynamic=False)
    def plain(x: Tensor, m: Tensor, conv: Tensor, rho: Tensor, lam: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        return ops.join(x, m, ops.Link(conv, None, (rho, lam, x0)))

    inputs = (x, m, conv, rho, lam, x0)
    yield {"by": "kernel", **both_ways(lambda *inputs: join(*inputs, NORM_EPS)[:2], *inputs)}
    yield {"by": "compiled", **both_ways(plain, *inputs)}


def time_share(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the sum of the embedding's gradients from all layers, which a join leaves out."""
    from torch import ones

    from nanochat.kernels.train.share import share

    (x0,) = random_stream(config, shape, 1)
    scales = ones(2, shape.n_layer, device="cuda")
    yield {"by": "kernel", **both_ways(lambda x0: share(x0, *scales), x0)}


def time_look_up(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the look-up of value embeddings in all layers, of ids that are equally frequent."""
    import torch

    from nanochat import ops
    from nanochat.kernels.train.look_up import look_up

    n, width = shape.layer_kinds.count("attention"), shape.n_kv_head * shape.head_dim
    weight = torch.randn(shape.vocab_size, n * width, device="cuda")
    idx = torch.randint(shape.vocab_size, (config.tokens // config.seq_len, config.seq_len), device="cuda")
    plain = torch.compile(ops.look_up_values, dynamic=False)
    for by, function in (("kernel", look_up), ("compiled", plain)):
        yield {"by": by, **both_ways(lambda w, f=function: tuple(f(idx, w, n, torch.bfloat16)), weight)}


def random_stream(config: BenchKernelsConfig, shape: GPTConfig, n: int) -> list[Tensor]:
    """Return n random tensors of the size of the residual stream."""
    import torch

    size = (config.tokens // config.seq_len, config.seq_len, shape.n_embd)
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(n)]


def time_head_loss(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time head and loss; the plain one on an eighth of the tokens, to fit memory."""
    import torch

    from nanochat import ops
    from nanochat.kernels.train.cross_entropy import cross_entropy_
    from nanochat.train.chunked_loss import head_loss

    fused = partial(head_loss, cap=ops.SOFTCAP, cross_entropy_=cross_entropy_)
    x = torch.randn(1, config.tokens, shape.n_embd, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(shape.vocab_size, shape.n_embd, device="cuda") * shape.n_embd**-0.5
    targets = torch.randint(0, shape.vocab_size, (1, config.tokens), device="cuda")
    yield {"by": "kernel", **both_ways(lambda x, w: fused(x, w, targets, "sum"), x, weight)}
    few = config.tokens // 8
    plain = torch.compile(ops.head_loss, dynamic=False)
    yield {
        "by": "compiled",
        "tokens": few,
        **both_ways(lambda x, w: plain(x, w, targets[:, :few], "sum"), x[:, :few], weight),
    }


def time_mlp(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Time the whole MLP: by kernels, by kernels in 8 bits, by cuBLAS with compiled relu^2."""
    import torch
    import torch.nn.functional as F

    from nanochat.kernels.train import fp8, mlp

    E = shape.n_embd
    h, w_fc, w_proj = (
        torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * scale
        for rows, columns, scale in ((config.tokens, E, 1.0), (4 * E, E, E**-0.5), (E, 4 * E, E**-0.5))
    )

    @torch.compile(dynamic=False)
    def plain(h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
        return F.linear(F.linear(h, w_fc).relu().square(), w_proj)

    yield {"by": "kernel", **both_ways(mlp.mlp, h, w_fc, w_proj)}
    yield {"by": "kernel in 8 bits", **both_ways(torch.compile(fp8.mlp, dynamic=False), h, w_fc, w_proj)}
    yield {"by": "compiled", **both_ways(plain, h, w_fc, w_proj)}


def time_products(config: BenchKernelsConfig, shape: GPTConfig) -> Iterator[dict]:
    """Measure forward, input gradient and weight gradient of each linear layer."""
    import torch

    from nanochat.benchmark import seconds
    from nanochat.kernels.train.slc2 import PACKED_ALIGN

    E, V = shape.n_embd, shape.vocab_size
    slc2_in = -(-(2 * E + shape.head_dim + shape.n_head) // PACKED_ALIGN) * PACKED_ALIGN
    layers = {"qkv": (3 * E, E), "slc2_in": (slc2_in, E), "mixer_out": (E, E), "mlp_in": (4 * E, E)}
    layers |= {"mlp_out": (E, 4 * E), "head": (V, E)}
    for name, (n_out, n_in) in layers.items():
        M = min(config.tokens, 2**30 // V) if name == "head" else config.tokens
        x, dy, w = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            for shape in ((M, n_in), (M, n_out), (n_out, n_in))
        )
        ways = {"forward": lambda: x @ w.T, "input": lambda: dy @ w, "weight": lambda: dy.T @ x}  # noqa: B023
        flops = 2 * M * n_out * n_in
        rates = {way: round(flops / seconds(product, x.device, 20) / 1e12) for way, product in ways.items()}
        yield {"layer": name, "shape": (M, n_out, n_in), **rates}


def main(argv: Sequence[str] | None = None) -> int:
    """Test, then measure and print."""
    config = parse(BenchKernelsConfig, argv)
    runtime = setup_runtime("cuda")

    from nanochat.config import GPTConfig
    from nanochat.hardware import describe

    shape = GPTConfig.from_depth(config.depth, vocab_size=config.vocab_size)
    timers = {
        "slc2": time_slc2,
        "rope": time_rope,
        "attention_inputs": time_attention_inputs,
        "residual_conv": time_residual_conv,
        "join": time_join,
        "share": time_share,
        "look_up": time_look_up,
        "head_loss": time_head_loss,
        "mlp": time_mlp,
        "products": time_products,
    }
    failed = []
    for op in config.ops:
        if op != "products" and not passes_tests(op):
            failed.append(op)
            continue
        for result in timers[op](config, shape):
            line = {"op": op, "depth": config.depth, "tokens": config.tokens, **result}
            print(json.dumps({**line, **describe(runtime.device)}), flush=True)
    if failed:
        raise ValueError(f"the tests of {', '.join(failed)} fail here: a wrong kernel has no speed")
    return 0


if __name__ == "__main__":
    run(main)
