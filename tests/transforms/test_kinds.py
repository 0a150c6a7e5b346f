"""Every kind of layer that holds weights goes the whole way: prepare, train, convert, save, load."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.export.artifact import bits_per_weight
from qat.nn import PackedConv1d, PackedConv2d, PackedLayer, QuantConv2d, QuantEmbedding, QuantExperts
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, Quantizer, TableQuantizer
from qat.transforms import quant_layers
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, small_cnn, tiny_gpt2, tiny_gpt_oss, tiny_mixtral, tiny_qwen2_moe

LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
CHANNEL8 = partial(MinMaxQuantizer, bits=8, granularity="per_channel_-1", dynamic=False)
EVERYTHING = {"head": True, "embedding": True}
WEIGHTS = {
    "lsq": LSQ4,
    "kmeans per channel": partial(KMeansQuantizer, bits=3),
    "nf4 double": partial(TableQuantizer, granularity="per_group_32", double_quant=True),
    "asymmetric blocks": partial(MinMaxQuantizer, bits=4, symmetric=False, granularity="per_block_8x16"),
}
CNN_WEIGHTS = {
    "lsq per channel": partial(LSQQuantizer, bits=4, granularity="per_channel"),
    "kmeans per tensor": partial(KMeansQuantizer, bits=3, granularity="per_tensor"),
    "flat groups": partial(MinMaxQuantizer, bits=4, granularity="per_flat_group_64"),
    "per input": partial(MinMaxQuantizer, bits=4, granularity="per_channel_-1"),
}


def tokens(batch=2):
    return torch.randint(0, 96, (batch, 17))


def every_gradient_is_there(model):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.flatten().abs().sum() > 0, name


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("build", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_the_grid_contract_of_language_models(build, weight, tmp_path):
    model, ids = build().eval(), tokens()
    qat.prepare(model, qat.Scheme(weight=weight, input=TOKEN8, **EVERYTHING))
    with torch.no_grad():
        trained = model(ids).logits
        bits = bits_per_weight(model)
        converted = qat.convert(model)(ids).logits
        loaded = qat.load(qat.save(model, tmp_path / "artifact"))
        assert torch.equal(trained, converted)
        assert torch.equal(trained, loaded(ids).logits)
    assert bits == bits_per_weight(model) == bits_per_weight(loaded)
    assert not any(isinstance(module, Quantizer) for module in loaded.modules())


@pytest.mark.parametrize("build", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_gradients_reach_weights_and_learned_scales(build):
    model, ids = qat.prepare(build(), qat.Scheme(weight=LSQ4, input=TOKEN8, **EVERYTHING)), tokens(4)
    model(ids, labels=ids).loss.backward()
    every_gradient_is_there(model)


@pytest.mark.parametrize("weight", CNN_WEIGHTS.values(), ids=CNN_WEIGHTS)
@pytest.mark.parametrize("activations", [TOKEN8, CHANNEL8], ids=["per token", "per channel"])
def test_the_grid_contract_of_convolutions(weight, activations, tmp_path):
    x = torch.randn(2, 4, 12, 12)
    model = qat.prepare(small_cnn(), qat.Scheme(weight=weight, input=activations, output=activations))
    qat.calibrate(model, [x])
    trained = model(x)
    trained.square().sum().backward()
    every_gradient_is_there(model)
    qat.convert(model)
    loaded = qat.load(qat.save(model, tmp_path / "cnn"), small_cnn())
    assert torch.equal(model(x), trained)
    assert torch.equal(loaded(x), trained)
    assert {type(layer) for layer in loaded if isinstance(layer, PackedLayer)} > {PackedConv1d, PackedConv2d}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(64, 32), torch.zeros(0, 64)),
        (nn.Linear(64, 32), torch.zeros(2, 0, 64)),
        (nn.Conv2d(64, 32, 1), torch.zeros(0, 64, 3, 3)),
        (nn.Embedding(32, 64), torch.zeros(0, dtype=torch.long)),
    ],
    ids=["linear", "linear, batch", "conv2d", "embedding"],
)
def test_no_token_at_all_is_computed_too(layer, x, weight):
    """As an expert is asked to that no token chose."""
    activations = {} if isinstance(layer, nn.Embedding) else {"input": TOKEN8, "grad": TOKEN8}
    scheme = qat.Scheme(weight=weight, output=TOKEN8, embedding=isinstance(layer, nn.Embedding), **activations)
    model = qat.prepare(nn.Sequential(deepcopy(layer)), scheme)
    y = model(x)
    y.sum().backward()
    assert y.numel() == 0
    assert model[0].weight.grad.abs().sum() == 0
    assert qat.convert(model)(x).shape == y.shape


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("build", [tiny_mixtral, tiny_gpt_oss], ids=["[out, in]", "[in, out]"])
def test_experts_that_no_token_chose_get_no_gradient(build, implementation):
    model = qat.prepare(build(), qat.Scheme(weight=LSQ4, input=TOKEN8, output=TOKEN8, grad=TOKEN8))
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    hidden, chosen = torch.randn(3, 64, requires_grad=True), torch.tensor([[2], [0], [2]])
    y = experts(hidden, chosen, torch.ones(3, 1))
    y.square().sum().backward()
    reached = experts.down_proj.grad.flatten(1).abs().sum(1) > 0
    assert reached.tolist() == [True, False, True, False]
    assert torch.isfinite(experts.gate_up_proj_quantizer.log_scale.grad).all()
    assert torch.equal(qat.convert(model).model.layers[0].mlp.experts(hidden, chosen, torch.ones(3, 1)), y)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_run_as_transformers_was_told_to(implementation, tmp_path):
    model, ids = tiny_mixtral().eval(), tokens()
    model.set_experts_implementation(implementation)
    qat.prepare(model, qat.Scheme(weight=LSQ4))
    with torch.no_grad():
        trained = model(ids).logits
        loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
        assert torch.equal(loaded(ids).logits, trained)
    assert loaded.config._experts_implementation == implementation


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_gpt_oss], ids=["[out, in]", "[in, out]"])
def test_eight_bit_experts_answer_almost_as_before(build):
    model, ids = build().eval(), tokens()
    with torch.no_grad():
        before = model(ids).logits
        qat.prepare(model, qat.Scheme(weight=partial(MinMaxQuantizer, bits=8, granularity="per_channel")))
        after = model(ids).logits
    assert not torch.equal(before, after)
    assert (before - after).abs().max() < 0.05 * before.abs().max()


def test_every_output_of_every_expert_has_a_scale():
    for build in (tiny_mixtral, tiny_gpt_oss):
        model = qat.prepare(build(), qat.Scheme(weight=partial(LSQQuantizer, granularity="per_channel")))
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj_quantizer.log_scale.shape == (4 * 2 * 96, 1)
        assert experts.down_proj_quantizer.log_scale.shape == (4 * 64, 1)
        assert experts.num_experts == 4


def test_experts_keep_their_names_and_parameters():
    model = tiny_gpt_oss()
    before = {name: id(p) for name, p in model.named_parameters()}
    qat.prepare(model, qat.Scheme(weight=LSQ4))
    assert before.items() <= {name: id(p) for name, p in model.named_parameters()}.items()
    twin = deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj += 1
    ids = tokens()
    assert not torch.equal(model(ids).logits, twin(ids).logits)


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_qwen2_moe], ids=["mixtral", "qwen2 moe"])
def test_routers_and_norms_stay_in_full_precision(build):
    model = qat.prepare(build(), qat.Scheme(weight=LSQ4))
    names = {name.rpartition(".")[2] for name, _ in quant_layers(model)}
    assert "experts" in names
    assert not {name for name in names if "gate" in name and name != "gate_proj"}
    assert not {name for name in names if "norm" in name}


def test_a_router_that_is_a_linear_layer_stays_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 4)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    model = qat.prepare(nn.Sequential(Block()), qat.Scheme(weight=LSQ4))
    assert type(model[0].gate) is nn.Linear
    assert len(list(quant_layers(model))) == 4
    with pytest.raises(InputError, match=r"matches only the router 0.gate, which stays in full precision"):
        qat.prepare(nn.Sequential(Block()), qat.Scheme(weight=LSQ4, rules={"x": qat.Rule("*.gate", weight=LSQ4)}))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(100, 8), torch.randn(2, 100)),
        (nn.Embedding(8, 100), torch.arange(3)),
        (nn.Conv2d(4, 8, 5), torch.randn(1, 4, 5, 5)),
    ],
    ids=["linear", "embedding", "conv2d"],
)
def test_odd_sizes_are_refused_with_those_that_work_or_padded(layer, x):
    grouped = partial(MinMaxQuantizer, bits=4, granularity="per_group_64")
    embedding = isinstance(layer, nn.Embedding)
    with pytest.raises(InputError, match=r"64 does not divide 100. Sizes that do: 10, 20, 25, 50, 100"):
        qat.prepare(nn.Sequential(layer), qat.Scheme(weight=grouped, embedding=embedding))
    padded = partial(MinMaxQuantizer, bits=4, granularity="per_flat_group_64")
    model = qat.prepare(nn.Sequential(layer), qat.Scheme(weight=padded, embedding=embedding))
    trained = model(x)
    assert torch.equal(qat.convert(model)(x), trained)


def test_the_weights_of_experts_are_named_where_a_size_does_not_fit():
    grouped = partial(MinMaxQuantizer, granularity="per_group_64")
    with pytest.raises(InputError, match=r"mlp.experts.down_proj, .* 64 does not divide 96. Sizes that do: 8, 12, 16"):
        qat.prepare(tiny_mixtral(), qat.Scheme(weight=grouped))


def test_full_precision_layers_of_gpt2_load_too(tmp_path):
    model, ids = tiny_gpt2().eval(), tokens()
    qat.prepare(model, qat.Scheme(weight=LSQ4, exclude="*.mlp.*"))
    with torch.no_grad():
        trained = model(ids).logits
        loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
        assert torch.equal(loaded(ids).logits, trained)


def test_generation_reads_a_packed_embedding():
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, embedding=True)).eval()
    ids = tokens(1)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(qat.convert(model).generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_mixed_precision_computes_the_same_before_and_after():
    image, ids = torch.randn(2, 4, 12, 12), tokens()
    cnn = qat.prepare(small_cnn(), qat.Scheme(weight=CNN_WEIGHTS["lsq per channel"], input=TOKEN8))
    moe = qat.prepare(tiny_mixtral(), qat.Scheme(weight=LSQ4, **EVERYTHING)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = cnn(image), moe(ids).logits
        assert torch.equal(qat.convert(cnn)(image), trained[0])
        assert torch.equal(qat.convert(moe)(ids).logits, trained[1])


def test_bfloat16_weights_go_the_whole_way(tmp_path):
    model, ids = tiny_gpt_oss().eval(), tokens()
    for parameter in model.parameters():  # and not the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    qat.prepare(model, qat.Scheme(weight=LSQ4, **EVERYTHING))
    with torch.no_grad():
        trained = model(ids).logits
        loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
        assert torch.equal(loaded(ids).logits, trained)


def test_rules_choose_among_kinds():
    rules = {"experts": {"match": "*.experts", "weight": partial(MinMaxQuantizer, bits=2, granularity="per_group_32")}}
    model = qat.prepare(tiny_mixtral(), qat.Scheme(weight=LSQ4, rules=rules))
    layers = dict(quant_layers(model))
    assert isinstance(layers["model.layers.0.mlp.experts"], QuantExperts)
    assert layers["model.layers.0.mlp.experts"].down_proj_quantizer.format.name == "int2"
    assert layers["model.layers.0.self_attn.q_proj"].weight_quantizer.format.name == "int4"


def test_plain_subclasses_that_compute_something_else_are_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    model = qat.prepare(
        nn.Sequential(Scaled(4, 8, 1), nn.Conv2d(8, 8, 1)), qat.Scheme(weight=WEIGHTS["kmeans per channel"])
    )
    assert type(model[0]) is Scaled
    assert isinstance(model[1], QuantConv2d)


def test_embeddings_wait_to_be_asked_for():
    def net():
        return nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 8))

    model = qat.prepare(net(), qat.Scheme(weight=LSQ4))
    assert type(model[0]) is nn.Embedding
    assert isinstance(qat.prepare(net(), qat.Scheme(weight=LSQ4, embedding=True))[0], QuantEmbedding)
    with pytest.raises(InputError, match=r"embedding 0, which stays in full precision unless scheme.embedding=true"):
        qat.prepare(net(), qat.Scheme(weight=LSQ4, rules={"x": qat.Rule("0", weight=LSQ4)}))


def test_an_embedding_takes_no_input_quantizer():
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, input=TOKEN8, embedding=True))
    assert not isinstance(model.get_input_embeddings().input_quantizer, Quantizer)
    rules = {"table": qat.Rule("*.embed_tokens", weight=LSQ4, input=TOKEN8)}
    with pytest.raises(InputError, match=r"embed_tokens is an embedding: .* takes no input"):
        qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, rules=rules, embedding=True))


def test_embeddings_that_are_not_there_are_named():
    with pytest.raises(InputError, match=r"has no nn.Embedding: set scheme.embedding=false"):
        qat.prepare(nn.Sequential(nn.Linear(64, 8)), qat.Scheme(weight=LSQ4, embedding=True))


def test_an_embedding_that_rescales_its_rows_is_refused():
    with pytest.raises(InputError, match="0: An embedding with max_norm"):
        qat.prepare(nn.Sequential(nn.Embedding(8, 64, max_norm=1.0)), qat.Scheme(weight=LSQ4, embedding=True))
