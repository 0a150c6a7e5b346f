"""Products of quantized matrices, on tensor cores and in plain PyTorch."""
