"""The training-time linear layer: full-precision weight, quantized as it is used."""

from torch import Tensor, nn

from qat.quantizers import NoQuantizer, Quantizer


class QuantLinear(nn.Linear):
    """y = output_quantizer(input_quantizer(x) @ weight_quantizer(W)^T + b).

    Takes over the Parameters of an `nn.Linear`, so optimizers, adapters and state dicts that knew them still do.
    """

    weight_quantizer: Quantizer | NoQuantizer

    def __init__(
        self,
        linear: nn.Linear,
        weight_quantizer: Quantizer | NoQuantizer,
        input_quantizer: nn.Module,
        output_quantizer: nn.Module,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.output_quantizer = output_quantizer
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return self.output_quantizer(self.weight_quantizer.linear(self.input_quantizer(input), self.weight, self.bias))
