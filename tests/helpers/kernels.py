"""Helpers shared by the kernel tests; the fixtures `device` and `dtype` are in conftest.py."""

import pytest
import torch


def on_gpu(*values):
    """Return a parametrize case that runs on a GPU only: the interpreter would take too long."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def error(value, reference):
    """Return the relative Frobenius error."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def poison(*shape, dtype, device):
    """Return a tensor of NaN: an unwritten result stays NaN, and padding that is read spreads NaN."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)
