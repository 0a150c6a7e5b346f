"""Quantized inputs of layers: `input_activations`, and the scale of static ones.

    input_scale       [1]
    input_zero_point  int8 [1]   signed, as codes; asymmetric inputs only

Dynamic scales follow from the data, in each engine by its own arithmetic. The library takes max|x| / 127.5 for int8 and
max|x| / 448 for fp8_e4m3, in the dtype of x; here it is max|x| / 127, as in the kernels of vLLM, rounded up to the
scale_dtype. Asymmetric scales, (max - min) / 255, are the same in both where x is float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import ActivationGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments, dtype_of
from qat.export.layouts.compressed_tensors.floats import E4M3
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.scales import DTYPES, dtype_misfits, restored
from qat.export.layouts.words import signed, unsigned
from qat.nn import StoredActivation
from qat.nn.packed import dtype_name
from qat.numerics.formats import Format, IntFormat
from qat.numerics.granularity import PerGroup, PerTensor, PerToken

_BITS = (4, 8)
# Of dynamic scales in engines. A config does not say it: the library would clamp to its range in the dtype of x, which
# overflows.
_USUAL = torch.float32
_RULES = {"absmax": True, "minmax": False}


def input_misfits(grid: ActivationGrid, types: tuple[str, ...], weight: torch.dtype) -> Iterator[Misfit]:
    """Misfits of an input for a format beside whose weights inputs have `types`, in a model of the dtype `weight`."""
    fitting = "fp8" if types == ("float",) else "minmax"
    if not types:
        yield Misfit("a quantized input", "quantizer@scheme.input=none")
        return
    kind = _type_of(grid.format)
    if kind not in types:
        bits = "" if grid.format.bits == E4M3.bits else " scheme.input.bits=8"
        yield Misfit(
            f"inputs in {grid.format.name} beside such weights", f"quantizer@scheme.input={fitting}_token{bits}"
        )
    if isinstance(grid.format, IntFormat) and grid.format.bits not in _BITS:
        yield Misfit(f"inputs of {grid.format.bits} bits", "scheme.input.bits=8")
    if grid.rule is None:
        if grid.granularity != PerTensor():
            yield Misfit(f"static input scales {grid.granularity}", "scheme.input.granularity=per_tensor")
        yield from dtype_misfits(grid.scale_dtype, weight, "input")
        return
    if grid.scale_dtype not in (torch.float32, weight) and weight != torch.float32:
        yield Misfit(f"input scales that a {dtype_name(weight)} model rounds", "scheme.input.scale_dtype=float32")
    if grid.rule not in _RULES:
        yield Misfit(f"input scales by the rule {grid.rule}", f"quantizer@scheme.input={fitting}_token")
    if not isinstance(grid.granularity, PerTensor | PerToken | PerGroup):
        yield Misfit(f"input scales {grid.granularity}", "scheme.input.granularity=per_token")


def input_arguments(input: StoredActivation) -> Arguments:
    """What the config says of an input that has no misfits."""
    granularity, rule = input.granularity, input.rule
    strategies = {PerTensor(): "tensor", PerToken(): "token"}
    size = granularity.group_size if isinstance(granularity, PerGroup) else None
    return Arguments(
        _type_of(input.format),
        input.format.bits,
        strategies.get(granularity, "group"),
        size,
        symmetric=input.zero_point is None if rule is None else _RULES[rule],
        dynamic=rule is not None,
        scale_dtype=None if rule is None or input.scale_dtype == _USUAL else str(input.scale_dtype),
    )


def input_tensors(input: StoredActivation, weight: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an input: none where scales are dynamic."""
    if input.rule is not None:
        return
    scale, zero_point, *_ = input.qparams(torch.empty(0))
    assert isinstance(scale, Tensor)
    yield "input_scale", scale.reshape(1).to(weight)
    if zero_point is not None:
        yield "input_zero_point", signed(zero_point.reshape(1), IntFormat(input.format.bits))


def restored_input(leaves: Leaves, said: Arguments, dtype: torch.dtype) -> StoredActivation:
    """The inverse of `input_arguments` and `input_tensors`, for a model of `dtype`.

    Raises:
        InputError: if it is no grid of inputs here.
    """
    name, format = leaves.name, _format(said, leaves.name)
    granularity = said.granularity(name)
    description: dict[str, Any] = {"format": format.name, "granularity": str(granularity), "rule": None}
    if said.dynamic:
        if not isinstance(granularity, PerTensor | PerToken | PerGroup) or said.strategy == "tensor_group":
            raise InputError(f"{name} has dynamic input scales by the strategy '{said.strategy}': refused.")
        rule = "absmax" if said.symmetric else "minmax"
        spelled = dtype_name(dtype_of(said.scale_dtype) if said.scale_dtype else _USUAL)
        # What engines leave behind of static scales, where inputs became dynamic later.
        leaves.drop("input_scale", "input_zero_point")
        return StoredActivation(description | {"rule": rule, "scale_dtype": spelled})
    if granularity != PerTensor():
        raise InputError(f"{name} has static input scales by the strategy '{said.strategy}': refused.")
    fields = {"scale": restored(leaves.take("input_scale", *DTYPES, shape=(1,)), dtype, name)}
    if not said.symmetric:
        fields["zero_point"] = unsigned(leaves.take("input_zero_point", torch.int8, shape=(1,)), IntFormat(format.bits))
    shapes = {field: {"shape": list(x.shape), "dtype": dtype_name(x.dtype)} for field, x in fields.items()}
    input = StoredActivation(description | {"scale_dtype": dtype_name(fields["scale"].dtype)} | shapes)
    for field, tensor in fields.items():
        getattr(input, field).copy_(tensor)
    return input


def _type_of(format: Format) -> str:
    """`int`, `float`, or the name of a format that inputs do not have."""
    if isinstance(format, IntFormat):
        return "int"
    return "float" if format == E4M3 else format.name


def _format(said: Arguments, name: str) -> Format:
    if said.type == "int" and said.num_bits in range(2, 9):
        return IntFormat(said.num_bits, signed=said.symmetric)
    # A power of two a block is found by another rule in the library than in the specification.
    if (said.type, said.num_bits, said.symmetric) == ("float", 8, True) and said.scale_dtype != "torch.uint8":
        return E4M3
    raise InputError(
        f"{name} has inputs in {said.num_bits}-bit {said.type}s of a kind that is not known here: refused."
    )
