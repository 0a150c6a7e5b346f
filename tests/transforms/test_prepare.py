from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.nn import PackedLinear
from qat.numerics.formats import IntFormat
from qat.numerics.metrics import sqnr
from qat.numerics.qtensor import QParams
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    Quantizer,
    TableQuantizer,
    VectorQuantizer,
)
from qat.transforms import quant_layers, uncalibrated
from tests.conftest import tiny_llama

LSQ3 = partial(LSQQuantizer, bits=3, granularity="per_group_32")
TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
RANDOM8 = partial(TOKEN8, rounding="stochastic")
STATIC8 = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)
SCHEMES = {
    "lsq": qat.Scheme(weight=LSQ3),
    "lsq_plus": qat.Scheme(weight=partial(LSQ3, symmetric=False)),
    "kmeans": qat.Scheme(weight=partial(KMeansQuantizer, bits=3)),
    "nf4_double": qat.Scheme(weight=partial(TableQuantizer, double_quant=True)),
    "w4a8": qat.Scheme(weight=partial(MinMaxQuantizer, bits=4), input=TOKEN8),
    "static": qat.Scheme(weight=LSQ3, input=STATIC8, output=partial(LSQQuantizer, bits=8, granularity="per_tensor")),
    "head_too": qat.Scheme(weight=LSQ3, head=True),
}


def tokens(batch=2):
    return torch.randint(0, 96, (batch, 17))


def prepared(scheme):
    model = qat.prepare(tiny_llama(), scheme).eval()
    return qat.calibrate(model, [{"input_ids": tokens()} for _ in range(2)])


@pytest.mark.parametrize("name", SCHEMES)
def test_the_grid_contract_of_a_whole_model(name, tmp_path):
    """Fake-quantized, converted, saved and reloaded: the same logits to the bit."""
    model, ids = prepared(SCHEMES[name]), tokens()
    with torch.no_grad():
        trained = model(ids).logits
        converted = qat.convert(model)(ids).logits
        loaded = qat.load(qat.save(model, tmp_path / "artifact"))
        reloaded = loaded(ids).logits
    assert torch.equal(trained, converted)
    assert torch.equal(trained, reloaded)
    assert not any("quantizers" in type(m).__module__ for m in loaded.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_prepare_keeps_the_parameters():
    model = tiny_llama()
    before = {name: id(p) for name, p in model.named_parameters()}
    qat.prepare(model, SCHEMES["lsq"])
    after = {name: id(p) for name, p in model.named_parameters()}
    assert before.items() <= after.items()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert type(model.lm_head) is nn.Linear


def test_only_what_the_rules_say():
    rules = {
        "down": {"match": "*.down_proj", "weight": partial(MinMaxQuantizer, bits=8)},
        "first": qat.Rule("model.layers.0.*"),
    }
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3, rules=rules, exclude=["*.k_proj"]))
    layers = dict(quant_layers(model))
    assert layers["model.layers.0.mlp.down_proj"].weight_quantizer.format.name == "int8"
    assert layers["model.layers.1.mlp.up_proj"].weight_quantizer.format.name == "int3"
    assert "model.layers.0.mlp.up_proj" not in layers
    assert "model.layers.1.self_attn.k_proj" not in layers


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (qat.Scheme(weight=LSQ3, rules={"x": qat.Rule("*.dwn_proj")}), r"rule 'x' .* matches no layer. Did you"),
        (qat.Scheme(weight=LSQ3, rules={"x": {"mach": "*"}}), "no option 'mach'. Did you mean 'match'"),
        (qat.Scheme(weight=LSQ3, rules={"x": {}}), "set scheme.rules.x.match"),
        (qat.Scheme(weight=LSQ3, exclude=["*.nothing"]), "exclude .* matches no layer"),
        (
            qat.Scheme(weight=partial(LSQ3, granularity="per_group_48")),
            "layers.0.*48 does not divide 64. Sizes that do",
        ),
        (qat.Scheme(weight=partial(LSQ3, bits=9)), "2 to 8 bits"),
        (qat.Scheme(weight=LSQ3, exclude="*"), "excludes every layer"),
        (
            qat.Scheme(weight=LSQ3, exclude=["*.mlp.*"], rules={"x": qat.Rule("*.up_proj", weight=LSQ3)}),
            r"rule 'x' .* is never used: earlier ones take model.layers.0.mlp.up_proj",
        ),
        (
            qat.Scheme(weight=LSQ3, rules={"x": qat.Rule("lm_head", weight=LSQ3)}),
            "matches only the output head lm_head, which stays in full precision unless scheme.head=true",
        ),
        (qat.Scheme(weight=partial(LSQ3, bitz=3)), "refused its options.*bitz"),
    ],
)
def test_bad_schemes_name_the_mend(scheme, message):
    with pytest.raises(InputError, match=message):
        qat.prepare(tiny_llama(), scheme)


