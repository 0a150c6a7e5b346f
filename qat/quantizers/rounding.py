"""How values between two of a grid are rounded, by name."""

from qat.errors import InputError, nearest

_ROUNDINGS = ("nearest", "stochastic")


def is_stochastic(rounding: str) -> bool:
    """Whether to round at random so that the expectation is the value itself.

    Raises:
        InputError: if there is no such rounding.
    """
    if rounding not in _ROUNDINGS:
        raise InputError(f"There is no rounding '{rounding}'.{nearest(rounding, _ROUNDINGS)}")
    return rounding == "stochastic"
