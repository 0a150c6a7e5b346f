"""Products of codes on int8 and fp8 tensor cores; int8 also on the vector units of a CPU.

They are calls of torch, and what surrounds them is plain PyTorch, so that a compiler fuses the scales into its
neighbours. The int32 sums still pass through memory, 4 bytes an element each way, which a kernel with the scales in its
epilogue would save; `_scaled_mm` is one.
"""

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels.scaled_product.operand import Operand, scaled

# `_int_mm` takes more than 16 rows, `_scaled_mm` any; both take the other sizes in multiples of 16.
_ROWS, _MULTIPLE = 32, 16
# Products of two codes are at most 2^14, and int32 ends below 2^31.
_MOST = 2**17 - 1


def scaled_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """y = (decode(a) @ decode(b)^T) * s_a * s_b^T, `[rows of a, rows of b]`.

    Sums are exact integers, or float32 (not the fast accumulation of Hopper, which keeps 14 bits).

    Raises:
        InputError: if int32 could not hold the sums.
    """
    rows, columns = len(a.codes), len(b.codes)
    if not a.codes.numel():
        return a.codes.new_zeros((rows, columns), dtype=dtype)
    multiply = _floats if a.is_float else _integers
    product = multiply(a.padded(_ROWS, _MULTIPLE), b.padded(_MULTIPLE, _MULTIPLE), dtype)
    return product[:rows, :columns]


def _integers(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    if a.codes.shape[1] > _MOST + 1:
        raise InputError(
            f"int8 products sum at most {_MOST} terms, not {a.codes.shape[1]}: take smaller batches with more "
            "trainer.accumulate_grad_batches, or leave wgrad out of scheme.products."
        )
    return scaled(torch._int_mm(a.native(), b.native().T), a, b, dtype)


def _floats(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return torch._scaled_mm(a.native(), b.native().T, _column(a), _column(b).reshape(1, -1), out_dtype=dtype)
    # Scales of rows come with bfloat16 results only.
    one = torch.ones((), device=a.codes.device)
    return scaled(torch._scaled_mm(a.native(), b.native().T, one, one, out_dtype=torch.float32), a, b, dtype)


def _column(operand: Operand) -> Tensor:
    """A scale for every row, `[rows, 1]`."""
    shape = len(operand.codes), 1
    if operand.scale is None:
        return torch.ones(shape, device=operand.codes.device)
    return operand.scale.expand(shape).contiguous()
