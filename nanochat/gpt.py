"""The Saint Iberis GPT: one residual stream, two kinds of mixer.

    r = rms_norm(wte[idx])
    block:  r += mixer(rms_norm(r));  r += Wproj( relu(Wfc rms_norm(r))^2 )
    logits = 15 * tanh(lm_head(rms_norm(r)) / 15)        in float32; untied, no biases, no norm weights

Layer i is attention iff i % slc_rate == 1 or it is the last, every other one is SLC2 (nanochat/slc2.py);
slc_rate=0 makes every layer attention. Attention: rotary positions (RoPE, Su et al. 2021), then rms_norm on q
and k, grouped key-value heads allowed. ReLU^2: Primer (So et al. 2021); logit soft-cap: Gemma 2 (2024).

Precision is explicit: parameters are float32, activations bfloat16 on CUDA and float32 elsewhere, logits and
loss float32. State dict keys are the published ones. `__init__` gives shapes (and torch's default values),
`init_weights()` the values to train from.

Letters: B batch, T time, E n_embd, H heads, D head_dim, V vocabulary, K n_kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nanochat.cache import ConvState, HybridCache, KVState, Span
from nanochat.config import GPTConfig
from nanochat.sampling import SamplingParams, penalize_repetition, sample
from nanochat.slc2 import SLC2, Linear, slc2_mix

SOFTCAP = 15.0
NORM_EPS = 2.0**-23  # float32's epsilon, for activations of every dtype
# Attention kernels for any length. cuDNN's is the fastest in training, but plans a kernel for each new length
# (0.09 s on an H100, dev/LOG.md); all but training on full rows would pay that at nearly every call.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# the last 9 ids are the special tokens; these two end a document and an answer (nanochat/tokenizer.py)
BOS_FROM_END, ASSISTANT_END_FROM_END = 9, 5


def norm(x: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


@lru_cache(maxsize=8)
def rotary_tables(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin (length, D/2) of RoPE angles with base 10000, rounded to bfloat16 as published."""
    with torch.inference_mode(False):  # the cached tables must serve training too
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        angles = torch.arange(length, device=device, dtype=torch.float32).outer(10000.0**-exponents)
        return angles.cos().bfloat16(), angles.sin().bfloat16()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B,T,H,D), its halves as coordinates, by the angles of cos, sin (T,D/2) or (B,T,D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def attention_inputs(attn: "CausalSelfAttention", h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Return q (B,H,T,D) and k (B,H_kv,T,D), rotated and normalised, and v (B,H_kv,T,D) of h (B,T,E)."""
    B, T, _ = h.shape
    q, k, v = (layer(h).view(B, T, -1, attn.head_dim) for layer in (attn.c_q, attn.c_k, attn.c_v))
    q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.n_head = config.n_head
        self.is_grouped = config.n_kv_head != config.n_head
        self.c_q = Linear(config.n_embd, config.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: KVState | None = None,
        span: Span | None = None,
        inputs: Callable[..., tuple[Tensor, ...]] = attention_inputs,
    ) -> Tensor:
        """Map h (B,T,E) to (B,T,E); with a state, attend also to the tokens that it holds.

        inputs computes queries, keys and values as `attention_inputs` does.
        """
        q, k, v = inputs(self, h, cos, sin)
        mask, is_causal = None, True
        if state is not None and span is not None:
            mask, is_causal = span.mask, span.is_causal
            past = state.append(k, v, span)
            k, v = (k, v) if is_causal else past
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=self.is_grouped
        )
        return self.c_proj(y.transpose(1, 2).reshape(h.shape))


def relu2_mlp(h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """Return relu(h Wfc^T)^2 Wproj^T (B,T,E) of h (B,T,E), Wfc (4E,E) and Wproj (E,4E), in h's dtype."""
    return F.linear(F.relu(F.linear(h, w_fc.to(h.dtype))).square(), w_proj.to(h.dtype))


class MLP(nn.Module):
    """Two linear layers with relu^2 between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, h: Tensor, mlp: Callable[[Tensor, Tensor, Tensor], Tensor] = relu2_mlp) -> Tensor:
        """Map h (B,T,E) to (B,T,E); mlp computes what `relu2_mlp` does."""
        return mlp(h, self.c_fc.weight, self.c_proj.weight)


def embed(idx: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the initial residual stream (B,T,E), in dtype, of token ids idx (B,T); weight (V,E)."""
    return norm(F.embedding(idx, weight).to(dtype))


def final_norm(x: Tensor, delta: Tensor) -> Tensor:
    """Return the input of the head for the residual stream x + delta (B,T,E)."""
    return norm(x + delta)


def head_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return soft-capped logits (..., V), float32 or wider, of the final hidden state x (..., E)."""
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Return the cross-entropy in nats of the logits of x (B,T,E) and targets (B,T), ignoring target -1.

    reduction: "none" gives (B*T,) with 0 at ignored targets; "sum"; "mean" over counted targets, 0 if none.
    """
    logits = head_logits(x, weight)
    count_all = "none" if reduction == "none" else "sum"
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=count_all)
    return loss / (targets != -1).sum().clamp(min=1) if reduction == "mean" else loss


@dataclass(frozen=True)
class Ops:
    """The functions that a forward without decode state is computed with.

    The defaults are the equations of this file and of slc2.py. nanochat/train/accelerate.py replaces them by
    kernels of the same signatures, or by compiled functions. Decoding always uses the defaults.
    """

    embed: Callable[..., Tensor] = embed
    norm: Callable[[Tensor], Tensor] = norm
    attention_inputs: Callable[..., tuple[Tensor, ...]] = attention_inputs
    slc2_mix: Callable[..., Tensor] = slc2_mix
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] = relu2_mlp
    final_norm: Callable[[Tensor, Tensor], Tensor] = final_norm
    loss: Callable[..., Tensor] = head_loss


