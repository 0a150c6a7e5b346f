"""Codes of a weight that are found once per optimizer step."""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.kernels import ops
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams


class StepCodes:
    """Keeps the codes of one weight, one byte each, until `renew`.

    Between two steps of the optimizer a weight does not change: micro-batches that accumulate gradients, and blocks
    that are computed again for their backward pass, need the same codes and scales. They are plain data without a
    graph; learned scales and codebooks are computed in every pass, because their gradients flow there.
    """

    def __init__(self) -> None:
        self._found: tuple[QParams | None, Tensor] | None = None

    def renew(self) -> None:
        """The weight, its scales or its mask changed."""
        self._found = None

    def of(
        self,
        weight: Tensor,
        qparams_of: Callable[[Tensor], QParams],
        follow: bool,
        format: Format,
        granularity: Granularity,
    ) -> tuple[QParams, Tensor]:
        """The qparams of `weight`, which is masked already, and the codes of its view.

        Args:
            qparams_of: finds the qparams.
            follow: whether they follow from the weight alone, and so are kept too.
        """
        if self._found is not None:
            qparams, codes = self._found
            return (qparams_of(weight) if qparams is None else qparams), codes
        qparams = qparams_of(weight)
        view = granularity.view(weight)
        with torch.no_grad():
            codes = ops.quantize_view(view, *ops.grid_of(qparams, format, len(view)))
        self._found = qparams if follow else None, codes
        return qparams, codes
