"""Linear layers that train with products of codes, and which quantizers these can do with."""

from collections.abc import Sequence

from torch import Tensor, nn

from qat.errors import InputError
from qat.kernels.low_bit_linear import GradGrid, Grid, LowBit, low_bit_linear
from qat.nn.layer import LayerQuantizers
from qat.nn.linear import QuantLinear
from qat.nn.quantize_grad import quantize_grad
from qat.numerics.formats import FloatFormat, Format, IntFormat
from qat.numerics.granularity import PerChannel, PerTensor, PerToken
from qat.quantizers import NoQuantizer, Quantizer

_FULL = "or set compute=fake for this layer"
# What to take, by the kind of products and the role.
_MENDS = {
    "int8": {"weight": "minmax or lsq", "input": "minmax_token", "grad": "grad_token or grad_tensor"},
    "fp8": {"weight": "fp8", "input": "fp8_token or fp8_static", "grad": "grad_fp8"},
}
_GRIDS = {"int8": "symmetric integers", "fp8": "8-bit floats, fp8_e4m3 (or fp8_e5m2 for gradients)"}


class LowBitLinear(QuantLinear):
    """A QuantLinear that multiplies codes while it trains; see `qat.kernels.low_bit_linear`.

    Evaluation multiplies what the codes stand for, as the artifact will, to the bit. So does training while activations
    are observed, or quantized in part (`callbacks.smooth_start`).

    Args:
        linear: whose Parameters it takes over.
        quantizers: symmetric ones, whose scales do not vary along what a product sums over.
        compute: `int8` or `fp8`. Products of fp8 need a GPU of compute capability 8.9; a CPU computes them in float32.
        products: of forward, dgrad and wgrad; the last two need a quantizer of gradients.

    Raises:
        InputError: if the quantizers do not allow these products.
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer

    def __init__(self, linear: nn.Linear, quantizers: LayerQuantizers, compute: str, products: Sequence[str]) -> None:
        super().__init__(linear, quantizers)
        self.compute = compute
        weight = _checked(quantizers.weights["weight"], "weight", compute)
        input = _checked(quantizers.input, "input", compute)
        grad = _checked(quantizers.grad, "grad", compute) if set(products) - {"forward"} else None
        self.how = LowBit(_grid(input), _grid(weight), None if grad is None else _grad_grid(grad), tuple(products))

    def forward(self, input: Tensor) -> Tensor:
        if not self._multiplies_codes:
            return super().forward(input)
        weight = self.weight_quantizer
        y = low_bit_linear(
            input,
            self.weight,
            self.bias,
            self.input_quantizer.codes(input),
            weight.codes(self.weight, stored=True),
            self.how,
            weight.mask,
            weight.dense_gradient,
        )
        return self.output_quantizer(y if self.how.grad is not None else quantize_grad(y, self.grad_quantizer))

    @property
    def _multiplies_codes(self) -> bool:
        weight, input = self.weight_quantizer, self.input_quantizer
        whole = input.observer is None and input.strength is None
        return self.training and weight.enabled and input.enabled and whole

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.compute}: {', '.join(self.how.products)}"


def _checked(quantizer: nn.Module, role: str, compute: str) -> Quantizer:
    """`quantizer`, unless it does not allow products of codes.

    Raises:
        InputError: if so.
    """
    mend = f"take quantizer@scheme.{role}={_MENDS[compute][role]}"
    if isinstance(quantizer, NoQuantizer):
        raise InputError(f"compute={compute} multiplies codes, and the {role} has none: {mend}, {_FULL}.")
    assert isinstance(quantizer, Quantizer)
    if not _multiplied(quantizer.format, role, compute):
        raise InputError(
            f"compute={compute} multiplies {_GRIDS[compute]}, and the {role} is {quantizer.format.name}: {mend}, "
            f"{_FULL}."
        )
    granularities = (PerTensor(), PerToken()) if role != "weight" else (PerTensor(), PerToken(), PerChannel(0))
    if quantizer.granularity not in granularities:
        raise InputError(
            f"compute={compute} sums codes before it scales them, but {quantizer.granularity} gives the {role} several "
            f"scales in one sum: set scheme.{role}.granularity={granularities[-1]}, {_FULL}."
        )
    if role == "grad" and quantizer.rule != "absmax":
        raise InputError(f"compute={compute} scales gradients by their extremes: {mend}, {_FULL}.")
    return quantizer


def _multiplied(format: Format, role: str, compute: str) -> bool:
    if compute == "int8":
        return isinstance(format, IntFormat) and format.signed
    names = ("fp8_e4m3", "fp8_e5m2") if role == "grad" else ("fp8_e4m3",)
    return isinstance(format, FloatFormat) and format.name in names


def _grid(quantizer: Quantizer) -> Grid:
    return Grid(quantizer.format, quantizer.granularity, quantizer.clips)


def _grad_grid(quantizer: Quantizer) -> GradGrid:
    return GradGrid(quantizer.format, quantizer.granularity, quantizer.scale_dtype, quantizer.stochastic)
