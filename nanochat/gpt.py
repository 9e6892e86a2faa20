"""The Saint Iberis GPT: one residual stream, two kinds of mixer.

    r = rms_norm(wte[idx])
    block:  r += mixer(rms_norm(r));  r += Wproj( relu(Wfc rms_norm(r))^2 )
    logits = 15 * tanh(lm_head(rms_norm(r)) / 15)        in float32; untied, no biases, no norm weights

Layer i is attention (nanochat/attention.py) iff i % slc_rate == 1 or it is the last, every other one is SLC2
(nanochat/slc2.py); slc_rate=0 makes every layer attention. ReLU^2: Primer (So et al. 2021); logit soft-cap:
Gemma 2 (2024). The second generation has more, each part by a field of GPTConfig:

    x0_mix          before layer i, r = resid_i r + x0_i wte_0, where wte_0 = rms_norm(wte[idx])
    residual_conv   m += conv(m) for the MLP's output m, likewise for keys and output of attention
    value_embeds    values of attention layers += a gated table of values by token

Precision is explicit: parameters are float32, activations bfloat16 on CUDA and float32 elsewhere, logits and
loss float32. State dict keys are the published ones. `__init__` gives shapes (and torch's default values),
`init_weights()` the values to train from.

Letters: B batch, T time, E n_embd, H heads, D head_dim, V vocabulary, K n_kernel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from nanochat.attention import CausalSelfAttention, rotary_tables
from nanochat.cache import HybridCache, LayerState, Span
from nanochat.config import GPTConfig
from nanochat.layers import Linear, ShortConv
from nanochat.ops import PLAIN, Link, Ops, head_logits, relu2_mlp
from nanochat.sampling import SamplingParams, penalize_repetition, sample
from nanochat.slc2 import SLC2

# Attention kernels for any length. cuDNN's is the fastest in training, but plans a kernel for each new length
# (0.09 s on an H100, dev/LOG.md); all but training on full rows would pay that at nearly every call.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# the last 9 ids are the special tokens; these two end a document and an answer (nanochat/tokenizer.py)
BOS_FROM_END, ASSISTANT_END_FROM_END = 9, 5


class MLP(nn.Module):
    """Two linear layers with relu^2 between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        # applied by the join to the next layer, which reads the output anyway
        self.conv = ShortConv(config.n_embd, config.residual_conv) if config.residual_conv else None

    def forward(self, h: Tensor, mlp: Callable[[Tensor, Tensor, Tensor], Tensor] = relu2_mlp) -> Tensor:
        """Map h (B,T,E) to (B,T,E); mlp computes what `relu2_mlp` does."""
        return mlp(h, self.c_fc.weight, self.c_proj.weight)


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
        link: Link,
        rotary: tuple[Tensor, Tensor],
        value_embeds: Tensor | None = None,
        state: LayerState | None = None,
        span: Span | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map the residual stream, in parts x and delta (B,T,E) and link, to the next x and delta.

        Stream and MLP's output stay apart: the next block joins them, which saves a pass over memory, because
        each block is compiled on its own. The decode state is updated in place.
        """
        ops = self.ops if state is None else PLAIN
        x, h = ops.join(x, delta, link)
        if self.is_attention:
            inner = (ops.attention_inputs, ops.residual_conv)
            x = x + self.attn(h, *rotary, value_embeds, state, span, *inner)
        else:
            x = x + self.attn(h, state and state.window("u"), ops.slc2_mix)
        return x, self.mlp(ops.norm(x), ops.mlp)


class Transformer(nn.Module):
    """The token embedding and the layers, under their published keys."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        n_attention, width = config.layer_kinds.count("attention"), config.n_kv_head * config.head_dim
        # the tables of all attention layers side by side: one look-up, one gradient
        self.value_embeds = (
            nn.Embedding(config.vocab_size, n_attention * width) if config.value_embeds else None
        )
        n_scales = config.n_layer if config.x0_mix else 0
        self.resid_scales = nn.Parameter(torch.empty(n_scales)) if n_scales else None
        self.x0_scales = nn.Parameter(torch.empty(n_scales)) if n_scales else None
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
        """Initialise every parameter; lm_head, each c_proj and each residual_conv start at zero."""
        c = self.config
        for name, parameter in self.named_parameters():
            if name == "transformer.wte.weight":
                nn.init.normal_(parameter)
            elif name == "transformer.value_embeds.weight":
                nn.init.uniform_(parameter, -(c.n_embd**-0.5), c.n_embd**-0.5)
            elif name == "transformer.resid_scales":
                parameter.copy_(torch.linspace(1.15, 1.05, c.n_layer))
            elif name == "transformer.x0_scales":
                parameter.copy_(torch.linspace(0.20, 0.05, c.n_layer))
            elif name.endswith("conv1d.weight"):  # (E,1,K)
                nn.init.uniform_(parameter, -(c.n_kernel**-0.5), c.n_kernel**-0.5)
            elif name.endswith(("lm_head.weight", "c_proj.weight", "conv.weight")):
                nn.init.zeros_(parameter)
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
        """Compile each block and what is outside of them for fixed shapes: few graphs at any depth."""
        for block in self.blocks:
            block.compile(dynamic=False)
        plain = [n for n in ("look_up_values", "loss") if getattr(self.ops, n) is getattr(PLAIN, n)]
        names = ("embed", "join", *plain)  # the kernels of these two need nothing around them
        compiled = {name: torch.compile(getattr(self.ops, name), dynamic=False) for name in names}
        self.ops = replace(self.ops, **compiled)

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.lm_head.weight.device

    def get_device(self) -> torch.device:
        """Return `device`, under nanochat's name."""
        return self.device

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
        x = ops.embed(idx, self.transformer.wte.weight, self.activation_dtype)
        delta = torch.zeros_like(x)
        states = [None] * len(self.blocks) if cache is None else cache.layers
        *links, last = self.links(x, states, ops)
        rotary, values = self._rotary(idx.size(1), span), self.value_embeds(idx, ops)
        call = self._block_call(cache is not None)
        with self._attention_kernels(idx.size(1), cache is not None):
            for block, link, embeds, state in zip(self.blocks, links, values, states, strict=True):
                x, delta = call(block, x, delta, link, rotary, embeds, state, span)
        if cache is not None and span is not None:
            cache.advance(span)
        return ops.join(x, delta, last)[1]

    def links(self, x0: Tensor, states: Sequence[LayerState | None], ops: Ops = PLAIN) -> list[Link]:
        """Return what joins each layer, and finally the head, to the layer before."""
        links = [Link()]
        for block, state in zip(self.blocks, states, strict=True):
            conv = block.mlp.conv
            links.append(Link(conv and conv.weight, state and state.window("mlp")))
        resid, embedding = self.transformer.resid_scales, self.transformer.x0_scales
        if resid is None or embedding is None:
            return links
        *links, last = links
        mixes = zip(resid.split(1), embedding.split(1), ops.share(x0, resid, embedding), strict=True)
        return [*(link._replace(mix=mix) for link, mix in zip(links, mixes, strict=True)), last]

    def value_embeds(self, idx: Tensor, ops: Ops) -> list[Tensor | None]:
        """Return the value embeddings (B,T,H_kv*D) of each layer, None where it has none."""
        table, kinds = self.transformer.value_embeds, self.config.layer_kinds
        if table is None:
            return [None] * len(kinds)
        n = kinds.count("attention")
        parts = iter(ops.look_up_values(idx, table.weight, n, self.activation_dtype))
        return [next(parts) if kind == "attention" else None for kind in kinds]

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
        """Return the number of parameters of each kind that the model has, and in total."""
        wte, lm_head = self.transformer.wte.weight.numel(), self.lm_head.weight.numel()
        counts = {"wte": wte, "lm_head": lm_head, "attention": 0, "slc2": 0, "mlp": 0}
        if (tables := self.transformer.value_embeds) is not None:
            counts["value_embeds"] = tables.weight.numel()
        if self.config.x0_mix:
            counts["scales"] = 2 * self.config.n_layer
        for block, kind in zip(self.blocks, self.config.layer_kinds, strict=True):
            counts[kind] += sum(p.numel() for p in block.attn.parameters())
            counts["mlp"] += sum(p.numel() for p in block.mlp.parameters())
        return {**counts, "total": sum(counts.values())}

    def num_scaling_parameters(self) -> int:
        """Return the number of parameters from which the length of training follows.

        Value embeddings are not counted: a token reads one row of their tables.
        """
        counts = self.num_parameters()
        return counts["total"] - counts.get("value_embeds", 0)

    def flops_per_token(self) -> int:
        """Return training FLOPs a token: 6 a weight of matrices and taps, and 12*E*T an attention layer.

        Looking rows of tables up takes none.

        The attention term counts the full T x T square, as PaLM (Chowdhery et al. 2022, appendix B) does.
        """
        c = self.config
        weights = self.num_scaling_parameters() - self.transformer.wte.weight.numel()
        return 6 * weights + 12 * c.n_embd * c.sequence_len * c.layer_kinds.count("attention")

    def estimate_flops(self) -> int:
        """Return `flops_per_token`, under nanochat's name."""
        return self.flops_per_token()
