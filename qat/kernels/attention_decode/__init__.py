"""Attention of a few queries to the codes of a quantized KV cache."""
