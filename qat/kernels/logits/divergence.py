"""Cross entropy and divergence from a teacher, and their gradient in the place of the logits, by one kernel.

A row of both models' logits is read three times by one program, the last two from the GPU's cache: for what makes
probabilities of them, for the sums over all words, and for the gradient, which needs these sums.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.tiles import power_of_two
from qat.kernels.launch import KEPT, Launch
from qat.kernels.logits.triton import logit_of_target, logits_of, with_logits

_WIDTH, _WARPS = 4096, 16


class Mix(NamedTuple):
    """(1 - weight) CE(q, target) + weight T^2 D(p, q), with p of the teacher's logits over T, q of the student's.

    D = forward KL(p || q) + reverse KL(q || p); or, of `between` b, b KL(p || m) + (1 - b) KL(q || m) with
    m = b p + (1 - b) q. The cross entropy is of logits that no temperature divides.

    Attributes:
        forward, reverse, between: which divergence; `between` is None where it is of the first kind.
        weight, temperature: from 0 to 1, and T.
        shape, teacher_shape: scale and softcap of the logits, see `reference.shaped`.
        ignored: rows with this target have losses and gradient 0.
    """

    forward: float
    reverse: float
    between: float | None
    weight: float
    temperature: float
    shape: tuple[float, float | None]
    teacher_shape: tuple[float, float | None]
    ignored: int


def losses_and_gradient(
    z: Tensor, z_teacher: Tensor, targets: Tensor, mix: Mix, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses of each row, and the gradient of their weighted sum with respect to z.

    Args:
        z: outputs of the student's head `[rows, vocabulary]`; not to be used afterwards.
        z_teacher: of the teacher's head.
        targets: the next tokens `[rows]`.

    Returns:
        cross entropies and T^2 times divergences, `[rows]` in float32, and the gradient in the dtype of z, where z was.
    """
    rows, columns = z.shape
    z, z_teacher = z.contiguous(), z_teacher.contiguous()
    cross_entropies, divergences = torch.zeros(2, rows, dtype=torch.float32, device=z.device)
    if rows:
        _ready(rows, columns, mix, with_gradient)(z, z_teacher, targets.contiguous(), cross_entropies, divergences)
    return cross_entropies, divergences, z if with_gradient else None


@lru_cache(KEPT)
def _ready(rows: int, columns: int, mix: Mix, with_gradient: bool) -> Launch:
    constants = {
        "CAPPED": mix.shape[1] is not None,
        "TEACHER_CAPPED": mix.teacher_shape[1] is not None,
        "BETWEEN": mix.between is not None,
        "GRADIENT": with_gradient,
        "WIDTH": min(_WIDTH, power_of_two(columns)),
    }
    shapes = [float(number or 1.0) for number in (*mix.shape, *mix.teacher_shape)]
    shares = float(mix.forward), float(mix.reverse), float(mix.between or 0.0)
    numbers = *shapes, *shares, float(mix.weight), float(mix.temperature), 1 / mix.temperature
    return Launch(_losses_and_gradient, rows, (columns, mix.ignored, *numbers), constants, _WARPS)


@triton.jit
def _share(probability, log_ratio):
    """probability * log_ratio, and 0 where there is no probability."""
    return tl.where(probability == 0, 0.0, probability * log_ratio)


@triton.jit
def _losses_and_gradient(
    z,
    z_teacher,
    targets,
    cross_entropies,
    divergences,
    columns,
    ignored,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    forward,
    reverse,
    between,
    weight,
    temperature,
    inverse_temperature,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BETWEEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own, theirs, target = z + row * columns, z_teacher + row * columns, tl.load(targets + row)
    counts = target != ignored
    at_target = logit_of_target(own, target, counts, columns, scale, softcap, CAPPED)

    # Finite, so that a tile of -inf makes no NaN.
    most, total, tempered = -3.4028234663852886e38, 0.0, 0.0
    most_a, most_b, total_b = most, most, total
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        v = logits_of(own, column, columns, scale, softcap, CAPPED)[0]
        b = logits_of(theirs, column, columns, teacher_scale, teacher_softcap, TEACHER_CAPPED)[0]
        most, total = with_logits(most, total, v)
        most_a, tempered = with_logits(most_a, tempered, v * inverse_temperature)
        most_b, total_b = with_logits(most_b, total_b, b * inverse_temperature)
    norm, norm_a, norm_b = most + tl.log(total), most_a + tl.log(tempered), most_b + tl.log(total_b)

    # KL(p || q) and KL(q || p), or both from the mixture.
    of_p, of_q = 0.0, 0.0
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        log_q = logits_of(own, column, columns, scale, softcap, CAPPED)[0] * inverse_temperature - norm_a
        b = logits_of(theirs, column, columns, teacher_scale, teacher_softcap, TEACHER_CAPPED)[0]
        log_p = b * inverse_temperature - norm_b
        p, q = tl.exp(log_p), tl.exp(log_q)
        if BETWEEN:
            log_m = tl.log(between * p + (1 - between) * q)
            of_p += tl.sum(_share(p, log_p - log_m), axis=0)
            of_q += tl.sum(_share(q, log_q - log_m), axis=0)
        else:
            of_p += tl.sum(_share(p, log_p - log_q), axis=0)
            of_q += tl.sum(_share(q, log_q - log_p), axis=0)
    # A share of 0 leaves out a divergence that is infinite, too.
    divergence = between * of_p + (1 - between) * of_q if BETWEEN else _share(forward, of_p) + _share(reverse, of_q)
    tl.store(cross_entropies + row, tl.where(counts, norm - at_target, 0.0))
    tl.store(divergences + row, tl.where(counts, divergence * temperature * temperature, 0.0))

    if GRADIENT:
        for first in range(0, columns, WIDTH):
            column = first + tl.arange(0, WIDTH)
            v, slope = logits_of(own, column, columns, scale, softcap, CAPPED)
            log_q = v * inverse_temperature - norm_a
            b = logits_of(theirs, column, columns, teacher_scale, teacher_softcap, TEACHER_CAPPED)[0]
            log_p = b * inverse_temperature - norm_b
            p, q = tl.exp(log_p), tl.exp(log_q)
            if BETWEEN:
                log_m = tl.log(between * p + (1 - between) * q)
                of_divergence = (1 - between) * (_share(q, log_q - log_m) - q * of_q)
            else:
                of_divergence = forward * (q - p)
                if reverse != 0:
                    of_divergence += reverse * (_share(q, log_q - log_p) - q * of_q)
            of_target = tl.exp(v - norm) - tl.where(column == target, 1.0, 0.0)
            gradient = (weight * temperature * of_divergence + (1 - weight) * of_target) * slope
            # Selected, not multiplied: what does not count is 0 whatever its logits are.
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(own + column, gradient.to(z.dtype.element_ty), mask=column < columns)
