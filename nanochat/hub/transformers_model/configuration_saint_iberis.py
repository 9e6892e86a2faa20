"""Configuration of a Saint Iberis model for Transformers, with the field names of its checkpoints."""

from transformers import PretrainedConfig


class SaintIberisConfig(PretrainedConfig):
    """The fields of nanochat's GPTConfig, with the names usual in transformers (`hidden_size`) as aliases."""

    model_type = "saint_iberis"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    attribute_map = {  # noqa: RUF012  a class attribute in transformers, too
        "max_position_embeddings": "sequence_len",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
    }

    def __init__(
        self,
        sequence_len: int = 1024,
        vocab_size: int = 50304,
        n_layer: int = 16,
        n_head: int = 6,
        n_kv_head: int = 6,
        n_embd: int = 768,
        n_kernel: int = 3,  # width of the convolution in SLC2 layers
        slc_rate: int = 3,  # layer i is attention iff i % slc_rate == 1 or it is the last; 0: all layers
        residual_conv: int = 0,  # taps of the convolutions added to k, attention's output and the MLP's
        value_embeds: bool = False,  # tables of values by token, added to the values of attention layers
        x0_mix: bool = False,  # each layer scales the residual stream and adds the embedding to it
        score_scale: float = 1.0,  # factor on attention's scores
        **kwargs,
    ):
        self.sequence_len = sequence_len
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.n_embd = n_embd
        self.n_kernel = n_kernel
        self.slc_rate = slc_rate
        self.residual_conv = residual_conv
        self.value_embeds = value_embeds
        self.x0_mix = x0_mix
        self.score_scale = score_scale
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    def is_attention(self, layer: int) -> bool:
        """True if a layer is attention; all others are SLC2."""
        return self.slc_rate == 0 or layer % self.slc_rate == 1 or layer == self.n_layer - 1
