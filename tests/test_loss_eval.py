import math

import pytest
import torch

from nanochat.loss_eval import evaluate_bpb
from scripts import base_loss
from tests.helpers.models import random_model, small_config


def test_bpb_is_nats_per_byte_without_special_tokens_and_ignored_targets():
    torch.manual_seed(0)
    model = random_model(small_config())
    token_bytes = torch.arange(50) % 5
    token_bytes[41:] = 0  # special tokens
    batches = []
    nats, n_bytes = 0.0, 0
    for _ in range(3):
        idx = torch.randint(0, 50, (2, 9))
        inputs, targets = idx[:, :-1], idx[:, 1:].clone()
        targets[1, -2:] = -1
        batches.append((inputs, targets, {}))
        log_probs = model(inputs).double().log_softmax(-1)
        for b in range(2):
            for t in range(8):
                target = targets[b, t].item()
                if target >= 0 and token_bytes[target] > 0:
                    nats -= log_probs[b, t, target].item()
                    n_bytes += token_bytes[target].item()
    expected = nats / math.log(2) / n_bytes
    assert evaluate_bpb(model, batches, None, token_bytes) == pytest.approx(expected, rel=1e-5)
    first = evaluate_bpb(model, batches[:1], None, token_bytes)
    assert evaluate_bpb(model, iter(batches), 1, token_bytes) == pytest.approx(first)
    assert first != pytest.approx(expected)


def test_nothing_to_evaluate_is_an_error():
    model, idx = random_model(small_config()), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="no text to evaluate"):
        evaluate_bpb(model, [(idx, torch.full_like(idx, -1))], None, torch.ones(50, dtype=torch.long))


@pytest.mark.parametrize("flag", ["split_tokens=0", "device_batch_size=0"])
def test_invalid_settings_of_base_loss(flag):
    with pytest.raises(ValueError, match=f"{flag} must be at least 1"):
        base_loss.main([f"--{flag}"])
