"""The shape of the model, under the names of the published meta_*.json files."""

from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any

HEAD_DIM = 128
GATE_INPUTS = 12  # channels that the gate of value embeddings reads
N_PUBLISHED = 8  # fields of GPTConfig that published files have


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model: widths, counts and the plan of its layers."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 16
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    n_kernel: int = 3  # taps of the convolution in SLC2 layers
    slc_rate: int = 3  # layer i is attention if i % slc_rate == 1 or i is last, else SLC2; 0: all attention
    # The second generation. Published models have none of these, and their files do not name them.
    residual_conv: int = 0  # taps of the convolutions added to k, attention's output and the MLP's; 0: none
    value_embeds: bool = False  # tables of values by token, added to the values of attention layers
    x0_mix: bool = False  # each layer scales the residual stream and adds the embedding to it
    score_scale: float = 1.0  # factor on attention's scores

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.slc_rate < 0:
            raise ValueError(f"slc_rate={self.slc_rate} must be 0 (all attention) or more")
        if self.residual_conv < 0:
            raise ValueError(f"residual_conv={self.residual_conv} must be 0 (none) or a number of taps")
        if self.value_embeds and self.n_embd < GATE_INPUTS:
            raise ValueError(f"value_embeds needs n_embd={self.n_embd} to be at least {GATE_INPUTS}")
        if not 0 < self.score_scale < inf:
            raise ValueError(f"score_scale={self.score_scale} must be above 0, and finite")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd={self.n_embd} must be an even multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")

    @classmethod
    def from_depth(cls, depth: int, **changes: Any) -> "GPTConfig":
        """Return the shape of a depth: width 64 * depth, rounded up to whole heads of 128."""
        n_head = -(-64 * depth // HEAD_DIM)
        shape = {"n_layer": depth, "n_head": n_head, "n_kv_head": n_head, "n_embd": n_head * HEAD_DIM}
        return cls(**{"sequence_len": 2048, **shape, **changes})

    @property
    def head_dim(self) -> int:
        """Size of one head, both of attention queries and of SLC2's shared A."""
        return self.n_embd // self.n_head

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The layer plan: "attention" or "slc2" for each layer."""

        def is_attention(i: int) -> bool:
            return self.slc_rate == 0 or i % self.slc_rate == 1 or i == self.n_layer - 1

        return tuple("attention" if is_attention(i) else "slc2" for i in range(self.n_layer))

    def to_meta(self) -> dict[str, Any]:
        """Return the fields for a meta or config file; of the second generation's, those that are used."""
        defaults = {field.name: field.default for field in fields(self)[N_PUBLISHED:]}
        return {name: value for name, value in asdict(self).items() if value != defaults.get(name)}
