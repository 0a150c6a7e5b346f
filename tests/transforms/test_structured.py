"""Parts are removed: the model, its configuration and its files are smaller, and say the same."""

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import qat
from qat.errors import InputError
from qat.quantizers import LSQQuantizer
from qat.transforms import Scheme, prepare, structured
from tests.conftest import tiny_llama
from tests.models import SIZES, tiny_gemma, tiny_gpt2, tiny_gpt_oss, tiny_mixtral
from tests.transforms.test_gptq import batches, logits

LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_16")


def tiny_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"num_hidden_layers": 4}, head_dim=16))


def tiny_qwen2():
    """Its queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES | {"num_hidden_layers": 4}))


def deep_gemma():
    """Full attention in every third block, sliding windows in the others."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    sizes = SIZES | {"num_hidden_layers": 6, "head_dim": 16, "layer_types": kinds, "sliding_window": 5}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


UNTIED = {"num_hidden_layers": 4, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=4),
    "llama, untied": lambda: tiny_llama(**UNTIED),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma3": deep_gemma,
}
PARTS = {
    "heads": {"heads": 0.5},
    "channels": {"channels": 0.3, "multiple_of": 16},
    "blocks": {"blocks": 0.5},
    "all": {"heads": 0.5, "channels": 0.9, "blocks": 0.3, "multiple_of": 2},
}


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_load_of_the_smaller_files_gives_the_same_logits(name, parts, tmp_path):
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "before")
    before = sum(p.numel() for p in model.parameters())
    structured(model, batches(2), **parts)
    model.save_pretrained(tmp_path / "after")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    assert torch.equal(logits(loaded, batches(1)), logits(model, batches(1)))
    after = sum(p.numel() for p in model.parameters())
    assert after < before
    assert size(tmp_path / "after") - size(tmp_path / "before") == pytest.approx(4 * (after - before), rel=0.05)
    ids = batches(1)[0]["input_ids"]
    cached, whole = (m.generate(ids, max_new_tokens=4, do_sample=False) for m in (loaded, model))
    assert torch.equal(cached, whole)


def test_the_configuration_says_what_is_left():
    model = structured(MODELS["llama"](), batches(1), heads=0.5, channels=0.3, blocks=0.5, multiple_of=16)
    config = model.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads) == (2, 1, 2)
    assert (config.intermediate_size, config.head_dim, config.hidden_size) == (96, 16, 64)
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]
    gemma = structured(deep_gemma(), batches(1), blocks=0.5)
    assert gemma.config.layer_types == [block.self_attn.layer_type for block in gemma.model.layers]


def test_it_is_quantized_trained_saved_and_loaded_as_any_model(tmp_path):
    model = structured(MODELS["llama"](), batches(2), heads=0.5, channels=0.5, blocks=0.25, multiple_of=16)
    prepare(model, Scheme(weight=LSQ4))
    model.train()(**batches(1)[0]).loss.backward()
    trained = logits(model.eval(), batches(1))
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    assert torch.equal(logits(loaded, batches(1)), trained)


def change(model, full, **options):
    smaller = structured(copy.deepcopy(model), batches(8), **options)
    return float((logits(smaller, batches(4, seed=1)) - full).square().mean())


def test_what_matters_least_is_removed():
    """Half of the channels, at random places, and the first of two groups of heads hardly reach the output."""
    model = tiny_llama().eval()
    weights = []
    with torch.no_grad():
        for block in model.model.layers:
            strong = torch.randperm(128)[:64].sort().values
            block.mlp.up_proj.weight[strong] *= 20
            block.self_attn.o_proj.weight[:, 32:] *= 20
            weights.append((block.mlp.gate_proj.weight[strong].clone(), block.self_attn.q_proj.weight[32:].clone()))
    structured(model, batches(4), heads=0.5, channels=0.5, multiple_of=16, compensate=False)
    for block, (gate, queries) in zip(model.model.layers, weights, strict=True):
        assert torch.equal(block.mlp.gate_proj.weight, gate)
        assert torch.equal(block.self_attn.q_proj.weight, queries)


@pytest.mark.parametrize("parts", [{"heads": 0.5}, {"channels": 0.5, "multiple_of": 16}], ids=["heads", "channels"])
def test_least_squares_make_up_for_what_is_gone(parts):
    model = tiny_llama().eval()
    full = logits(model, batches(4, seed=1))
    assert change(model, full, **parts) < 0.8 * change(model, full, compensate=False, **parts)


def test_the_block_that_does_nothing_goes():
    model = MODELS["llama"]().eval()
    with torch.no_grad():
        idle = model.model.layers[2]
        idle.self_attn.o_proj.weight *= 1e-3
        idle.mlp.down_proj.weight *= 1e-3
    full = logits(model, batches(1))
    structured(model, batches(2), blocks=0.25)
    assert idle not in list(model.model.layers)
    assert torch.allclose(logits(model, batches(1)), full, atol=1e-2)


def test_heads_are_left_as_the_architecture_accepts_them():
    """Of 10 heads 3 would be nearest to what is wanted, and no divisor of the hidden size."""
    model = tiny_llama(hidden_size=80, num_attention_heads=10, num_key_value_heads=10)
    assert structured(model, batches(1), heads=0.68).config.num_attention_heads == 4


def test_a_model_without_memory_gets_its_shapes_without_data():
    with torch.device("meta"):
        shadow = MODELS["llama"]()
    structured(shadow, [], heads=0.5, channels=0.3, blocks=0.5, multiple_of=16)
    real = structured(MODELS["llama"](), batches(1), heads=0.5, channels=0.3, blocks=0.5, multiple_of=16)
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (shadow, real)]
    assert shapes[0] == shapes[1]


REFUSED = {
    "nothing": (tiny_llama, {}, "set heads, channels or blocks"),
    "share": (tiny_llama, {"heads": 30}, r"heads is 30; it is the share.*set it to 0.3"),
    "few blocks": (tiny_llama, {"blocks": 0.1}, "blocks=0.1 of 2 blocks is none: set it to 0.5"),
    "few heads": (tiny_llama, {"heads": 0.1}, "set heads to one of 0.5"),
    "multiple": (tiny_llama, {"channels": 0.3, "multiple_of": 256}, "set multiple_of to a smaller"),
    "gpt2": (tiny_gpt2, {"heads": 0.5}, "no attention of separate linear layers.*set heads=0"),
    "experts": (tiny_mixtral, {"channels": 0.5}, "has experts.*set channels=0"),
    "sinks": (tiny_gpt_oss, {"heads": 0.5}, "sinks would be"),
    "no transformer": (lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), {"blocks": 0.5}, "is no transformers model"),
    "prepared": (lambda: prepare(tiny_llama(), Scheme(weight=LSQ4)), {"heads": 0.5}, "before prepare"),
    "no data": (tiny_llama, {"heads": 0.5}, "calibration_batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_and_leaves_the_model_as_it_was(case):
    make, options, message = REFUSED[case]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    with pytest.raises(InputError, match=message):
        structured(model, [] if case == "no data" else batches(1), **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert settings is None or model.config.to_dict() == settings


def test_gpt2_and_mixtures_lose_blocks(tmp_path):
    for make in (tiny_gpt2, tiny_mixtral, tiny_gemma):
        model = structured(make().eval(), batches(1), blocks=0.5)
        model.save_pretrained(tmp_path / type(model).__name__)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / type(model).__name__).eval()
        assert torch.equal(logits(loaded, batches(1)), logits(model, batches(1)))
