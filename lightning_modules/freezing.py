"""Parameters that do not train."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from qat.errors import InputError


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let no parameter of `model` train whose name one of `patterns` matches.

    Args:
        model: as it is trained, prepared already: `*.weight` are weights and gains, `*quantizer.*` what quantizers
            learn.
        patterns: of names, `*` for any part of one.

    Returns:
        the names of the frozen parameters.

    Raises:
        InputError: if a pattern matches none, or nothing is left to train.
    """
    if isinstance(patterns, str):
        raise InputError(f"module.freeze is '{patterns}'; it is a list of patterns: set it to ['{patterns}'].")
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            examples = ", ".join(list(named)[:2])
            raise InputError(
                f"module.freeze has '{pattern}', which matches no parameter. They are called {examples} and so on; "
                "'*' stands for any part of a name."
            )
    frozen = [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name in frozen:
        named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise InputError("module.freeze leaves nothing to train: take a pattern out of it, or set fit=false.")
    return frozen
