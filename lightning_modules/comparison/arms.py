"""The arms of a comparison, as options of the command that runs each of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_modules.comparison.recipe import chooses_recipe
from qat.errors import InputError

FULL = "fp"
# Options that are the comparison's, or that each arm has of its own.
_OF_THE_COMPARISON = ("method", "compare", "seed", "hydra", "resumed", "ckpt_path", "paths.output_dir", "title")
# Options that say how to quantize, which an arm in full precision does not.
_OF_THE_SCHEME = (
    *("scheme", "quantizer", "kv", "transforms", "distill", "module.freeze"),
    *("callbacks.smooth_start", "callbacks.soft", "callbacks.refresh", "callbacks.nested"),
    *("callbacks.dampening", "callbacks.freezing", "callbacks.precision"),
)


class Arm(NamedTuple):
    """One run, of one seed.

    name: in the table.
    options: of `python train.py`.
    """

    name: str
    options: list[str]


def trained_arms(given: Sequence[str], arms: Mapping[str, Any] | None, seed: int) -> list[Arm]:
    """Runs that train with quantization, from the options `given` to the comparison and those of each arm.

    An arm with a recipe of its own takes that in the place of the comparison's.
    """
    return [
        Arm(name, [*_without(given, *["experiment"] * chooses_recipe(options)), f"seed={seed}", *options])
        for name, options in chosen(arms).items()
    ]


def full_precision(given: Sequence[str], seed: int) -> Arm:
    """The run that trains alike without quantization; `given` names no recipe, but spells it out."""
    return Arm(FULL, [*_without(given, *_OF_THE_SCHEME), f"seed={seed}", "method=fp"])


def rounded_arms(given: Sequence[str], arms: Mapping[str, Any] | None, seed: int, model: Sequence[str]) -> list[Arm]:
    """Runs that quantize what the run in full precision trained, which the options `model` load.

    `given` names no recipe, but spells it out: its scheme is kept, and each arm has transforms of its own.
    """
    # What it loads is pruned already, and is not trained.
    kept = _without(given, "model", "transforms", "prune", "distill")
    return [
        Arm(name, [*kept, f"seed={seed}", *model, *options, "method=ptq"]) for name, options in chosen(arms).items()
    ]


def chosen(arms: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The arms that are not set to null.

    Raises:
        InputError: if one is called as the run in full precision is, or its options are no list.
    """
    found = {name: options for name, options in (arms or {}).items() if options is not None}
    for name, options in found.items():
        if name == FULL:
            raise InputError(f"An arm cannot be called '{FULL}', which is the run in full precision.")
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            example = f"'compare.rounded.{name}=[\"transforms=gptq\"]'"
            raise InputError(f"The options of the arm '{name}' are {options}: give a list, as in {example}.")
    return {name: list(options) for name, options in found.items()}


def _without(given: Sequence[str], *groups: str) -> list[str]:
    """The options that are neither the comparison's nor of `groups`."""
    return [option for option in given if not _is_of(option, (*_OF_THE_COMPARISON, *groups))]


def _is_of(option: str, groups: Sequence[str]) -> bool:
    """Whether `option` chooses one of `groups` or something within it."""
    key = option.lstrip("+~").partition("=")[0]
    return any(key == group or key.startswith((f"{group}.", f"{group}@")) for group in groups)
