"""Products of codes that cannot be are refused by name."""

from functools import partial

import pytest
from torch import nn

import qat
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer
from tests.models import small_cnn, tiny_qwen_moe
from tests.nn.test_low_bit_linear import ALL, FP8, GRAD8, GRAD_FP8, IN_INT8, INT8, SCHEMES, TOKEN8

GROUP16 = partial(INT8, granularity="per_group_16")
ASYMMETRIC8 = partial(TOKEN8, symmetric=False)
REFUSED = {
    "groups": (GROUP16, TOKEN8, None, "weight several .*set scheme.weight.granularity=per_channel"),
    "input groups": (INT8, GROUP16, None, "set scheme.input.granularity=per_token"),
    "zero point": (INT8, ASYMMETRIC8, None, "the input is uint8: take quantizer@scheme.input=minmax_token"),
    "codebook": (KMeansQuantizer, TOKEN8, None, "the weight is codebook16: take quantizer@scheme.weight=minmax or lsq"),
    "other kind": (FP8, TOKEN8, None, "the weight is fp8_e4m3"),
    "no input": (INT8, None, None, "the input has none: take quantizer@scheme.input=minmax_token"),
    "no gradient": (INT8, TOKEN8, None, "the grad has none: take quantizer@scheme.grad=grad_token"),
    "gradient groups": (
        INT8,
        TOKEN8,
        partial(GRAD8, granularity="per_group_8"),
        "set scheme.grad.granularity=per_token",
    ),
    "float gradient": (INT8, TOKEN8, GRAD_FP8, "the grad is fp8_e5m2: take quantizer@scheme.grad=grad_token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_grids_that_cannot_be_multiplied_are_refused_by_name(case):
    weight, input, grad, message = REFUSED[case]
    products = ALL if "gradient" in case else ("forward",)
    scheme = IN_INT8(weight=weight, input=input, grad=grad, products=products)
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(InputError, match=f"^0: .*{message}.* or set compute=fake for this layer"):
        qat.prepare(model, scheme)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "int9"}, "compute is 'int9'. Did you mean 'int8'"),
        ({"compute": "int8", "products": ["forward", "wgard"]}, "products has 'wgard'. Did you mean 'wgrad'"),
        ({"compute": "int8", "products": ["dgrad"]}, "add forward to products"),
        ({"products": ALL}, "set compute=int8 or compute=fp8"),
        ({"compute": "int8", "weight": None, "input": None}, "nothing is quantized"),
    ],
    ids=["compute", "product", "no forward", "no compute", "nothing quantized"],
)
def test_bad_options_name_the_mend(options, message):
    with pytest.raises(InputError, match=message):
        qat.prepare(nn.Sequential(nn.Linear(32, 8)), qat.Scheme(**{"weight": INT8, "input": TOKEN8} | options))


@pytest.mark.parametrize(("build", "kind"), [(small_cnn, "Conv2d"), (tiny_qwen_moe, "Experts")])
def test_other_layers_are_refused(build, kind):
    with pytest.raises(InputError, match=rf"compute=int8 is for nn.Linear, not \w*{kind}: give it a rule of its own"):
        qat.prepare(build(), SCHEMES["w8a8"])
