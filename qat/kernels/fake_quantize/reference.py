"""Fake quantization in plain PyTorch, forward and backward written out, on the view `[groups, elements]`.

The gradients are those that autograd derives from `qat.numerics.functional.fake_quantize`, with v = x / s + z, the
result x_hat and the incoming gradient g:

    dx = g where v is inside the grid, else 0            (a codebook has no outside)
    ds = sum over the group of (g * x_hat - dx * x) / s
    dz = sum over the group of (dx - g) * s
    dcodebook[k] = sum over the members of entry k of g * s

Where x is NaN, x_hat is too; that is outside of every grid that has an outside, and a member of no entry.

Everything runs in place, in blocks that fit a core's cache and in scratch memory, which makes these many small passes
cost about one long one.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams, codes_shape, scale_down, unscale
from qat.scratch import block_elements, scratch


class Gradients(NamedTuple):
    """Shaped like the qparams of the view; empty where not needed."""

    scale: Tensor
    zero_point: Tensor
    codebook: Tensor


def quantize(x: Tensor, params: ViewParams, format: Format, stochastic: bool = False) -> Tensor:
    """Codes of `x`; stochastic ones are drawn from torch's generator so that their expectation is x."""
    codes = torch.empty(codes_shape(x.shape, format), dtype=format.code_dtype, device=x.device)
    for (own,), (x_block, out) in _blocks([params], x, codes):
        _encode_to(out, x_block, own, format, stochastic)
    return codes


def dequantize(codes: Tensor, out: Tensor, params: ViewParams, format: Format) -> None:
    """Write the values of `codes`, computed in float32, into `out`."""
    for (own,), (block, values) in _blocks([params], codes, out):
        _decode_to(values, block, own, format)


def restore(x: Tensor, codes: Tensor, out: Tensor, params: ViewParams, format: Format) -> None:
    """As `dequantize`, for the codes of `x`, which have none for NaN: it is put back where x is."""
    for (own,), (x_block, block, values) in _blocks([params], x, codes, out):
        _restore_to(values, x_block, block, own, format)


def fake_quantize(x: Tensor, out: Tensor, params: ViewParams, format: Format) -> None:
    """Write what `x` is on its grid into `out`, of any floating dtype."""
    for (own,), (x_block, values) in _blocks([params], x, out):
        codes = scratch("codes", codes_shape(x_block.shape, format), format.code_dtype, x.device)
        _encode_to(codes, x_block, own, format)
        _restore_to(values, x_block, codes, own, format)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor | None,
    x_hat: Tensor | None,
    needs: list[bool],
    params: ViewParams,
    format: Format,
) -> Gradients:
    """Gradients to scale, zero point and codebook; the one to x takes the place of `grad`.

    Args:
        grad: gradient of x_hat, `[groups, elements]`; overwritten.
        x: the values that were quantized.
        codes: their codes, if they were kept.
        x_hat: if given, the values of the codes are written there, for who needs them again.
        needs: which of the four gradients to compute; the others come back empty.
    """
    need_x, need_scale, need_zero_point, need_codebook = needs
    codes = quantize(x, params, format) if codes is None else codes
    wanted = zip(params[:3], needs[1:], strict=True)
    found = Gradients(*(torch.zeros_like(p) if need and p is not None else grad.new_empty(0) for p, need in wanted))
    restored = grad if x_hat is None else x_hat
    for (own, total), (g_own, x_own, code_block, x_hat_own) in _blocks([params, found], grad, x, codes, restored):
        g, x_block = g_own.to(torch.float32), x_own.to(torch.float32)
        lost = _lost(x_block)
        if need_codebook:
            _add_codebook_gradient(total.codebook, g, format.entry(code_block), lost, own)
        if need_zero_point:
            total.zero_point.sub_(g.sum(1, keepdim=True))
        if need_scale or x_hat is not None:
            values = _decode(code_block, _temporary("values", g), own, format)
            _fill(values, lost, math.nan)
        if x_hat is not None:
            x_hat_own.copy_(values)
        if need_scale:
            values.mul_(g)
        if need_x or need_scale or need_zero_point:
            _clip_backward_(g, x_block, lost, own, format)
        if need_scale:
            total.scale.add_(values.addcmul_(g, x_block, value=-1).sum(1, keepdim=True))
        if need_zero_point:
            total.zero_point.add_(g.sum(1, keepdim=True))
        if need_x and g is not g_own:
            g_own.copy_(g)
    if need_scale:
        found.scale.div_(params.scale)
    if need_zero_point:
        found.zero_point.mul_(params.scale)
    return found


