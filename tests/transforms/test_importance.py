from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms import KVCache, fisher, hessian, quant_layers
from tests.conftest import tiny_llama

KMEANS = qat.Scheme(weight=partial(KMeansQuantizer, bits=2))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 96, (2, 17), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def weighted_error(model, importance):
    layers = dict(quant_layers(model))
    return sum(
        (importance[name] * (layer.weight_quantizer(layer.weight) - layer.weight).square()).sum().item()
        for name, layer in layers.items()
    )


def test_fisher_lowers_the_error_weighted_by_squared_gradients():
    model = tiny_llama().eval()
    importance = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            importance[name] += parameter.grad.square()
    model.zero_grad()
    importance = {name.removesuffix(".weight"): value for name, value in importance.items()}
    qat.prepare(model, KMEANS)
    before = weighted_error(model, importance)
    fisher(model, batches())
    assert weighted_error(model, importance) < 0.95 * before


def test_hessian_lowers_the_error_of_the_outputs():
    model = qat.prepare(nn.Sequential(nn.Linear(64, 32, bias=False)), KMEANS)
    layer = model[0]
    x = torch.randn(500, 64) * torch.logspace(-1, 1, 64)
    exact = x @ layer.weight.T

    def loss():
        return (layer(x) - exact).square().sum().item()

    before = loss()
    hessian(model, [{"input": x[:250]}, {"input": x[250:]}])
    assert loss() < 0.8 * before


@pytest.mark.parametrize("transform", [fisher, hessian])
def test_a_model_is_left_as_it_was(transform):
    scheme = qat.Scheme(
        weight=KMEANS.weight, input=partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)
    )
    model = qat.prepare(tiny_llama(), scheme).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    quantizers = [layer.weight_quantizer for _, layer in quant_layers(model)]
    transform(model, batches())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][1], name
        assert parameter.grad is None, name
        assert "quantizer" in name or torch.equal(parameter, before[name][0]), name
    assert model.training
    assert [layer.weight_quantizer for _, layer in quant_layers(model)] == quantizers
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("transform", [fisher, hessian])
def test_layers_that_share_a_weight_add_up(transform):
    """Only the second of two layers sees a large input; its share of the importance decides."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            y = self.first(x) + self.second(x.flip(1) * 10)
            return type("Output", (), {"loss": (y * torch.randn_like(y)).sum()})

    model = qat.prepare(Twice(), KMEANS)
    weight, quantizer = model.first.weight, model.first.weight_quantizer
    x = torch.randn(200, 64) * torch.logspace(-2, 0, 64)
    heavy = x.flip(1).square().mean(0)
    before = (heavy * (quantizer(weight) - weight).square()).sum()
    transform(model, [{"x": part} for part in x.split(5)])
    assert model.second.weight_quantizer is quantizer
    assert (heavy * (quantizer(weight) - weight).square()).sum() < 0.9 * before


@pytest.mark.parametrize("transform", [fisher, hessian])
def test_no_batches_are_refused(transform):
    with pytest.raises(InputError, match="no data to find an importance from"):
        transform(qat.prepare(tiny_llama(), KMEANS), [])


@pytest.mark.parametrize("transform", [fisher, hessian])
@pytest.mark.parametrize(
    "weight", [partial(LSQQuantizer, bits=3), partial(KMeansQuantizer, bits=3, init="entropy")], ids=["lsq", "entropy"]
)
def test_codebooks_that_importance_would_not_change_are_refused(transform, weight):
    message = f"choose quantizer@scheme.weight=kmeans .*or leave transforms={transform.__name__}"
    with pytest.raises(InputError, match=message):
        transform(qat.prepare(tiny_llama(), qat.Scheme(weight=weight)), [])


@pytest.mark.parametrize("transform", [fisher, hessian])
def test_importance_is_that_of_the_full_precision_model(transform):
    """Neither quantized gradients nor a quantized cache, static and not yet calibrated, take part."""
    found = []
    static = partial(MinMaxQuantizer, bits=2, granularity="per_tensor", dynamic=False)
    rough = {"grad": partial(MinMaxQuantizer, bits=2, granularity="per_tensor"), "kv": KVCache(static, static)}
    for others in ({}, rough):
        torch.manual_seed(0)
        model = qat.prepare(tiny_llama(), qat.Scheme(weight=KMEANS.weight, **others))
        ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
        transform(model, [{"input_ids": ids, "labels": ids}])
        found.append([layer.weight_quantizer.codebook.detach() for _, layer in quant_layers(model)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_fisher_needs_a_loss():
    model = qat.prepare(nn.Sequential(nn.Linear(64, 8)), KMEANS)
    with pytest.raises(InputError, match="take transforms=hessian"):
        fisher(model, [{"input": torch.randn(2, 64)}])
