"""Fixed codebooks of the field, ascending, each within [-1, 1] unless its rule scales by the mean."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from qat.errors import InputError, nearest

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

# AbnormalFloat-4 for blocks of 64 (NF4 Isn't Information Theoretically Optimal, arXiv 2306.06965): least expected
# absolute error on normal weights scaled by their block's absolute maximum.
AF4 = (
    -1.0,
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.0,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
    1.0,
)


@lru_cache
def normal_float(bits: int) -> tuple[float, ...]:
    """NormalFloat of `bits` bits: 2^(bits-1) quantiles of a normal distribution above zero, one less below, and zero.

    The outermost probability is the mean of 1 - 1 / 2^(bits+1) and 1 - 1 / (2^(bits+1) - 2), as for NF4.
    """
    if bits == 4:
        return NF4
    outermost = 1 - (2.0 ** -(bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1])

    above, below = quantiles(2 ** (bits - 1)), quantiles(2 ** (bits - 1) - 1)
    return tuple(sorted([*(above / above[0]).tolist(), 0.0, *(-below / below[0]).tolist()]))


@lru_cache
def power_of_two(bits: int) -> tuple[float, ...]:
    """Zero and +-2^-i for i < 2^(bits-1) - 1: multiplication is a shift (INQ, arXiv 1702.03044)."""
    return _mirrored([2.0**-i for i in range(2 ** (bits - 1) - 1)])


@lru_cache
def additive_power_of_two(bits: int) -> tuple[float, ...]:
    """Sums of powers of two (APoT, arXiv 1909.13144), scaled to [-1, 1].

    The bits - 1 bits of the magnitude are spent on terms of two bits, each zero or one of three powers, and, if they
    are odd, on one more term of one bit; the powers 2^-1, 2^-2, ... go round the terms.
    """
    pairs, odd = divmod(bits - 1, 2)
    terms: list[list[float]] = [[0.0] for _ in range(pairs)]
    single = [0.0]
    power = 1
    for turn in range(3):
        if turn == 2 and odd:
            single.append(2.0**-power)
            power += 1
        for term in terms:
            term.append(2.0**-power)
            power += 1
    sums = {sum(chosen) for chosen in product(*terms, single)} - {0.0}
    return _mirrored([value / max(sums) for value in sums])


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


# Family: its sizes in bits, and the values of one size. Ternary takes two stored bits.
_FAMILIES: dict[str, tuple[range, Callable[[int], tuple[float, ...]]]] = {
    "nf": (range(2, 9), normal_float),
    "af": (range(4, 5), lambda bits: AF4),
    "pot": (range(2, 6), power_of_two),
    "apot": (range(2, 9), additive_power_of_two),
    "binary": (range(1, 2), lambda bits: (-1.0, 1.0)),
    "ternary": (range(2, 3), lambda bits: (-1.0, 0.0, 1.0)),
}


def fixed_codebook(family: str, bits: int) -> Tensor:
    """The codebook of a family: `nf`, `af`, `pot`, `apot`, `binary` or `ternary`; float32 `[entries]`.

    Raises:
        InputError: if there is no such family, or not with so many bits.
    """
    if family not in _FAMILIES:
        raise InputError(f"There is no fixed codebook '{family}'.{nearest(family, _FAMILIES)}")
    sizes, values = _FAMILIES[family]
    if bits not in sizes:
        spelled = " or ".join(map(str, sizes)) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"
        raise InputError(f"The grid {family} has {spelled} bits, not {bits}; for {bits} bits use kmeans, lsq or nf4.")
    return table(values(bits))


def table(values: tuple[float, ...]) -> Tensor:
    """A codebook as a float32 tensor `[entries]`."""
    return torch.tensor(values, dtype=torch.float32)


def _mirrored(magnitudes: list[float]) -> tuple[float, ...]:
    return tuple(sorted([*(-m for m in magnitudes), 0.0, *magnitudes]))
