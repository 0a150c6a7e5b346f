"""Masks, and what pruning does to a product: each method better than the one before it, for what it looks at."""

from itertools import pairwise

import pytest
import torch

from qat.errors import InputError
from qat.numerics.gptq import gptq, output_errors
from qat.numerics.sparsity import (
    MaskedColumns,
    Pattern,
    gradual_mask,
    magnitude_scores,
    mask_of,
    parse_pattern,
    sparsegpt,
    wanda_scores,
)
from qat.quantizers import KMeansQuantizer
from tests.numerics.test_gptq import GRIDS, columns, fixed, problem

PATTERNS = {"unstructured": Pattern(), "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_exactly_the_lowest_scores_are_pruned(scope, sparsity):
    scores = torch.rand(6, 40)
    mask = mask_of(scores, Pattern(), sparsity, scope)
    if scope == "row":
        assert ((~mask).sum(1) == round(40 * sparsity)).all()
        assert (scores.masked_fill(mask, 0).amax(1) < scores.masked_fill(~mask, 2).amin(1)).all()
    else:
        assert (~mask).sum() == round(240 * sparsity)
        assert scores[~mask].max() < scores[mask].min()


@pytest.mark.parametrize(("name", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_every_group_keeps_its_highest(name, kept, of):
    scores = torch.rand(6, 40)
    groups = mask_of(scores, parse_pattern(name, 1 - kept / of), 1 - kept / of).view(-1, of)
    assert (groups.sum(1) == kept).all()
    own = scores.view(-1, of)
    assert (own.masked_fill(groups, 0).amax(1) < own.masked_fill(~groups, 2).amin(1)).all()


def test_equal_scores_are_counted_too():
    assert mask_of(torch.zeros(3, 8), Pattern(2, 4), 0.5).sum() == 12
    assert mask_of(torch.ones(3, 8), Pattern(), 0.25).sum() == 18


@pytest.mark.parametrize("name", PATTERNS)
def test_a_gradual_mask_grows_into_the_last_one(name):
    scores, pattern = torch.rand(8, 64), PATTERNS[name]
    shares = [0.1, 0.3, 0.45, 0.5]
    steps = [gradual_mask(scores, pattern, 0.5, share) for share in shares]
    for share, mask in zip(shares, steps, strict=True):
        assert (~mask).float().mean() == pytest.approx(share, abs=1e-2)
    assert all((after <= before).all() for before, after in pairwise(steps))
    assert torch.equal(steps[-1], mask_of(scores, pattern, 0.5))


@pytest.mark.parametrize(
    ("name", "sparsity", "message"),
    [
        ("2:3:4", 0.5, "Choose from: unstructured, 2:4, 4:8"),
        ("4:2", 0.5, "Choose from"),
        ("2:4", 0.7, "prunes 0.5 of the weights, not 0.7: set sparsity=0.5"),
        ("unstructured", 50, "set it to 0.5"),
    ],
)
def test_bad_patterns_name_the_mend(name, sparsity, message):
    with pytest.raises(InputError, match=message):
        parse_pattern(name, sparsity)


def test_groups_must_divide_a_row():
    for prune in (
        lambda p: mask_of(torch.rand(4, 30), p, 0.5),
        lambda p: sparsegpt(torch.rand(4, 30), torch.eye(30), p, 0.5),
    ):
        with pytest.raises(InputError, match="do not divide 30 columns: exclude the layer"):
            prune(Pattern(2, 4))


@pytest.mark.parametrize("name", PATTERNS)
def test_wanda_keeps_outputs_better_than_magnitude_and_sparsegpt_better_than_wanda(name):
    """Some inputs are far larger than others, as a few channels of every language model are."""
    weight, x = problem()
    x[:, ::9] *= 20
    h, pattern = x.t() @ x, PATTERNS[name]
    errors = {
        "magnitude": mask_of(magnitude_scores(weight), pattern, 0.5, "matrix"),
        "wanda": mask_of(wanda_scores(weight, h.diagonal()), pattern, 0.5),
    }
    errors = {kind: output_errors(weight, weight * mask, h).sum() for kind, mask in errors.items()}
    found, mask = sparsegpt(weight, h, pattern, 0.5)
    errors["sparsegpt"] = output_errors(weight, found, h).sum()
    assert errors["wanda"] < 0.7 * errors["magnitude"]
    assert errors["sparsegpt"] < 0.7 * errors["wanda"]
    assert torch.equal(found != 0, mask)
    assert mask.float().mean() == 0.5
    if pattern.kept is not None:
        assert (mask.view(-1, pattern.of).sum(1) == pattern.kept).all()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("grid", ["int4 group", "int3 channel", "int2 asymmetric", "nf4 double", "mxfp4"])
@torch.no_grad()
def test_one_pass_for_both_beats_pruning_and_then_rounding(grid, name):
    weight, x = problem()
    h, pattern = x.t() @ x, PATTERNS[name]
    quantizer = fixed(GRIDS[grid], weight)
    pruned, first = sparsegpt(weight, h, pattern, 0.5)
    both, mask = sparsegpt(weight, h, pattern, 0.5, columns(quantizer, weight))
    assert output_errors(weight, both, h).sum() < 0.97 * output_errors(weight, quantizer(pruned) * first, h).sum()
    assert (both[~mask] == 0).all()
    quantizer.set_mask(mask)
    assert torch.equal(quantizer.quantize(both).dequantize(), both)


@torch.no_grad()
def test_gptq_of_a_pruned_matrix_leaves_its_zeros():
    weight, x = problem()
    h = x.t() @ x
    quantizer = fixed(GRIDS["int3 channel"], weight)
    mask = mask_of(wanda_scores(weight, h.diagonal()), Pattern(2, 4), 0.5)
    found = gptq(weight, h, MaskedColumns(columns(quantizer, weight), mask))
    assert (found[~mask] == 0).all()
    assert output_errors(weight, found, h).sum() < 0.8 * output_errors(weight, quantizer(weight) * mask, h).sum()


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_sparsegpt_is_the_recursion_by_the_inverse(name):
    """As the paper's: masks by w^2 / U_ii^2 of the weights of the moment, with H^-1 = U^T U, in float64."""
    weight, x = problem()
    h, pattern, block = x.t() @ x, PATTERNS[name], 16
    damped = h.double() + 0.1 * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w, expected = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    together = block if pattern.kept is None else pattern.of
    for i in range(weight.shape[1]):
        if i % together == 0:
            own = slice(i, i + together)
            expected[:, own] = mask_of((w[:, own] / factor.diagonal()[own]).square(), pattern, 0.5, "matrix")
        error = w[:, i] * ~expected[:, i] / factor[i, i]
        w[:, i:] -= torch.outer(error, factor[i, i:])
    found, mask = sparsegpt(weight, h, pattern, 0.5, damping=0.1, block_size=block)
    assert (mask != expected).float().mean() < 0.01
    same = (mask == expected).all(1)
    torch.testing.assert_close(found[same].double(), w[same], rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_without_correlations_sparsegpt_is_magnitude_within_a_block():
    weight, _ = problem()
    found, mask = sparsegpt(weight, torch.eye(64), Pattern(), 0.5, block_size=64)
    assert torch.equal(mask, mask_of(weight.abs(), Pattern(), 0.5, "matrix"))
    assert torch.equal(found, weight * mask)


@torch.no_grad()
def test_a_codebook_gets_an_entry_of_zero():
    weight, x = problem()
    quantizer = KMeansQuantizer(weight.shape, 3)
    mask = mask_of(weight.abs(), Pattern(2, 4), 0.5)
    quantizer.set_mask(mask)
    quantizer.initialize(weight)
    table = quantizer.qparams(weight).codebook
    assert ((table == 0).sum(-1) == 1).all()
    assert (table.diff(dim=-1) >= 0).all()
    both, kept = sparsegpt(weight, x.t() @ x, Pattern(2, 4), 0.5, columns(quantizer, weight))
    quantizer.set_mask(kept)
    assert torch.equal(quantizer.quantize(both).dequantize(), both)
    assert (both[~kept] == 0).all()
