import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import qat
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.clipping import LayerClip
from qat.errors import InputError
from qat.quantizers import LSQQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import fit

LSQ4 = qat.Scheme(weight=partial(LSQQuantizer, bits=4))


def two_layers():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, bias=False))
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.randn_like(parameter) * number
    return model


def plain_norm(parameters):
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters))


def test_each_layer_is_clipped_by_its_own_norm():
    model = two_layers()
    before = [plain_norm(layer.parameters()) for layer in model]
    grads = [p.grad.clone() for p in model.parameters()]
    clip = LayerClip(model, {"0": before[0] / 4, "*": 2 * before[1]})
    norms = clip.norms()
    assert norms.tolist() == pytest.approx(before, rel=1e-6)
    clip.clip_(norms)
    for grad, parameter, factor in zip(grads, model.parameters(), (0.25, 0.25, 1.0), strict=True):
        torch.testing.assert_close(parameter.grad, grad * factor, rtol=1e-5, atol=0)


def test_layers_without_a_gradient_or_a_limit_are_left_alone():
    model = two_layers()
    model[0].weight.grad = None
    bias, last = model[0].bias.grad.clone(), model[1].weight.grad.clone()
    clip = LayerClip(model, {"0": 0.5})
    assert clip.norms()[0] == pytest.approx(float(bias.norm()))
    clip.clip_(clip.norms())
    assert float(model[0].bias.grad.norm()) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(model[1].weight.grad, last)


def test_what_is_shared_or_frozen_counts_once_or_not():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 4)
    assert LayerClip(model, 1.0).norms().tolist() == [4.0]


class Gradients(pl.Callback):
    """Keeps the norms of what the optimizer saw."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        layers = {}
        for name, parameter in pl_module.model.named_parameters():
            if parameter.grad is not None:
                layers.setdefault(name.rpartition(".")[0], []).append(parameter)
        self.norms = {name: plain_norm(owned) for name, owned in layers.items()}


def test_training_clips_scales_apart_from_their_weights(tmp_path):
    def run(limits):
        torch.manual_seed(0)
        seen = Gradients()
        model = qat.prepare(tiny_llama(), LSQ4)
        module = CausalLMModule(model, partial(torch.optim.SGD, lr=0.0), layer_clip=limits)
        return fit(tmp_path, module, seen, max_steps=1, log_every_n_steps=1), seen.norms

    _, free = run(None)
    rows, clipped = run({"*_quantizer": 1e-3, "*": 1e-2})
    assert any(norm > 1e-2 for name, norm in free.items() if not name.endswith("_quantizer"))
    for name, norm in free.items():
        assert clipped[name] == pytest.approx(min(norm, 1e-3 if name.endswith("_quantizer") else 1e-2), rel=1e-3)
    total = math.sqrt(sum(norm**2 for norm in free.values()))
    assert rows[0]["train/gradient_norm"] == pytest.approx(total, rel=1e-5)


def test_a_gradient_that_is_no_number_still_stops_before_the_weights(tmp_path):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3), layer_clip=1.0)
    parameter = module.model.model.layers[1].mlp.up_proj.weight
    parameter.register_hook(lambda grad: grad * math.nan)
    before = parameter.detach().clone()
    with pytest.raises(InputError, match=r"gradients became nan at step 0. First at fault: .*layers.1.mlp.up_proj"):
        fit(tmp_path, module)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("limits", "options", "message"),
    [
        (0.0, {}, r"limits the gradients of '\*' to 0.0; it is a positive number"),
        ({"*.donw_proj": 1.0}, {}, r"has '\*.donw_proj', which matches no layer"),
        (
            {"*": 1.0, "lm_head": 0.1},
            {},
            "has 'lm_head', which matches no layer that trains and that no pattern before",
        ),
        (1.0, {"gradient_clip_val": 1.0}, "set one of them to null"),
    ],
    ids=["zero", "pattern", "order", "both"],
)
def test_bad_options_name_the_mend(limits, options, message, tmp_path):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3), layer_clip=limits)
    with pytest.raises(InputError, match=message):
        fit(tmp_path, module, **options)
