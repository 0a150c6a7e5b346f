"""ONNX with QuantizeLinear and DequantizeLinear nodes: what TensorRT and ONNX Runtime read."""

# Of the folder that is written: the graph, and the numbers beside it.
MODEL, DATA = "model.onnx", "model.onnx.data"
