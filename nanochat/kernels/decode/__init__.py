"""Triton kernels of the graph decoder."""
