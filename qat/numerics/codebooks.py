"""Fixed codebooks of the field."""

from functools import lru_cache

import torch
from torch import Tensor

# NormalFloat-4 of QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution, scaled to [-1, 1], with an
# exact zero; the values are those of the published table.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@lru_cache
def dynamic_map(exponent_bits: int = 7) -> tuple[float, ...]:
    """The 256 values of the 8-bit dynamic data type, ascending in [-1, 1].

    8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 1.3: the number of leading zeros gives a
    power of ten, the remaining bits a linear fraction. QLoRA quantizes its scales with it.
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(exponent_bits):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = 10.0 ** (exponent - exponent_bits + 1) * ((edges[:-1] + edges[1:]) / 2.0)
        values += magnitudes.tolist()
        values += (-magnitudes).tolist()
    return tuple(sorted(values))


def table(values: tuple[float, ...]) -> Tensor:
    """A codebook as a float32 tensor `[entries]`."""
    return torch.tensor(values, dtype=torch.float32)
