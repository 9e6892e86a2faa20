"""What the tests of all kernels share; their fixtures `device` and `dtype` are in conftest.py."""

import pytest
import torch


def on_gpu(*values):
    """A case that would take the interpreter too long."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def error(value, reference):
    """Relative Frobenius error."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def poison(*shape, dtype, device):
    """Memory that holds NaN: a result that is not written stays NaN, a padding that is read spreads it."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)
