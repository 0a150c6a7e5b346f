"""The layout of compressed-tensors checkpoints, which llm-compressor writes and vLLM, SGLang and transformers read."""

from qat.export.layouts.compressed_tensors.layout import CompressedTensors

__all__ = ["CompressedTensors"]
