"""Numerics: formats, granularities and quantized tensors; tensors only, no layers."""
