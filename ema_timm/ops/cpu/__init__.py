"""The closed form on the CPU: the C kernel, and PyTorch operators where it is missing."""
