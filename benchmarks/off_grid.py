"""SmolLM2 off its grid: the same function with other weights.

The packaged SmolLM2 comes from a 4-bit file: groups of 32 of its weights lie exactly on 16 values, so a 4-bit grid
with such groups would look lossless. Folding the norms' gains into the layers that follow and rotating the residual
stream by a random orthogonal matrix (QuaRot, arXiv 2404.00456) leaves every output as it was and no weight on its old
grid.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def rotate_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Rotate a Llama-like `model` in place; its output head gets a weight of its own. Returns `model`."""
    core = model.model
    size = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(_reads(model.lm_head.weight, core.norm, rotation))
    core.embed_tokens.weight = nn.Parameter((core.embed_tokens.weight.double() @ rotation).to(torch.float32))
    for layer in core.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.copy_(_reads(linear.weight, layer.input_layernorm, rotation))
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(_reads(linear.weight, layer.post_attention_layernorm, rotation))
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(rotation.T @ linear.weight.double())
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
    core.norm.weight.fill_(1)
    return model


def _reads(weight: Tensor, norm: nn.Module, rotation: Tensor) -> Tensor:
    """The weight of a layer that reads the rotated stream, with the gain of the norm before it."""
    return ((weight.double() * norm.weight.double()) @ rotation).to(torch.float32)
