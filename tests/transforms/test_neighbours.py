"""Folds: what feeds what, found by experiment, and scales that move without a change of the function."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from qat.errors import InputError
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, NoQuantizer
from qat.transforms import Scheme, fold_scale_, neighbours, prepare, quant_layers, uncalibrated
from qat.transforms.channels import Norm
from qat.transforms.neighbours import divide_outputs_
from qat.transforms.plain import full_precision
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, SIZES, tiny_gpt2, tiny_mixtral
from tests.transforms.texts import batches, exact, logits, same_function, with_outliers

INT4 = partial(MinMaxQuantizer, bits=4)
QKV = {"q_proj", "k_proj", "v_proj"}


def prepared(model, **scheme):
    return prepare(model.eval(), Scheme(weight=INT4, **scheme))


def found(model, block=0):
    """The folds of a block: the source and its targets, by the last parts of their names."""
    own = [fold for fold in neighbours(model) if fold.block.endswith(f".{block}")]
    return {last(fold.name): {last(name) for name in fold.targets} for fold in own}


def last(name):
    return name.rpartition(".")[2]


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES))


def neox():
    """Its fused projection holds queries, keys and values of each head in turn."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


MODELS = LANGUAGE_MODELS | {"qwen2": qwen2, "qwen3": qwen3, "mistral": mistral, "gpt-neox": neox}


@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "qwen3", "mistral"])
def test_the_folds_of_a_block_like_llamas(name):
    expected = {
        "input_layernorm": QKV,
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    }
    assert found(prepared(MODELS[name]()), block=1) == expected


def test_the_norms_of_gemma_that_no_layer_reads_are_left_alone():
    folds = found(prepared(LANGUAGE_MODELS["gemma3"]()))
    assert folds["input_layernorm"] == QKV
    assert folds["pre_feedforward_layernorm"] == {"gate_proj", "up_proj"}
    assert not {"post_attention_layernorm", "post_feedforward_layernorm", "q_norm"} & folds.keys()


def test_routers_and_experts_read_what_a_norm_returns():
    assert found(prepared(tiny_mixtral()))["post_attention_layernorm"] == {"gate", "experts"}


def test_a_layer_in_full_precision_is_a_target_too():
    model = prepared(tiny_llama(), exclude=["*.k_proj"])
    assert found(model)["input_layernorm"] == QKV


def test_heads_that_share_values_share_a_scale():
    (fold,) = [f for f in neighbours(prepared(tiny_llama())) if f.name.endswith("0.self_attn.v_proj")]
    heads = fold.columns.view(4, 16)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert torch.equal(heads[[0, 2]].flatten(), torch.arange(32))


def test_only_the_values_of_a_fused_projection_are_scaled():
    model = prepared(tiny_gpt2())
    (fold,) = [f for f in neighbours(model) if f.name.endswith("h.0.attn.c_attn")]
    assert torch.equal(fold.columns, torch.arange(128, 192))
    before = fold.source.weight.detach().clone()
    fold.fold_(torch.full((192,), 2.0))
    assert torch.equal(fold.source.weight[:128], before[:128])
    assert torch.equal(fold.source.weight[128:], before[128:] / 2)


def test_a_gelu_between_two_layers_lets_no_scale_through():
    assert "c_fc" not in found(prepared(tiny_gpt2()))


@pytest.mark.parametrize("name", MODELS)
def test_folding_at_random_changes_no_output(name):
    model = prepared(exact(with_outliers(MODELS[name]())))
    folds, weights = neighbours(model), copy.deepcopy(model.state_dict())
    with full_precision(model):
        full = logits(model, batches(1))
        for fold in folds:
            fold.fold_(torch.exp(torch.randn(fold.channels, dtype=torch.float64)))
        assert same_function(model, batches(1), full)
        divide_outputs_(folds[0].source, torch.full((folds[0].channels,), 2.0))
        assert not same_function(model, batches(1), full)
    moved = {f"{name}.weight" for fold in folds for name in [fold.name, *fold.targets]}
    after = model.state_dict()
    assert len(folds) >= 6
    assert not [name for name in moved & after.keys() if torch.equal(after[name], weights[name])]


@pytest.mark.parametrize("name", MODELS)
def test_searching_changes_nothing(name):
    model = prepared(with_outliers(MODELS[name]()))
    before = copy.deepcopy(model.state_dict())
    neighbours(model)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


class Peeking(nn.Module):
    """A norm that another reader sees too, which no fold can undo."""

    def __init__(self, norm, seen):
        super().__init__()
        self.norm, self.seen = norm, seen

    def forward(self, x):
        y = self.norm(x)
        self.seen.append(y)
        return y


def test_what_someone_else_reads_too_is_left_alone():
    model = prepared(tiny_llama())
    layer, seen = model.model.layers[0], []
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    layer.post_attention_layernorm = Peeking(norm, seen)
    layer.mlp = Sum(mlp, seen)
    folds = found(model)
    assert "input_layernorm" in folds
    assert "norm" not in folds


class Sum(nn.Module):
    def __init__(self, mlp, seen):
        super().__init__()
        self.mlp, self.seen = mlp, seen

    def forward(self, x):
        return self.mlp(x) + self.seen.pop().sin()


def test_weights_of_two_layers_take_no_scale():
    model = prepared(tiny_llama())
    first, second = model.model.layers
    second.self_attn.v_proj.weight = first.self_attn.v_proj.weight
    assert "input_layernorm" not in found(model)
    assert "v_proj" not in found(model)


def test_quantizers_are_fitted_anew():
    static = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)
    model = prepare(tiny_llama().eval(), Scheme(weight=partial(LSQQuantizer, bits=4), input=static))
    for _, layer in quant_layers(model):
        layer.input_quantizer.initialized = True
    fold = neighbours(model)[0]
    assert isinstance(fold.source, Norm)
    fold.fold_(torch.full((64,), 2.0))
    assert len(uncalibrated(model)) == len(fold.targets) == 3
    for layer in fold.targets.values():
        fitted = copy.deepcopy(layer.weight_quantizer)
        fitted.initialize(layer.weight)
        assert torch.equal(fitted.log_scale, layer.weight_quantizer.log_scale)


def test_two_plain_layers_can_be_folded_by_hand():
    first, second = nn.Linear(8, 4), nn.Linear(4, 8)
    x, pair = torch.randn(3, 8), nn.Sequential(first, second)
    before = pair(x)
    fold_scale_(first, [second], torch.tensor([0.1, 1, 3, 20]))
    assert torch.allclose(pair(x), before, atol=1e-6)


def test_bad_input_is_named():
    model = prepared(tiny_llama())
    fold = neighbours(model)[0]
    for scale in (torch.zeros(64), -torch.ones(64), torch.full((64,), torch.inf)):
        with pytest.raises(InputError, match="positive"):
            fold_scale_(fold.source, list(fold.targets.values()), scale)
    with pytest.raises(InputError, match="list of blocks"):
        neighbours(nn.Sequential(nn.Linear(4, 4)))
    assert not isinstance(model.model.layers[0].self_attn.q_proj.weight_quantizer, NoQuantizer)
