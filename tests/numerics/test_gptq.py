"""GPTQ on one matrix: worse on the weight, better on what the weight is for."""

import pytest
import torch

from qat.errors import InputError
from qat.kernels import ops
from qat.numerics.columns import Columns
from qat.numerics.descent import descend, refit
from qat.numerics.gptq import gptq, output_errors
from qat.quantizers import (
    FixedQuantizer,
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
    VectorQuantizer,
)

SHAPE = (48, 64)
GRIDS = {
    "int4 group": lambda: LSQQuantizer(SHAPE, 4, "per_group_16"),
    "int3 channel": lambda: LSQQuantizer(SHAPE, 3, "per_channel"),
    "int2 asymmetric": lambda: LSQQuantizer(SHAPE, 2, "per_group_32", symmetric=False),
    "int4 block": lambda: MinMaxQuantizer(SHAPE, 4, granularity="per_block_16x16"),
    "int4 flat": lambda: MinMaxQuantizer(SHAPE, 4, granularity="per_flat_group_40"),
    "int4 column": lambda: MinMaxQuantizer(SHAPE, 4, granularity="per_channel_1"),
    "fp8": lambda: MinMaxQuantizer(SHAPE, format="fp8_e4m3"),
    "nf4 double": lambda: TableQuantizer(SHAPE, granularity="per_group_16", double_quant=True),
    "nvfp4": lambda: NVFP4Quantizer(SHAPE),
    "mxfp4": lambda: MicroscalingQuantizer(SHAPE),
    "ternary": lambda: TableQuantizer(SHAPE, family="ternary", bits=2, granularity="per_tensor", rule="absmean"),
    "k-means row": lambda: KMeansQuantizer(SHAPE, 3),
    "k-means group": lambda: KMeansQuantizer(SHAPE, 2, granularity="per_group_32"),
    "k-means shared": lambda: KMeansQuantizer(SHAPE, 3, granularity="per_group_16", codebook="per_channel"),
}


