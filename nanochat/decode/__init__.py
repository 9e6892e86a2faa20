"""Decoding many sequences at once, for engine and server."""

from typing import Literal

# which decoder to take: the fastest for model and device, or PyTorch alone
DecoderKind = Literal["best", "plain"]
