"""Mixture-of-experts weights: modules that hold `[experts, out, in]` Parameters and multiply by them themselves."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.packed import PackedTensor
from qat.nn.quantize_grad import quantize_grad
from qat.nn.stand_in import StandIn


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds, as in transformers 5, a 3-D Parameter with a matrix for each of its `num_experts`."""
    experts = getattr(module, "num_experts", None)
    return isinstance(experts, int) and any(
        p is not None and p.ndim == 3 and len(p) == experts for p in module._parameters.values()
    )


class _Experts(StandIn):
    """Takes weights as the matrices `[experts * out, in]` that they are quantized as."""

    def _take_over(self, module: Any, without: Collection[str] = ()) -> None:
        super()._take_over(module, without)
        self.shapes = {name: tuple(getattr(module, name).shape) for name in _weight_names(module)}
        self.transposed = _is_transposed(module)

    def extra_repr(self) -> str:
        return ", ".join([type(self.shell).__name__, *(f"{name} {list(s)}" for name, s in self.shapes.items())])

    def _run(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        shaped = {name: self._unflattened(name, matrix) for name, matrix in weights.items()}
        return super()._run(shaped, *args, **kwargs)

    def _unflattened(self, name: str, matrix: Tensor) -> Tensor:
        experts, *sizes = self.shapes[name]
        if self.transposed:
            return matrix.reshape(experts, *reversed(sizes)).mT
        return matrix.reshape(experts, *sizes)


class PackedExperts(_Experts, PackedLayer):
    """Runs the forward of an experts module with weights that it dequantizes from codes, for inference."""

    kind = "experts"

    def __init__(
        self, module: nn.Module, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module
    ) -> None:
        super().__init__()
        self.weight_names = tuple(weights)
        self._take_over(module, without=self.weight_names)
        self._adopt(weights, input, output)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        matrices = {name: weight.dequantize() for name, weight in self.weights().items()}
        return self.output_quantizer(self._run(matrices, self.input_quantizer(hidden_states), *args, **kwargs))


class QuantExperts(_Experts, QuantLayer):
    """Runs the forward of an experts module with fake-quantized weights, each computed once.

    A weight `[experts, out, in]` is quantized as the matrix `[experts * out, in]`: per_channel means one scale for each
    output of each expert, and groups run along the input, also where the module stores `[experts, in, out]`. The input
    quantizer sees the hidden states, the gradient quantizer the gradient of the weighted sum of all experts.
    """

    stored = PackedExperts

    def __init__(self, experts: nn.Module, quantizers: LayerQuantizers) -> None:
        super().__init__()
        self._take_over(experts)
        self._adopt(experts, quantizers)

    @staticmethod
    def names(module: Any) -> list[str]:
        return _weight_names(module)

    @staticmethod
    def as_matrix(module: Any, weight: Tensor) -> Tensor:
        return QuantExperts.as_matrices(module, weight).flatten(0, -2)

    @staticmethod
    def as_matrices(module: Any, weight: Tensor) -> Tensor:
        """`weight` of `module` as a view of one matrix for each expert, `[experts, out, in]`."""
        return weight.mT if _is_transposed(module) else weight

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        return self._unflattened(name, matrix)

    @staticmethod
    def features(module: Any) -> tuple[int | None, int]:
        into, out_of = (-2, -1) if _is_transposed(module) else (-1, -2)
        shapes = [getattr(module, name).shape for name in _weight_names(module)]
        return shapes[0][into], shapes[-1][out_of]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        matrices = {weight.name: weight.quantizer(weight.matrix) for weight in self.weights()}
        y = self._run(matrices, self.input_quantizer(hidden_states), *args, **kwargs)
        return self.output_quantizer(quantize_grad(y, self.grad_quantizer))

    def plain(self) -> nn.Module:
        return self._restored()


def _weight_names(module: Any) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and p.ndim == 3]


def _is_transposed(module: Any) -> bool:
    """Whether weights are `[experts, in, out]`: said by `is_transposed` (transformers 5), else seen in the sizes."""
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return said
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    _, rows, columns = getattr(module, _weight_names(module)[0]).shape
    return rows == hidden != columns
