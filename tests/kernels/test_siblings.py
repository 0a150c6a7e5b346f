import numpy as np
import torch
from torch import nn

from qat.kernels.siblings import once_for_siblings
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.quantizers import MinMaxQuantizer


def hidden(grad=True):
    return torch.randn(2, 3, 8, requires_grad=grad) * 2


def test_layers_that_quantize_the_same_tensor_share_the_result():
    x = hidden()
    first, second = (MinMaxQuantizer((8,), bits=8, granularity="per_token") for _ in range(2))
    a, b = first(x), second(x)
    assert a.data_ptr() == b.data_ptr()
    (a.sum() + 2 * b.sum()).backward(inputs=[x])  # each has a gradient of its own
    assert (x.grad == 3).all()


def test_another_grid_or_another_tensor_has_its_own():
    x = hidden()
    int8, int4 = (MinMaxQuantizer((8,), bits=bits, granularity="per_token") for bits in (8, 4))
    assert int8(x).data_ptr() != int4(x).data_ptr()
    assert not torch.equal(int8(x), int4(x))
    assert not torch.equal(int8(x), int8(x + 1))


def test_a_tensor_that_changed_is_quantized_anew():
    quantizer, x = MinMaxQuantizer((8,), bits=8, granularity="per_token"), hidden()
    before = quantizer(x)
    with torch.no_grad():
        x.mul_(3)
    assert not torch.equal(before, quantizer(x))


def test_parameters_are_always_quantized_anew():
    """Optimizers written in C change them behind the version counter's back."""
    weight, calls = nn.Parameter(torch.ones(4)), []
    for _ in range(2):
        once_for_siblings(weight, "key", lambda: calls.append(1) or torch.zeros(4))
    assert len(calls) == 2


def test_what_no_graph_made_is_always_quantized_anew():
    """An array or `x.data` may change behind the version counter's back, too."""
    array = np.ones((2, 8), dtype=np.float32)
    x, quantizer = torch.from_numpy(array), MinMaxQuantizer((8,), bits=8, granularity="per_token")
    before = quantizer(x)
    array *= 3
    torch.testing.assert_close(quantizer(x), 3 * before, rtol=1e-2, atol=0)
    x.data.mul_(2)
    torch.testing.assert_close(quantizer(x), 6 * before, rtol=1e-2, atol=0)


def test_nothing_outlives_the_tensor():
    from qat.kernels import siblings

    x = hidden()
    once_for_siblings(x, (parse_format("int8"), parse_granularity("per_token")), lambda: torch.zeros(1))
    assert siblings._latest.slot is not None
    del x
    assert siblings._latest.slot is None
