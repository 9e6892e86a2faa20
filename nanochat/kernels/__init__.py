"""Triton kernels, one op a file, its plain PyTorch reference beside it; imported on NVIDIA GPUs only."""
