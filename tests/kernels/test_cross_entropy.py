"""The chunked loss is the plain one, with all its gradients."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qat.kernels.cross_entropy import linear_cross_entropy

TOKENS, IN, VOCABULARY = 37, 16, 101


def inputs(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    leaves = [
        torch.randn(TOKENS, IN, dtype=dtype),
        torch.randn(VOCABULARY, IN, dtype=dtype),
        torch.randn(VOCABULARY, dtype=dtype) if bias else None,
    ]
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[::5] = -100
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves], targets


def plain(x, weight, bias, targets, scale=1.0, softcap=None):
    z = F.linear(x, weight, bias).float() * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets, reduction="sum")


def gradients(loss, leaves):
    return torch.autograd.grad(3.0 * loss, [leaf for leaf in leaves if leaf is not None])


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 5.0)], ids=str)
def test_value_and_gradients(chunk, bias, shape):
    leaves, targets = inputs(bias=bias)
    expected, found = plain(*leaves, targets, *shape), linear_cross_entropy(*leaves, targets, chunk, *shape)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_loss():
    leaves, targets = inputs(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = gradients(F.cross_entropy(F.linear(*exact), targets, reduction="sum"), exact)
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients(loss, leaves), truth, strict=True)]
        for loss in (linear_cross_entropy(*leaves, targets, 8), plain(*leaves, targets))
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(1.1 * theirs, 5e-3)


def test_autocast_multiplies_in_its_dtype():
    leaves, targets = inputs(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear_cross_entropy(*leaves, targets, 8), plain(*leaves, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected_grad, rtol=0.05, atol=0.05)


def test_tokens_that_do_not_count():
    leaves, targets = inputs()
    found = linear_cross_entropy(*leaves, torch.full_like(targets, -100), 8)
    assert found == 0
    assert all((grad == 0).all() for grad in gradients(found, leaves))


def test_what_needs_no_gradient_gets_none():
    (x, weight, bias), targets = inputs()
    frozen = weight.detach()
    found = linear_cross_entropy(x, frozen, bias.detach(), targets, 8)
    (grad,) = gradients(found, [x])
    torch.testing.assert_close(grad, gradients(plain(x, frozen, bias, targets), [x])[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, bias, targets, 8), found.detach())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_the_logits_of_all_tokens_never_exist():
    leaves, targets = inputs()
    with Largest() as largest:
        gradients(linear_cross_entropy(*leaves, targets, 8), leaves)
    assert largest.elements == max(8, IN) * VOCABULARY
