"""Codes of the weights once per optimizer step: for training that passes through a model several times in between."""

from torch import nn

from qat.nn import QuantLinear
from qat.quantizers import Quantizer
from qat.quantizers.step_codes import StepCodes
from qat.transforms.layers import quant_layers


class ModelStepCodes:
    """Lets the linear layers of `model` keep the codes of their weights while they train, until `renew`.

    Call `renew` after every step of the optimizer, and whenever a weight, a scale or a mask changed; evaluation never
    looks at what is kept. It pays on a CPU; a GPU finds codes as fast as it would read them.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = (layer for _, layer in quant_layers(model) if isinstance(layer, QuantLinear))
        self._quantizers = {q for layer in layers if isinstance(q := layer.weight_quantizer, Quantizer)}
        for quantizer in self._quantizers:
            quantizer.step_codes = StepCodes()

    def renew(self) -> None:
        """Find all codes anew when they are needed next."""
        for quantizer in self._quantizers:
            if quantizer.step_codes is not None:
                quantizer.step_codes.renew()

    def stop(self) -> None:
        """Find codes in every forward pass, as ever."""
        for quantizer in self._quantizers:
            quantizer.step_codes = None
