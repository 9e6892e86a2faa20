"""Saint Iberis for Transformers: a language model of gated short convolutions (SLC2) and attention.

    r = rms_norm(wte[idx])
    block:  r += mixer(rms_norm(r));  r += Wproj( relu(Wfc rms_norm(r))^2 )
    logits = 15 * tanh(lm_head(rms_norm(r)) / 15)        in float32; untied, no biases, no norm weights

Layer i is attention iff i % slc_rate == 1 or it is the last; all others are SLC2. Models of the second
generation have more, each part by a field of the config:

    x0_mix          before layer i, r = resid_i r + x0_i r0, where r0 = rms_norm(wte[idx])
    residual_conv   m += conv(m) for the MLP's output m, likewise for keys and output of attention
    value_embeds    values of attention layers += a gated table of values by token
    score_scale     a factor on attention's scores

This file and the two beside it belong to an exported model and need torch and transformers only. The weights
have the names of nanochat's checkpoints.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Pad rows of different lengths on the left to generate, on either side to train, with an attention_mask that is
0 at padding. Attention and convolution ignore padding, and positions count real tokens only.

Shapes: B batch, T new tokens, S all tokens (cached and new), E n_embd, H heads, D head size, K taps,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_saint_iberis import SaintIberisCache, SaintIberisConv, at_least_float32
from .configuration_saint_iberis import SaintIberisConfig

SOFTCAP = 15.0
NORM_EPS = 2.0**-23  # float32's epsilon, for activations of every dtype
GATE_INPUTS = 12  # channels of h that the gate of value embeddings reads


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin (B,T,1,D/2) bfloat16 of the rotary angles at positions (B,T), base 10000."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * 10000.0**-exponents
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to x (B,T,H,D); coordinate i is paired with i + D/2."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def visible_tokens(attention_mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
    """Return the attention mask of the last T of S tokens, (B or 1, 1, T, S) bool; True: may attend.

    Return None if SDPA needs no mask: is_causal covers T = S, and a single token attends to all.
    """
    if attention_mask is None and T in (1, S):
        return None
    keys = torch.arange(S, device=device)
    queries = keys[S - T :, None]
    visible = (keys <= queries)[None, None]
    if attention_mask is not None:
        # padding attends to itself: softmax over an empty row is NaN, and 0 * NaN would spread it
        visible = visible & attention_mask[:, None, None].bool() | (keys == queries)
    return visible


class SaintIberisAttention(nn.Module):
    """Causal attention with rotary positions, normalized queries and keys, and optional grouped queries."""

    def __init__(self, config: SaintIberisConfig, layer: int):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.is_grouped = config.n_kv_head != config.n_head
        self.scale = None if config.score_scale == 1 else config.score_scale * self.head_dim**-0.5
        self.cache_index = sum(map(config.is_attention, range(layer)))
        width, taps = config.n_kv_head * self.head_dim, config.residual_conv
        self.c_q = nn.Linear(config.n_embd, config.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, width, bias=False)
        self.c_v = nn.Linear(config.n_embd, width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_conv = SaintIberisConv(width, taps, layer, "k") if taps else None
        self.y_conv = SaintIberisConv(config.n_embd, taps, layer, "y") if taps else None
        self.value_gate = (
            nn.Linear(GATE_INPUTS, config.n_kv_head, bias=False) if config.value_embeds else None
        )

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        values: Tensor | None,
        visible: Tensor | None,
        is_token: Tensor | None,
        cache: SaintIberisCache | None,
    ) -> Tensor:
        """Map h (B,T,E) to (B,T,E); values (B,T,n_kv_head*D), of the tokens, if the layer has a gate."""
        B, T, _ = h.shape
        q, k, v = self.c_q(h), self.c_k(h), self.c_v(h)
        if self.k_conv is not None:
            k = self.k_conv(k, is_token, cache)
        q, k, v = (x.view(B, T, -1, self.head_dim) for x in (q, k, v))
        if self.value_gate is not None:
            gate = 2 * torch.sigmoid(self.value_gate(h[..., :GATE_INPUTS]))
            v = v + gate.unsqueeze(-1) * values.view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.cache_index)
        is_causal = visible is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, scale=self.scale, enable_gqa=self.is_grouped
        )
        y = y.transpose(1, 2).reshape(B, T, -1)
        if self.y_conv is not None:
            y = self.y_conv(y, is_token, cache)
        return self.c_proj(y)


class SaintIberisSLC2(nn.Module):
    """The gated short causal convolution (Rikka Botan, "Saint Iberis", 2025).

    x, al, a, b = h Wx^T, h Wal^T, h Wa^T, h Wb^T         (B,T,E) (B,T,H) (B,T,D) (B,T,E)
    u = silu(silu(al) outer a) * x
    z[t] = sum_w conv[w] u[t-(K-1)+w];  y = (b * silu(z)) Wc^T
    """

    def __init__(self, config: SaintIberisConfig, layer: int):
        super().__init__()
        E, H = config.n_embd, config.n_head
        self.x_proj = nn.Linear(E, E, bias=False)
        self.alpha_proj = nn.Linear(E, H, bias=False)
        self.A_proj = nn.Linear(E, E // H, bias=False)
        self.B_proj = nn.Linear(E, E, bias=False)
        self.conv1d = SaintIberisConv(E, config.n_kernel, layer, "u", is_residual=False)
        self.c_proj = nn.Linear(E, E, bias=False)

    def forward(self, h: Tensor, is_token: Tensor | None, cache: SaintIberisCache | None) -> Tensor:
        """Map h (B,T,E) to (B,T,E); the convolution reads zeros where is_token (B,T,1) is 0."""
        outer = F.silu(self.alpha_proj(h)).unsqueeze(-1) * self.A_proj(h).unsqueeze(-2)  # (B,T,H,D)
        u = F.silu(outer).flatten(-2) * self.x_proj(h)
        return self.c_proj(self.B_proj(h) * F.silu(self.conv1d(u, is_token, cache)))


class SaintIberisMLP(nn.Module):
    """Two linear layers with relu^2 in between, and in the second generation a convolution after them."""

    def __init__(self, config: SaintIberisConfig, layer: int):
        super().__init__()
        E, taps = config.n_embd, config.residual_conv
        self.c_fc = nn.Linear(E, 4 * E, bias=False)
        self.c_proj = nn.Linear(4 * E, E, bias=False)
        self.conv = SaintIberisConv(E, taps, layer, "mlp") if taps else None

    def forward(self, h: Tensor, is_token: Tensor | None, cache: SaintIberisCache | None) -> Tensor:
        """Map h (B,T,E) to (B,T,E)."""
        m = self.c_proj(F.relu(self.c_fc(h)).square())
        return m if self.conv is None else self.conv(m, is_token, cache)


class SaintIberisBlock(GradientCheckpointingLayer):
    """A layer: a mixer (attention or SLC2, both named `attn` in checkpoints) and an MLP, with residuals."""

    def __init__(self, config: SaintIberisConfig, layer: int):
        super().__init__()
        self.is_attention = config.is_attention(layer)
        self.attn = (SaintIberisAttention if self.is_attention else SaintIberisSLC2)(config, layer)
        self.mlp = SaintIberisMLP(config, layer)

    def forward(
        self,
        x: Tensor,
        x0: Tensor | None,
        scales: Tensor | None,
        values: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        is_token: Tensor | None,
        cache: SaintIberisCache | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer, given x (B,T,E).

        x0 (B,T,E), scales (2,): see x0_mix; values: see SaintIberisAttention. Only the cache may be passed by
        name: reentrant checkpointing drops the gradients of other arguments that are.
        """
        if scales is not None:
            resid_scale, x0_scale = at_least_float32(scales).split(1)
            x = (resid_scale * x + x0_scale * x0).to(x.dtype)
        h = norm(x)
        if self.is_attention:
            x = x + self.attn(h, cos, sin, values, visible, is_token, cache)
        else:
            x = x + self.attn(h, is_token, cache)
        return x + self.mlp(norm(x), is_token, cache)


