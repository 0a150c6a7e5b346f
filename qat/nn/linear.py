"""Linear layers: a full-precision weight that is quantized as it is used, and a packed one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.kernels.linear import compute_dtype
from qat.kernels.quantized_linear.fallback import say_once
from qat.kernels.quantized_linear.ops import quantized_linear, takes
from qat.kernels.quantized_linear.reference import linear_by_rows
from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.packed import PackedTensor
from qat.nn.quantize_grad import quantize_grad
from qat.quantizers import NoQuantizer, Quantizer


class PackedLinear(PackedLayer):
    """y = output_quantizer(input_quantizer(x) @ dequantize(weight)^T + b), for inference.

    Computes in the dtype of x, or in autocast's; the same bits as the QuantLinear it came from wherever the matrix
    product is the same.
    """

    kind = "linear"
    weight: PackedTensor
    bias: Tensor | None

    def __init__(
        self, module: nn.Module, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weights["weight"].shape
        bias: Any = module.bias
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._adopt(weights, input, output)

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        dtype = compute_dtype(x)
        x = x if x.dtype == dtype else x.to(dtype)
        tiled = self.weight.tiled() if takes(x) else None
        if tiled is not None:
            return self.output_quantizer(quantized_linear(x, tiled, self.bias))
        say_once(x, self.weight.format.name, str(self.weight.granularity))
        # Autograd would keep every block, and a compiler unroll them.
        in_blocks = x.device.type == "cpu" and not (torch.is_grad_enabled() and x.requires_grad)
        if in_blocks and self.weight.rows_are_separate and not torch.compiler.is_compiling():
            return self.output_quantizer(self._by_rows(x))
        return self.output_quantizer(F.linear(x, self.weight.dequantize(dtype), self.bias))

    def _by_rows(self, x: Tensor) -> Tensor:
        def rows(first: int, last: int) -> Tensor:
            if last - first == self.out_features:
                return self.weight.dequantize(x.dtype)
            return self.weight.dequantize_rows(torch.arange(first, last), x.dtype)

        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear_by_rows(x, self.out_features, self.in_features, bias, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)
        self.put_in_order()
        return self

    def put_in_order(self) -> None:
        """On a GPU let the weight take the order of kernels now: a compiler could not put it there."""
        if takes(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)):
            self.weight.tiled()

    def plain(self, dtype: torch.dtype) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantLinear(QuantLayer, nn.Linear):
    """y = output_quantizer(input_quantizer(x) @ weight_quantizer(W)^T + b); grad_quantizer quantizes dL/dy before that.

    Takes over the Parameters of an `nn.Linear`, so optimizers, adapters and state dicts that knew them still do.
    """

    stored = PackedLinear

    weight_quantizer: Quantizer | NoQuantizer

    def __init__(self, linear: nn.Linear, quantizers: LayerQuantizers) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self._adopt(linear, quantizers)

    @staticmethod
    def features(module: Any) -> tuple[int | None, int]:
        return module.in_features, module.out_features

    def forward(self, input: Tensor) -> Tensor:
        y = self.weight_quantizer.linear(self.input_quantizer(input), self.weight, self.bias)
        return self.output_quantizer(quantize_grad(y, self.grad_quantizer))

    def plain(self) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)
