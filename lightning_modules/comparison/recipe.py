"""A recipe as the options that it stands for, so that arms can take some of them and leave others."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose
from omegaconf import OmegaConf

_GROUP = "experiment"


def chooses_recipe(options: Sequence[str]) -> bool:
    """Whether `options` choose a file of configs/experiment/."""
    return any(_key(option) == _GROUP for option in options)


def spelled_out(given: Sequence[str]) -> list[str]:
    """Options that compose the same as `given`, with those that a recipe stands for in the place of its name.

    They come first, and a group that `given` chooses itself is not chosen twice: what a user says beside the recipe
    holds.
    """
    others = [option for option in given if _key(option) != _GROUP]
    chosen = {_key(option) for option in others}
    recipe = [option for option in given if _key(option) == _GROUP]
    options = _options_of(recipe) if recipe else []
    return [*(option for option in options if _key(option) not in chosen), *others]


def _options_of(recipe: Sequence[str]) -> list[str]:
    """The groups that `recipe` chooses otherwise than the default job, then the values that these lack."""
    usual, chosen = _choices([]), _choices(recipe)
    groups = [f"{group}={chosen[group]}" for group in usual if group != _GROUP and chosen[group] != usual[group]]
    before, after = _leaves(groups), _leaves(recipe)
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return [*groups, *(f"++{key}={_written(value)}" for key, value in changed.items())]


def _choices(options: Sequence[str]) -> dict[str, Any]:
    """The option of every group."""
    return dict(compose("train", list(options), return_hydra_config=True).hydra.runtime.choices)


def _leaves(options: Sequence[str]) -> dict[str, Any]:
    return dict(_flat(OmegaConf.to_container(compose("train", list(options)), resolve=False)))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping of names, by the names that lead to it."""
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        for name, own in value.items():
            yield from _flat(own, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def _written(value: Any) -> str:
    """`value` as the command line has it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _key(option: str) -> str:
    return option.lstrip("+~").partition("=")[0]