class SaintIberisPreTrainedModel(PreTrainedModel):
    """Properties of these models that transformers reads."""

    config_class = SaintIberisConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SaintIberisBlock",)
    _supports_sdpa = True
    _input_embed_layer = "wte"

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model creates a SaintIberisCache

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # the parts that change the residual stream start without effect
        if isinstance(module, SaintIberisConv) and module.is_residual:
            nn.init.zeros_(module.weight)
        elif isinstance(module, SaintIberisModel) and self.config.x0_mix:
            nn.init.ones_(module.resid_scales)
            nn.init.zeros_(module.x0_scales)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the embedding and the tables of values, in which new tokens have zeros."""
        wte, tables = super().resize_token_embeddings(*args, **kwargs), self.base_model.value_embeds
        if tables is not None:
            more = wte.num_embeddings - tables.num_embeddings
            weight = F.pad(tables.weight.detach(), (0, 0, 0, more))
            tables.weight = nn.Parameter(weight, tables.weight.requires_grad)
            tables.num_embeddings += more
        return wte


class SaintIberisModel(SaintIberisPreTrainedModel):
    """The model without its output head."""

    def __init__(self, config: SaintIberisConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        kinds = [config.is_attention(layer) for layer in range(config.n_layer)]
        width = sum(kinds) * config.n_kv_head * (config.n_embd // config.n_head)
        self.value_embeds = nn.Embedding(config.vocab_size, width) if config.value_embeds else None
        self.resid_scales = nn.Parameter(torch.empty(config.n_layer)) if config.x0_mix else None
        self.x0_scales = nn.Parameter(torch.empty(config.n_layer)) if config.x0_mix else None
        self.h = nn.ModuleList(SaintIberisBlock(config, layer) for layer in range(config.n_layer))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SaintIberisCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: SaintIberisCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states (B,T,E) of input_ids (B,T), which follow the tokens in the cache.

        attention_mask (B,S) is 1 at tokens and 0 at padding, cached tokens included. past_key_values is the
        name of `cache` in older versions of transformers. use_cache: whether to return a cache; default: not
        in training. Raise ValueError for shapes that do not match and for options that are not supported.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if output_attentions or self.config.output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: attention weights are not materialized"
            )
        if self.value_embeds is not None and input_ids is None:
            raise ValueError(
                f"inputs_embeds of shape {tuple(inputs_embeds.shape)} came without token ids, but attention "
                "layers look values up by them (value_embeds=True): pass input_ids instead"
            )
        cache = self.open_cache(past_key_values if cache is None else cache, use_cache)
        x = norm(self.wte(input_ids) if inputs_embeds is None else inputs_embeds)
        x0 = x if self.config.x0_mix else None
        T = x.size(1)
        S = T if cache is None else cache.get_seq_length() + T
        attention_mask = _checked_mask(attention_mask, x.size(0), S)
        if position_ids is None:
            mask = torch.ones(1, S, device=x.device) if attention_mask is None else attention_mask
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, S - T :]
        cos, sin = rotary_angles(position_ids, self.config.n_embd // self.config.n_head)
        visible = visible_tokens(attention_mask, T, S, x.device)
        is_token = None if attention_mask is None else attention_mask[:, S - T :, None].to(x.dtype)
        states = [x]
        layers = zip(self.h, self._scales(), self._values(input_ids, x.dtype), strict=True)
        for block, scales, values in layers:
            x = block(x, x0, scales, values, cos, sin, visible, is_token, cache=cache)
            if output_hidden_states:
                states.append(x)
        x = norm(x)
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        # positional: the second field is `cache`, or `past_key_values` in older versions
        return BaseModelOutputWithPast(x, cache, hidden_states)

    def _scales(self) -> list[Tensor | None]:
        """Return the scales (2,) of stream and embedding of each layer, None if there are none."""
        if self.resid_scales is None:
            return [None] * len(self.h)
        return list(torch.stack([self.resid_scales, self.x0_scales], dim=1))

    def _values(self, input_ids: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """Return the values (B,T,n_kv_head*D) of the tokens for each layer, None where there are none."""
        if self.value_embeds is None:
            return [None] * len(self.h)
        n_tables = sum(block.is_attention for block in self.h)
        tables = iter(self.value_embeds(input_ids).to(dtype).chunk(n_tables, dim=-1))
        return [next(tables) if block.is_attention else None for block in self.h]

    def open_cache(self, cache: SaintIberisCache | None, use_cache: bool | None) -> SaintIberisCache | None:
        """Return the given cache, a new one, or None if use_cache is False (default: in training)."""
        if cache is None:
            return SaintIberisCache() if (not self.training if use_cache is None else use_cache) else None
        if not isinstance(cache, SaintIberisCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}, not a SaintIberisCache; pass None to create one"
            )
        return cache


def _checked_mask(attention_mask: Tensor | None, B: int, S: int) -> Tensor | None:
    """Return the mask, or None if it masks nothing; raise ValueError unless its shape is (B,S)."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (B, S):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(B, S)}: "
            "one value for each token, cached tokens included"
        )
    return None if attention_mask.all() else attention_mask


class SaintIberisForCausalLM(SaintIberisPreTrainedModel, GenerationMixin):
    """The language model: SaintIberisModel and the output head."""

    def __init__(self, config: SaintIberisConfig):
        super().__init__(config)
        self.transformer = SaintIberisModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SaintIberisCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: SaintIberisCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits (B,T,V) float32 and, given labels, the loss.

        logits_to_keep: return logits of the last tokens only, or of these indices; 0: of all. labels (B,T):
        token ids, -100 is ignored; they are shifted here, and the loss is the mean in nats per token. For the
        other arguments see SaintIberisModel.forward.
        """
        cache = self.transformer.open_cache(past_key_values if cache is None else cache, use_cache)
        outputs = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache=cache is not None,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = SOFTCAP * torch.tanh(at_least_float32(self.lm_head(x[:, kept])) / SOFTCAP)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, cache, outputs.hidden_states)
