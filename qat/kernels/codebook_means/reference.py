"""One step of Lloyd's algorithm in plain PyTorch, on the view `[groups, elements]`.

    v = x / scale; the members of entry k are the v between its midpoints to the entries below and above;
    mass_k = sum of w, moment_k = sum of w v, square_k = sum of w v^2 over the members;
    c_k = moment_k / mass_k

An entry without members is dead: no gradient reaches it, and it would stay so. It is moved into the cell with the
largest squared error, e = square - moment^2 / mass, which it halves: the two entries go to mean -+ sqrt(3/4) times the
cell's deviation, the best places in a cell that is filled evenly.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qat.numerics.formats import CodebookFormat, as_index
from qat.scratch import scratch

# Values at once: what the caches of two cores hold; on a GPU, a bound to the temporaries.
_PIECE_OF_A_CPU, _PIECE_OF_A_GPU = 2**18, 2**25
SHIFT = math.sqrt(3 / 4)
# What is left of a cell's error in each half of it.
LEFT = 1 / 8


def lloyd_step_(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> None:
    """Move each entry to the mean of its members, dead ones into the cells with the largest error; in place.

    Args:
        x: `[groups, elements]`.
        scale: `[groups, 1]`.
        codebook: `[rows, entries]` float32 in any order; row r serves `groups / rows` consecutive groups.
        importance: weights of x, shaped like it; None weighs evenly.
    """
    ascending, places = codebook.sort(dim=1, stable=True)
    codebook.scatter_(1, places, _moved(x, scale.to(torch.float32), ascending, importance))


def _moved(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> Tensor:
    """The ascending entries after the step, each where it was."""
    mass, moment = cell_sums(x, scale, codebook, importance, powers=2)
    alive = mass > 0
    entries = torch.where(alive, moment / torch.where(alive, mass, 1), codebook)
    if alive.all():
        return entries
    *_, square = cell_sums(x, scale, codebook, importance, powers=3)
    return _revived(entries, mass, square - moment * entries)


def cell_sums(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None, powers: int) -> list[Tensor]:
    """Sums of w v^p over the members of every entry of ascending codebooks, for p = 0 ... powers - 1."""
    sums = [torch.zeros_like(codebook) for _ in range(powers)]
    format = CodebookFormat(codebook.shape[1])
    for rows, groups, columns in _pieces(x, len(codebook)):
        block = x[groups, columns]
        v, codes, share = (scratch(name, block.shape, torch.float32, x.device) for name in ("v", "codes", "share"))
        torch.div(block, scale[groups], out=v)
        table = codebook[rows]
        members = as_index(format.encode_(codes.copy_(v), table).view(len(table), -1))
        share.fill_(1) if importance is None else share.copy_(importance[groups, columns])
        for power, total in enumerate(sums):
            share = share.mul_(v) if power else share
            total[rows].scatter_add_(1, members, share.view(len(table), -1))
    return sums


def _pieces(x: Tensor, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut x into blocks of whole codebook rows, or one row's groups and elements: rows, groups and columns of each."""
    groups, elements = x.shape
    most = _PIECE_OF_A_CPU if x.device.type == "cpu" else _PIECE_OF_A_GPU
    unit = groups // rows if rows > 1 else 1
    step = max(1, most // (unit * elements)) * unit
    width = elements if rows > 1 else most
    for begin in range(0, groups, step):
        own = slice(begin // unit, (begin + step) // unit) if rows > 1 else slice(None)
        for left in range(0, elements, width):
            yield own, slice(begin, begin + step), slice(left, left + width)


def _revived(entries: Tensor, mass: Tensor, error: Tensor) -> Tensor:
    """The entries with the dead ones moved into the cells with the largest error, `[rows, entries]`."""
    alive = mass > 0
    error = error.masked_fill(~alive, 0)
    for _ in range(int((~alive).sum(1).max())):
        entries, mass, error, alive = _revive_one(entries, mass, error, alive)
    return entries


def _revive_one(entries: Tensor, mass: Tensor, error: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the first dead entry of each row into its worst cell; rows without one, or without error, stay."""
    worst, dead = error.argmax(1, keepdim=True), (~alive).to(torch.uint8).argmax(1, keepdim=True)
    largest, heap = error.gather(1, worst), mass.gather(1, worst)
    split = (largest > 0) & ~alive.gather(1, dead)
    centre = entries.gather(1, worst)
    shift = SHIFT * (largest / torch.where(split, heap, 1)).clamp(min=0).sqrt()

    def with_halves(field: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.where(split, field.scatter(1, worst, low).scatter(1, dead, high), field)

    return (
        with_halves(entries, centre - shift, centre + shift),
        with_halves(mass, heap / 2, heap / 2),
        with_halves(error, largest * LEFT, largest * LEFT),
        alive.scatter(1, dead, True),
    )
