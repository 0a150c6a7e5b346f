"""Products of codes compute what fake quantization does, and where gradients are rounded at random, in expectation."""

from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import qat
from qat.kernels import dispatch, product_ops
from qat.kernels.ops import reference_kernels
from qat.kernels.scaled_product import tensor_cores
from qat.nn import LowBitLinear, PackedLinear, QuantLinear
from qat.quantizers import LSQQuantizer, MinMaxQuantizer
from qat.transforms import quant_layers
from tests.conftest import tiny_llama

ALL = ("forward", "dgrad", "wgrad")
INT8 = partial(MinMaxQuantizer, bits=8, scale_dtype="float32")
TOKEN8 = partial(INT8, granularity="per_token")
STATIC8 = partial(INT8, granularity="per_tensor", dynamic=False)
FP8 = partial(MinMaxQuantizer, format="fp8_e4m3", scale_dtype="float32")
FP8_TOKEN, FP8_STATIC = partial(FP8, granularity="per_token"), partial(FP8, granularity="per_tensor", dynamic=False)
GRAD8 = partial(TOKEN8, rounding="stochastic")
GRAD_FP8 = partial(FP8_TOKEN, format="fp8_e5m2", rounding="stochastic")
LSQ8 = partial(LSQQuantizer, bits=8, granularity="per_tensor")
IN_INT8, IN_FP8 = partial(qat.Scheme, compute="int8"), partial(qat.Scheme, compute="fp8")
SCHEMES = {
    "w8a8": IN_INT8(weight=INT8, input=TOKEN8),
    "per tensor": IN_INT8(
        weight=partial(INT8, granularity="per_tensor"), input=partial(INT8, granularity="per_tensor")
    ),
    "w4a8, learned": IN_INT8(weight=LSQQuantizer, input=TOKEN8),
    "static": IN_INT8(weight=LSQ8, input=STATIC8),
    "learned input": IN_INT8(weight=INT8, input=LSQ8),
    "fp8": IN_FP8(weight=FP8, input=FP8_TOKEN),
    "fp8, static": IN_FP8(weight=FP8, input=FP8_STATIC),
}
TENSOR_GRAD8 = partial(GRAD8, granularity="per_tensor")
BACKWARD = {
    "int8": IN_INT8(weight=INT8, input=TOKEN8, grad=GRAD8, products=ALL),
    "int8, per tensor": IN_INT8(weight=INT8, input=TOKEN8, grad=TENSOR_GRAD8, products=ALL),
    "w4a8": IN_INT8(weight=LSQQuantizer, input=TOKEN8, grad=GRAD8, products=ALL),
    "fp8": IN_FP8(weight=FP8, input=FP8_TOKEN, grad=GRAD_FP8, products=ALL),
}


def layer_of(scheme, *sizes, bias=True):
    """A prepared, calibrated layer in training."""
    model = qat.prepare(nn.Sequential(nn.Linear(*sizes, bias)), scheme).train()
    return qat.calibrate(model, [torch.randn(64, sizes[0])])[0]


def gradients(layer, x, g):
    """y, and the gradients of x and of every parameter by name."""
    leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    y = layer(x)
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(3, 17, 40), (5, 40)], ids=str)
def test_values_and_gradients_are_those_of_fake_quantization(name, shape):
    """Also beyond a static grid, where x has no gradient, and for learned scales."""
    layer = layer_of(SCHEMES[name], 40, 24)
    x, g = 2 * torch.randn(shape), torch.randn(*shape[:-1], 24)
    y, found = gradients(layer.train(), x, g)
    expected_y, expected = gradients(layer.eval(), x, g)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    if name in ("static", "learned input"):
        assert (found["x"] == 0).any()


