"""Divergences are what their papers define, and their gradients those of autograd."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lightning_modules.distillation.divergences import DIVERGENCES, divergence_of
from lightning_modules.distillation.logits import LogitLoss
from lightning_modules.head import Shape
from qat.errors import InputError

ROWS, WORDS = 9, 23


def kl(p, q):
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def definition(name, p, q, beta=0.3, gamma=0.8):
    """As the papers write it, of probabilities."""
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "cakld": lambda: gamma * kl(q, p) + (1 - gamma) * kl(p, q),
    }[name]()


def pooled(p, indices):
    """Probabilities of the tokens `indices` and of all others together."""
    few = p.gather(-1, indices)
    return torch.cat([few, 1 - few.sum(-1, keepdim=True)], -1)


def plain(name, z, z_teacher, targets, weight=1.0, temperature=1.0, top_k=None, shapes=((1.0, None), (1.0, None))):
    """The whole loss in the plainest words, for autograd."""
    (scale, cap), (scale_teacher, cap_teacher) = shapes
    v, v_teacher = z * scale, z_teacher * scale_teacher
    v = v if cap is None else cap * torch.tanh(v / cap)
    v_teacher = v_teacher if cap_teacher is None else cap_teacher * torch.tanh(v_teacher / cap_teacher)
    p, q = (v_teacher / temperature).softmax(-1), (v / temperature).softmax(-1)
    if top_k is not None:
        indices = p.topk(top_k, -1).indices
        p, q = pooled(p, indices), pooled(q, indices)
    losses = temperature**2 * definition(name, p, q)[targets != -100].sum()
    return (1 - weight) * F.cross_entropy(v, targets, reduction="sum") + weight * losses


def logits(dtype=torch.float64):
    torch.manual_seed(0)
    targets = torch.randint(0, WORDS, (ROWS,))
    targets[::4] = -100
    return 3 * torch.randn(ROWS, WORDS, dtype=dtype), 3 * torch.randn(ROWS, WORDS, dtype=dtype), targets


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "top k": {"top_k": 5},
    "all but one": {"top_k": WORDS - 1},
    "mixed": {"weight": 0.3, "temperature": 0.7},
    "capped": {"shapes": ((2.0, 5.0), (0.5, None))},
    "everything": {"weight": 0.6, "temperature": 2.0, "top_k": 3, "shapes": ((0.5, 4.0), (2.0, 3.0))},
}


def loss_of(name, shapes=((1.0, None), (1.0, None)), **options):
    divergence = divergence_of(name, beta=0.3, gamma=0.8)
    return LogitLoss(divergence, shape=Shape(*shapes[0]), teacher_shape=Shape(*shapes[1]), **options)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_and_gradient(name, options):
    z, z_teacher, targets = logits()
    z.requires_grad_()
    expected = plain(name, z, z_teacher, targets, **options)
    (gradient,) = torch.autograd.grad(expected, z)
    found = loss_of(name, **options)(z.detach().clone(), z_teacher.clone(), targets)
    weight = options.get("weight", 1.0)
    total = ((1 - weight) * found.cross_entropy + weight * found.divergence).sum()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-9, atol=1e-10)
    assert (found.gradient[targets == -100] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 4])
def test_it_is_zero_for_the_teacher_itself_and_positive_otherwise(name, top_k):
    z, z_teacher, targets = logits()
    loss = loss_of(name, top_k=top_k)
    same, other = loss(z.clone(), z.clone(), targets), loss(z.clone(), z_teacher.clone(), targets)
    assert same.divergence.abs().max() < 1e-12
    assert same.gradient.abs().max() < 1e-12
    assert (other.divergence[targets != -100] > 0.01).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fewer_tokens_never_see_more_and_all_tokens_see_all(name):
    """Data processing: pooling tokens makes no divergence larger."""
    z, z_teacher, targets = logits()
    of = partial(loss_of, name)
    seen = [of(top_k=k)(z.clone(), z_teacher.clone(), targets).divergence for k in (1, 2, 5, 12, WORDS - 1, WORDS)]
    for fewer, more in pairwise(seen):
        assert (fewer <= more + 1e-12).all()
    assert torch.equal(seen[-1], of()(z.clone(), z_teacher.clone(), targets).divergence)


def test_jsd_tends_to_both_directions():
    z, z_teacher, targets = logits()
    for beta, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        near = LogitLoss(divergence_of("jsd", beta))(z.clone(), z_teacher.clone(), targets).divergence
        limit = loss_of(name)(z.clone(), z_teacher.clone(), targets).divergence
        torch.testing.assert_close(near / min(beta, 1 - beta), limit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 4])
def test_probabilities_that_vanish_make_no_nan(name, top_k):
    """One token certain for each, not the same one: their exponentials underflow in float32."""
    z, z_teacher, targets = (torch.zeros(1, 50), torch.zeros(1, 50), torch.zeros(1, dtype=torch.long))
    z[0, 0], z_teacher[0, 7] = 400.0, 400.0
    found = loss_of(name, top_k=top_k)(z, z_teacher, targets)
    assert torch.isfinite(found.divergence).all()
    assert torch.isfinite(found.gradient).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bfloat16_logits_are_computed_in_float32(name):
    z, z_teacher, targets = logits(torch.bfloat16)
    exact = loss_of(name)(z.double(), z_teacher.double(), targets)
    found = loss_of(name)(z.clone(), z_teacher.clone(), targets)
    assert found.gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found.divergence.double(), exact.divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("foward_kl",), "distill.divergence is 'foward_kl'. Did you mean 'forward_kl'"),
        (("jsd", 0), "distill.beta is 0, .* distill.divergence=forward_kl"),
        (("jsd", 1), "distill.beta is 1, .* distill.divergence=reverse_kl"),
        (("jsd", 1.5), "distill.beta is 1.5; it lies between 0 and 1"),
        (("cakld", 0.5, -0.1), "distill.gamma is -0.1; it lies between 0 and 1"),
    ],
)
def test_what_is_no_divergence(arguments, message):
    with pytest.raises(InputError, match=message):
        divergence_of(*arguments)
