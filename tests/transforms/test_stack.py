"""Layers as one matrix: the same as one after the other."""

import copy
import sys
from functools import partial

import pytest
import torch

from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer
from qat.transforms import Rule, Scheme, gptq, prepare, quant_layers, wanda
from qat.transforms.gptq import fix_scales
from qat.transforms.inputs import quantized_linears
from qat.transforms.stack import Stack, stacks
from tests.conftest import tiny_llama
from tests.transforms.texts import batches

LSQ = partial(LSQQuantizer, granularity="per_group_16")
SCHEMES = {
    "lsq": Scheme(weight=partial(LSQ, bits=3)),
    "asymmetric": Scheme(weight=partial(LSQ, bits=3, symmetric=False)),
    "tensor": Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_tensor")),
    "nf3": Scheme(weight=partial(TableQuantizer, bits=3, granularity="per_group_16")),
    "kmeans": Scheme(weight=partial(KMeansQuantizer, bits=2)),
    "mixed": Scheme(weight=partial(LSQ, bits=3), rules={"values": Rule("*.v_proj", weight=partial(LSQ, bits=4))}),
}


def differing(model, other):
    """Share of the weights of linear layers that are not the same."""
    layers, others = (dict(quant_layers(each)) for each in (model, other))
    unequal = [(layer.weight != others[name].weight).flatten() for name, layer in layers.items() if ".layers." in name]
    return float(torch.cat(unequal).float().mean())


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_of_stacks_is_that_of_each_layer(scheme, pruned, monkeypatch):
    model = prepare(tiny_llama(), SCHEMES[scheme])
    if pruned:
        wanda(model, batches(2))
    alone = copy.deepcopy(model)
    gptq(model, batches(2))
    each = lambda layers: [Stack.of({name: layer}) for name, layer in layers.items()]  # noqa: E731
    monkeypatch.setattr(sys.modules["qat.transforms.gptq"], "stacks", each)
    gptq(alone, batches(2))
    assert differing(model, alone) < 0.01


def test_layers_of_unlike_grids_are_stacks_of_their_own():
    model = prepare(tiny_llama(), SCHEMES["mixed"])
    fix_scales(model)
    layers = quantized_linears(model.model.layers[0].self_attn)
    for layer in layers.values():
        layer.weight_quantizer.initialize(layer.weight)
    assert [stack.names for stack in stacks(layers)] == [["q_proj", "k_proj", "o_proj"], ["v_proj"]]


def test_a_stack_fills_each_layer_with_its_rows():
    model = prepare(tiny_llama(), SCHEMES["lsq"])
    layers = quantized_linears(model.model.layers[0].mlp)
    del layers["down_proj"]
    stack = Stack.of(layers)
    stack.fill_(stack.weight + 1)
    before, after = stack.split(stack.weight), [layer.weight for layer in layers.values()]
    assert all(torch.equal(now, own + 1) for now, own in zip(after, before, strict=True))