@pytest.mark.parametrize("name", SCHEMES)
def test_bfloat16_is_closer_to_the_exact_product_than_fake_quantization(name):
    """Which rounds what it multiplies to bfloat16."""
    layer = layer_of(SCHEMES[name], 256, 64, bias=False)
    x = torch.randn(32, 256)
    exact = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        fake, codes = layer(x), layer.train()(x)
    assert codes.dtype == fake.dtype == torch.bfloat16
    assert (codes.float() - exact).norm() < (fake.float() - exact).norm()
    assert (codes.float() - exact).norm() < 3e-3 * exact.norm()


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_the_reference_computes_the_same(compute):
    layer, x = layer_of(SCHEMES["w8a8" if compute == "int8" else "fp8"], 40, 24), torch.randn(9, 40)
    y = layer(x)
    with reference_kernels():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_of_all_products_are_unbiased(name):
    draws = 400
    layer, x, g = layer_of(BACKWARD[name], 16, 8), torch.randn(12, 16), torch.randn(12, 8)
    layer.grad_quantizer.enabled = False
    _, exact = gradients(layer.eval(), x, g)
    layer.grad_quantizer.enabled = True
    drawn = [gradients(layer.train(), x, g)[1] for _ in range(draws)]
    for key, value in exact.items():
        samples = torch.stack([draw[key] for draw in drawn])
        spread = samples.std(0) / draws**0.5
        off = (samples.mean(0) - value).abs() / spread.clamp(min=1e-6 * float(value.abs().max()))
        assert off.max() < 5.5, key
        if key in ("x", "weight"):
            assert 1e-4 < (samples[0] - value).norm() / value.norm() < (0.05 if "fp8" not in name else 0.3)
        if key == "bias":
            torch.testing.assert_close(samples[0], value)  # it is a sum, and sees the gradient in full


