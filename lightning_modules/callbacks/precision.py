"""Bits of weights that change while they train."""

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy

from qat.errors import InputError, nearest
from qat.nn import LowBitLinear
from qat.numerics.metrics import sqnr
from qat.transforms.build import found_at
from qat.transforms.layers import QuantizedWeight, quantized_weights

# Bits by the optimizer step from which on they are in force, in the order of steps.
Steps = dict[int, int]


class PrecisionSchedule(Callback):
    """Trains weights at full precision, then at bits that change from step to step, and ends at those of the scheme.

    Progressive quantization: each grid starts from what the one before has learned. A change keeps the range of the
    grid and the state of the optimizer, see `Quantizer.set_bits`. With a signal, `sqnr`, a weight goes to its next bits
    only once sum w^2 / sum (w - w_hat)^2 at those, in dB, reaches it: layers that fewer bits would hurt wait, and those
    that never get there end with more bits, and ship with them. Evaluation sees the bits in force; the artifact has
    those of the end. Checkpoints carry the bits. `train/bits` is their mean over weights; 32 while in full precision.

    Args:
        bits: by optimizer step, `{0: 8, 100: 6, 200: 4}`; None: those of the scheme.
        rules: the same for layers by patterns of their names with shell wildcards, of which the first that matches
            wins; None in the place of steps: those of the scheme.
        delay_steps: steps in full precision before anything is quantized; then quantizers are fitted to the weights.
        sqnr: in dB, that the weights must have at the next bits; None: the next bits come at their step.
        every_n_steps: optimizer steps between two looks at it.
        end_step: of the last look; None: two thirds of the training.

    Raises:
        InputError: if the steps do not rise, or the bits do not fall where they depend on `sqnr`.
    """

    def __init__(
        self,
        bits: Mapping[Any, Any] | None = None,
        rules: Mapping[str, Mapping[Any, Any] | None] | None = None,
        delay_steps: int = 0,
        sqnr: float | None = None,
        every_n_steps: int = 10,
        end_step: int | None = None,
    ) -> None:
        if delay_steps < 0 or every_n_steps < 1 or (end_step is not None and end_step < 0):
            raise InputError(
                f"callbacks.precision has delay_steps={delay_steps}, every_n_steps={every_n_steps} and end_step="
                f"{end_step}: delay_steps and end_step start at 0, every_n_steps at 1."
            )
        falling = sqnr is not None
        self.bits = _steps("bits", bits, falling)
        self.rules = {pattern: _steps(f"rules.{pattern}", own, falling) for pattern, own in (rules or {}).items()}
        self.delay_steps, self.sqnr, self.every_n_steps, self.end_step = delay_steps, sqnr, every_n_steps, end_step
        if falling and not self._changes:
            raise InputError("callbacks.precision.sqnr says when bits may fall, and none do: set its bits too.")
        self._weights: list[QuantizedWeight] = []
        self._steps: dict[str, Steps] = {}
        # How many of its steps a weight has taken.
        self._taken: dict[str, int] = {}
        self._delayed = delay_steps > 0
        self._looked_at: int | None = None

    @property
    def _changes(self) -> bool:
        return bool(self.bits or any(self.rules.values()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights, before a checkpoint says which bits they have."""
        if stage != "fit" or not (self._changes or self.delay_steps):
            return
        self._weights = list(quantized_weights(pl_module))
        if not self._weights:
            raise InputError(
                "callbacks.precision is for quantized weights, and the scheme has none: choose scheme=w4, or leave it "
                "as it is."
            )
        self._steps = self._assigned()
        self._taken = dict.fromkeys(self._steps, 0)
        for weight in self._weights:
            with found_at(weight.label):
                _check(weight, self._steps[weight.label])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._weights:
            return
        steps = trainer.estimated_stepping_batches
        last = self.last_change(steps)
        if last >= steps:
            raise InputError(
                f"callbacks.precision changes bits until step {last}, the training ends after {steps}: nothing would "
                "train on what ships. Shorten it, or raise trainer.max_steps."
            )
        self._last_look = self._end(steps)
        if self._delayed:
            _check_strategy(trainer)
            for weight in self._weights:
                weight.quantizer.enabled = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        # While gradients accumulate the step stays the same.
        if self._weights and step != self._looked_at:
            self._looked_at = step
            for weight in self._weights:
                self._advance(weight, step)
            if self._delayed and step >= self.delay_steps:
                self._end_delay()
        if self._weights:
            pl_module.log("train/bits", self._mean_bits())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that something stopped before the delay was over ships quantized weights all the same."""
        if self._weights and self._delayed:
            self._end_delay()

    def last_change(self, steps: float) -> int:
        """The last of `steps` optimizer steps, counted from 0, before which a grid may change."""
        changes = [step for own in (self.bits, *self.rules.values()) for step in own or {}]
        return max([self.delay_steps, *changes, self._end(steps) if self.sqnr is not None else 0])

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "delayed": self._delayed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the bits, for which the scales of the checkpoint are already.

        Raises:
            InputError: if they are of another schedule.
        """
        if not self._weights and not any(state_dict["taken"].values()):
            return
        self._delayed = state_dict["delayed"]
        for weight in self._weights:
            taken, own = state_dict["taken"].get(weight.label, 0), list(self._steps[weight.label].values())
            if taken > len(own):
                raise InputError(_OTHER)
            self._taken[weight.label] = taken
            if taken:
                weight.quantizer.format = weight.quantizer.format.with_bits(own[taken - 1])
        if not self._weights:
            raise InputError(_OTHER)

    def _advance(self, weight: QuantizedWeight, step: int) -> None:
        """Take every step that has come for `weight` and, but for the first, that its SQNR allows."""
        own = list(self._steps[weight.label].items())
        while (taken := self._taken[weight.label]) < len(own) and own[taken][0] <= step:
            start, bits = own[taken]
            if self.sqnr is not None and taken and not (self._is_look(start, step) and self._allows(weight, bits)):
                return
            weight.quantizer.set_bits(bits)
            self._taken[weight.label] += 1

    def _is_look(self, start: int, step: int) -> bool:
        return step <= self._last_look and (step - start) % self.every_n_steps == 0

    def _allows(self, weight: QuantizedWeight, bits: int) -> bool:
        assert self.sqnr is not None
        trial = copy.deepcopy(weight.quantizer)
        trial.set_bits(bits)
        w = weight.quantizer.masked(weight.matrix)
        return sqnr(w, trial.quantize(w).dequantize()) >= self.sqnr

    def _end_delay(self) -> None:
        """Quantize from now on, by quantizers that are fitted to the weights as they have become."""
        self._delayed = False
        for weight in self._weights:
            weight.quantizer.enabled = True
            weight.quantizer.initialize(weight.matrix)

    def _end(self, steps: float) -> int:
        return int(2 * steps // 3) if self.end_step is None else self.end_step

    def _mean_bits(self) -> float:
        if self._delayed:
            return 32.0
        sizes = [weight.parameter.numel() for weight in self._weights]
        total = sum(w.quantizer.format.bits * size for w, size in zip(self._weights, sizes, strict=True))
        return total / sum(sizes)

    def _assigned(self) -> dict[str, Steps]:
        """The steps of every weight."""
        layers = {weight.label: weight.label.rpartition(".")[0] for weight in self._weights}
        found: dict[str, Steps] = {}
        for pattern, own in self.rules.items():
            matching = [w for w, layer in layers.items() if w not in found and fnmatchcase(layer, pattern)]
            if not matching:
                raise InputError(
                    f"callbacks.precision.rules has '{pattern}', which matches no layer that is quantized and that no "
                    f"pattern before it takes.{nearest(pattern, sorted(set(layers.values())))}"
                )
            found |= dict.fromkeys(matching, own)
        return {label: found.get(label, self.bits) for label in layers}


_OTHER = (
    "The checkpoint is of another schedule of bits: leave callbacks.precision as the run before had it, or start a new "
    "run."
)


def _steps(option: str, given: Mapping[Any, Any] | None, falling: bool) -> Steps:
    """Bits by steps, as numbers.

    Raises:
        InputError: if they are none, or in no order.
    """
    try:
        found = {int(step): int(bits) for step, bits in (given or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"callbacks.precision.{option} is {given}: give bits by steps, as in {{0:8,100:6,200:4}}."
        ) from error
    steps, bits = list(found), list(found.values())
    if steps != sorted(steps) or any(step < 0 for step in steps):
        raise InputError(f"callbacks.precision.{option} has the steps {steps}: they start at 0 and rise.")
    if falling and bits != sorted(set(bits), reverse=True):
        raise InputError(
            f"callbacks.precision.{option} has the bits {bits}, and callbacks.precision.sqnr says when bits may fall: "
            "let each be fewer than the one before, or set sqnr to null."
        )
    return found


def _check(weight: QuantizedWeight, steps: Steps) -> None:
    """Refuse what cannot change its bits, and steps that do not end at what ships."""
    if not steps:
        return
    if isinstance(weight.layer, LowBitLinear):
        raise InputError(
            "products of codes are settled for their bits: set scheme.compute=fake, or leave out callbacks.precision."
        )
    trial = copy.deepcopy(weight.quantizer)
    for bits in steps.values():
        trial.set_bits(bits)
    ships, last = weight.quantizer.format.bits, trial.format.bits
    if last != ships:
        raise InputError(
            f"callbacks.precision ends at {last} bits, and the scheme ships {ships}: let it end at {ships}, or set "
            f"scheme.weight.bits={last}."
        )


def _check_strategy(trainer: Trainer) -> None:
    """Refuse several devices that wait for gradients of scales, which full precision has none of."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise InputError(
            "callbacks.precision.delay_steps leaves scales without gradients: set trainer.strategy="
            "ddp_find_unused_parameters_true."
        )
