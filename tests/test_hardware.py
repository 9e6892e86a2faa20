"""Peak performance by the names that GPUs report."""

import pytest
import torch

from nanochat.hardware import PEAK_FLOPS, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),  # was mistaken for an L4
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4080 SUPER", 104e12),
        ("NVIDIA GeForce RTX 4070", 58e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # a smaller GPU
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_no_name_hides_a_longer_one():
    """The first match counts, so a name must not come before a longer one that contains it."""
    names = list(PEAK_FLOPS)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]