def test_weights_and_inputs_are_multiplied_exactly_in_the_backward_pass():
    """Gradients that lie on the grid once the scale of the other operand is in them lose nothing."""
    layer = layer_of(BACKWARD["int8"], 16, 8, bias=False)
    x = torch.randn(12, 16)
    w_scale = layer.weight_quantizer.qparams(layer.weight).scale
    whole = torch.randint(-127, 128, (12, 8)).float()
    whole[:, 0] = 127
    _, found = gradients(layer, x, whole / w_scale.T)
    expected = (whole / w_scale.T) @ layer.weight_quantizer(layer.weight)
    torch.testing.assert_close(found["x"], expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    x_scale = layer.input_quantizer.qparams(x).scale
    whole[0] = 127
    _, found = gradients(layer, x, whole / x_scale)
    expected = (whole / x_scale).T @ layer.input_quantizer(x)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("products", [("forward", "dgrad"), ("forward", "wgrad")], ids=str)
def test_a_product_that_is_not_listed_sees_the_gradient_in_full(products):
    scheme = IN_INT8(weight=INT8, input=TOKEN8, grad=GRAD8, products=products)
    layer, x, g = layer_of(scheme, 16, 8), torch.randn(12, 16), torch.randn(12, 8)
    _, found = gradients(layer, x, g)
    exact = {"x": g @ layer.weight_quantizer(layer.weight), "weight": g.T @ layer.input_quantizer(x)}
    same = {key: torch.allclose(found[key], value, atol=1e-5) for key, value in exact.items()}
    assert same == {"x": "dgrad" not in products, "weight": "wgrad" not in products}


def test_beside_the_forward_product_alone_gradients_are_quantized_as_without_it():
    scheme = IN_INT8(weight=INT8, input=TOKEN8, grad=TOKEN8)
    layer, x, g = layer_of(scheme, 16, 8), torch.randn(12, 16), torch.randn(12, 8)
    _, found = gradients(layer, x, g)
    g_hat = layer.grad_quantizer(g)
    assert torch.allclose(found["x"], g_hat @ layer.weight_quantizer(layer.weight), atol=1e-5)
    assert torch.equal(found["bias"], g_hat.sum(0))


@pytest.fixture
def strict_products(monkeypatch):
    """torch's products with the demands that they have on a GPU, for fp8 too; counts the calls."""
    calls = []

    def demanding(product, types):
        def multiply(a, b, *scales, **options):
            assert (a.dtype, b.dtype) in types
            assert a.stride() == (a.shape[1], 1)
            assert b.stride() == (1, b.shape[0])
            assert a.shape[1] % 16 == b.shape[1] % 16 == 0
            assert a.shape[0] > 16 or product is not int_mm
            if scales and scales[0].numel() > 1:
                assert [tuple(s.shape) for s in scales] == [(a.shape[0], 1), (1, b.shape[1])]
                assert all(s.dtype == torch.float32 and s.is_contiguous() for s in scales)
                assert options["out_dtype"] == torch.bfloat16
            calls.append(product)
            return product(a, b, *scales, **options)

        return multiply

    int_mm, scaled_mm, e4m3 = torch._int_mm, torch._scaled_mm, torch.float8_e4m3fn
    monkeypatch.setattr(torch, "_int_mm", demanding(int_mm, [(torch.int8, torch.int8)]))
    monkeypatch.setattr(torch, "_scaled_mm", demanding(scaled_mm, [(e4m3, e4m3), (torch.float8_e5m2, e4m3)]))
    monkeypatch.setattr(product_ops, "plain_product", tensor_cores)
    return calls


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("sizes", [(48, 32, 64), (7, 20, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_product_is_one_that_a_gpu_takes(name, sizes, dtype, strict_products):
    """Row-major by column-major, sizes in multiples of 16, whatever the layer, the tokens and the layout of dy are."""
    tokens, size_in, size_out = sizes
    layer = layer_of(BACKWARD[name], size_in, size_out).to(dtype)
    x, g = torch.randn(tokens, size_in, dtype=dtype), torch.randn(size_out, tokens, dtype=dtype).T
    strict_products.clear()
    y, found = gradients(layer, x, g)
    assert len(strict_products) == 3
    layer.grad_quantizer.enabled = False
    expected_y, expected = gradients(layer.eval(), x, g)
    rounding = 0.15 if "fp8" in name else 0.02
    assert (y - expected_y).norm() < 0.01 * expected_y.norm()
    for key in ("x", "weight"):
        assert (found[key] - expected[key]).norm() < rounding * expected[key].norm()


OPERATORS = {
    "int8": (["row_codes"], ["gradient_codes", "transposed_codes", "transposed_codes"]),
    "int8, per tensor": (["row_codes"], ["gradient_codes", "transposed_codes", "transposed_codes"]),
    "w4a8": (["quantize"], ["gradient_codes", "transposed_codes", "transposed_codes"]),
    "fp8": (["row_codes"], ["gradient_codes", "transposed_codes", "transposed_codes"]),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_on_a_gpu_a_compiler_is_given_the_kernels_of_weights_and_gradients(name, monkeypatch):
    """And fuses the codes of activations with what makes these. The graph is one, without breaks."""
    monkeypatch.setattr(dispatch, "runs_triton", lambda _: torch.compiler.is_dynamo_compiling())
    torch._dynamo.reset()
    graphs = []

    def note(graph, _):
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        named = [call.name().removeprefix("qat::") for call in calls if getattr(call, "namespace", "") == "qat"]
        graphs.append([call for call in named if call.split("_")[0] in ("row", "gradient", "transposed", "quantize")])
        return make_boxed_func(graph.forward)

    layer, x, g = layer_of(BACKWARD[name], 32, 24), torch.randn(5, 32), torch.randn(5, 24)
    expected_y = layer(x)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=note, bw_compiler=note), fullgraph=True)
    y, found = gradients(compiled, x, g)
    torch.testing.assert_close(y, expected_y)
    assert tuple(graphs) == OPERATORS[name]
    layer.grad_quantizer.enabled = False
    _, expected = gradients(layer.eval(), x, g)
    assert (found["x"] - expected["x"]).norm() < 0.3 * expected["x"].norm()


def bytes_kept(layers, x):
    """What autograd keeps for the backward pass of layers that stand side by side, Parameters left out."""
    kept, own = {}, {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    assert all(y.requires_grad for y in outputs)
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_a_byte_an_input_is_kept_and_once_for_siblings(name):
    layers = [layer_of(SCHEMES[name], 64, 32, bias=False).bfloat16() for _ in range(3)]
    hidden = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True) * 1  # no leaf, as hidden states are
    fake, codes = (bytes_kept([layer.train(mode) for layer in layers], hidden) for mode in (False, True))
    inputs, weights, scales = 512 * 64, 3 * 32 * 64, 4 * (512 + 3 * 32)
    assert codes == inputs + weights + scales
    assert fake >= 2 * inputs


@pytest.mark.parametrize(("name", "keeps_x"), [("static", True), ("learned input", True), ("fp8, static", False)])
def test_x_itself_is_kept_only_where_a_grid_clips(name, keeps_x):
    layer, x = layer_of(SCHEMES[name], 64, 32, bias=False), torch.randn(512, 64)
    assert (bytes_kept([layer], x) > 5 * x.numel()) == keeps_x


def test_masks_are_respected():
    layer = layer_of(BACKWARD["int8"], 16, 8)
    mask = torch.rand(8, 16) > 0.5
    layer.weight_quantizer.set_mask(mask)
    x, g = torch.randn(5, 16), torch.randn(5, 8)
    y, found = gradients(layer, x, g)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-5, atol=1e-5)
    assert (found["weight"][~mask] == 0).all()
    layer.weight_quantizer.dense_gradient = True
    assert (gradients(layer.train(), x, g)[1]["weight"][~mask] != 0).any()


def test_no_tokens():
    layer = layer_of(BACKWARD["int8"], 16, 8)
    y, found = gradients(layer, torch.zeros(0, 16), torch.zeros(0, 8))
    assert y.shape == (0, 8)
    assert found["weight"].eq(0).all()


def test_evaluation_observation_and_partial_strength_multiply_what_codes_stand_for(monkeypatch):
    layer = layer_of(SCHEMES["static"], 16, 8)
    monkeypatch.setattr("qat.nn.low_bit_linear.low_bit_linear", lambda *_: pytest.fail("codes were multiplied"))
    x = torch.randn(4, 16)
    layer.eval()(x)
    layer.train().input_quantizer.strength = torch.tensor(0.5)
    layer(x)
    layer.input_quantizer.strength = None
    layer.input_quantizer.observer = layer.input_quantizer.make_observer()
    layer(x)
    layer.input_quantizer.observer = None
    with pytest.raises(pytest.fail.Exception, match="codes were multiplied"):
        layer(x)


def trained(scheme, steps=40):
    torch.manual_seed(0)
    model, ids = qat.prepare(tiny_llama(), scheme).train(), torch.randint(0, 96, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.02), ("fp8", 0.05)])
