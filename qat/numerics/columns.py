"""The grid of every column of a matrix, for methods that round one column after the other."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, ViewParams, scale_down, unscale

# What columns of matrices must have in common to be stacked: the format, and which of the qparams there are.
Kind = tuple[Format, tuple[bool, ...]]


class ColumnGrid(Protocol):
    """What rounds the columns of a matrix one by one."""

    def round(self, values: Tensor, column: int) -> Tensor:
        """The nearest grid values of `values` `[rows]`, which stand in `column`."""


class Columns:
    """The grid of every column of a matrix `[rows, columns]`, whatever shares a scale in it.

    Neighbouring columns with the same qparams in every row, such as those of a group, are a run. What a run needs is
    gathered once, so that rounding a column looks nothing up and never waits for a GPU.
    """

    def __init__(self, qparams: QParams, format: Format, granularity: Granularity, shape: torch.Size) -> None:
        if format.block > 1:
            raise InputError(
                f"GPTQ rounds one column after the other, and one code of {format.name} stands for {format.block} "
                "columns: take a scalar grid, as quantizer@scheme.weight=kmeans."
            )
        params = qparams.for_view()
        groups, device = len(params.scale), params.scale.device
        width = -(-shape.numel() // groups)
        number = torch.arange(groups, dtype=torch.int32, device=device)[:, None].expand(groups, width)
        group = granularity.unview(number, shape).t().contiguous()
        starts = torch.ones(len(group), dtype=torch.bool, device=device)
        starts[1:] = (group[1:] != group[:-1]).any(1)
        self._fill(format, (starts.cumsum(0) - 1).tolist(), _gathered(params, group[starts]))

    def _fill(self, format: Format, run: list[int], params: ViewParams) -> None:
        self._format, self._run, self._params = format, run, params
        count = len(params.scale)
        fields = ([None] * count if field is None else field.unbind(0) for field in params)
        self._own = [ViewParams(*own) for own in zip(*fields, strict=True)]

    @property
    def kind(self) -> Kind:
        """Columns of the same kind can be stacked."""
        return self._format, tuple(field is None for field in self._params)

    @classmethod
    def stacked(cls, parts: Sequence["Columns"]) -> "Columns":
        """The grid of matrices on top of each other, `[all their rows, columns]`; `parts` are of one kind."""
        together = list(zip(*(part._run for part in parts), strict=True))
        runs = {key: place for place, key in enumerate(dict.fromkeys(together))}

        def joined(fields: Sequence[Tensor | None]) -> Tensor | None:
            found = [field[[run[i] for run in runs]] for i, field in enumerate(fields) if field is not None]
            return torch.cat(found, dim=1) if found else None

        scale, *others = (joined(fields) for fields in zip(*(part._params for part in parts), strict=True))
        assert scale is not None
        whole = cls.__new__(cls)
        whole._fill(parts[0]._format, [runs[key] for key in together], ViewParams(scale, *others))
        return whole

    def round(self, values: Tensor, column: int) -> Tensor:
        """The nearest grid values of `values` `[rows]`, which stand in `column`."""
        params = self._own[self._run[column]]
        codes = self._format.encode_(scale_down(values, params), params.codebook)
        return unscale(self._format.decode(codes, params.codebook), params)


def _gathered(params: ViewParams, group: Tensor) -> ViewParams:
    """The qparams of elements that belong to `group` `[runs, rows]`: `[runs, rows]`, the codebook `..., entries]`."""
    groups = len(params.scale)

    def each(field: Tensor | None) -> Tensor | None:
        return None if field is None else field[(group // (groups // len(field))).long()]

    flat = (field if field is None else field[:, 0] for field in params._replace(codebook=None))
    return ViewParams(*map(each, flat))._replace(codebook=each(params.codebook))  # type: ignore[arg-type]
