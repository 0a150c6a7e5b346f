from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.kernels import ops
from qat.quantizers import MinMaxQuantizer, TableQuantizer

WEIGHTS = {
    "int4": partial(MinMaxQuantizer, bits=4, granularity="per_group_32"),
    "asymmetric": partial(MinMaxQuantizer, bits=4, symmetric=False),
    "fp8": partial(MinMaxQuantizer, format="fp8_e4m3"),
    "nf4": partial(TableQuantizer),
}


def trained(weight, dtype=torch.float32, mask=False, dense=False, autocast=False):
    """y and every gradient of a small layer."""
    torch.manual_seed(0)
    model = qat.prepare(nn.Sequential(nn.Linear(64, 24)).to(dtype), qat.Scheme(weight=weight))
    quantizer = model[0].weight_quantizer
    if mask:
        quantizer.set_mask(torch.rand(24, 64) > 0.5)
        quantizer.dense_gradient = dense
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "how", [{}, {"dtype": torch.bfloat16}, {"mask": True}, {"mask": True, "dense": True}, {"autocast": True}], ids=str
)
def test_scales_found_on_the_way_give_the_same_as_scales_found_before(name, how, monkeypatch):
    expected = trained(WEIGHTS[name], **how)
    monkeypatch.setattr(ops, "keeps_codes", lambda weight: False)  # as on a GPU
    found = trained(WEIGHTS[name], **how)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_only_x_and_the_weight_are_kept(monkeypatch):
    monkeypatch.setattr(ops, "keeps_codes", lambda weight: False)
    model = qat.prepare(nn.Sequential(nn.Linear(64, 24)), qat.Scheme(weight=WEIGHTS["int4"]))
    x, kept = torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        model(x)
    assert set(kept) == {x.data_ptr(), model[0].weight.data_ptr()}


def test_compiled_layers_compute_the_same(monkeypatch):
    monkeypatch.setattr(ops, "keeps_codes", lambda weight: False)
    torch._dynamo.reset()
    scheme = qat.Scheme(weight=WEIGHTS["int4"], input=partial(MinMaxQuantizer, bits=8, granularity="per_token"))
    model = qat.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), scheme)
    x = torch.randn(6, 64, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    found = torch.autograd.grad(torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
