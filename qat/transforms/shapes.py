"""How many blocks, heads and channels a transformers model has, and how its configuration says so."""

import copy
from typing import Any, NamedTuple

from torch import nn

from qat.errors import InputError
from qat.options import require_whole
from qat.transforms.anatomy import attention_of, mlp_of

_MOST = 0.95


class Sizes(NamedTuple):
    """Of a whole model; None where its blocks have no such part, or differ in it.

    groups: key/value heads, each with the query heads that share it.
    """

    blocks: int
    groups: int | None
    channels: int | None


def block_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks of a transformers model, and its name.

    Raises:
        InputError: if there is none, or the model's configuration does not say how long it is.
    """
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(
        f"{type(model).__name__} is no transformers model with config.num_hidden_layers blocks: its parts cannot be "
        "removed."
    )


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of `model` as it is."""
    _, stack = block_stack(model)
    found: list[int | None] = []
    for find in (attention_of, mlp_of):
        try:
            counts = {find(block).units for block in stack}
        except InputError:
            counts = set()
        found.append(counts.pop() if len(counts) == 1 else None)
    return Sizes(len(stack), *found)


def sizes_within(model: nn.Module, heads: float, channels: float, blocks: float, multiple_of: int) -> Sizes:
    """The sizes of `model` without these shares of its parts.

    Raises:
        InputError: if a share is no share, nothing would be removed, or the model has no such parts.
    """
    shares = {"heads": heads, "channels": channels, "blocks": blocks}
    for option, share in shares.items():
        if not isinstance(share, int | float) or not 0 <= share <= _MOST:
            raise InputError(f"{option} is {share}; it is the share to remove, from 0 to {_MOST}: set it to 0.3.")
    require_whole("multiple_of", multiple_of, usual=64)
    if not any(shares.values()):
        raise InputError("Nothing is to be removed: set heads, channels or blocks to a share such as 0.3.")
    before = sizes_of(model)
    left: dict[str, int | None] = {"groups": before.groups, "channels": before.channels}
    if heads:
        left["groups"] = _groups(model, before, heads)
    if channels:
        left["channels"] = _channels(model, before, channels, multiple_of)
    count = max(1, round(before.blocks * (1 - blocks)))
    if blocks and count == before.blocks:
        least = 1 / before.blocks
        raise InputError(f"blocks={blocks} of {before.blocks} blocks is none: set it to {least:.2g} or more.")
    return Sizes(count, **left)


def configure(model: nn.Module, before: Sizes, after: Sizes) -> None:
    """Let `model.config` say how many heads and channels `after` has."""
    config: Any = model.config
    for name, value in _settings(model, before, after).items():
        setattr(config, name, value)


def resized(config: Any, settings: dict[str, Any]) -> Any:
    """A copy of `config` with other settings, built and checked as from its file.

    Raises:
        Exception: of some kind, where transformers refuses it.
    """
    new = type(config).from_dict(copy.deepcopy(config.to_dict()) | settings)
    new._attn_implementation = config._attn_implementation
    return new


def _settings(model: nn.Module, before: Sizes, after: Sizes) -> dict[str, Any]:
    """What the configuration will say of the heads and channels that change."""
    settings: dict[str, Any] = {}
    _, stack = block_stack(model)
    if after.groups is not None and after.groups != before.groups:
        part = attention_of(stack[0])
        (_, queries), (_, head_dim), _ = part.rows
        settings |= {"num_attention_heads": after.groups * (queries // head_dim), "head_dim": head_dim}
        if hasattr(model.config, "num_key_value_heads"):
            settings["num_key_value_heads"] = after.groups
    if after.channels is not None and after.channels != before.channels:
        settings["intermediate_size"] = after.channels
    return settings


def _groups(model: nn.Module, before: Sizes, share: float) -> int:
    """The number of key/value heads nearest to what shall be left that the configuration can say."""
    if before.groups is None:
        attention_of(block_stack(model)[1][0])  # says what is missing
        raise InputError("The blocks differ in their numbers of heads, which no configuration can say: set heads=0.")
    wanted = before.groups * (1 - share)
    possible = [n for n in range(1, before.groups) if _can_say(model, before, before._replace(groups=n))]
    nearest = min([*possible, before.groups], key=lambda n: (abs(n - wanted), n))
    if nearest == before.groups:
        shares = ", ".join(f"{1 - n / before.groups:.2g}" for n in possible) or "0"
        raise InputError(
            f"heads={share} of {before.groups} key/value heads is none that the configuration can say: set heads to "
            f"one of {shares}."
        )
    return nearest


def _channels(model: nn.Module, before: Sizes, share: float, multiple_of: int) -> int:
    if before.channels is None:
        mlp_of(block_stack(model)[1][0])
        raise InputError("The blocks differ in their channels, which no configuration can say: set channels=0.")
    left = max(1, round(before.channels * (1 - share) / multiple_of)) * multiple_of
    if not 0 < left < before.channels:
        raise InputError(
            f"channels={share} of {before.channels}, in multiples of {multiple_of}, is none: set multiple_of to a "
            "smaller number, such as 16."
        )
    return left


def _can_say(model: nn.Module, before: Sizes, after: Sizes) -> bool:
    try:
        resized(model.config, _settings(model, before, after))
    except Exception:  # it depends on the version of transformers which kind
        return False
    return True
