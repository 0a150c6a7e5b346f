"""Every family of kernels against its reference, of odd sizes, in bfloat16, and on tensors that are not contiguous."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch

from qat.kernels import dispatch, ops
from qat.kernels.codebook_means import reference as codebook_means
from qat.kernels.fake_quantize import reference
from qat.kernels.linear import fake_quantized_linear
from qat.kernels.logits import reference as logits
from qat.kernels.operand_codes import reference as operand_codes
from qat.kernels.rule_linear import rule_quantized_linear
from qat.kernels.scaled_product import tensor_cores
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.qtensor import QParams, ViewParams
from tests.kernels.interpreter import interpreted
from tests.kernels.test_fake_quantize import grids
from tests.kernels.test_scaled_product import exact, operand

# Rows and columns: no multiple of a tile, nor of what a thread reads at once.
SIZES = [(7, 33), (37, 129), (1, 2051)]
LEARNED = ["int4", "uint4", "fp8_e4m3", "codebook16"]
RULES = [("int8", "absmax"), ("uint4", "minmax"), ("fp4_e2m1", "microscaling")]


def shifted(x):
    """`x`, beginning one element after the start of its memory."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].view(x.shape).copy_(x)


def with_gaps(x):
    """`x` as every second column of a wider tensor."""
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)[..., ::2].copy_(x)


def turned(x):
    """`x`, which lies transposed in memory."""
    return x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


LAYOUTS = [shifted, with_gaps, turned]


def close(found, expected, what, rtol=1e-4):
    """Near enough for sums in another order; `rtol` of the greatest, since terms cancel."""
    limit = rtol * float(expected.float().abs().max()) if expected.numel() else 0
    torch.testing.assert_close(
        found.float().cpu(), expected.float(), rtol=rtol, atol=limit, msg=lambda m: f"{what}: {m}"
    )


def rounded(dtype, device):
    """How far values in `dtype` may be apart: Triton's interpreter cuts what is rounded to bfloat16."""
    return 2**-7 if dtype == torch.bfloat16 and device == "cpu" else 0.0


def there(params, device):
    return ViewParams(*(None if param is None else param.to(device) for param in params))


def compare_values(device, dtype):
    from qat.kernels.fake_quantize import triton

    torch.manual_seed(0)
    for name, size, layout in product(LEARNED, SIZES, LAYOUTS):
        for format, params in grids(name, size[0]):
            x, what = (3 * torch.randn(size)).to(dtype), (name, size, layout.__name__)
            expected = torch.empty(size, dtype=dtype)
            reference.fake_quantize(x, expected, params, format)
            own, out = layout(x.to(device)), layout(torch.zeros(size, dtype=dtype, device=device))
            triton.fake_quantize(own, out, there(params, device), format)
            close(out, expected, what, rounded(dtype, device))
            codes = triton.quantize(own, there(params, device), format)
            assert torch.equal(codes.cpu(), reference.quantize(x, params, format)), what


def compare_gradients(device, dtype):
    from qat.kernels.fake_quantize import backward

    torch.manual_seed(0)
    for name, size, layout in product(LEARNED, SIZES, LAYOUTS):
        for format, params in grids(name, size[0]):
            x, g, what = (3 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype), (name, size, layout.__name__)
            needs, x_hat = [True, *(param is not None for param in params[:3])], torch.zeros(size, dtype=dtype)
            dx, own_hat = layout(g.to(device)), torch.zeros(size, dtype=dtype, device=device)
            found = backward.fake_quantize_backward(
                dx, layout(x.to(device)), None, own_hat, needs, there(params, device), format
            )
            expected = reference.fake_quantize_backward(g, x, None, x_hat, needs, params, format)
            assert torch.equal(dx.cpu(), g), what
            close(own_hat, x_hat, what, rounded(dtype, device))
            for a, b, need in zip(found, expected, needs[1:], strict=True):
                if need:
                    assert a.dtype == torch.float32
                    close(a, b, what)


def compare_dynamic(device, dtype):
    from qat.kernels.fake_quantize import dynamic

    torch.manual_seed(0)
    for (name, rule), size, layout in product(RULES, SIZES, LAYOUTS):
        x, format, what = torch.randn(size).to(dtype), parse_format(name), (name, size, layout.__name__)
        storage = torch.float8_e8m0fnu if rule == "microscaling" else torch.bfloat16
        params, expected = DYNAMIC_RULES[rule](x, format, storage), torch.empty(size, dtype=dtype)
        reference.fake_quantize(x, expected, params, format)
        own, out = layout(x.to(device)), layout(torch.zeros(size, dtype=dtype, device=device))
        dynamic.fake_quantize(own, out, rule, storage, None, format)
        close(out, expected, what, rounded(dtype, device))
        scale, _ = dynamic.params(own, rule, storage, format)
        assert torch.equal(scale.cpu(), params.scale), what


