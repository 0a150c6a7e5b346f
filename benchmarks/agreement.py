"""No time is taken of a kernel that computes something else."""

from collections.abc import Callable

import torch
from torch import Tensor

# Relative error in the Frobenius norm that a result in bfloat16 has at most.
GATE = 1e-2


def agreed(compute: Callable[[], Tensor], error: Callable[[Tensor], float], room: int, what: str) -> float:
    """The error of a result, if it is small and has the same bits twice, also in memory full of NaN.

    Args:
        room: bytes of memory that are filled with NaN; what is allocated next is likely to lie there.

    Raises:
        SystemExit: if not.
    """
    poison = torch.full((room // 4,), float("nan"), device="cuda" if torch.cuda.is_available() else "cpu")
    del poison
    first, second = compute(), compute()
    found = error(first)
    if not torch.equal(first, second) or not found < GATE:
        raise SystemExit(f"{what}: error {found:.2e}, bits repeat: {torch.equal(first, second)}. Nothing is measured.")
    return found
