"""A converted model as a graph of ONNX, by the exporter of torch.

Parameters are called as in the model's state dict. What the exporter says about its own work, stack traces of this
machine among it, is left out, so that the same model gives the same bytes.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import nn

from qat.errors import InputError
from qat.export.onnx.activations import ACTIVATION, static_nodes
from qat.export.onnx.tensors import constant_of, to_onnx
from qat.export.onnx.twin import WEIGHT, TracedModel
from qat.export.onnx.weights import weight_nodes
from qat.nn import PackedTensor, StoredActivation

# What is traced: sizes of one would be taken for constants.
_BATCH, _LENGTH = 2, 8


def to_graph(model: nn.Module, opset: int) -> ir.Model:
    """The graph of a converted causal LM; its large tensors are read from `model` when they are asked for.

    Raises:
        InputError: if torch cannot trace the architecture.
    """
    graph = _trace(model, opset)
    names = _names(model)
    with _as_inputs(graph.graph, set(names)):
        simplify(graph)
    for name, value in list(graph.graph.initializers.items()):
        value.name = names.get(name, name)
    _add_unused(graph.graph, model, names)
    for node in list(graph.graph):
        _fill(graph.graph, node, model, opset)
    return _cleaned(graph)


def _trace(model: nn.Module, opset: int) -> ir.Model:
    device = next(model.parameters()).device
    ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64, device=device)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about its own calls
        try:
            program: Any = torch.onnx.export(
                TracedModel(model),
                (),
                kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
                output_names=["logits"],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise InputError(
                f"torch cannot export {type(model).__name__} to ONNX ({reason}): export=native."
            ) from error
    graph: ir.Model = program.model
    return graph


def _names(model: nn.Module) -> dict[str, str]:
    """The name in `model` of every tensor that the traced one has; of a shared one, the first."""
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for parts in (model.named_parameters, model.named_buffers):
        for name, tensor in parts(remove_duplicate=False):
            names[f"model.{name}"] = first.setdefault(id(tensor), name)
    return names


def simplify(graph: ir.Model) -> None:
    """Compute what is constant, and only that.

    The optimizer of onnxscript also drops factors that are almost one, and with them the rounding of our scales.
    """
    common.InlinePass()(graph)
    fold_constants(graph)
    common.RemoveUnusedNodesPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.DeduplicateInitializersPass()(graph)
    common.CommonSubexpressionEliminationPass()(graph)
    common.OutputFixPass()(graph)
    common.NameFixPass()(graph)


@contextmanager
def _as_inputs(graph: ir.Graph, names: set[str]) -> Iterator[None]:
    """Hold the initializers `names` for inputs, which no optimizer transposes, merges or drops by what they hold."""
    held = [value for name, value in graph.initializers.items() if name in names]
    count = len(graph.inputs)
    for value in held:
        del graph.initializers[str(value.name)]
        graph.inputs.append(value)
    constants = [(value, value.const_value) for value in held]
    for value in held:
        value.const_value = None
    yield
    del graph.inputs[count:]
    for value, tensor in constants:
        value.const_value = tensor
        graph.register_initializer(value)


def _add_unused(graph: ir.Graph, model: nn.Module, names: Mapping[str, str]) -> None:
    """Keep what the model stores and the graph does not need, so that the file holds all of it."""
    quantized = [
        f"{name}." for name, module in model.named_modules() if isinstance(module, PackedTensor | StoredActivation)
    ]
    for name, tensor in model.state_dict().items():
        own = not name.startswith(tuple(quantized))
        if own and names[f"model.{name}"] == name and name not in graph.initializers:
            graph.register_initializer(constant_of(to_onnx(tensor, name)))


def _fill(graph: ir.Graph, node: ir.Node, model: nn.Module, opset: int) -> None:
    """Put the nodes that a placeholder stands for in its place."""
    kind = f"{node.domain}::{node.op_type}"
    if kind == WEIGHT:
        name = node.attributes["weight"].as_string()
        packed: Any = model.get_submodule(name)
        nodes = weight_nodes(name, packed, opset)
    elif kind == ACTIVATION:
        name = node.attributes["quantizer"].as_string()
        stored: Any = model.get_submodule(name)
        x: Any = node.inputs[0]
        nodes = static_nodes(name, stored, x)
    else:
        return
    for place, added in enumerate(nodes):
        added.name = f"{name}.{place}.{added.op_type}"
        _share_constants(graph, added)
    result = nodes[-1].outputs[0]
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [result])


def _share_constants(graph: ir.Graph, node: ir.Node) -> None:
    """Make the constants of a new node initializers; those of a layer that is called again are there already."""
    for place, value in enumerate(node.inputs):
        if value is None or value.const_value is None:
            continue
        known = graph.initializers.get(str(value.name))
        if known is None:
            graph.register_initializer(value)
        elif known is not value:
            node.replace_input_with(place, known)


def _cleaned(graph: ir.Model) -> ir.Model:
    common.NameFixPass()(graph)  # of the nodes of a layer that is called again
    common.RemoveUnusedOpsetsPass()(graph)
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.doc_string = graph.graph.doc_string = None
    graph.producer_name, graph.producer_version = "lightning-qat", None
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    return graph