def _decode(codes: Tensor, out: Tensor, own: ViewParams, format: Format) -> Tensor:
    return unscale(format.decode(codes, own.codebook, out=out), own, out=out)


def _encode_to(out: Tensor, x: Tensor, own: ViewParams, format: Format, stochastic: bool = False) -> None:
    v = scale_down(x, own, out=_temporary("v", x))
    noise = _temporary("noise", v).uniform_() if stochastic else None
    out.copy_(format.encode_(v, own.codebook, noise))


def _restore_to(out: Tensor, x: Tensor, codes: Tensor, own: ViewParams, format: Format) -> None:
    _decode_to(out, codes, own, format)
    _fill(out, _lost(x), math.nan)


def _decode_to(out: Tensor, codes: Tensor, own: ViewParams, format: Format) -> None:
    """As `_decode`, into any floating dtype."""
    if out.dtype == torch.float32:
        _decode(codes, out, own, format)
    else:
        out.copy_(_decode(codes, _temporary("values", out), own, format))


def _lost(x: Tensor) -> Tensor | None:
    """Where `x` is NaN; None for nowhere.

    A CPU looks at the sum first, which is NaN if anything is: its fastest pass, where finding and filling take as long
    as all the rest. A GPU would have to be waited for.
    """
    return x.isnan() if x.is_cuda or bool(x.sum().isnan()) else None


def _fill(values: Tensor, lost: Tensor | None, by: float) -> None:
    if lost is not None:
        values.masked_fill_(lost, by)


def _clip_backward_(g: Tensor, x: Tensor, lost: Tensor | None, own: ViewParams, format: Format) -> None:
    """Set g to 0 where v is beyond the ends of the grid, or NaN."""
    if format.saturates:
        v = scale_down(x, own, out=_temporary("v", g))
        torch.ops.aten.hardtanh_backward.grad_input(g, v, *_open_interval(format), grad_input=g)
        _fill(g, lost, 0.0)


@lru_cache
def _open_interval(format: Format) -> tuple[float, float]:
    """The ends of the grid, one float32 further out: hardtanh's backward excludes its own ends."""
    ends = torch.tensor(format.range(), dtype=torch.float32)
    below, above = torch.nextafter(ends, torch.tensor([-math.inf, math.inf])).tolist()
    return below, above


def _add_codebook_gradient(total: Tensor, g: Tensor, entry: Tensor, lost: Tensor | None, own: ViewParams) -> None:
    """Add g * s of every element to its entry of the codebook."""
    shares = torch.mul(g, own.scale, out=_temporary("v", g))
    _fill(shares, lost, 0.0)
    rows = len(total), -1
    total.scatter_add_(1, entry.view(rows), shares.view(rows))


def _blocks(params: list[Any], *tensors: Tensor) -> Iterator[tuple[tuple[Any, ...], tuple[Tensor, ...]]]:
    """Cut `tensors` `[groups, elements]` into blocks, each with its own part of `params` (the first: ViewParams)."""
    if tensors[0].numel() == 0:  # an expert without tokens
        return iter(())
    groups, elements = len(tensors[0]), max(tensor.shape[1] for tensor in tensors)
    most = block_elements(tensors[0].device)
    if groups == 1:
        # Vector codes are fewer than elements; both are cut into as many parts.
        parts = zip(*(tensor.split(most * tensor.shape[1] // elements or 1, dim=1) for tensor in tensors), strict=True)
        return zip(repeat(tuple(params)), parts, strict=False)
    tables = 1 if params[0].codebook is None else len(params[0].codebook)
    # A block holds whole codebook rows, unless all groups share a single one.
    unit = 1 if tables == 1 else groups // tables
    step = max(1, most // max(1, unit * elements)) * unit
    own = zip(*(_split(p, step, groups) for p in params), strict=False)
    return zip(own, zip(*(tensor.split(step) for tensor in tensors), strict=True), strict=False)


def _split(params: Any, step: int, groups: int) -> Iterator[Any]:
    """The part of a tuple of parameters for each `step` groups, without end where all groups share them."""
    fields = (
        repeat(field) if field is None or len(field) < 2 else field.split(step * len(field) // groups)
        for field in params
    )
    return map(type(params), *fields)


def _temporary(name: str, like: Tensor) -> Tensor:
    return scratch(name, like.shape, torch.float32, like.device)
