"""Small models without zero weights: the zeros of init_weights would hide errors."""

import torch

from nanochat.gpt import GPT, GPTConfig


def small_config(**changes) -> GPTConfig:
    shape = {"sequence_len": 32, "vocab_size": 50, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 24}
    return GPTConfig(**{**shape, **changes})


# what the second generation has and a published model has not
SECOND = {"residual_conv": 3, "value_embeds": True, "x0_mix": True, "score_scale": 1.44}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Return a model with normal weights, scaled to keep activations near one."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model
