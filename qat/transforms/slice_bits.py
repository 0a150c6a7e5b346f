"""Converted models at fewer bits than they are stored with."""

from torch import nn

from qat.errors import InputError
from qat.nn import PackedLayer, PackedTensor
from qat.numerics.nested import is_nested, sliced
from qat.quantizers import NestedQuantizer


def slice_bits(model: nn.Module, bits: int) -> nn.Module:
    """Keep the first `bits` bits of the weights of a converted `model` whose codes are nested, in place.

    Weights of other grids stay as they are, and nested ones of no more bits.

    Returns:
        `model`.

    Raises:
        InputError: if no weight has nested codes of `bits` bits or more.
    """
    made: dict[int, PackedTensor] = {}
    found: set[str] = set()
    for layer in (module for module in model.modules() if isinstance(module, PackedLayer)):
        for name, weight in layer.weights().items():
            found.add(weight.format.name)
            if not is_nested(weight.format) or weight.format.bits <= bits:
                continue
            key = weight.memory  # shared with an embedding, say
            if key not in made:
                made[key] = PackedTensor.from_quantized(sliced(weight.quantized(), bits))
            setattr(layer, name, made[key])
    if not made and f"levels{2**bits}" not in found:
        raise InputError(
            f"No weight has nested codes of {bits} bits or more, but codes of {', '.join(sorted(found))}: leave out "
            "bits, or train with quantizer@scheme.weight=nested."
        )
    return model


def nested_widths(model: nn.Module) -> list[int]:
    """The widths below the largest that quantizers of `model` are trained for, the largest first."""
    quantizers = (module for module in model.modules() if isinstance(module, NestedQuantizer))
    return sorted({width for quantizer in quantizers for width in quantizer.widths[1:]}, reverse=True)
