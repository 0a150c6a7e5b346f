"""Tiny models with every kind of layer that can be quantized."""

from torch import nn

from tests.conftest import tiny_llama

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4))


def tiny_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def tiny_qwen_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16)
    )


def tiny_qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **sizes, num_experts_per_tok=2))


def tiny_gpt_oss():
    """Its experts are stored transposed, with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=16))


def tiny_gemma():
    """Its embedding scales its rows, and is tied."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, tie_word_embeddings=True))


LANGUAGE_MODELS = {
    "llama, tied": tiny_llama,
    "llama, untied": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": tiny_gpt2,
    "gemma3": tiny_gemma,
    "mixtral": tiny_mixtral,
    "qwen3 moe": tiny_qwen_moe,
    "gpt-oss": tiny_gpt_oss,
}


def small_cnn():
    """Takes `[batch, 4, 12, 12]`: strides, groups, a depthwise convolution, and every kind of padding."""
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding="same", groups=16, padding_mode="reflect", bias=False),
        nn.Conv2d(16, 32, (1, 3), groups=2, dilation=(1, 2), padding=(0, 2), padding_mode="circular"),
        nn.Flatten(2),
        nn.Conv1d(32, 8, 5, stride=3, padding=2, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv1d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(80, 10),
    )