PLAIN = Ops()


class Block(nn.Module):
    """One layer: a mixer (attention or SLC2, both under the key `attn`) and an MLP on the residual stream."""

    def __init__(self, config: GPTConfig, kind: str):
        super().__init__()
        self.is_attention = kind == "attention"
        self.attn = CausalSelfAttention(config) if self.is_attention else SLC2(config)
        self.mlp = MLP(config)
        self.ops = PLAIN

    def forward(
        self,
        x: Tensor,
        delta: Tensor,
        cos: Tensor,
        sin: Tensor,
        state: KVState | ConvState | None = None,
        span: Span | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map the residual stream x + delta (B,T,E) to the next; update the decode state in place.

        Return the stream and the MLP's output separately: the next block adds them, which saves a pass over
        memory, because each block is compiled on its own.
        """
        ops = self.ops if state is None else PLAIN
        x = x + delta
        if self.is_attention:
            x = x + self.attn(ops.norm(x), cos, sin, state, span, ops.attention_inputs)
        else:
            window = state.window if isinstance(state, ConvState) else None
            x = x + self.attn(ops.norm(x), window, ops.slc2_mix)
        return x, self.mlp(ops.norm(x), ops.mlp)


class Transformer(nn.Module):
    """The token embedding and the layers, under their published keys."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, kind) for kind in config.layer_kinds)


class GPT(nn.Module):
    """The model. Activations are computed in compute_dtype (None: bfloat16 on CUDA, float32 elsewhere)."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.ops = PLAIN
        self.checkpoints_activations = False  # keep each block's input alone and compute the rest twice

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter; lm_head and each c_proj start at zero."""
        for name, parameter in self.named_parameters():
            if name == "transformer.wte.weight":
                nn.init.normal_(parameter)
            elif name == "lm_head.weight" or name.endswith("c_proj.weight"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 3:  # conv1d.weight (E,1,K)
                bound = self.config.n_kernel**-0.5
                nn.init.uniform_(parameter, -bound, bound)
            else:
                fan_out, fan_in = parameter.shape
                nn.init.normal_(parameter, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))

    @property
    def blocks(self) -> list[Block]:
        """Return the layers in order."""
        return cast("list[Block]", list(self.transformer.h))

    def use(self, ops: Ops) -> None:
        """Compute every forward without decode state with these functions."""
        self.ops = ops
        for block in self.blocks:
            block.ops = ops

    def compile_blocks(self) -> None:
        """Compile each block, embedding, final norm and loss for fixed shapes: few graphs at any depth."""
        for block in self.blocks:
            block.compile(dynamic=False)
        names = ("embed", "final_norm") + (("loss",) if self.ops.loss is head_loss else ())
        compiled = {name: torch.compile(getattr(self.ops, name), dynamic=False) for name in names}
        self.use(replace(self.ops, **compiled))

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.lm_head.weight.device

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: HybridCache | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Return logits (B,T,V) float32 of token ids idx (B,T) int64, or the loss against targets: head_loss.

        With a cache, idx continues the cached sequences: a prefill, a chunk of one, or one token.
        Raise ValueError if the cache is too small or has another batch size.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return head_logits(x, self.lm_head.weight)
        return self.ops.loss(x, self.lm_head.weight, targets, loss_reduction)

    def next_logits(self, idx: Tensor, cache: HybridCache) -> Tensor:
        """Return logits (B,V) float32 of the token after idx (B,T), which continues the cached sequences."""
        return head_logits(self.hidden(idx, cache)[:, -1], self.lm_head.weight)

    def hidden(self, idx: Tensor, cache: HybridCache | None = None) -> Tensor:
        """Return the final normalised hidden state (B,T,E); see `forward`."""
        span = None if cache is None else cache.span(*idx.shape)
        ops = self.ops if cache is None else PLAIN  # decoding must not compile them for each length
        cos, sin = self._rotary(idx.size(1), span)
        x = ops.embed(idx, self.transformer.wte.weight, self.activation_dtype)
        delta = torch.zeros_like(x)
        states = [None] * len(self.blocks) if cache is None else cache.layers
        call = self._block_call(cache is not None)
        with self._attention_kernels(idx.size(1), cache is not None):
            for block, state in zip(self.blocks, states, strict=True):
                x, delta = call(block, x, delta, cos, sin, state, span)
        if cache is not None and span is not None:
            cache.advance(span)
        return ops.final_norm(x, delta)

    def _rotary(self, T: int, span: Span | None) -> tuple[Tensor, Tensor]:
        """Return cos and sin at the positions of T tokens: (T,D/2), or (B,T,D/2) if rows differ in length."""
        length = T if span is None else span.end
        length = -(-length // self.config.sequence_len) * self.config.sequence_len
        cos, sin = rotary_tables(length, self.config.head_dim, self.device)
        places = slice(T) if span is None else span.places
        return cos[places], sin[places]

    def _block_call(self, is_decoding: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        if is_decoding:
            return Block.forward  # not the compiled one: positions differ at every call
        if self.checkpoints_activations and torch.is_grad_enabled():
            return cast("Callable[..., tuple[Tensor, Tensor]]", partial(checkpoint, use_reentrant=False))
        return Block.__call__

    def _attention_kernels(self, T: int, is_decoding: bool) -> AbstractContextManager:
        """Leave the choice to PyTorch in training on full rows, and exclude cuDNN elsewhere."""
        # activations that the backward recomputes must come from the same kernel, outside of this context
        is_full = self.config.sequence_len == T or self.checkpoints_activations
        if self.training and is_full and not is_decoding:
            return nullcontext()
        return sdpa_kernel(ANY_LENGTH)

    def new_cache(self, batch_size: int, max_len: int) -> HybridCache:
        """Return an empty decode state for this model."""
        return HybridCache(self.config, batch_size, max_len, self.device, self.activation_dtype)

    @property
    def activation_dtype(self) -> torch.dtype:
        """Return the dtype of activations and decode state."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.bfloat16 if self.device.type == "cuda" else self.lm_head.weight.dtype

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continue one sequence input_ids (1,T): yield token ids, each from a forward of one token.

        Stop after max_new_tokens, or before a token that ends a document (<|bos|>) or an answer
        (<|assistant_end|>). The same seed gives the same tokens; None draws a fresh one.
        """
        if input_ids.ndim != 2 or input_ids.size(0) != 1 or input_ids.size(1) < 1:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (1, T) with T >= 1")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
        params = SamplingParams.from_flat(temperature, top_k, top_p, repetition_penalty)
        V = self.config.vocab_size
        stop_tokens = {V - BOS_FROM_END, V - ASSISTANT_END_FROM_END}
        generator = torch.Generator(self.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        seen = input_ids.to(self.device)
        cache = self.new_cache(1, seen.size(1) + max_new_tokens)
        idx = seen
        for _ in range(max_new_tokens):
            logits = self.next_logits(idx, cache)
            if params.repetition_penalty != 1:
                logits = penalize_repetition(logits, seen, params.repetition_penalty)
            idx = sample(logits, params, generator)
            token = int(idx)
            if token in stop_tokens:
                return
            yield token
            seen = torch.cat([seen, idx], dim=1)

    # -----------------------------------------------------------------------------------------------------
    # Accounting, by layer kind

    def num_parameters(self) -> dict[str, int]:
        """Return the number of parameters of wte, lm_head, attention, slc2, mlp and in total."""
        wte, lm_head = self.transformer.wte.weight.numel(), self.lm_head.weight.numel()
        counts = {"wte": wte, "lm_head": lm_head, "attention": 0, "slc2": 0, "mlp": 0}
        for block, kind in zip(self.blocks, self.config.layer_kinds, strict=True):
            counts[kind] += sum(p.numel() for p in block.attn.parameters())
            counts["mlp"] += sum(p.numel() for p in block.mlp.parameters())
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self) -> int:
        """Return training FLOPs a token: 6 a weight of matrices and taps, and 12*E*T an attention layer.

        The attention term counts the full T x T square, as PaLM (Chowdhery et al. 2022, appendix B) does.
        """
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.transformer.wte.weight.numel()
        return 6 * weights + 12 * c.n_embd * c.sequence_len * c.layer_kinds.count("attention")
