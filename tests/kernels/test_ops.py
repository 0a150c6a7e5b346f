import pytest
import torch
from torch.nn import functional as F

from qat.errors import InputError
from qat.kernels import dispatch, ops
from qat.kernels.linear import fake_quantized_linear
from qat.numerics import functional
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.qtensor import QParams
from qat.scratch import scratch

CASES = [
    ("int3", "per_group_16"),
    ("int8", "per_tensor"),
    ("uint4", "per_channel"),
    ("int4", "per_block_8x16"),
    ("codebook8", "per_channel"),
    ("codebook16", "per_group_16"),
    ("codebook3", "per_tensor"),
    ("int4", "per_flat_group_100"),
]
LARGE = (520, 1040)  # more than one cache-sized piece, and no multiple of it


def case(name, spelling, shape):
    """A grid that clips some of x, with every qparam learned."""
    format, granularity = parse_format(name), parse_granularity(spelling)
    x = torch.randn(shape, requires_grad=True)
    sizes = granularity.param_shape(shape)
    step = 2.0 / format.range()[1]
    scale = (step * (0.8 + 0.4 * torch.rand(sizes))).requires_grad_()
    zero_point = torch.full(sizes, 7.0, requires_grad=True) if name.startswith("uint") else None
    codebook = torch.randn(*sizes, format.entries).sort().values.requires_grad_() if "book" in name else None
    return x, QParams(scale, zero_point, codebook), format, granularity


