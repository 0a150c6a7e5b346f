"""What a layer's weights become as a candidate: rounded to nearest, or by GPTQ for what flows into the layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.numerics.qtensor import QuantizedTensor
from qat.planning.candidates import Candidate, PlannedLayer, candidate_quantizer
from qat.planning.grams import grams
from qat.planning.predictions import Batch
from qat.transforms.build import found_at
from qat.transforms.gptq import gptq_rounded, with_fixed_scales

ROUNDINGS = ("nearest", "gptq")
# W_hat of every weight of a layer by name, as matrices in float32.
Rounding = Callable[[PlannedLayer, Candidate], dict[str, Tensor]]


def check_rounding(name: str) -> None:
    """Refuse what is no rounding."""
    if name not in ROUNDINGS:
        raise InputError(f"There is no rounding '{name}'.{nearest(name, ROUNDINGS)}")


def make_rounding(name: str, model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Rounding:
    """The rounding of that name; GPTQ's Hessians, X^T X of the full-precision model, are found in a pass over the data.

    Layers that GPTQ passes over, because they are not linear, are rounded to nearest.
    """
    if name == "nearest":
        return to_nearest
    linear = [layer for layer in layers if isinstance(layer.module, nn.Linear)]
    return ByGPTQ(grams(model, linear, batches))


def to_nearest(layer: PlannedLayer, candidate: Candidate) -> dict[str, Tensor]:
    """W_hat as rounding to nearest leaves it."""
    return {name: q.dequantize().float() for name, q in quantized(layer, candidate).items()}


@dataclass(frozen=True)
class ByGPTQ:
    """W_hat as `transforms=gptq` with its default options leaves it, where the layer's inputs are in full precision.

    Attributes:
        hessians: X^T X `[in, in]` of layers by name; other layers are rounded to nearest.
    """

    hessians: Mapping[str, Tensor]

    def __call__(self, layer: PlannedLayer, candidate: Candidate) -> dict[str, Tensor]:
        if layer.name not in self.hessians:
            return to_nearest(layer, candidate)
        (weight,) = layer.matrices().values()
        quantizer = candidate_quantizer(layer.name, weight, candidate)
        hessian = self.hessians[layer.name].to(weight.device)
        with found_at(layer.name):
            quantizer.initialize(weight)
            return {"weight": gptq_rounded(weight, hessian, with_fixed_scales(quantizer, weight))}


def quantized(layer: PlannedLayer, candidate: Candidate) -> dict[str, QuantizedTensor]:
    """Every weight of `layer` as `candidate`, fitted to it, stores it: what rounding to nearest gives.

    Raises:
        InputError: if the quantizer does not suit the layer, or a weight holds NaN; the layer is named.
    """
    found = {}
    for name, matrix in layer.matrices().items():
        quantizer = candidate_quantizer(layer.name, matrix, candidate)
        with found_at(layer.name):
            quantizer.initialize(matrix)
            found[name] = quantizer.quantize(matrix)
    return found


def errors(layer: PlannedLayer, candidate: Candidate, rounding: Rounding = to_nearest) -> dict[str, Tensor]:
    """W_hat - W of every weight of `layer`, as matrices in float32."""
    matrices = layer.matrices()
    return {name: w_hat - matrices[name].float() for name, w_hat in rounding(layer, candidate).items()}
