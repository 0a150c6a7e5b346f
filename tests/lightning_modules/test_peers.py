"""Other libraries' arms in a comparison."""

import json
from functools import partial

import pytest
import torch
from torch import nn

import qat
from lightning_modules.comparison.peers import fake_quantize_by_torchao
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_cli import forks, shell  # noqa: F401

pytest.importorskip("torchao")

INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")


def fake_quantized(model):
    return {name for name, module in model.named_modules() if type(module).__module__.startswith("torchao")}


def test_torchao_quantizes_the_layers_that_the_scheme_does_on_their_grid():
    model = tiny_llama()
    rules = {"down": {"match": "*.down_proj", "weight": partial(MinMaxQuantizer, bits=8)}}
    fake_quantize_by_torchao(model, qat.Scheme(weight=INT4, input=TOKEN8, rules=rules, exclude=["*.o_proj"]))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    own = {name for name in fake_quantized(model) if not name.endswith("fake_quantizer")}
    assert own == {name for name in linear if "o_proj" not in name and name != "lm_head"}
    layers = model.model.layers[0].mlp
    for layer, levels, size in ((layers.up_proj, 16, 32), (layers.down_proj, 256, layers.down_proj.in_features)):
        groups = layer.weight_fake_quantizer(layer.weight).detach().view(-1, size)
        assert max(len(group.unique()) for group in groups) <= levels
        assert not torch.equal(groups.view_as(layer.weight), layer.weight)
    assert layers.up_proj.activation_fake_quantizer is not None
    assert layers.down_proj.activation_fake_quantizer is None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (qat.Scheme(weight=partial(KMeansQuantizer, bits=3)), "no fake quantization of weights to"),
        (qat.Scheme(weight=INT4, input=partial(TOKEN8, granularity="per_tensor", dynamic=False)), "of inputs to int8"),
        (qat.Scheme(weight=INT4, embedding=True), "and model.embed_tokens is another"),
        (qat.Scheme(weight=INT4, kv=qat.transforms.KVCache(TOKEN8, TOKEN8)), "no KV cache"),
    ],
)
def test_what_torchao_does_not_have_is_refused(scheme, message):
    with pytest.raises(InputError, match=message):
        fake_quantize_by_torchao(tiny_llama(), scheme)


@pytest.mark.usefixtures("forks")
def test_a_peer_trains_beside_or_is_left_out_by_name(shell):  # noqa: F811
    words = ["method=compare", "compare.seeds=[0]", "compare.rounded={rtn: []}", "trainer.max_steps=2"]
    output = shell.run(*words, "scheme.weight.granularity=per_group_32", "hydra.run.dir=run")
    assert "torchao" in output
    kept = json.loads((shell.folder / "run" / "comparison.json").read_text())["arms"]
    assert kept["torchao-0"]["before"] == kept["fp-0"]["before"]
    assert len({kept[f"{arm}-0"]["perplexity"] for arm in ("fp", "rtn", "qat", "torchao")}) == 4
    words[2] = '+compare.rounded.autoround=["transforms=autoround"]'
    output = shell.run(*words, "quantizer@scheme.weight=vector", "scheme.weight.granularity=per_channel")
    assert "autoround was left out: " in output
    assert "torchao was left out: torchao has no fake quantization of weights to" in output
    assert "'gptqmodel'" in shell.fails(*words, "compare.peers=[gptqmodel]")