def test_a_refused_scheme_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(64, 60), nn.Linear(60, 64))
    with pytest.raises(InputError, match="does not divide 60"):
        qat.prepare(model, qat.Scheme(weight=partial(LSQ3, granularity="per_group_64")))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_weight_that_is_no_number_is_not_packed():
    model = qat.prepare(nn.Sequential(nn.Linear(64, 8)), SCHEMES["lsq"])
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight of 0 holds NaN"):
        qat.convert(model)


def test_calibration_sees_every_feature():
    """One feature in 576 is fifty times as large, and a learned scale has to know it."""
    x = torch.randn(1, 256, 576)
    x[..., 17] *= 50
    learned = partial(LSQQuantizer, bits=8, granularity="per_tensor")
    model = qat.prepare(nn.Sequential(nn.Linear(576, 8)), qat.Scheme(weight=LSQ3, input=learned))
    qat.calibrate(model, [x])
    with torch.no_grad():
        assert sqnr(x, model[0].input_quantizer(x)) > 15


def test_what_cannot_be_swapped_is_refused():
    with pytest.raises(InputError, match="wrap it"):
        qat.prepare(nn.Linear(64, 64), SCHEMES["lsq"])
    with pytest.raises(InputError, match=r"Call qat.prepare"):
        qat.convert(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(InputError, match="would group different texts"):
        qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3, input=partial(MinMaxQuantizer, granularity="per_channel")))


def test_preparing_twice_is_refused():
    with pytest.raises(InputError, match="prepared already"):
        qat.prepare(qat.prepare(nn.Sequential(nn.Linear(64, 64)), SCHEMES["lsq"]), SCHEMES["lsq"])


def test_a_shared_weight_has_one_quantizer_and_one_packed_tensor():
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    model = qat.prepare(nn.Sequential(first, second), SCHEMES["lsq"])
    assert model[0].weight_quantizer is model[1].weight_quantizer
    qat.convert(model)
    assert model[0].weight is model[1].weight


def test_gpt2_is_swapped_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4)).eval()
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
        qat.prepare(model, qat.Scheme(weight=partial(MinMaxQuantizer, bits=8)))
        after = model(ids).logits
    assert len(list(quant_layers(model))) == 8
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 0.05 * before.abs().max()


def test_static_quantizers_wait_for_calibration():
    model = qat.prepare(tiny_llama(), SCHEMES["static"])
    assert len(uncalibrated(model)) == 2 * 14
    with pytest.raises(InputError, match="never calibrated"):
        model(tokens())
    with pytest.raises(InputError, match="saw no data"):
        qat.calibrate(model, [])
    qat.calibrate(model, [(tokens(),), tokens()])
    assert not uncalibrated(model)


def test_calibration_finds_the_extremes_of_all_batches():
    layer = qat.prepare(nn.Sequential(nn.Linear(64, 8)), qat.Scheme(weight=LSQ3, input=STATIC8))
    batches = [torch.randn(4, 64), 3 * torch.randn(4, 64), torch.randn(4, 64)]
    qat.calibrate(layer, batches)
    largest = torch.cat(batches).abs().max()
    assert torch.allclose(layer[0].input_quantizer.scale * 127, largest, rtol=0.01)


def test_activations_without_a_weight_quantizer_are_refused():
    with pytest.raises(InputError, match="no weight quantizer: give its rule a weight"):
        qat.prepare(nn.Sequential(nn.Linear(64, 8)), qat.Scheme(input=TOKEN8))


