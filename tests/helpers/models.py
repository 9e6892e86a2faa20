"""Small models without zero weights: the zeros of init_weights would hide errors."""

import torch

from nanochat.gpt import GPT, GPTConfig


def small_config(**changes) -> GPTConfig:
    shape = {"sequence_len": 32, "vocab_size": 50, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 24}
    return GPTConfig(**{**shape, **changes})


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Return a model with normal weights, scaled to keep activations near one."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[1] if parameter.ndim == 2 else parameter.shape[2]
            parameter.normal_(std=fan_in**-0.5)
    return model
