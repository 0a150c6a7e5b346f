"""Gradients clipped layer by layer."""

from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest

_OPTION = "module.layer_clip"
_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


class LayerClip:
    """Limits the norm of the gradients of each layer by itself, g <- g * min(1, limit / |g|).

    One layer with large gradients then does not shorten the steps of all others, as it does where one norm over the
    whole model is limited (adaptive clipping goes as far as single units, arXiv 2102.06171). A layer is a module with
    the Parameters that it holds itself: a linear layer's weight and bias. What a quantizer learns is a layer of its
    own, `L.weight_quantizer`, because gradients of scales are of another size. Nothing waits for a GPU.

    Args:
        model: its Parameters that train; what several modules share belongs to the first.
        limits: one for all layers, or by patterns of their names with shell wildcards, of which the first that matches
            wins; a layer that none matches is not clipped.

    Raises:
        InputError: if a limit is not positive or a pattern is of no use.
    """

    def __init__(self, model: nn.Module, limits: float | Mapping[str, float]) -> None:
        by_pattern = dict(limits) if isinstance(limits, Mapping) else {"*": limits}
        _check(by_pattern)
        layers: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                layers[name.rpartition(".")[0]].append(parameter)
        chosen = _chosen(list(layers), by_pattern)
        self._parameters = [p for owned in layers.values() for p in owned]
        # On the device from the start: a copy in every step would wait for it.
        device = self._parameters[0].device
        owners = [number for number, owned in enumerate(layers.values()) for _ in owned]
        self._owners = torch.tensor(owners, device=device)
        self._limits = torch.tensor([chosen.get(name, torch.inf) for name in layers], device=device)
        self._none = torch.zeros((), device=device)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The norm of the gradients of every layer, `[layers]` float32; 0 without any."""
        norms = iter(torch._foreach_norm([p.grad for p in self._parameters if p.grad is not None]))
        each = [self._none if p.grad is None else next(norms).to(self._none.dtype) for p in self._parameters]
        return torch.zeros_like(self._limits).index_add_(0, self._owners, torch.stack(each).square()).sqrt_()

    @torch.no_grad()
    def clip_(self, norms: Tensor) -> None:
        """Shorten the gradients of every layer whose norm, of `norms`, is beyond its limit, in place."""
        factors = (self._limits / (norms + _EPSILON)).clamp_(max=1.0)[self._owners].unbind()
        found = [(p.grad, factor) for p, factor in zip(self._parameters, factors, strict=True) if p.grad is not None]
        torch._foreach_mul_([grad for grad, _ in found], [factor for _, factor in found])


def check_clipping(gradient_clip_val: float | None, scaled: bool) -> None:
    """Refuse to clip layer by layer what is clipped, or scaled, as a whole.

    Args:
        gradient_clip_val: the trainer's.
        scaled: whether gradients are of float16 and have a factor against underflow.

    Raises:
        InputError: if so.
    """
    if gradient_clip_val:
        raise InputError(
            f"{_OPTION} limits the gradients of each layer, trainer.gradient_clip_val={gradient_clip_val} those of the "
            "whole model: set one of them to null."
        )
    if scaled:
        raise InputError(
            f"{_OPTION} does not know the factor of float16 gradients: set trainer.precision=bf16-mixed, or "
            f"{_OPTION}=null."
        )


def _check(limits: Mapping[str, Any]) -> None:
    for pattern, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
            raise InputError(
                f"{_OPTION} limits the gradients of '{pattern}' to {limit}; it is a positive number, such as 1.0, and "
                "null switches it off."
            )


def _chosen(names: list[str], limits: Mapping[str, float]) -> dict[str, float]:
    """The limit of every layer that has one."""
    chosen: dict[str, float] = {}
    for pattern, limit in limits.items():
        own = [name for name in names if name not in chosen and fnmatchcase(name, pattern)]
        if not own:
            raise InputError(
                f"{_OPTION} has '{pattern}', which matches no layer that trains and that no pattern before it "
                f"takes.{nearest(pattern, names)}"
            )
        chosen |= dict.fromkeys(own, limit)
    return chosen
