"""EMA attention on a GPU: passes of PyTorch operators, and fused Triton kernels."""
