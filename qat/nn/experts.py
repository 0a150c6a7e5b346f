"""Mixture-of-experts weights: modules that hold `[experts, out, in]` Parameters and multiply by them themselves."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.packed import PackedTensor
from qat.nn.quantize_grad import quantize_grad


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds, as in transformers 5, a 3-D Parameter with a matrix for each of its `num_experts`."""
    experts = getattr(module, "num_experts", None)
    return isinstance(experts, int) and any(
        p is not None and p.ndim == 3 and len(p) == experts for p in module._parameters.values()
    )


class _Experts(nn.Module):
    """Stands in the place of an experts module, holds its tensors under their names, and answers as it would.

    The module itself stays behind as `shell`, without tensors of its own: its forward is called with them and with the
    weights that take the place of the quantized ones. It is no submodule, so every tensor has one name.
    """

    shell: nn.Module

    def _take_over(self, module: Any, without: tuple[str, ...] = ()) -> None:
        shell = _shell_of(module)
        self.shapes = {name: tuple(getattr(module, name).shape) for name in _weight_names(module)}
        self.transposed = _is_transposed(module)
        for name, parameter in module._parameters.items():
            if name not in without:
                self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name in shell._modules:
            self.add_module(name, getattr(module, name))
        self.__dict__["shell"] = shell

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "shell" not in self.__dict__:
                raise
            return getattr(self.__dict__["shell"], name)

    def train(self, mode: bool = True) -> Any:
        self.shell.training = mode
        return super().train(mode)

    def extra_repr(self) -> str:
        return ", ".join([type(self.shell).__name__, *(f"{name} {list(s)}" for name, s in self.shapes.items())])

    def _run(self, matrices: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Call the module's own forward with `matrices`, given as `[experts * out, in]`, for its weights."""
        weights: dict[str, Any] = {name: self._unflattened(name, matrix) for name, matrix in matrices.items()}
        tensors = {**self._parameters, **self._buffers, **weights}
        return functional_call(self.shell, tensors, args, kwargs, tie_weights=False)

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

    def __init__(self, experts: nn.Module, quantizers: LayerQuantizers) -> None:
        super().__init__()
        self._take_over(experts)
        self._adopt(experts, quantizers)

    @staticmethod
    def matrices(module: Any) -> dict[str, Tensor]:
        transposed = _is_transposed(module)
        weights = {name: getattr(module, name) for name in _weight_names(module)}
        return {name: (weight.mT if transposed else weight).flatten(0, -2) for name, weight in weights.items()}

    @staticmethod
    def features(module: Any) -> tuple[int | None, int]:
        matrices = list(QuantExperts.matrices(module).values())
        return matrices[0].shape[-1], len(matrices[-1]) // module.num_experts

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        matrices = {weight.name: weight.quantizer(weight.matrix) for weight in self.weights()}
        y = self._run(matrices, self.input_quantizer(hidden_states), *args, **kwargs)
        return self.output_quantizer(quantize_grad(y, self.grad_quantizer))

    def plain(self) -> nn.Module:
        experts = _shell_of(self.shell)
        experts._parameters.update({name: self._parameters[name] for name in experts._parameters})
        experts._buffers.update({name: self._buffers[name] for name in experts._buffers})
        return experts

    def pack(self, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module) -> PackedLayer:
        return PackedExperts(self, weights, input, output)


def _shell_of(module: Any) -> Any:
    """A copy of `module`, or of what it stands for, with the same submodules and without tensors of its own."""
    shell = copy.copy(getattr(module, "shell", module))
    shell._parameters = dict.fromkeys(shell._parameters)
    shell._buffers = dict.fromkeys(shell._buffers)
    shell._modules = dict(shell._modules)
    return shell


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
