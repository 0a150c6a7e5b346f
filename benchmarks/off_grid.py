"""SmolLM2 off its grid: the same function with other weights.

The packaged SmolLM2 comes from a 4-bit file: groups of 32 of its weights lie exactly on 16 values, so a 4-bit grid
with such groups would look lossless. Folding the norms' gains into the layers that follow and rotating the residual
stream by a random orthogonal matrix (`qat.transforms.hadamard`) leaves every output as it was and no weight on its old
grid.
"""

import torch
from torch import nn

from qat.transforms.hadamard import rotate_stream_
from qat.transforms.stream import find_stream


def rotate_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Rotate `model` in place; its output head gets a weight of its own. Returns `model`."""
    stream = find_stream(model)
    generator = torch.Generator().manual_seed(seed)
    # Not `orthogonal`, which draws another one: recorded results are of models rotated by this.
    rotation = torch.linalg.qr(torch.randn(stream.size, stream.size, dtype=torch.float64, generator=generator)).Q
    rotate_stream_(model, stream, rotation)
    return model
