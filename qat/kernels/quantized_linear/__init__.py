"""y = x @ dequantize(W)^T + b for packed weights: tile order, decoding, kernels for few and for many tokens."""