def problem(tokens=256):
    """A weight, and inputs whose features hang together as those of a network do."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 16) @ torch.randn(16, SHAPE[1]) + 0.3 * torch.randn(tokens, SHAPE[1])
    return torch.randn(SHAPE) * 0.1, x * torch.linspace(0.2, 3, SHAPE[1])


def fixed(make, weight):
    quantizer = make()
    quantizer.initialize(weight)
    return FixedQuantizer(quantizer, weight) if not quantizer.clips else quantizer


def columns(quantizer, weight):
    return Columns(quantizer.qparams(weight), quantizer.format, quantizer.granularity, weight.shape)


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_it_rounds_each_column_as_the_quantizer_does(grid):
    weight, _ = problem()
    quantizer = fixed(GRIDS[grid], weight)
    own = columns(quantizer, weight)
    rounded = torch.stack([own.round(weight[:, i], i) for i in range(SHAPE[1])], dim=1)
    assert torch.equal(rounded, quantizer(weight))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_the_weight_gets_worse_and_its_product_better(grid, act_order):
    weight, x = problem()
    quantizer = fixed(GRIDS[grid], weight)
    found = gptq(weight, x.t() @ x, columns(quantizer, weight), act_order=act_order, block_size=24)
    rounded = quantizer(weight)
    assert (weight - found).square().sum() > (weight - rounded).square().sum()
    assert ((weight - found) @ x.t()).square().sum() < 0.8 * ((weight - rounded) @ x.t()).square().sum()
    assert torch.equal(quantizer.quantize(found).dequantize(), found)  # it lies on the grid


@torch.no_grad()
def test_without_correlations_it_rounds():
    weight, _ = problem()
    quantizer = fixed(GRIDS["int3 channel"], weight)
    assert torch.equal(gptq(weight, torch.eye(SHAPE[1]), columns(quantizer, weight)), quantizer(weight))
    assert torch.equal(gptq(weight, torch.zeros(SHAPE[1], SHAPE[1]), columns(quantizer, weight)), quantizer(weight))


@torch.no_grad()
def test_blocks_of_columns_change_nothing_but_the_last_bits():
    weight, x = problem()
    quantizer = fixed(GRIDS["int4 group"], weight)
    h = x.t() @ x
    one, many = (gptq(weight, h, columns(quantizer, weight), block_size=size) for size in (64, 8))
    assert (one != many).float().mean() < 0.01


@pytest.mark.parametrize("block_size", [1, 24, 128])
@torch.no_grad()
def test_it_is_the_recursion_by_the_inverse(block_size):
    """w_j <- w_j - (w_i - w_hat_i) U_ij / U_ii with H^-1 = U^T U, as the paper has it, in float64."""
    weight, x = problem()
    quantizer = fixed(GRIDS["int4 group"], weight)
    own, h = columns(quantizer, weight), x.t() @ x
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w, expected = weight.double().clone(), torch.empty_like(weight)
    for i in range(SHAPE[1]):
        expected[:, i] = own.round(w[:, i].float(), i)
        error = (w[:, i] - expected[:, i]) / factor[i, i]
        w[:, i + 1 :] -= torch.outer(error, factor[i, i + 1 :])
    found = gptq(weight, h, own, act_order=False, block_size=block_size)
    assert (found != expected).float().mean() < 0.01


@torch.no_grad()
def test_a_sweep_is_coordinate_descent_column_by_column():
    weight, x = problem()
    quantizer = fixed(GRIDS["int4 group"], weight)
    own, h = columns(quantizer, weight), x.t() @ x
    expected = start = gptq(weight, h, own)
    for i in range(SHAPE[1]):
        gradient = (expected - weight) @ h[:, i]
        expected = expected.clone()
        expected[:, i] = own.round(expected[:, i] - gradient / h[i, i], i)
    assert (descend(weight, start, h, own, block_size=24) != expected).float().mean() < 0.01


@torch.no_grad()
def test_a_singular_hessian_is_damped_until_it_is_not():
    weight, x = problem(tokens=8)
    quantizer = fixed(GRIDS["int4 group"], weight)
    h = x.t() @ x
    found = gptq(weight, h, columns(quantizer, weight), damping=0.0)
    assert output_errors(weight, found, h).sum() < output_errors(weight, quantizer(weight), h).sum()


def test_what_cannot_be_inverted_is_refused():
    weight, x = problem()
    quantizer = fixed(GRIDS["int4 group"], weight)
    with pytest.raises(InputError, match="singular"):
        gptq(weight, -(x.t() @ x), columns(quantizer, weight))
    with pytest.raises(InputError, match="NaN"):
        gptq(weight, x.t() @ x * torch.nan, columns(quantizer, weight))
    vector = VectorQuantizer(SHAPE, 2)
    vector.initialize(weight)
    with pytest.raises(InputError, match="one column after the other"):
        columns(vector, weight)


def test_a_fixed_quantizer_keeps_its_grid_and_finds_it_anew(tmp_path):
    weight, _ = problem()
    for make in (GRIDS["nf4 double"], GRIDS["nvfp4"], GRIDS["int4 flat"]):
        quantizer = fixed(make, weight)
        before = quantizer(weight)
        assert torch.equal(before, make()(weight))
        assert torch.equal(
            quantizer.quantize(before / 2).qparams.for_view().scale, quantizer.qparams(weight).for_view().scale
        )
        other = FixedQuantizer(make(), weight * 3)
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other(weight), before)
        quantizer.initialize(weight * 3)
        assert torch.equal(quantizer(weight * 3), make()(weight * 3))


def test_it_computes_the_same_as_the_operators():
    weight, _ = problem()
    quantizer = fixed(GRIDS["k-means shared"], weight)
    expected = ops.fake_quantize(weight, quantizer.qparams(weight), quantizer.format, quantizer.granularity)
    assert torch.equal(quantizer(weight), expected)


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_a_sweep_lowers_the_error_and_stays_on_the_grid(grid):
    weight, x = problem()
    quantizer = fixed(GRIDS[grid], weight)
    own, h = columns(quantizer, weight), x.t() @ x
    start = gptq(weight, h, own)
    found = descend(weight, start, h, own, block_size=24)
    assert output_errors(weight, found, h).sum() < output_errors(weight, start, h).sum()
    assert torch.equal(quantizer.quantize(found).dequantize(), found)


@pytest.mark.parametrize("grid", ["int4 group", "int3 channel", "k-means row", "int2 asymmetric"])
@torch.no_grad()
def test_refitted_scales_and_codebooks_are_those_of_least_squares(grid):
    weight, x = problem()
    quantizer = fixed(GRIDS[grid], weight)
    q = quantizer.quantize(weight)
    h = x.t() @ x
    params = refit(weight, q, h)
    before = output_errors(weight, q.dequantize(), h).sum()
    assert quantizer.adopt(params)
    table = q.qparams.codebook if q.qparams.codebook is None else params.codebook.view_as(q.qparams.codebook)
    new = q.qparams._replace(scale=params.scale.view_as(q.qparams.scale), codebook=table)
    assert output_errors(weight, type(q)(q.codes, new, q.format, q.granularity, q.dtype).dequantize(), h).sum() < before
