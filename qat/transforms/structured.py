"""Remove heads, channels and whole blocks: the tensors, the configuration and the saved model become smaller."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.nn import PackedLayer, QuantLayer
from qat.options import require_within
from qat.transforms.anatomy import Part, attention_of, mlp_of
from qat.transforms.blocks import Block, walk
from qat.transforms.inputs import hessians
from qat.transforms.shapes import Sizes, block_stack, configure, resized, sizes_of, sizes_within

# Below it a Hessian of few tokens cannot be inverted.
_LEAST_DAMPING = 1e-8
PartOf = Callable[[nn.Module], Part]


def structured(
    model: nn.Module,
    batches: Iterable[Any],
    heads: float = 0.0,
    channels: float = 0.0,
    blocks: float = 0.0,
    multiple_of: int = 64,
    compensate: bool = True,
    damping: float = 0.01,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Take whole parts out of a transformers model, in place; what is left is a plain, smaller model.

    Blocks go first, those that change their hidden states least: 1 - cos(input, output), averaged over tokens (block
    influence, ShortGPT, arXiv 2403.03853). Then, block by block and each seeing what the smaller ones before it make,
    key/value heads with all the query heads that share them, and MLP channels: those with the least sum of
    (|W_ij| |x_j|)^2 over the columns j that read them, Wanda's score (arXiv 2306.11695) of whole columns, as in FLAP
    (arXiv 2312.11983). Every block keeps as many, so that `config.json` can say it.

    Args:
        model: a transformers model in full precision, before `prepare`: quantizers are made for the shapes they find.
        batches: mappings, passed as keywords. Of a model on the meta device only the shapes change, and none is needed.
        heads, channels, blocks: shares to remove, from 0 to 0.95 each.
        multiple_of: channels that are left are a multiple of this, for kernels and groups of scales.
        compensate: let the columns that are left take the place of the others, by least squares on the batches.
        damping: of that least-squares problem, as a share of the mean of the diagonal of X^T X.
        device: where to compute; blocks go there one at a time. Default: where the model is.

    Returns:
        `model`.

    Raises:
        InputError: if the model was prepared, holds no parts of a known kind, or cannot say the sizes in its
            configuration (it is then as it was); or if there is no data.
    """
    if any(isinstance(module, QuantLayer | PackedLayer) for module in model.modules()):
        raise InputError("Remove parts before prepare: quantizers are made for the shapes that they find.")
    require_within("damping", damping, usual=0.01, low=0, high=1)
    before = sizes_of(model)
    after = sizes_within(model, heads, channels, blocks, multiple_of)
    _rehearse(model, after)
    if next(model.parameters()).is_meta:
        return _cut(model, after)
    batches = list(batches)
    stack = block_stack(model)
    if after.blocks < before.blocks:
        _keep_blocks(model, _influential(model, batches, after.blocks, device))
    work = partial(_narrow, before=before, after=after, compensate=compensate, damping=damping)
    if after[1:] != before[1:]:
        walk(model, batches, work, "removing heads and channels", device, blocks=stack)
    configure(model, before, after)
    return model


class _Wanted(NamedTuple):
    find: PartOf
    kept: int


def _wanted(before: Sizes, after: Sizes) -> list[_Wanted]:
    """The kinds of parts that shrink, in the order in which a block computes them, and how many units stay."""
    kinds = [(attention_of, before.groups, after.groups), (mlp_of, before.channels, after.channels)]
    return [_Wanted(find, new) for find, old, new in kinds if new is not None and new != old]


@torch.no_grad()
def _narrow(block: Block, before: Sizes, after: Sizes, compensate: bool, damping: float) -> None:
    for find, kept in _wanted(before, after):
        part = find(block.module)
        ((_, hessian),) = hessians(block, {part.name: part.out})  # type: ignore[dict-item]
        weight = part.out.weight.to(torch.float32)
        scores = (weight.square().sum(0) * hessian.diagonal()).view(part.units, -1).sum(1)
        units = scores.topk(kept).indices.sort().values
        columns = part.columns(units)
        part.keep(units, _least_squares(weight, hessian, columns, damping) if compensate else None)


def _least_squares(weight: Tensor, hessian: Tensor, columns: Tensor, damping: float) -> Tensor:
    """W' `[out, kept]` of least |X W^T - X_kept W'^T|^2, with a ridge that draws it to the columns as they are."""
    h, before = hessian.to(torch.float64), weight[:, columns].to(torch.float64)
    ridge = max(damping, _LEAST_DAMPING) * h.diagonal().mean()
    if not torch.isfinite(h).all():
        raise InputError("The activations of the calibration data hold NaN or infinity, or their squares overflow.")
    if ridge == 0:  # nothing was ever read
        return weight[:, columns]
    own = h[columns][:, columns] + torch.diag(ridge.expand(len(columns)))
    wanted = weight.to(torch.float64) @ h[:, columns] + ridge * before
    return torch.linalg.solve(own, wanted.t()).t().to(torch.float32)


def _influential(model: nn.Module, batches: list[Any], kept: int, device: torch.device | str | None) -> list[int]:
    """The indices of the `kept` blocks that change their hidden states most, ascending."""
    influences: list[float] = []

    @torch.no_grad()
    def measure(block: Block) -> None:
        pairs = ((call.hidden.to(block.device).float(), block.run(call).float()) for call in block.calls)
        similar = [F.cosine_similarity(before, after, dim=-1).flatten() for before, after in pairs]
        influences.append(1 - float(torch.cat(similar).mean()))

    walk(model, batches, measure, "influence of blocks", device, blocks=block_stack(model))
    most = sorted(range(len(influences)), key=lambda i: -influences[i])[:kept]
    return sorted(most)


def _keep_blocks(model: nn.Module, kept: list[int]) -> None:
    """Leave only the blocks `kept`, ascending; they are counted anew, since caches go by their numbers."""
    _, stack = block_stack(model)
    left = [stack[i] for i in kept]
    del stack[:]
    stack.extend(left)
    for number, block in enumerate(left):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]
    config: Any = model.config
    for name, value in list(vars(config).items()):
        # Such as layer_types: an entry for each block.
        if "layer" in name and isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)


def _cut(model: nn.Module, after: Sizes) -> nn.Module:
    """Shrink a model whose values do not matter, keeping the first of everything."""
    before = sizes_of(model)
    _keep_blocks(model, list(range(after.blocks)))
    for block in block_stack(model)[1]:
        for find, kept in _wanted(before, after):
            find(block).keep(torch.arange(kept, device="meta"))
    configure(model, before, after)
    return model


def _rehearse(model: nn.Module, after: Sizes) -> None:
    """Refuse what would not be, tensor for tensor, the model that its configuration then describes."""
    config: Any = model.config
    kind: Any = type(model)
    with torch.device("meta"):
        shadow = kind(copy.deepcopy(config))
        cut = _cut(shadow, after)
        described = kind(resized(cut.config, {}))
    own, said = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (cut, described))
    for name in own.keys() | said.keys():
        if own.get(name) != said.get(name):
            raise InputError(
                f"A smaller {type(model).__name__} could not be saved: {name} would be {list(own.get(name, ()))}, and "
                f"its configuration says {list(said.get(name, ()))}. Set heads=0, and channels=0 if it says so again."
            )
