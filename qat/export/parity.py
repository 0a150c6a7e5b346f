"""The grid contract, checked on a whole model."""

import torch
from torch import Tensor


class GridContractError(RuntimeError):
    """An exported model does not compute what the trained one does."""


def check_logits(trained: Tensor, exported: Tensor, exact: bool, tolerance: float = 1e-2) -> float:
    """Compare the logits of a trained model with those of its export, on the same tokens.

    Args:
        trained, exported: `[batch, tokens, vocabulary]`.
        exact: demand the same bits.
        tolerance: else allow this relative error, for kernels that sum in another order.

    Returns:
        max |difference| / max |logit|.

    Raises:
        GridContractError: if they differ by more.
    """
    error = float((trained.float() - exported.float()).abs().max() / trained.float().abs().max())
    same = torch.equal(trained, exported) if exact else error <= tolerance
    if not same:
        raise GridContractError(
            f"The exported model is not the trained one: relative logit error {error:.1e}, "
            f"{'bit equality' if exact else f'at most {tolerance:.0e}'} required."
        )
    return error
