"""Numbers among the options of a transform: what could not have been meant is refused, by its name."""

from typing import Any

from qat.errors import InputError


def require_whole(name: str, value: Any, usual: int, least: int = 1) -> None:
    """Refuse an option that is no whole number from `least` on.

    Raises:
        InputError: if it is none; the message says `usual`, what one would set.
    """
    if not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value}; it is a whole number from {least} on: set it to {usual}.")


def require_within(name: str, value: Any, usual: float, low: float, high: float) -> None:
    """Refuse an option that is no number from `low` to `high`.

    Raises:
        InputError: if it is none; the message says `usual`, what one would set.
    """
    if not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is {value}; it lies between {low:g} and {high:g}: set it to {usual:g}.")
