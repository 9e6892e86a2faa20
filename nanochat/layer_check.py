"""Refuse a layer that was changed in only one of the places that compute it.

Each layer exists four times: the plain equations (gpt.py, slc2.py), the training kernels (train/fused.py),
the decoding kernels (decode/graph_model.py) and the exported file (hub/transformers_model). A change in one
place only would make the others silently compute the old layer. So random activations pass through each plain
layer and through its other version, and the results must agree up to rounding.

c_proj and lm_head start at zero, and published convolutions are zero. Zeros would hide every difference:
such weights hold noise during the comparison, and zeros again after it. The noise comes from a generator of
its own, so the process's random state does not change.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from nanochat.attention import rotary_tables
from nanochat.gpt import ANY_LENGTH, GPT, Block
from nanochat.layers import norm
from nanochat.ops import PLAIN, Link, Ops

TOKENS = 64  # of a comparison; products in 8 bits need a multiple of 16
# largest relative error of a value or gradient that rounding explains
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
BOUND_8_BITS = 0.25


@contextmanager
def noise_for_zeros(model: nn.Module) -> Iterator[bool]:
    """Fill the weights that are all zero with noise, yield whether there were any, and zero them again."""
    zero = [p for p in model.parameters() if not p.any()]
    generator = torch.Generator(zero[0].device if zero else "cpu").manual_seed(0)
    try:
        with torch.no_grad():
            for p in zero:
                p.normal_(std=p[0].numel() ** -0.5, generator=generator)
        yield bool(zero)
    finally:
        with torch.no_grad():
            for p in zero:
                p.zero_()


def noise(model: GPT, *shape: int, seed: int = 0) -> Tensor:
    """Return normal noise in the model's dtype of activations, on its device."""
    generator = torch.Generator(model.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=model.device).to(model.activation_dtype)


def require_same(
    layer: str, fast: Sequence[Tensor], plain: Sequence[Tensor], bound: float, version: str, way_out: str
) -> None:
    """Raise ValueError, naming the layer, the error and the way out, if two results differ beyond bound."""
    error = max(_relative_error(f, p) for f, p in zip(fast, plain, strict=True))
    if not error <= bound:  # NaN is a difference, too
        raise ValueError(
            f"{layer}: {version} and the plain layer differ by {100 * error:.1f} %, and rounding explains "
            f"{100 * bound:.1f} % at most: change the layer in every place that computes it (CONTRIBUTING.md "
            f"lists them), or {way_out}"
        )


def check_ops(model: GPT, ops: Ops, bound: float) -> None:
    """Compare the functions `ops` with the plain ones: values and all gradients of every layer and the loss.

    Raise ValueError for the first that differs by more than the relative error `bound`.
    """
    c = model.config
    T = min(TOKENS, c.sequence_len)
    tables = rotary_tables(c.sequence_len, c.head_dim, model.device)
    rotary = tuple(table[:T] for table in tables)
    h, dy = norm(noise(model, 1, T, c.n_embd)), noise(model, 1, T, c.n_embd, seed=1)
    values = noise(model, 1, T, c.n_kv_head * c.head_dim, seed=2)
    compare = _Comparison(ops, bound)
    with noise_for_zeros(model), torch.enable_grad(), sdpa_kernel(ANY_LENGTH):
        links = model.links(norm(noise(model, 1, T, c.n_embd, seed=3)), [None] * c.n_layer)[1:]
        for i, (block, kind, link) in enumerate(zip(model.blocks, c.layer_kinds, links, strict=True)):
            compare(f"layer {i} ({kind})", _mixer(block, rotary, values), h, dy, block.attn.parameters())
            mlp = [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
            compare(f"layer {i} (MLP)", lambda o, h, b=block: b.mlp(h, o.mlp), h, dy, mlp)
            taps, scales = [] if link.conv is None else [link.conv], link.mix[:2] if link.mix else ()
            dy2 = torch.cat([dy, h], -1)
            compare(f"layer {i} (join to the next)", _join(link, dy), h, dy2, [*taps, *scales])
        if c.x0_mix:
            compare("the embedding in every layer", _mixes(model, dy), h, torch.cat([dy, h], -1), [])
        if c.value_embeds:  # two tables in place of the model's, which take too much memory in float64
            ids = torch.arange(T, device=model.device)[None] // 2
            compare("value embeddings", lambda o, h: _cat(o.look_up_values(ids, h[0], 2, h.dtype)), h, dy, [])
        targets = (torch.arange(T, device=model.device) * 7 % c.vocab_size)[None]
        one = torch.ones((), device=model.device)
        weight = model.lm_head.weight
        compare("the loss", lambda o, h: o.loss(h, weight, targets, "mean"), h, one, [weight])


def _mixer(block: Block, rotary: tuple[Tensor, ...], values: Tensor) -> Callable[[Ops, Tensor], Tensor]:
    if block.is_attention:
        return lambda ops, h: block.attn(
            h, *rotary, values, inputs=ops.attention_inputs, conv=ops.residual_conv
        )
    return lambda ops, h: block.attn(h, mix=ops.slc2_mix)


def _join(link: Link, delta: Tensor) -> Callable[[Ops, Tensor], Tensor]:
    return lambda ops, h: _cat(ops.join(h, delta, link))


def _mixes(model: GPT, x: Tensor) -> Callable[[Ops, Tensor], Tensor]:
    def mixes(ops: Ops, x0: Tensor) -> Tensor:
        links = model.links(x0, [None] * model.config.n_layer, ops)[:-1]
        return torch.stack([_cat(ops.join(x, x, link)) for link in links]).sum(0)

    return mixes


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), -1)


class _Comparison:
    def __init__(self, ops: Ops, bound: float):
        self.ops, self.bound = ops, bound

    def __call__(
        self,
        layer: str,
        function: Callable[[Ops, Tensor], Tensor],
        h: Tensor,
        dy: Tensor,
        weights: Iterable[Tensor],
    ) -> None:
        weights = list(weights)

        def value_and_gradients(ops: Ops) -> list[Tensor]:
            x = h.detach().clone().requires_grad_()
            y = function(ops, x)
            return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy.to(y.dtype))]

        fast, plain = value_and_gradients(self.ops), value_and_gradients(PLAIN)
        require_same(layer, fast, plain, self.bound, "the training kernels", "train with --fused=False")


def _relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()
