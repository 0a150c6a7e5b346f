"""Block-wise or layer-wise training of a whole model: a warm start for training end to end."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.nn import QuantLinear
from qat.options import require_whole, require_within
from qat.quantizers import Quantizer
from qat.transforms.block_error import Drawn, block_error, gradients
from qat.transforms.blocks import Block, Call, targets_of, walk
from qat.transforms.build import found_at
from qat.transforms.inputs import inputs_of, quantized_linears, running_order
from qat.transforms.plain import uncalibrated_off

UNITS = ("block", "layer")


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int = 200,
    batch_size: int = 8,
    lr: float = 1e-4,
    quantizer_lr: float = 1e-3,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
    unit: str = "block",
) -> nn.Module:
    """Train the quantized linear layers of each block in turn, so that it gives what it gave in full precision.

    The first of the two phases of EfficientQAT (arXiv 2407.11062), for models of which only a block at a time can be
    trained, and a better start than rounding for training end to end. Weights, biases and all that their quantizers
    learn follow, through fake quantization,

        min mean (B_q(x_q) - B(x))^2

    with x_q as the quantized blocks before it make it, B(x) of the model in full precision, and Adam, whose rates fall
    to zero along a cosine. What was learned is kept if the block's error on all batches is less than before. Static
    activation quantizers that nothing calibrated yet let everything through.

    With `unit="layer"` each linear layer trains alone, in the order in which they run, to give what its weight W
    gives in full precision,

        min mean (Q(W') x_q - W x_q)^2

    with W' that starts at W, and x_q as the quantized layers before it make it: no layer makes up for
    those before it.

    Args:
        model: prepared.
        batches: mappings, passed as keywords.
        steps: of Adam for each unit.
        batch_size: sequences for each step; at least those of one batch are taken.
        lr, quantizer_lr: first rates, of weights and biases and of what quantizers learn; 0 leaves them. Steps are
            taken in float32, whatever the dtype of the model.
        device: where to compute; blocks go there one at a time. Default: where the model is.
        folder: where finished blocks are kept, so that a run that was killed goes on; see `qat.transforms.discard`.
        unit: what trains at a time: `block` or `layer`.

    Returns:
        `model`: its weights are trained, and lie between the values of their grids as before.

    Raises:
        InputError: if the model has no blocks, no linear layer in them has a quantized weight, an option is out of
            range, there is no data, or it holds NaN.
    """
    if unit not in UNITS:
        raise InputError(f"Reconstruction has no unit '{unit}'.{nearest(str(unit), UNITS)}")
    require_whole("steps", steps, usual=200)
    require_whole("batch_size", batch_size, usual=8)
    require_within("lr", lr, usual=1e-4, low=0, high=1)
    require_within("quantizer_lr", quantizer_lr, usual=1e-3, low=0, high=1)
    if not quantized_linears(model):
        raise InputError(
            "Reconstruction trains quantized linear layers, and the model has none: prepare it with scheme=w4."
        )
    train = partial(_reconstruct, steps=steps, batch_size=batch_size, rates=(lr, quantizer_lr))

    def work(block: Block) -> None:
        for own in [block] if unit == "block" else _layers_of(block):
            train(own)

    key = f"reconstruct {unit} {steps} {batch_size} {lr} {quantizer_lr}"
    with uncalibrated_off(model):
        walk(model, batches, work, "reconstruction", device, folder, key, with_targets=True)
    return model


def _layers_of(block: Block) -> Iterator[Block]:
    """Every linear layer as a block of its own, whose calls are made by the layers before it as they are by then."""
    layers = running_order(block)
    for index, (name, layer) in enumerate(layers.items()):
        inputs = inputs_of(block, layer)
        calls = [Call(x, (), {}) for x in inputs]
        own = Block(f"{block.name}.{name}", layer, index, len(layers), calls, block.device)
        own.targets = targets_of(own, inputs)
        yield own


def _reconstruct(block: Block, steps: int, batch_size: int, rates: tuple[float, float]) -> None:
    layers = list(quantized_linears(block.module).values())
    if not layers:
        return
    with found_at(block.name):
        before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
        error = block_error(block)
        _train(block, _parameters(layers), rates, steps, Drawn(block, batch_size))
        if not block_error(block) < error:
            block.module.load_state_dict(before)


def _parameters(layers: list[QuantLinear]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases, and what quantizers learn."""
    quantizers = [child for layer in layers for child in layer.children() if isinstance(child, Quantizer)]
    learned = [p for quantizer in quantizers for p in quantizer.parameters()]
    own = {id(p) for p in learned}
    weights = [p for layer in layers for p in layer.parameters() if id(p) not in own]
    trained = ([p for p in group if p.requires_grad] for group in (weights, learned))
    return tuple(trained)  # type: ignore[return-value]


def _train(
    block: Block, groups: tuple[list[Tensor], list[Tensor]], rates: tuple[float, float], steps: int, drawn: Drawn
) -> None:
    """Take the steps of one block, on copies in float32: they are too small for bfloat16."""
    held = list(chain.from_iterable(groups))
    moved = {p: p.detach().to(torch.float32, copy=True) for p in held}
    optimizer = torch.optim.Adam(
        [{"params": [moved[p] for p in group], "lr": lr} for group, lr in zip(groups, rates, strict=True) if group]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        found = gradients(block, held, drawn())
        for p in held:
            moved[p].grad = found[p].to(torch.float32)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for p in held:
                p.copy_(moved[p])
