"""Layers that get the same candidate, because inference engines run them as one."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from qat.errors import InputError, nearest

# Siblings whose weights engines join into one matrix: queries, keys and values; gate and up.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


def lock_groups(layers: Iterable[str], fused: Iterable[Sequence[str]] = FUSED) -> list[tuple[str, ...]]:
    """The layers of a plan, each in one group; a group gets one candidate.

    Args:
        layers: their names.
        fused: sets of siblings, by the last part of their names, that are locked wherever they stand side by side; or
            of layers by their whole names.

    Returns:
        Groups in the order of the layers; most hold one layer.
    """
    names = list(layers)
    leader = {name: name for name in names}
    for together in fused:
        for members in _members(names, together):
            first = leader[members[0]]
            joined = {leader[member] for member in members}
            leader = {name: first if own in joined else own for name, own in leader.items()}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(leader[name], []).append(name)
    return [tuple(group) for group in groups.values()]


def _members(names: Sequence[str], together: Sequence[str]) -> list[list[str]]:
    """Every set of layers that `together` stands for."""
    whole = [name for name in together if name in names]
    if whole or any("." in name for name in together):
        for name in together:
            if name not in names:
                raise InputError(f"locked: there is no layer '{name}'.{nearest(name, names[:20])}")
        return [whole]
    siblings: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if leaf in together:
            siblings.setdefault(parent, []).append(name)
    return list(siblings.values())


def common(group: Sequence[str], allowed: Mapping[str, Collection[str]]) -> list[str]:
    """The candidates that every layer of `group` may get, in the order of the first.

    Raises:
        InputError: if there is none.
    """
    first, *others = group
    shared = [name for name in allowed[first] if all(name in allowed[other] for other in others)]
    if not shared:
        choices = "; ".join(f"{layer}: {', '.join(allowed[layer]) or 'none'}" for layer in group)
        raise InputError(
            f"{', '.join(group)} are locked to one candidate and have none in common ({choices}). Allow them one, or "
            "take them out of locked."
        )
    return shared
