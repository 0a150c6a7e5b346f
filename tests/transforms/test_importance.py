from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, Quantizer
from qat.transforms import fisher, hessian, quant_layers
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
def test_what_else_is_quantized_changes_no_importance(transform):
    """Gradients, activations, keys and values are in full precision meanwhile; static ones need no calibration yet."""
    static = partial(MinMaxQuantizer, bits=2, granularity="per_tensor", dynamic=False)
    token = partial(MinMaxQuantizer, bits=2, granularity="per_token")
    others = {
        "weight alone": {},
        "gradients": {"grad": partial(token, rounding="stochastic")},
        "activations": {"input": static, "output": token},
        "keys and values": {"kv": qat.transforms.KVCache(static, token, window=3)},
    }
    found = {}
    for name, other in others.items():
        torch.manual_seed(1)
        model = qat.prepare(tiny_llama(initializer_range=0.3), qat.Scheme(weight=KMEANS.weight, **other))
        before = {key: module for key, module in model.named_modules() if isinstance(module, Quantizer)}
        transform(model, batches())
        assert {key: module for key, module in model.named_modules() if isinstance(module, Quantizer)} == before
        found[name] = torch.stack([layer.self_attn.k_proj.weight_quantizer.codebook for layer in model.model.layers])
    assert all(torch.equal(codebook, found["weight alone"]) for codebook in found.values())


def test_an_expert_that_no_token_reached_has_no_importance_yet():
    model = qat.prepare(nn.Sequential(nn.Linear(64, 32)), KMEANS)
    fitted = [
        hessian(model, given)[0].weight_quantizer.codebook.clone() for given in (inputs(3), inputs(3, 0), inputs(0))
    ]
    assert torch.equal(fitted[0], fitted[1])
    assert torch.isfinite(fitted[2]).all()


def inputs(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(size, 64, generator=generator)} for size in sizes]


@pytest.mark.parametrize("transform", [fisher, hessian])
def test_no_batches_are_refused(transform):
    with pytest.raises(InputError, match="no data to find an importance from"):
        transform(qat.prepare(tiny_llama(), KMEANS), [])


@pytest.mark.parametrize("transform", [fisher, hessian])
@pytest.mark.parametrize(
    "weight",
    [partial(LSQQuantizer, bits=3), *(partial(KMeansQuantizer, bits=4, init=init) for init in ("entropy", "nf4"))],
    ids=["lsq", "entropy", "nf4"],
)
def test_a_scheme_without_codebooks_to_weigh_is_refused(transform, weight):
    """Rather than computing everything and changing nothing."""
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=weight))
    mend = rf"transforms={transform.__name__} .* this scheme has none: take quantizer@scheme.weight=kmeans with init=km"
    with pytest.raises(InputError, match=mend):
        transform(model, batches())


def test_hessian_weighs_linear_layers_only():
    model = qat.prepare(nn.Sequential(nn.Conv1d(64, 8, 1)), KMEANS)
    with pytest.raises(InputError, match="codebooks of linear layers that k-means fits, and this scheme has none"):
        hessian(model, [{"input": torch.randn(2, 64, 5)}])


def test_codebooks_with_another_start_stay_as_they_are():
    rules = {"down": qat.Rule("*.down_proj", weight=partial(KMeansQuantizer, bits=4, init="nf4"))}
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=KMEANS.weight, rules=rules))
    layers = model.model.layers[0].mlp
    kept, fitted = (q.weight_quantizer.codebook.detach().clone() for q in (layers.down_proj, layers.up_proj))
    fisher(model, batches())
    assert torch.equal(layers.down_proj.weight_quantizer.codebook, kept)
    assert not torch.equal(layers.up_proj.weight_quantizer.codebook, fitted)


def test_fisher_needs_a_loss():
    model = qat.prepare(nn.Sequential(nn.Linear(64, 8)), KMEANS)
    with pytest.raises(InputError, match="take transforms=hessian"):
        fisher(model, [{"input": torch.randn(2, 64)}])
