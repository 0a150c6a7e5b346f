"""ONNX as one of the targets."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from qat.atomic import recover
from qat.errors import InputError
from qat.export.architecture import empty_model, fill
from qat.export.consumers import Consumer, onnxruntime_consumer
from qat.export.grids import LayerGrid
from qat.export.layouts.base import Misfit
from qat.export.model_folder import computing_dtype, model_folder
from qat.export.onnx import MODEL
from qat.export.targets import Target, refuse, refuse_cache, stored_grids
from qat.nn import PackedLinear, PackedTensor, StoredActivation
from qat.transforms.layers import conv1d_to_linear, replace

_PACKAGES = ("onnx", "onnxscript")
# 21 is the first with integers of 4 bits and scales for blocks; ONNX Runtime 1.32 was tested up to 25.
_OLDEST_OPSET, _NEWEST_OPSET = 21, 25


class Onnx(Target):
    """`model.onnx` from token ids and attention mask `[batch, sequence]` to logits, without a cache.

    Weights are codes behind DequantizeLinear, activations pass through QuantizeLinear where their scales are static.
    The folder holds `config.json`, the generation settings and the tokenizer too. The graph computes in the model's
    dtype; for bfloat16 ONNX Runtime has no kernels on a CPU. Beside weights of 4 bits in groups it rounds activations
    to 8 bits of its own accord, unless the session's `session.qdq_matmulnbits_accuracy_level` is 1.

    Args:
        opset: version of ONNX's operators. Under 25 codes of 2 bits are stored as integers of 4.

    Raises:
        InputError: if the opset has no such operators, or a package is not installed.
    """

    title = "ONNX"

    def __init__(self, opset: int = _OLDEST_OPSET) -> None:
        if not _OLDEST_OPSET <= opset <= _NEWEST_OPSET:
            raise InputError(f"Codes are written with opset {_OLDEST_OPSET} to {_NEWEST_OPSET}, not {opset}.")
        absent = [name for name in _PACKAGES if find_spec(name) is None]
        if absent:
            raise InputError(f"ONNX is written by {', '.join(absent)}: pip install 'lightning-qat[export]'.")
        self.opset = opset

    def check(self, model: nn.Module) -> None:
        refuse_cache(self.title, model)
        grids = stored_grids(self.title, model)
        if not hasattr(model, "config"):
            raise InputError(f"{self.title} is written for causal language models of transformers: export=native.")
        for name, grid in grids.items():
            refuse(self.title, name, self._misfits(grid))

    def _misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        from qat.export.onnx.activations import activation_misfits
        from qat.export.onnx.weights import weight_misfits

        if grid.kind != "linear":
            yield Misfit(f"a quantized {grid.kind} layer", "scheme.embedding=false")
            return
        yield from weight_misfits(grid.weights["weight"], self.opset)
        for role, activation in (("input", grid.input), ("output", grid.output)):
            if activation is not None:
                yield from activation_misfits(role, activation)

    def write(self, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
        from qat.export.onnx.file import write_model
        from qat.export.onnx.graph import to_graph

        self.check(model)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        graph = to_graph(model, self.opset)
        with model_folder(folder, MODEL, model, tokenizer, dtype=computing_dtype(model)) as temporary:
            write_model(graph, temporary, {name: _describe(layer) for name, layer in layers.items()})
        return Path(folder)

    def read(self, folder: str | Path, trust_remote_code: bool = False) -> nn.Module:
        from qat.export.onnx.file import OnnxFile

        folder = Path(folder)
        recover(folder)
        file = OnnxFile(folder)
        model, _ = empty_model(folder, trust_remote_code)
        conv1d_to_linear(model)
        for name in file.layers:
            replace(model, name, _restored(model, name, file))
        tensors: Any = file  # `fill` asks for tensors by name, and for no more
        fill(model, tensors, set())
        return model.eval()

    def consumer(self, folder: Path) -> Consumer:
        return onnxruntime_consumer(folder / MODEL)


def _describe(layer: PackedLinear) -> dict[str, Any]:
    """What the file says of a layer beside its tensors."""
    roles = {"input": layer.input_quantizer, "output": layer.output_quantizer}
    described = {role: q.description if isinstance(q, StoredActivation) else None for role, q in roles.items()}
    return {"weight": layer.weight.description, **described}


def _restored(model: nn.Module, name: str, file: Any) -> PackedLinear:
    """The packed layer that the file stores for the linear layer `name` of `model`."""
    from qat.export.onnx.weights import read_weight

    linear = model.get_submodule(name) if name in dict(model.named_modules()) else None
    if not isinstance(linear, nn.Linear):
        raise InputError(f"The file does not fit its config.json, whose model has no linear layer {name}.")
    described = file.layers[name]
    try:
        weight = read_weight(f"{name}.weight", file.stored, described["weight"], file.opset)
        roles = [_activation(f"{name}.{role}_quantizer", described[role], file) for role in ("input", "output")]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"What the file says of {name} is damaged ({error!r}). Export the run again.") from error
    if weight.shape != linear.weight.shape:
        raise InputError(f"{name} is {list(weight.shape)}, and its config.json says {list(linear.weight.shape)}.")
    return PackedLinear(linear, {"weight": PackedTensor.from_quantized(weight)}, *roles)


def _activation(name: str, described: Any, file: Any) -> nn.Module:
    """The stored activation `name`; static scales and zero points are constants of the graph."""
    from qat.export.onnx.tensors import numbers_to_torch

    if described is None:
        return nn.Identity()
    stored = StoredActivation(described)
    fields: dict[str, Any] = stored._buffers
    if stored.rule is None:
        fields["scale"].copy_(file[f"{name}.scale"].reshape_as(fields["scale"]))
    if stored.rule is None and fields["zero_point"] is not None:
        zero_point = numbers_to_torch(file.stored(f"{name}.zero_point"))
        fields["zero_point"].copy_(zero_point.reshape_as(fields["zero_point"]))
    return stored
