"""Learn the rotation of the residual stream on the loss of the quantized model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qat.errors import InputError
from qat.numerics.hadamard import cayley_step
from qat.quantizers import Quantizer
from qat.transforms.channels import inputs_changed, outputs_changed
from qat.transforms.layers import is_quantized, quant_layers
from qat.transforms.plain import uncalibrated_off
from qat.transforms.stream import Stream


def learned_rotation(model: nn.Module, stream: Stream, batches: Iterable[Any], steps: int, rate: float) -> Tensor:
    """The orthogonal matrix to rotate `stream` by, found by Cayley SGD (SpinQuant, arXiv 2405.16406).

    In each step all that reads or writes the stream is rotated anew and quantized, the loss of a batch goes back to
    the matrix, straight through the rounding, and the weights stay what they were. Static activations that nothing
    calibrated yet are left in full precision. The one with the lowest loss over all batches, the last or the identity,
    is returned, so on them the model gets no worse.

    Args:
        model: rotated already, norms of the stream without gains: a Hadamard matrix is a better start than none.
        batches: mappings that hold labels; passed in turn.
        steps: of gradient descent, one batch each.
        rate: of the first step, falling to none.

    Returns:
        `[size, size]` in float64.

    Raises:
        InputError: if steps or the rate are not positive, nothing is quantized, or there are no batches with labels.
    """
    from rich.progress import track  # only now: it takes as long to import as all of this package

    batches = list(batches)
    _check(model, batches, steps, rate)
    matrix = torch.eye(stream.size, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with uncalibrated_off(model):
            start = _mean_loss(model, stream, matrix, batches)
            for step in track(range(steps), "learning a rotation", transient=True):
                gradient = _gradient(model, stream, matrix, batches[step % len(batches)])
                matrix = cayley_step(matrix, gradient, rate * (1 - step / steps), stream.centers)
            better = _mean_loss(model, stream, matrix, batches) < start
    finally:
        model.train(was_training)
    return _orthogonal(matrix) if better else torch.eye(stream.size, dtype=torch.float64, device=matrix.device)


def _check(model: nn.Module, batches: list[Any], steps: int, rate: float) -> None:
    if steps < 0 or not rate > 0:
        raise InputError(f"steps is {steps} and rate {rate}: take a number of steps, 0 for none, and a positive rate.")
    if not is_quantized(model):
        raise InputError("A rotation is learned from the loss of quantization, and nothing is quantized: set steps=0.")
    if not batches:
        raise InputError("There is nothing to learn a rotation from: set calibration_batches to 1 or more.")
    if "labels" not in batches[0]:
        raise InputError("A rotation is learned from a loss: give it batches with labels, or set steps=0.")


def _gradient(model: nn.Module, stream: Stream, matrix: Tensor, batch: Any) -> Tensor:
    """Of the loss of one batch to `matrix`."""
    with torch.enable_grad():
        leaf = matrix.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_loss(model, stream, leaf, batch), leaf)
    return gradient


@torch.no_grad()
def _mean_loss(model: nn.Module, stream: Stream, matrix: Tensor, batches: list[Any]) -> float:
    return sum(float(_loss(model, stream, matrix, batch)) for batch in batches) / len(batches)


def _loss(model: nn.Module, stream: Stream, matrix: Tensor, batch: Any) -> Tensor:
    """Of the model with its stream rotated by `matrix` and everything quantized."""
    tensors = rotated_tensors(model, stream, matrix)
    _fit_quantizers(model, tensors)
    return functional_call(model, tensors, kwargs={**batch, "use_cache": False}).loss


def rotated_tensors(model: nn.Module, stream: Stream, matrix: Tensor) -> dict[str, Tensor]:
    """The Parameters of `model` in other axes of the stream, by name, differentiable to `matrix`."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}

    def add(module: nn.Module, tensors: dict[str, Tensor]) -> None:
        own = {f"{names[module]}.{name}": tensor for name, tensor in tensors.items()}
        if own.keys() & found.keys():
            raise InputError(f"{names[module]} both reads and writes the residual stream: set steps=0.")
        found.update(own)

    for reading in stream.readings:
        for reader in reading.readers:
            add(reader, inputs_changed(reader, lambda weight: weight @ matrix, matrix.dtype))
        if reading.norm.bias is not None:
            add(reading.norm.module, {"bias": reading.norm.module.bias @ matrix.to(reading.norm.module.bias.dtype)})
    for writer in stream.writers:
        add(writer, outputs_changed(writer, lambda weight: matrix.T @ weight, matrix.dtype))
    return found


@torch.no_grad()
def _fit_quantizers(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Weight quantizers with scales of their own start anew on the weights that they are to quantize."""
    for name, layer in quant_layers(model):
        for weight_name in layer.names(layer):
            quantizer, tensor = getattr(layer, f"{weight_name}_quantizer"), tensors.get(f"{name}.{weight_name}")
            if tensor is not None and isinstance(quantizer, Quantizer) and quantizer.rule is None:
                quantizer.initialize(layer.as_matrix(layer, tensor))


def _orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to `matrix`, which steps in float32 have moved by their rounding."""
    u, _, vt = torch.linalg.svd(matrix.double())
    return u @ vt