@pytest.mark.parametrize("shape", [(24, 48), LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_the_operator_equals_the_definition(name, spelling, shape):
    x, qparams, format, granularity = case(name, spelling, shape)
    leaves = [x, *(field for field in qparams if field is not None)]
    g = torch.randn(shape)
    fused, expected = (
        ops.fake_quantize(x, qparams, format, granularity),
        functional.fake_quantize(x, qparams, format, granularity),
    )
    assert torch.equal(fused, expected)
    for a, b in zip(torch.autograd.grad(fused, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize(("name", "spelling"), [*CASES, ("fp8_e4m3", "per_tensor"), ("fp4_e2m1", "per_channel")])
def test_what_is_no_number_stays_none(name, spelling):
    """Neither a value of a grid nor a member of a codebook's entry; inside of no grid that clips."""
    x, qparams, format, granularity = case(name, spelling, (24, 48))
    x.data[5, 7] = torch.nan
    leaves, g = [x, *(field for field in qparams if field is not None)], torch.randn(24, 48)
    fused = ops.fake_quantize(x, qparams, format, granularity)
    assert fused.isnan().nonzero().tolist() == [[5, 7]]
    found, expected = (
        torch.autograd.grad(y, leaves, g) for y in (fused, functional.fake_quantize(x, qparams, format, granularity))
    )
    assert found[0][5, 7] == (0 if format.saturates else g[5, 7])
    assert found[1].isnan().sum() == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kept", [True, False], ids=["codes kept", "codes found anew"])
@pytest.mark.parametrize("name", ["int3", "codebook8"])
def test_a_weight_that_is_no_number_stays_none(name, kept, monkeypatch):
    monkeypatch.setattr(ops, "keeps_codes", lambda weight: kept)
    weight, qparams, format, granularity = case(name, "per_channel", (24, 48))
    weight.data[5, 7] = torch.nan
    x = torch.randn(3, 48, requires_grad=True)
    y = fake_quantized_linear(x, weight, None, qparams, format, granularity)
    assert y.isnan().nonzero()[:, 1].unique().tolist() == [5]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isnan().nonzero()[:, 1].unique().tolist() == [7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_the_linear_layer_equals_its_two_parts(name, spelling, dtype):
    weight, qparams, format, granularity = case(name, spelling, (24, 48))
    weight = weight.detach().to(dtype).requires_grad_()
    x, bias = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True), torch.randn(24, dtype=dtype, requires_grad=True)
    leaves = [x, weight, bias, *(field for field in qparams if field is not None)]
    g = torch.randn(2, 5, 24, dtype=dtype)
    fused = fake_quantized_linear(x, weight, bias, qparams, format, granularity)
    parts = F.linear(x, functional.fake_quantize(weight, qparams, format, granularity), bias)
    assert torch.equal(fused, parts)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(torch.autograd.grad(fused, leaves, g), torch.autograd.grad(parts, leaves, g), strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_a_shared_gradient_is_not_overwritten():
    """The backward pass works in place, but never on memory that autograd still hands to others."""
    x, qparams, format, granularity = case("int3", "per_group_16", (24, 48))
    g = torch.randn(24, 48)
    before = g.clone()
    ops.fake_quantize(x, qparams, format, granularity).backward(g)
    assert torch.equal(g, before)


def test_autocast_computes_in_its_dtype():
    weight, qparams, format, granularity = case("int4", "per_group_16", (24, 48))
    x = torch.randn(3, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = fake_quantized_linear(x, weight, None, qparams, format, granularity)
        expected = F.linear(x, functional.fake_quantize(weight, qparams, format, granularity))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    leaves = [weight, *(field for field in qparams if field is not None)]
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert a.dtype == torch.float32
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


def test_autocast_leaves_doubles_alone():
    weight, qparams, format, granularity = case("int4", "per_group_16", (24, 48))
    with torch.autocast("cpu", torch.bfloat16):
        y = fake_quantized_linear(torch.randn(3, 48).double(), weight.double(), None, qparams, format, granularity)
    assert y.dtype == torch.float64


def test_a_single_vector_goes_through_both_passes():
    weight, qparams, format, granularity = case("int4", "per_group_16", (24, 48))
    x = torch.randn(48, requires_grad=True)
    fused = fake_quantized_linear(x, weight, None, qparams, format, granularity)
    parts = F.linear(x, functional.fake_quantize(weight, qparams, format, granularity))
    for a, b in zip(
        torch.autograd.grad(fused.sum(), [x, weight]), torch.autograd.grad(parts.sum(), [x, weight]), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_codebook_shared_by_the_columns_of_a_tensor():
    x, qparams, format, _ = case("codebook8", "per_tensor", (6, 8))
    qparams = qparams._replace(scale=torch.rand(1, 8) + 0.5)
    columns = parse_granularity("per_channel_-1")
    assert torch.equal(
        ops.fake_quantize(x, qparams, format, columns), functional.fake_quantize(x, qparams, format, columns)
    )


@pytest.mark.parametrize("spelling", ["per_channel_-1", "per_tensor"])
@pytest.mark.parametrize("name", ["int4", "uint4", "codebook8"])
def test_no_tokens_are_no_mistake(name, spelling):
    x, qparams, format, granularity = case(name, spelling, (6, 8))
    leaves = [x, *(field for field in qparams if field is not None)]
    none = ops.fake_quantize(x[:0], qparams, format, granularity)
    assert none.shape == (0, 8)
    assert all((g == 0).all() for g in torch.autograd.grad(none.sum(), leaves))
    assert ops.quantize(x[:0], qparams, format, granularity, stochastic=True).shape == (0, 8)


def test_operators_take_tensors_that_are_trained():
    x, qparams, format, granularity = case("uint4", "per_channel", (24, 48))
    assert not ops.quantize(x, qparams, format, granularity).requires_grad
    y = ops.fake_quantize(x, qparams, format, granularity)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_fake_tensors_leave_no_trace_in_scratch_memory():
    from torch._subclasses import FakeTensorMode

    weight, qparams, format, granularity = case("int4", "per_group_16", (24, 48))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake_quantized_linear(torch.randn(3, 48), weight, None, qparams, format, granularity)
    with torch.device("meta"):
        assert scratch("fresh", torch.Size([4]), torch.float32, torch.device("cpu")).device.type == "cpu"
    y = fake_quantized_linear(torch.randn(3, 48), weight, None, qparams, format, granularity)
    assert type(y) is torch.Tensor


def test_operators_are_well_formed():
    x, qparams, format, granularity = case("uint4", "per_channel", (24, 48))
    grid = ops.grid_of(QParams(*(f if f is None else f.detach() for f in qparams)), format, 24)
    view = granularity.view(x.detach())
    codes = torch.ops.qat.quantize(view, *grid)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qat.quantize, (view, *grid), test_utils=checks)
    torch.library.opcheck(torch.ops.qat.dequantize_, (codes, torch.empty(24, 48), *grid), test_utils=checks)
    torch.library.opcheck(torch.ops.qat.fake_quantize, (view, torch.bfloat16, *grid), test_utils=checks)
    torch.library.opcheck(torch.ops.qat.restore_, (view, None, torch.empty(24, 48), *grid), test_utils=checks)
    backward = (torch.randn(24, 48), view, codes, torch.empty(24, 48), [True, True, True, False], *grid)
    torch.library.opcheck(torch.ops.qat.fake_quantize_backward_, backward, test_utils=checks)
    rule = "minmax", torch.bfloat16
    torch.library.opcheck(torch.ops.qat.fake_quantize_dynamic, (view, x.dtype, *rule, None, "uint4"), test_utils=checks)
    restored = (view, torch.empty(24, 48), *rule, None, "uint4")
    torch.library.opcheck(torch.ops.qat.restore_dynamic_, restored, test_utils=checks)
    torch.library.opcheck(torch.ops.qat.dynamic_params, (view, *rule, "uint4"), test_utils=checks)


def test_past_the_dispatcher_everything_is_the_same(monkeypatch):
    """On a GPU, where nobody watches."""

    def computed():
        torch.manual_seed(0)
        found = []
        for name, granularity in [("uint4", "per_group_16"), ("codebook8", "per_channel"), ("fp4_e2m1", "per_channel")]:
            x, qparams, format, cut = case(name, granularity, (24, 48))
            y = ops.fake_quantize(x, qparams, format, cut)
            found += [y, *torch.autograd.grad(y.square().sum(), [x, qparams.scale])]
        x = torch.randn(8, 32, requires_grad=True)
        y = ops.fake_quantize_dynamic(x, "absmax", parse_format("int8"), parse_granularity("per_token"), torch.bfloat16)
        return [*found, y, *torch.autograd.grad(y.square().sum(), x)]

    expected = computed()
    monkeypatch.setattr(dispatch, "_is_watched", lambda x: torch.is_grad_enabled())
    for a, b in zip(computed(), expected, strict=True):
        assert torch.equal(a, b)


def test_a_scale_for_another_tensor_is_refused():
    x, qparams, format, granularity = case("int4", "per_channel", (24, 48))
    with pytest.raises(InputError, match="24 scales, but the tensor it was given has 12 groups"):
        ops.fake_quantize(x[:12], qparams, format, granularity)


def test_backward_keeps_a_byte_a_weight():
    """Between the passes autograd holds x, the weight itself, its codes and the qparams: no second weight."""
    weight, qparams, format, granularity = case("int4", "per_channel", (256, 512))
    x = torch.randn(4, 512, requires_grad=True)
    own = {t.data_ptr() for t in (weight, x)}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fake_quantized_linear(x, weight, None, qparams, format, granularity)
    assert sum(kept) <= 256 * 512 + 8 * 256
