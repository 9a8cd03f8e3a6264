"""The closed form in fused Triton kernels. Importing this package imports no Triton."""
