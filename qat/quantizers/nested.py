"""One set of codes for several widths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats import LevelFormat
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, ViewParams
from qat.quantizers.lsq import LSQQuantizer


class NestedQuantizer(LSQQuantizer):
    """Codes whose first bits are codes too, trained to serve at every width (MatQuant, arXiv 2502.06786).

    All widths share the weights and one learned scale s. At b of B bits the grid has 2^b levels around zero, 2^(B-b) s
    apart, so that every width covers the same range, and the code is the first b bits of the code of B bits, which is
    what ships; `qat.load(folder, bits=b)` leaves out the others. MatQuant rounds codes to fewer bits, and needs a clamp
    then; levels without a zero are cut off exactly, and serve two bits better.

    Which width a forward pass takes is set by `at`; until then, and for all that is stored, it is the largest.

    Args:
        bits: of the codes that ship, up to 8.
        also: smaller widths to train for. The first scale is the best at the middle one of all.
        granularity, scale_dtype: see `LSQQuantizer`.

    Raises:
        InputError: if a width is none, or not smaller than `bits`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 8,
        also: Sequence[int] = (4, 2),
        granularity: str | Granularity = "per_channel",
        scale_dtype: str = "bfloat16",
    ) -> None:
        super().__init__(shape, bits, granularity, grid="stretched", scale_dtype=scale_dtype)
        widths = [bits, *also]
        if not also or any(width not in range(1, bits) for width in also) or len(set(widths)) < len(widths):
            raise InputError(
                f"also is {list(also)}: widths from 1 to {bits - 1}, each once, below bits={bits}: [4, 2]."
            )
        self.widths = tuple(sorted(widths, reverse=True))

    def at(self, bits: int) -> None:
        """Quantize with `bits` bits, one of `widths`, from now on."""
        assert bits in self.widths
        self.format = LevelFormat(2**bits)
        if self.step_codes is not None:
            self.step_codes.renew()

    def qparams(self, x: Tensor) -> QParams:
        found = super().qparams(x)
        assert isinstance(found.scale, Tensor)
        return found._replace(scale=found.scale * 2**self._dropped)

    def _fit(self, view: Tensor, importance: Tensor | None) -> None:
        self.at(self.widths[len(self.widths) // 2])
        super()._fit(view, importance)
        self.at(self.widths[0])

    @torch.no_grad()
    def adopt(self, params: ViewParams) -> bool:
        return super().adopt(params._replace(scale=params.scale / 2**self._dropped))

    def rescale_(self, ratio: float) -> None:
        raise InputError(
            "Nested codes have several widths at once, which take turns: leave out callbacks.precision, or take "
            "quantizer@scheme.weight=stretched."
        )

    @property
    def _dropped(self) -> int:
        """How many of the stored bits are left out."""
        return self.widths[0] - self.format.bits