class Unnamed(Quantizer):
    """Computes its scale from x, and names no rule for it."""

    def __init__(self, shape):
        super().__init__(shape, IntFormat(8), "per_tensor")

    def qparams(self, x):
        return QParams(x.abs().max().view(1) / 127)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(LSQQuantizer, granularity="per_channel"), "per_tensor or per_channel_-1, not per_channel"),
        (partial(KMeansQuantizer, granularity="per_group_32"), "per_tensor or per_channel_-1"),
        (Unnamed, "is for weights: no named rule"),
        (NVFP4Quantizer, "NVFP4Quantizer is for weights: .* take mxfp4"),
        (partial(TableQuantizer, granularity="per_token", double_quant=True), "set double_quant=false"),
        (
            partial(VectorQuantizer, bits=2, granularity="per_tensor"),
            "vector codebooks .* are for weights; take minmax_token",
        ),
        (partial(MinMaxQuantizer, granularity="per_channel_-1"), "would span the tokens of a call, .* take per_token"),
        (RANDOM8, "random rounding is for gradients, .* set rounding=nearest"),
    ],
    ids=["lsq", "kmeans", "unnamed", "nvfp4", "double", "vectors", "dynamic channel", "random"],
)
@pytest.mark.parametrize("role", ["input", "output"])
def test_activation_quantizers_that_cannot_be_stored_are_refused(factory, message, role):
    with pytest.raises(InputError, match=f"0, {role} of shape .64.: .*{message}"):
        qat.prepare(nn.Sequential(nn.Linear(64, 64)), qat.Scheme(weight=LSQ3, **{role: factory}))


def test_a_weight_is_not_rounded_at_random():
    """Its codes would be drawn anew when it is packed: others than those that trained."""
    model, scheme = nn.Sequential(nn.Linear(64, 8)), qat.Scheme(weight=partial(RANDOM8, granularity="per_channel"))
    with pytest.raises(InputError, match=r"0, weight of shape .8, 64.: random rounding is for gradients"):
        qat.prepare(model, scheme)


@pytest.mark.parametrize("role", ["weight", "input", "output", "grad", "kv"])
def test_nothing_means_full_precision(role):
    """As `scheme.input=null` says on the command line."""
    model = qat.prepare(tiny_llama(), qat.Scheme(**{"weight": LSQ3, "grad": TOKEN8, role: None}))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer.weight_quantizer, Quantizer) == (role != "weight")
    assert isinstance(layer.grad_quantizer, Quantizer) == (role != "grad")
    assert not any(isinstance(q, Quantizer) for q in (layer.input_quantizer, layer.output_quantizer))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_artifact_that_is_cast_computes_as_the_model_that_was(name, dtype, tmp_path):
    """A cast reaches neither scales nor codebooks, nor activations' static scales."""
    model = qat.prepare(tiny_llama().to(dtype), SCHEMES[name]).eval()
    qat.calibrate(model, [{"input_ids": tokens()} for _ in range(2)])
    ids = tokens()
    trained = model(ids).logits
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    before = {key: value.dtype for key, value in loaded.state_dict().items() if value.is_floating_point()}
    loaded.to(dtype)
    assert torch.equal(loaded(ids).logits, trained)
    stored = [key for key in before if key.rpartition(".")[2] in ("scale", "codebook", "offset")]
    assert all(loaded.state_dict()[key].dtype == before[key] for key in stored)


def test_a_packed_weight_follows_a_cast_as_a_weight_does():
    (layer,) = qat.convert(qat.prepare(nn.Sequential(nn.Linear(64, 8)), SCHEMES["nf4_double"]))
    exact = layer.weight.dequantize()
    layer.bfloat16()
    assert layer.weight.dequantize().dtype == torch.bfloat16
    assert layer.weight.description["dtype"] == "bfloat16"
    assert torch.equal(layer.weight.dequantize(torch.float32), exact)
    assert torch.equal(layer.weight.dequantize(), exact.bfloat16())


def test_a_packed_layer_is_small():
    model = qat.convert(qat.prepare(nn.Sequential(nn.Linear(256, 256, bias=False)), SCHEMES["lsq"]))
    assert isinstance(model[0], PackedLinear)
    assert sum(b.numel() * b.element_size() for b in model.buffers()) == 256 * 256 * 3 // 8 + 256 * 8 * 2


def test_what_is_stored_holds_no_graph():
    model = qat.convert(prepared(SCHEMES["static"]))
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_training_overfits_one_batch():
    model = qat.prepare(tiny_llama(), SCHEMES["lsq"])
    ids = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_changes_nothing():
    ids = tokens()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = qat.prepare(tiny_llama(), SCHEMES["w4a8"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
