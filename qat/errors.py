"""The one exception for a mistake in the input: shown to the user as its message alone, without a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was asked for cannot be done as asked; the message names the mend."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Say which of `choices` were meant by `word`: " Did you mean 'kmeans'? Choose from: ...", ready to append."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Choose from: {', '.join(choices)}." if choices else hint
