"""Tiny models and KV layouts that several tests share."""

from functools import partial

import torch

from qat.nn.kv_cache import QuantizedCache
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NoQuantizer,
    TableQuantizer,
)
from qat.transforms import calibrate
from qat.transforms.kv import quantize_kv
from tests.conftest import tiny_llama

VOCABULARY = 96
INT8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
INT4 = partial(MinMaxQuantizer, bits=4, granularity="per_token")
INT4_GROUP = partial(MinMaxQuantizer, bits=4, granularity="per_group_8", symmetric=False)
INT2 = partial(MinMaxQuantizer, bits=2, granularity="per_token", symmetric=False)
NF4 = partial(TableQuantizer, granularity="per_token")
FP8 = partial(MinMaxQuantizer, bits=8, format="fp8_e4m3", granularity="per_token")
MXFP4 = partial(MicroscalingQuantizer, granularity="per_group_16")
STATIC = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)
LEARNED = partial(LSQQuantizer, bits=4, granularity="per_channel_-1")
CODEBOOK = partial(KMeansQuantizer, bits=3, granularity="per_tensor")


def kivi(tokens, bits=2):
    return partial(MinMaxQuantizer, bits=bits, granularity=f"per_block_{tokens}x1", symmetric=False)


# Keys, values, window.
LAYOUTS = {
    "int8": (INT8, INT8, 0),
    "int4": (INT4, INT4, 0),
    "int4_window5": (INT4, INT4, 5),
    "int2": (INT2, INT2, 0),
    "nf4": (NF4, NF4, 0),
    "nf4_group": (partial(NF4, granularity="per_group_8"), INT4_GROUP, 0),
    "fp8": (FP8, FP8, 0),
    "mxfp4": (MXFP4, MXFP4, 0),
    "kivi4": (kivi(4), INT2, 0),
    "kivi4_window8": (kivi(4), INT2, 8),
    "kivi32": (kivi(32), INT4_GROUP, 0),
    "kivi32_window8": (kivi(32), INT4_GROUP, 8),
    "blocks_of_both": (kivi(4), kivi(8, bits=4), 3),
    "keys_only": (INT4, NoQuantizer, 0),
    "keys_only_window3": (kivi(4), NoQuantizer, 3),
    "values_only": (NoQuantizer, INT2, 0),
    "static": (STATIC, partial(STATIC, symmetric=False), 0),
    "learned": (LEARNED, CODEBOOK, 2),
}
MODELS = ("llama", "qwen2", "qwen3", "gpt2")


def tiny(kind="llama", **options):
    """A random model in float64, so that no rounding hangs on the order of a sum, with attention that matters."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if kind == "llama":
        model = tiny_llama(initializer_range=0.3, **options)
    elif kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **sizes | options))
    else:
        config, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        model = model_class(config(**sizes | options))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.double().eval()


def tokens(batch=2, length=40):
    return torch.randint(1, VOCABULARY, (batch, length))


def quantized(layout="int4", kind="llama", **options):
    """A tiny model with the KV quantizers of a layout, calibrated where it needs that."""
    key, value, window = LAYOUTS[layout]
    model = quantize_kv(tiny(kind, **options), key, value, window)
    return calibrate(model, [tokens() for _ in range(2)])


@torch.no_grad()
def whole(model, ids, **inputs):
    """Logits of one pass without a cache, as training computes them."""
    return model(ids, use_cache=False, **inputs).logits


@torch.no_grad()
def in_parts(model, ids, sizes, cache=None):
    """Logits of a text that is given to the model part by part, with a cache; and the cache."""
    cache = QuantizedCache(model) if cache is None else cache
    logits = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(logits, dim=1), cache
