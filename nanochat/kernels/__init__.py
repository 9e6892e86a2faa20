"""Triton kernels: one op per file, with its plain PyTorch reference; imported on NVIDIA GPUs only."""
