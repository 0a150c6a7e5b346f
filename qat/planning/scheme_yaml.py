"""A plan as a scheme: a yaml that training, rounding and export take like any other."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from qat.atomic import replaced_file
from qat.errors import InputError
from qat.planning.plan import Plan

_SHARED = ("input", "output", "grad", "compute", "products")
_TEMPLATE = """\
# python train.py --config-dir {folder} scheme={name}    {description}
defaults:
  - /quantizer@weight: none
  - /quantizer@input: none
  - /quantizer@output: none
  - /quantizer@grad: none
  - /kv@kv: none
{quantizers}
  - _self_

_target_: qat.transforms.Scheme
_convert_: all
head: false
embedding: false
exclude: []
compute: fake
products: [forward]
rules:
{rules}
"""


def write_scheme(plan: Plan, folder: str | Path, name: str) -> Path:
    """Write `folder/scheme/name.yaml`, for `python train.py --config-dir folder scheme=name`.

    A rule for each candidate that was chosen, with the patterns of its layers; layers that were not planned match none
    and stay in full precision. Activations, gradients and products follow scheme.input, .output, .grad, .compute and
    .products, which can be chosen as in any scheme.

    Returns:
        The path of the yaml.

    Raises:
        InputError: if a chosen candidate has no option of the config group `quantizer`.
    """
    chosen = {c: [n for n, own in plan.assignment.items() if own == c] for c in plan.candidates}
    chosen = {candidate: names for candidate, names in chosen.items() if names}
    everything = (*plan.assignment, *plan.others)
    quantizers, rules = [], []
    for candidate, names in chosen.items():
        option = plan.candidates[candidate].option
        if option is None:
            raise InputError(f"The candidate '{candidate}' has no option of the config group quantizer: give it one.")
        rule: dict[str, Any] = {"match": patterns(names, everything)}
        quantizers.append(f"  - /quantizer@rules.{candidate}.weight: {option}")
        if plan.candidates[candidate].quantizes:
            rule |= {"weight": dict(plan.candidates[candidate].options)}
            rule |= {option: f"${{scheme.{option}}}" for option in _SHARED}
        rules.append(_rule(candidate, rule))
    text = _TEMPLATE.format(
        folder=folder, name=name, description=_description(plan), quantizers="\n".join(quantizers), rules="".join(rules)
    )
    path = Path(folder) / "scheme" / f"{name}.yaml"
    with replaced_file(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n")
    return path


def _description(plan: Plan) -> str:
    return f"{plan.bits_per_weight:.3f} bits per weight, planned by {plan.signal}"


def _rule(candidate: str, rule: Mapping[str, Any]) -> str:
    """One entry of `rules`, a pattern a line, its options on one."""
    lines = [f"  {candidate}:"]
    lines += ["    match:", *(f"      - {_flow(pattern)}" for pattern in rule["match"])]
    lines += [f"    {key}: {_flow(value)}" for key, value in rule.items() if key != "match"]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def patterns(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Shell wildcards that match `names` and nothing else of `everything`.

    Layers that differ in their first number share patterns: `model.layers.1[0-4].mlp.up_proj`.
    """
    families: dict[tuple[str, str], list[int]] = {}
    found = []
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", f".{name}.")
        if number is None:
            found.append(_literal(name))
        else:
            ends = (name[: number.start() - 1], name[number.end() - 1 :])
            families.setdefault(ends, []).append(int(number.group()))
    for (before, after), numbers in families.items():
        found += _family(before, after, numbers, names, everything)
    return found


def _family(
    before: str, after: str, numbers: Sequence[int], names: Sequence[str], everything: Sequence[str]
) -> list[str]:
    """Patterns for the names before + number + after; the shortest that match no other layer."""
    first, last = _literal(before), _literal(after)
    for middles in (["*"], _digits(numbers), [str(number) for number in numbers]):
        tried = [f"{first}{middle}{last}" for middle in middles]
        matched = {name for name in everything if any(fnmatchcase(name, pattern) for pattern in tried)}
        if matched == {f"{before}{number}{after}" for number in numbers}:
            return tried
    return tried


def _digits(numbers: Sequence[int]) -> list[str]:
    """Wildcards for whole numbers, one for all that differ in their last digit only: 10, 11, 13 -> 1[013]."""
    tens: dict[str, list[int]] = {}
    for number in sorted(numbers):
        tens.setdefault(str(number)[:-1], []).append(number % 10)
    return [f"{head}[{_ranges(digits)}]" if len(digits) > 1 else f"{head}{digits[0]}" for head, digits in tens.items()]


def _ranges(digits: Sequence[int]) -> str:
    """0, 1, 2, 5 -> 0-25."""
    runs: list[list[int]] = []
    for digit in digits:
        if runs and digit == runs[-1][-1] + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    return "".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs)


def _literal(text: str) -> str:
    """`text` with what a wildcard would be, as itself."""
    return re.sub(r"([*?[])", r"[\1]", text)
