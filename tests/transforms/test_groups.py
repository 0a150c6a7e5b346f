"""GPTQ whose scales are found group by group."""

import copy
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.numerics.gptq import gptq_in_groups, output_errors
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MicroscalingQuantizer, MinMaxQuantizer, TableQuantizer
from qat.transforms import Scheme, gptq, prepare, quant_layers
from qat.transforms.blocks import walk
from qat.transforms.groups import fit_group
from qat.transforms.inputs import hessians
from qat.transforms.plain import full_precision
from qat.transforms.stack import Stack
from tests.conftest import tiny_llama
from tests.numerics.test_gptq import SHAPE, problem
from tests.transforms.texts import batches

GROUP = 16
# So much that float32 computes what float64 does: a scale that rounds otherwise changes all that comes after it.
DAMPING = 0.1
QUANTIZERS = {
    "lsq": partial(LSQQuantizer, bits=3, granularity=f"per_group_{GROUP}"),
    "asymmetric": partial(LSQQuantizer, bits=3, granularity=f"per_group_{GROUP}", symmetric=False),
    "minmax": partial(MinMaxQuantizer, bits=3, granularity=f"per_group_{GROUP}"),
    "nf3": partial(TableQuantizer, bits=3, granularity=f"per_group_{GROUP}"),
    "mxfp4": partial(MicroscalingQuantizer),
    "k-means": partial(KMeansQuantizer, bits=2, granularity=f"per_group_{GROUP}"),
}


@pytest.mark.parametrize("act_order", [False, True])
@torch.no_grad()
def test_it_is_the_recursion_by_the_inverse_with_scales_of_the_moment(act_order):
    """Column by column in float64, a quantizer of each group fitted as the paper's code does: to what is there now."""
    weight, x = problem()
    h = x.t() @ x
    quantizer = LSQQuantizer(SHAPE, 4, f"per_group_{GROUP}")
    quantizer.initialize(weight)
    stack = Stack(["weight"], [weight], [quantizer])
    found = gptq_in_groups(weight, h, partial(fit_group, stack, None), GROUP, DAMPING, act_order)

    groups = h.diagonal().view(-1, GROUP)
    order = torch.arange(SHAPE[1])
    if act_order:
        by_group = [g * GROUP + groups[g].argsort(descending=True) for g in groups.sum(1).argsort(descending=True)]
        order = torch.cat(by_group)
    damped = h.double() + DAMPING * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    w, expected = weight.double()[:, order], torch.empty(SHAPE, dtype=torch.float64)
    for i, column in enumerate(order):
        if i % GROUP == 0:
            own = LSQQuantizer((SHAPE[0], GROUP), 4, f"per_group_{GROUP}")
            own.initialize(w[:, i : i + GROUP].float())
        one = w[:, i : i + 1].float().expand(-1, GROUP)
        expected[:, column] = own(one)[:, 0].double()
        error = (w[:, i] - expected[:, column]) / factor[i, i]
        w[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])
    assert (found != expected).double().mean() < 0.02
    assert torch.equal(quantizer(found), found)  # the quantizer holds the scales


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_grid_with_groups_ships(name):
    model = prepare(tiny_llama().eval(), Scheme(weight=QUANTIZERS[name]))
    static = gptq(copy.deepcopy(model), batches(2))
    gptq(model, batches(2), static_groups=False)
    for layer, one in quant_layers(model):
        assert torch.equal(one.weight_quantizer(one.weight), one.weight), layer
    assert not torch.equal(one.weight, dict(quant_layers(static))[layer].weight)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        assert torch.equal(qat.convert(model)(input_ids=ids).logits, trained)


def test_where_all_columns_share_a_scale_it_is_the_same():
    model = prepare(tiny_llama(), Scheme(weight=partial(LSQQuantizer, bits=3)))
    static = gptq(copy.deepcopy(model), batches(2))
    gptq(model, batches(2), static_groups=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), static.parameters(), strict=True))


def errors_by_layer(model, full):
    """Of what each linear layer computes from the inputs that it has in full precision."""
    found = {}
    layers, before = dict(quant_layers(model)), dict(quant_layers(full))

    def measure(block):
        for group, hessian in hessians(block):
            for name in group:
                whole = f"{block.name}.{name}"
                pair = before[whole].weight.detach(), layers[whole].weight.detach()
                found[whole] = float(output_errors(*pair, hessian).sum())

    with full_precision(full):
        walk(full, batches(4), torch.no_grad()(measure), "errors")
    return found


def test_most_layers_are_no_worse_than_with_static_scales():
    """Both without an order by inputs and without refinement, which would hide what the scales do."""
    full = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"]))
    options = {"act_order": False, "sweeps": 0}
    static, in_turn = (
        errors_by_layer(gptq(copy.deepcopy(full), batches(4), static_groups=flag, **options), full)
        for flag in (True, False)
    )
    no_worse = [name for name in static if in_turn[name] <= static[name]]
    assert len(no_worse) > len(static) / 2


def test_scales_that_are_found_together_only_are_named():
    double = partial(TableQuantizer, granularity=f"per_group_{GROUP}", double_quant=True)
    shared = partial(KMeansQuantizer, bits=3, granularity=f"per_group_{GROUP}", codebook="per_channel")
    for quantizer, reason in ((double, "quantized themselves"), (shared, "share a codebook")):
        with pytest.raises(InputError, match=rf"model\.layers\.0\.self_attn.*{reason}.*static_groups=true"):
            gptq(prepare(tiny_llama(), Scheme(weight=quantizer)), batches(1), static_groups=False)
