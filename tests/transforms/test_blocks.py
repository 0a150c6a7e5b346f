"""What goes wrong on the way through the blocks of a model is said by the name of the layer or the option."""

from functools import partial

import pytest
import torch

from qat.errors import InputError
from qat.quantizers import LSQQuantizer
from qat.transforms import Scheme, autoround, awq, gptq, prepare, smoothquant, sparsegpt, structured, wanda
from tests.conftest import tiny_llama
from tests.transforms.texts import batches

INT3 = Scheme(weight=partial(LSQQuantizer, bits=3, granularity="per_group_16"))
METHODS = {
    "gptq": gptq,
    "awq": awq,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "autoround": partial(autoround, steps=1),
}
# A module whose weight holds NaN, and what is named.
BROKEN = {
    "model.layers.0.self_attn.o_proj": r"model\.layers\.0\.self_attn\.o_proj made NaN",
    "model.layers.1.post_attention_layernorm": r"model\.layers\.1\.post_attention_layernorm made NaN",
    "model.embed_tokens": r"What comes before model\.layers\.0 made NaN",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("method", METHODS)
def test_the_layer_that_makes_nan_is_named(method, name):
    model = prepare(tiny_llama(), INT3)
    model.get_submodule(name).weight.data[..., 0] = torch.nan
    with pytest.raises(InputError, match=BROKEN[name]):
        METHODS[method](model, batches(1))


def test_it_is_named_where_parts_are_removed():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj made NaN"):
        structured(model, batches(1), channels=0.5, multiple_of=16)


def test_squares_that_overflow_are_told_from_nan():
    model = prepare(tiny_llama(), INT3)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e25)
    with pytest.raises(InputError, match=r"model\.layers\.1: the squares .* overflow float32"):
        gptq(model, batches(1))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (gptq, {"block_size": 0}, "block_size is 0.*set it to 128"),
        (gptq, {"damping": 2.0}, "damping is 2.0.*between 0 and 1.*set it to 0.01"),
        (gptq, {"sweeps": 1.5}, "sweeps is 1.5; it is a whole number from 0 on"),
        (gptq, {"device": "gpu"}, "on device 'gpu'.*set device to null"),
        (sparsegpt, {"block_size": 0}, "block_size is 0"),
        (sparsegpt, {"damping": -1}, "damping is -1"),
        (wanda, {"sparsity": "half"}, "sparsity is half.*set it to 0.5"),
        (awq, {"grid": 0}, "grid is 0.*set it to 20"),
        (autoround, {"scale_reach": "far"}, "scale_reach is far.*set it to 0.25"),
        (smoothquant, {"alpha": "a"}, "alpha is a.*set it to 0.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_options_out_of_range_are_named(method, options, message):
    with pytest.raises(InputError, match=message):
        method(prepare(tiny_llama(), INT3), batches(1), **options)


def test_a_model_without_quantized_layers_is_told_to_be_prepared():
    with pytest.raises(InputError, match="prepare it with a scheme"):
        gptq(tiny_llama(), batches(1))
