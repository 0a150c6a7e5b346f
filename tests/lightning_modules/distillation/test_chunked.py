"""The chunked losses are the plain ones with all their gradients, and hold no logits of all tokens."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.distillation.chunked import at_heads, of_logits
from lightning_modules.distillation.divergences import DIVERGENCES
from lightning_modules.distillation.lazy_logits import Linear, Logits
from tests.lightning_modules.distillation.test_divergences import OPTIONS, loss_of, plain

TOKENS, IN, IN_TEACHER, VOCABULARY = 11, 6, 8, 23


def inputs(dtype=torch.float64, bias=True, tokens=TOKENS, vocabulary=VOCABULARY):
    """Two heads, of a student and of a wider teacher, and targets."""
    torch.manual_seed(0)
    heads = []
    for width in (IN, IN_TEACHER):
        x, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
        heads.append(Linear(x, weight, torch.randn(vocabulary, dtype=dtype) if bias else None))
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::4] = -100
    return *heads, targets


def learned(head):
    return Linear(*(None if tensor is None else tensor.requires_grad_() for tensor in head))


def gradients(loss, head):
    return torch.autograd.grad(3.0 * loss, [tensor for tensor in head if tensor is not None])


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_and_gradients(name, chunk, options):
    student, teacher, targets = inputs(bias=chunk == 4)
    student = learned(student)
    expected = plain(name, F.linear(*student), F.linear(*teacher), targets, **options)
    found, sums = at_heads(student, teacher, targets, chunk, loss_of(name, **options))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = options.get("weight", 1.0)
    torch.testing.assert_close((1 - weight) * sums.cross_entropy + weight * sums.divergence, expected.detach())
    for own, true in zip(gradients(found, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name):
    student, teacher, targets = inputs()
    loss = loss_of(name, **OPTIONS["everything"])
    z, z_teacher = (F.linear(*head).detach() for head in (student, teacher))
    assert torch.autograd.gradcheck(lambda z: of_logits(z, Logits(z_teacher), targets, 4, loss)[0], z.requires_grad_())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_that_are_there_give_the_same(name):
    student, teacher, targets = inputs()
    loss = loss_of(name, **OPTIONS["everything"])
    expected, sums = at_heads(student, teacher, targets, 4, loss)
    z, z_teacher = F.linear(*student).requires_grad_(), F.linear(*teacher)
    before = z.detach().clone(), z_teacher.clone()
    found, own = of_logits(z, Logits(z_teacher), targets, 3, loss)
    found.backward()
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(own.divergence, sums.divergence)
    assert torch.equal(z.detach(), before[0])
    assert torch.equal(z_teacher, before[1])
    assert z.grad.abs().max() > 0


def test_bfloat16_is_as_near_to_the_truth_as_plain_logits():
    student, teacher, targets = inputs(torch.bfloat16)
    student = learned(student)
    exact = [Linear(*(tensor.detach().double() for tensor in head)) for head in (student, teacher)]
    exact_student = learned(exact[0])
    truth = gradients(plain("forward_kl", F.linear(*exact_student), F.linear(*exact[1]), targets), exact_student)
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients(loss, student), truth, strict=True)]
        for loss in (
            at_heads(student, teacher, targets, 4, loss_of("forward_kl"))[0],
            plain("forward_kl", F.linear(*student).float(), F.linear(*teacher).float(), targets),
        )
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(1.1 * theirs, 1e-2)


def test_autocast_multiplies_in_its_dtype():
    student, teacher, targets = inputs(torch.float32, bias=False)
    student = learned(student)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = at_heads(student, teacher, targets, 4, loss_of("forward_kl"))
        z, z_teacher = F.linear(*student), F.linear(*teacher)
        assert z.dtype == torch.bfloat16
        expected = plain("forward_kl", z.float(), z_teacher.float(), targets)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(found, student))


def test_the_teacher_gets_no_gradient_and_nothing_learned_no_loss():
    student, teacher, targets = inputs()
    teacher, student = learned(teacher), learned(student)
    found, sums = at_heads(student, teacher, torch.full_like(targets, -100), 4, loss_of("jsd", weight=0.5))
    found.backward()
    assert found == sums.divergence == sums.cross_entropy == 0
    assert all(tensor.grad is None for tensor in teacher)
    assert all((tensor.grad == 0).all() for tensor in student)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 3])
def test_no_logits_of_all_tokens_exist(name, top_k):
    student, teacher, targets = inputs(torch.float32, tokens=64, vocabulary=101)
    student = learned(student)
    for way, limit in ((partial(at_heads, student, teacher), 8 * 101), (None, 64 * 101)):
        with Largest() as largest:
            if way is None:
                loss = plain(name, F.linear(*student), F.linear(*teacher), targets, top_k=top_k)
            else:
                loss, _ = way(targets, 8, loss_of(name, top_k=top_k))
            loss.backward()
        assert largest.elements == limit
