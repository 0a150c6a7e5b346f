"""Fake quantization in plain PyTorch, forward and backward written out, on the view `[groups, elements]`.

The gradients are those that autograd derives from `qat.numerics.functional.fake_quantize`, with v = x / s + z, the
code's grid value q and the incoming gradient g:

    dx = g where v is inside the grid, else 0            (a codebook has no outside)
    ds = sum over the group of dx * (q - v) + (g - dx) * (q - z)
    dz = sum over the group of (dx - g) * s
    dcodebook[k] = sum over the members of entry k of g * s

Everything runs in pieces that fit a core's cache, which makes these many small passes cost about one long one and
bounds what they allocate.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams, scale_down, unscale

_PIECE = 2**16


def quantize(x: Tensor, params: ViewParams, format: Format) -> Tensor:
    """Codes of `x`."""
    codes = torch.empty(x.shape, dtype=format.code_dtype, device=x.device)
    for piece, own in _pieces(x, params):
        codes[piece] = format.encode(scale_down(x[piece], own), own.codebook)
    return codes


def dequantize(codes: Tensor, out: Tensor, params: ViewParams, format: Format) -> None:
    """Write the values of `codes`, computed in float32, into `out`."""
    for piece, own in _pieces(codes, params):
        out[piece] = unscale(format.decode(codes[piece], own.codebook), own)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, codes: Tensor, needs: list[bool], params: ViewParams, format: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to scale, zero point and codebook; the one to x takes the place of `grad`.

    Args:
        grad: gradient of x_hat, `[groups, elements]`; overwritten if `needs[0]`.
        x: the values that were quantized.
        codes: their codes.
        needs: which of the four gradients to compute; the others come back empty.
    """
    need_x, need_scale, need_zero_point, need_codebook = needs
    scale, _, codebook, _ = params
    dscale = torch.zeros_like(scale) if need_scale else grad.new_empty(0)
    dzero_point = torch.zeros_like(scale) if need_zero_point else grad.new_empty(0)
    dcodebook = torch.zeros_like(codebook) if need_codebook and codebook is not None else grad.new_empty(0)
    for piece, own in _pieces(x, params):
        g = grad[piece].to(torch.float32)
        rows = piece[0]
        if need_codebook:
            _add_codebook_gradient(dcodebook, g, codes[piece], rows.start / len(x), own)
        if need_x or need_scale or need_zero_point:
            v = scale_down(x[piece], own)
            inside = _clip_backward(g, v, format)
            if need_scale:
                dscale[rows] += _scale_gradient(g, inside, v, format.decode(codes[piece], own.codebook), own)
            if need_zero_point:
                dzero_point[rows] += own.scale * (inside - g).sum(1, keepdim=True)
            if need_x:
                grad[piece] = inside
    return dscale, dzero_point, dcodebook


def _clip_backward(g: Tensor, v: Tensor, format: Format) -> Tensor:
    """g where v is on or inside the ends of the grid, else 0."""
    if not format.saturates:
        return g
    low, high = format.range()
    # hardtanh's own backward is one pass, but excludes its ends: open the interval by one float.
    below, above = torch.nextafter(torch.tensor([low, high]), torch.tensor([-math.inf, math.inf])).tolist()
    return torch.ops.aten.hardtanh_backward(g, v, below, above)


def _scale_gradient(g: Tensor, inside: Tensor, v: Tensor, q: Tensor, own: ViewParams) -> Tensor:
    outside = (g - inside).mul_(q if own.zero_point is None else q - own.zero_point)
    return (q - v).mul_(inside).add_(outside).sum(1, keepdim=True)


def _add_codebook_gradient(total: Tensor, g: Tensor, codes: Tensor, position: float, own: ViewParams) -> None:
    """Add g * s of every member to its entry; the piece starts at the share `position` of all codebook rows."""
    assert own.codebook is not None
    rows = len(own.codebook)
    first = round(position * len(total)) if len(total) > 1 else 0
    members = codes.reshape(rows, -1).long()
    total[first : first + rows].scatter_add_(1, members, (g * own.scale).reshape(rows, -1))


def _pieces(view: Tensor, params: ViewParams) -> Iterator[tuple[tuple[slice, slice], ViewParams]]:
    """Cut `view` into blocks of about `_PIECE` elements, each with the parameters of its groups."""
    groups, elements = view.shape
    if groups == 1:
        for start in range(0, elements, _PIECE):
            yield (slice(0, 1), slice(start, start + _PIECE)), params
        return
    scale, zero_point, codebook, offset = params
    tables = 1 if codebook is None else len(codebook)
    groups_per_table = groups // tables
    # A block holds whole codebook rows, unless all groups share a single one.
    unit = 1 if tables == 1 else groups_per_table
    step = max(1, _PIECE // (unit * elements)) * unit
    for start in range(0, groups, step):
        rows = slice(start, min(start + step, groups))
        own_table = codebook
        if codebook is not None and tables > 1:
            own_table = codebook[rows.start // groups_per_table : rows.stop // groups_per_table]
        own = ViewParams(
            scale[rows],
            None if zero_point is None else zero_point[rows],
            own_table,
            None if offset is None else offset[rows],
        )
        yield (rows, slice(None)), own
