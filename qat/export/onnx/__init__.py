"""ONNX with QuantizeLinear and DequantizeLinear nodes: what TensorRT and ONNX Runtime read."""
