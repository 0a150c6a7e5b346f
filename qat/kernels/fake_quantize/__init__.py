"""Quantize, dequantize and fake-quantize."""