def compare_operands(device, dtype):
    from qat.kernels.operand_codes import gradients, rows
    from qat.kernels.operand_codes.transposed import transposed

    torch.manual_seed(0)
    for name, size, layout in product(["int8", "fp8_e5m2"], SIZES, LAYOUTS):
        x, format, what = torch.randn(size).to(dtype), parse_format(name), (name, size, layout.__name__)
        own, across, down = layout(x.to(device)), torch.rand(1, size[1]) + 0.1, torch.rand(size[0], 1) + 0.1
        found = [*rows.row_codes(own, torch.bfloat16, format)]
        expected = [*operand_codes.row_codes(x, torch.bfloat16, format)]
        factors = [factor.to(device) for factor in (across, down)]
        found += gradients.gradient_codes(own, *factors, None, torch.float32, format, False)
        expected += operand_codes.gradient_codes(x, across, down, None, torch.float32, format, False)
        found.append(transposed(layout(expected[0].to(device))))
        expected.append(operand_codes.transposed(expected[0]))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)), what


def compare_means(device, dtype):
    from qat.kernels.codebook_means import triton

    torch.manual_seed(0)
    for size, layout in product(SIZES, LAYOUTS):
        x, importance, codebook = torch.randn(size).to(dtype), torch.rand(size).to(dtype), torch.randn(size[0], 5)
        scale, own = torch.rand(size[0], 1) + 0.5, codebook.clone().to(device)
        triton.lloyd_step_(layout(x.to(device)), scale.to(device), own, layout(importance.to(device)))
        codebook_means.lloyd_step_(x, scale, codebook, importance)
        close(own, codebook, (size, layout.__name__), 1e-3)


def compare_losses(device, dtype):
    from qat.kernels.logits import triton

    torch.manual_seed(0)
    for size, layout, softcap in product(SIZES, LAYOUTS, [None, 5.0]):
        z, targets = (4 * torch.randn(size)).to(dtype), torch.randint(size[1], (size[0],))
        what, shape = (size, layout.__name__, softcap), (0.5, softcap, -100, True)
        own = triton.loss_and_gradient(layout(z.to(device)), targets.to(device), *shape)
        losses, dz = logits.loss_and_gradient(z.clone(), targets, *shape)
        close(own[0], losses, what)
        close(own[1], dz, what, 2**-7 if dtype == torch.bfloat16 else 1e-4)
        total, factor = torch.randn(size), torch.tensor(0.3)
        found = triton.times(layout(total.to(device)), factor.to(device), dtype)
        close(found, logits.times(total, factor, dtype), what, rounded(dtype, device))


def compare_products(device, dtype):
    """No kernel of ours, but what tensor cores are asked for."""
    torch.manual_seed(0)
    for names, layout in product([("int8", "int8"), ("fp8_e5m2", "fp8_e4m3")], LAYOUTS):
        operands = [operand(rows, 33, name, "rows") for rows, name in zip((7, 37), names, strict=True)]
        a, b = (o._replace(codes=layout(o.codes.to(device)), scale=o.scale.to(device)) for o in operands)
        y, expected = tensor_cores.scaled_product(a, b, dtype), exact(*operands)
        # Tensor cores add 8-bit floats with fewer digits than float32 has.
        close(y, expected, (names, layout.__name__), 2**-7 if dtype == torch.bfloat16 else 1e-3)


def compare_layers(device, dtype):
    """y and every gradient of a linear layer, with the kernels and with the references."""
    torch.manual_seed(0)
    x, weight, g = (torch.randn(shape).to(device, dtype) for shape in [(3, 5, 37), (23, 37), (3, 5, 23)])
    scale = (0.3 * torch.rand(23, 1) + 0.1).to(device)
    int4, row = parse_format("int4"), parse_granularity("per_channel")
    rule = ops.rule_arguments("absmax", int4, torch.bfloat16, None)
    layers = {
        "learned": lambda x, w, s: fake_quantized_linear(x, w, None, QParams(s), int4, row),
        "rule": lambda x, w, s: rule_quantized_linear(x, w, None, rule, row) + 0 * s.sum().to(dtype),
    }
    for (name, layer), layout in product(layers.items(), LAYOUTS):
        found = []
        for with_kernels in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dispatch, "runs_triton", lambda _, on=with_kernels: on)
                patch.setattr(ops, "keeps_codes", lambda _: False)
                leaves = [*(layout(leaf).requires_grad_() for leaf in (x, weight)), scale.clone().requires_grad_()]
                y = layer(*leaves)
                found.append([y, *torch.autograd.grad(y, leaves, layout(g))])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            close(a, b.cpu(), (name, layout.__name__), 2e-2 if dtype == torch.bfloat16 else 1e-4)


CHECKS = {
    check.__name__: check
    for check in (
        *(compare_values, compare_gradients, compare_dynamic, compare_operands),
        *(compare_means, compare_losses, compare_products, compare_layers),
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_take_any_layout_in_the_interpreter(check):
    interpreted(__name__, f"[{check}('cpu', dtype) for dtype in DTYPES.values()]")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels_take_any_layout(check, dtype):
    CHECKS[check]("cuda", DTYPES[dtype])
