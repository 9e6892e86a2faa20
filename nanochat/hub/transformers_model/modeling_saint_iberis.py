"""Saint Iberis for Transformers: a language model of gated short convolutions (SLC2) and attention.

    r = rms_norm(wte[idx])
    block:  r += mixer(rms_norm(r));  r += Wproj( relu(Wfc rms_norm(r))^2 )
    logits = 15 * tanh(lm_head(rms_norm(r)) / 15)        in float32; untied, no biases, no norm weights

Layer i is attention iff i % slc_rate == 1 or it is the last; all others are SLC2. This file belongs to an
exported model and needs torch and transformers only. The weights have the names of nanochat's checkpoints.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Pad rows of different lengths on the left to generate, on either side to train, with an attention_mask that is
0 at padding. Attention and convolution ignore padding, and positions count real tokens only.

Shapes: B batch, T new tokens, S all tokens (cached and new), E n_embd, H heads, D head size, K n_kernel,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_saint_iberis import SaintIberisConfig

SOFTCAP = 15.0
NORM_EPS = 2.0**-23  # float32's epsilon, for activations of every dtype


class SaintIberisCache(DynamicCache):
    """The decode state of a batch: keys and values of attention layers, the last K-1 inputs of convolutions.

    DynamicCache holds the attention layers only, numbered in their order.
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.windows: dict[int, Tensor] = {}  # layer -> (B, K-1, E), oldest first

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.windows.clear()

    def crop(self, *args, **kwargs) -> None:
        """Raise ValueError: the convolution inputs before a window are not stored."""
        raise ValueError(
            "a SaintIberisCache cannot be cropped, so assisted generation is not available; use a new cache"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by rows beam_idx (B,), for beam search."""
        super().reorder_cache(beam_idx)
        self._map_windows(lambda window: window[beam_idx.to(window.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; the copies are adjacent."""
        super().batch_repeat_interleave(repeats)
        self._map_windows(lambda window: window.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_windows(lambda window: window[indices.to(window.device)])

    def _map_windows(self, function) -> None:
        self.windows = {layer: function(window) for layer, window in self.windows.items()}


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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

    def __init__(self, config: SaintIberisConfig, cache_index: int):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.is_grouped = config.n_kv_head != config.n_head
        self.cache_index = cache_index
        self.c_q = nn.Linear(config.n_embd, config.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None, cache: SaintIberisCache | None
    ) -> Tensor:
        """Map h (B,T,E) to (B,T,E)."""
        B, T, _ = h.shape
        q, k, v = (proj(h).view(B, T, -1, self.head_dim) for proj in (self.c_q, self.c_k, self.c_v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.cache_index)
        is_causal = visible is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, enable_gqa=self.is_grouped
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class SaintIberisSLC2(nn.Module):
    """The gated short causal convolution (Rikka Botan, "Saint Iberis", 2025).

    x, al, a, b = h Wx^T, h Wal^T, h Wa^T, h Wb^T         (B,T,E) (B,T,H) (B,T,D) (B,T,E)
    u = silu(silu(al) outer a) * x
    z[t] = sum_w conv[w] u[t-(K-1)+w];  y = (b * silu(z)) Wc^T
    """

    def __init__(self, config: SaintIberisConfig, layer: int):
        super().__init__()
        E, H, K = config.n_embd, config.n_head, config.n_kernel
        self.layer = layer
        self.x_proj = nn.Linear(E, E, bias=False)
        self.alpha_proj = nn.Linear(E, H, bias=False)
        self.A_proj = nn.Linear(E, E // H, bias=False)
        self.B_proj = nn.Linear(E, E, bias=False)
        self.conv1d = nn.Conv1d(E, E, K, groups=E, bias=False)
        self.c_proj = nn.Linear(E, E, bias=False)

    def forward(self, h: Tensor, is_token: Tensor | None, cache: SaintIberisCache | None) -> Tensor:
        """Map h (B,T,E) to (B,T,E); the convolution reads zeros where is_token (B,T,1) is 0."""
        T, K = h.size(1), self.conv1d.kernel_size[0]
        outer = F.silu(self.alpha_proj(h)).unsqueeze(-1) * self.A_proj(h).unsqueeze(-2)  # (B,T,H,D)
        u = F.silu(outer).flatten(-2) * self.x_proj(h)
        if is_token is not None:
            u = u * is_token
        window = None if cache is None else cache.windows.get(self.layer)
        past = F.pad(u, (0, 0, K - 1, 0)) if window is None else torch.cat([window, u], dim=1)
        if cache is not None:
            cache.windows[self.layer] = past[:, T:].clone()  # a view would keep `past` in memory
        weight = at_least_float32(self.conv1d.weight)
        z = sum(at_least_float32(past[:, w : w + T]) * weight[:, 0, w] for w in range(K)).to(u.dtype)
        return self.c_proj(self.B_proj(h) * F.silu(z))


class SaintIberisMLP(nn.Module):
    """Two linear layers with relu^2 in between."""

    def __init__(self, config: SaintIberisConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map h (B,T,E) to (B,T,E)."""
        return self.c_proj(F.relu(self.c_fc(h)).square())


class SaintIberisBlock(GradientCheckpointingLayer):
    """A layer: a mixer (attention or SLC2, both named `attn` in checkpoints) and an MLP, with residuals."""

    def __init__(self, config: SaintIberisConfig, layer: int):
        super().__init__()
        self.is_attention = config.is_attention(layer)
        if self.is_attention:
            self.attn = SaintIberisAttention(config, sum(map(config.is_attention, range(layer))))
        else:
            self.attn = SaintIberisSLC2(config, layer)
        self.mlp = SaintIberisMLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        is_token: Tensor | None,
        cache: SaintIberisCache | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer, given x (B,T,E)."""
        h = norm(x)
        if self.is_attention:
            x = x + self.attn(h, cos, sin, visible, cache)
        else:
            x = x + self.attn(h, is_token, cache)
        return x + self.mlp(norm(x))


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


class SaintIberisModel(SaintIberisPreTrainedModel):
    """The model without its output head."""

    def __init__(self, config: SaintIberisConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
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
        cache = self.open_cache(past_key_values if cache is None else cache, use_cache)
        x = norm(self.wte(input_ids) if inputs_embeds is None else inputs_embeds)
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
        for block in self.h:
            x = block(x, cos, sin, visible, is_token, cache=cache)
            if output_hidden_states:
                states.append(x)
        x = norm(x)
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        # positional: the second field is `cache`, or `past_key_values` in older versions
        return BaseModelOutputWithPast(x, cache, hidden_states)

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
