"""Products of codes in plain PyTorch: the definition, and what a CPU does with 8-bit floats."""

import torch
from torch import Tensor

from qat.kernels.scaled_product.operand import Operand, scaled


def scaled_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """y = (decode(a) @ decode(b)^T) * s_a * s_b^T.

    Integers are summed exactly, for which float32 has too few digits; floats in float32, as tensor cores do.
    """
    wide = torch.float32 if a.is_float else torch.float64
    sums = a.native().to(wide) @ b.native().to(wide).T
    return scaled(sums.to(torch.float32), a, b, dtype)
