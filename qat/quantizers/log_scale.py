"""Learned scales are kept as log2(scale): always positive, and every step of the optimizer is a relative one."""

import torch
from torch import Tensor

from qat.numerics.ste import smallest_scale


def log_scale_of(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """log2(scale), with scales too small for `dtype` (groups of zeros) raised to what it can store."""
    return torch.log2(scale.clamp(min=2 * smallest_scale(dtype)))