def test_training_overfits_one_batch_as_fake_quantization_does(name, tolerance):
    scheme = BACKWARD[name]
    fake = qat.Scheme(weight=scheme.weight, input=scheme.input)
    _, expected = trained(fake)
    model, losses = trained(scheme)
    assert all(isinstance(layer, LowBitLinear) for _, layer in quant_layers(model))
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] == pytest.approx(expected[-1], rel=0.05, abs=tolerance * losses[0])


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_what_ships_is_what_evaluation_computed(name, tmp_path):
    model, _ = trained(BACKWARD[name], steps=2)
    ids = torch.randint(0, 96, (1, 9))
    evaluated = model.eval()(ids).logits
    qat.convert(model)
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    loaded = qat.load(qat.save(model, tmp_path / "artifact"))
    assert torch.equal(loaded(ids).logits, evaluated)


def test_checkpointing_changes_no_gradient():
    ids, found = torch.randint(0, 96, (2, 17)), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = qat.prepare(tiny_llama(), BACKWARD["int8"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rules_choose_layer_by_layer():
    rules = {"down": qat.Rule("*.down_proj", weight=INT8, input=TOKEN8)}
    model = qat.prepare(
        tiny_llama(), qat.Scheme(weight=INT8, input=TOKEN8, compute="int8", rules=rules, embedding=True)
    )
    layers = dict(quant_layers(model))
    assert type(layers["model.layers.0.mlp.down_proj"]) is QuantLinear
    assert type(layers["model.layers.0.mlp.up_proj"]) is LowBitLinear
    assert type(layers["lm_head"]) is LowBitLinear
