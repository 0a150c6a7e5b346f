"""Codes of weights that go back and forth: found, counted, and frozen.

Overcoming Oscillations in Quantization-Aware Training (arXiv 2203.11086). Near the boundary between two codes the
straight-through gradient drives a weight across, and what the other code does drives it back; it never settles, and
what ships is whichever of the two the last step left.
"""

from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels import ops
from qat.numerics.formats import CodebookFormat, FloatFormat, Format
from qat.numerics.qtensor import QParams, ViewParams, scale_down
from qat.quantizers.base import Quantizer
from qat.quantizers.nested import NestedQuantizer

FROZEN = 2  # in the place of a direction
_TENSORS = ("codes", "direction", "frequency", "mean")


class CodeHistory:
    """What is remembered of the codes of one weight, 6 bytes for each element.

    With k the code's place in the order of the grid's values, its direction d = sign(k - k') at every change, and a
    momentum m, one `update` after each step of the optimizer is

        o = 1 where k changed against the direction of its last change, else 0
        f <- m o + (1 - m) f                    the frequency of oscillations
        e <- m k + (1 - m) e                    the running mean of the code
        frozen to round(e) where f > threshold, from then on

    Attributes:
        format: the grid.
        codes: as they were after the last step, shaped like the matrix (1 byte); of frozen elements, the frozen ones.
        direction: of the last change: -1, 1, 0 before the first; `FROZEN` (int8).
        frequency: f (float16).
        mean: e - k (float16, which would lose small steps of e itself).
    """

    def __init__(self, format: Format, codes: Tensor) -> None:
        self.format, self.codes = format, codes
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes, dtype=torch.float16)
        self.mean = torch.zeros_like(codes, dtype=torch.float16)

    @property
    def frozen(self) -> Tensor:
        """Which elements are frozen, boolean."""
        return self.direction == FROZEN

    @torch.no_grad()
    def update(self, codes: Tensor, threshold: float | None, momentum: float) -> None:
        """Take note of the `codes` after a step, and freeze what oscillates; a threshold of None freezes nothing."""
        # Products with masks, because torch.where takes ten times as long on a CPU.
        settling, place = ~self.frozen, _place_of(self.codes, self.format)
        change = (_place_of(codes, self.format) - place).mul_(settling)
        moved = change.sign().to(torch.int8)
        oscillated = (moved != 0) & (moved == -self.direction)
        self.frequency.mul_(1 - momentum).add_(oscillated.to(torch.float16), alpha=momentum)
        self.mean.sub_(change.to(torch.float16)).mul_(1 - momentum)
        self.direction.mul_(moved == 0).add_(moved)
        place += change
        if threshold is not None:
            now = (self.frequency > threshold) & settling
            place += self.mean.round().to(torch.int16).mul_(now)
            self.direction.mul_(~now).add_(now, alpha=FROZEN)
        self.codes = _code_at(place, self.format)

    @torch.no_grad()
    def held(self, matrix: Tensor, quantizer: Quantizer) -> Tensor:
        """`matrix` with what its frozen elements stand for on the grid of `quantizer`, whatever moved them."""
        granularity, qparams = quantizer.granularity, quantizer.ready_qparams(matrix)
        values = ops.dequantize(self.codes, qparams, self.format, granularity, matrix.dtype)
        return torch.lerp(matrix, values, self.frozen.to(matrix.dtype))  # exact with 0 and 1

    def state_dict(self) -> dict[str, Any]:
        return {"format": self.format.name} | {name: getattr(self, name) for name in _TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state`, unless it is of another format."""
        if state["format"] == self.format.name:
            for name in _TENSORS:
                setattr(self, name, state[name].to(self.codes.device))


@torch.no_grad()
def codes_of(quantizer: Quantizer, matrix: Tensor) -> Tensor:
    """The codes of a weight, without the question whether it is finite, for which one would wait for a GPU."""
    masked = quantizer.masked(matrix.detach())
    return ops.quantize(masked, quantizer.ready_qparams(masked), quantizer.format, quantizer.granularity)


def check_settles(quantizer: Quantizer) -> None:
    """Refuse a grid whose codes have no order, or do not stay where they are frozen.

    Raises:
        InputError: if so.
    """
    if quantizer.format.block > 1:
        raise InputError(
            f"the codes of {quantizer.format.name} stand for vectors, which go neither up nor down: take "
            "quantizer@scheme.weight=kmeans or lsq."
        )
    if isinstance(quantizer, NestedQuantizer):
        raise InputError("nested codes have several widths that take turns: take quantizer@scheme.weight=stretched.")
    if not quantizer.clips:
        raise InputError(
            f"the scales of {type(quantizer).__name__} follow from the weights at every step, and the codes with them: "
            "take quantizer@scheme.weight=lsq or kmeans, or minmax with scheme.weight.dynamic=false."
        )


@torch.no_grad()
def dampening(quantizer: Quantizer, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The regulariser |w_hat - clip(w)|^2, one number, and its gradient to w, shaped like `matrix`.

    w_hat and the ends of the grid, to which w is clipped, are constants: the gradient is 2 (w - w_hat) where w lies
    between the ends and 0 beyond them, where a constant is left out. What is pruned has none.

    Args:
        quantizer: of the weight.
        matrix: the weight, `[rows, columns]`.
    """
    w = quantizer.masked(matrix.detach())
    qparams, granularity = quantizer.ready_qparams(w), quantizer.granularity
    w_hat = ops.fake_quantize(w, qparams, quantizer.format, granularity)
    inside = granularity.unview(_between_ends(granularity.view(w), qparams, quantizer.format), w.shape)
    residual = (w - w_hat).mul_(inside)
    return residual.float().square().sum(), residual.mul_(2)


def _between_ends(view: Tensor, qparams: QParams, format: Format) -> Tensor:
    params = qparams.for_view()
    v = scale_down(view, params)
    if not isinstance(format, CodebookFormat):
        low, high = format.range()
        return (v >= low) & (v <= high)
    if format.block > 1:  # a table of vectors has no ends
        return torch.ones_like(v, dtype=torch.bool)
    return _between_entries(v, params)


def _between_entries(v: Tensor, params: ViewParams) -> Tensor:
    assert params.codebook is not None
    rows = v.reshape(len(params.codebook), -1)
    inside = (rows >= params.codebook[:, :1]) & (rows <= params.codebook[:, -1:])
    return inside.view_as(v)


def _place_of(codes: Tensor, format: Format) -> Tensor:
    """Where each code stands in the order of values, int16; codes of floats are a sign and a magnitude."""
    place = codes.to(torch.int16)
    if not isinstance(format, FloatFormat):
        return place
    sign = 2 ** (format.bits - 1)
    return torch.where(place >= sign, sign - place, place)


def _code_at(place: Tensor, format: Format) -> Tensor:
    """The inverse of `_place_of`, for places beyond the ends too."""
    if not isinstance(format, FloatFormat):
        return place.clamp(*format.code_range).to(format.code_dtype)
    sign = 2 ** (format.bits - 1)
    bounded = place.clamp(-format.highest, format.highest)
    return torch.where(bounded < 0, sign - bounded, bounded).to(format.code_dtype)
