"""The base of every quantizer: a new one overrides `qparams` and inherits everything else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.kernels import ops, product_ops
from qat.kernels.linear import fake_quantized_linear
from qat.kernels.rule_linear import rule_quantized_linear
from qat.numerics.finite import all_finite
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity, parse_granularity
from qat.numerics.qtensor import QParams, QuantizedTensor, ViewParams, codes_shape
from qat.numerics.ste import straight_through
from qat.quantizers.mask import Masked
from qat.quantizers.observers import MinMaxObserver, Observer
from qat.quantizers.shards import refuse_shards
from qat.quantizers.step_codes import StepCodes

_DIVERGED = "Look for the layer it came from; a training that diverged needs a lower learning rate."
STORAGE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Quantizer(Masked, ABC):
    """Finds the qparams of a tensor; quantizes and fake-quantizes with them.

    Args:
        shape: shape of the tensor to quantize; for an activation its trailing part `(features,)`. Parameters are made
            from it at once and never change their shape.
        format: the grid.
        granularity: who shares a scale, as an object or spelled (`per_group_64`).
        scale_dtype: how scales are stored: `bfloat16`, `float16` or `float32`. What trains is what ships: they are
            rounded to it before every use.

    Attributes:
        rule: the name under `qat.numerics.dynamic.DYNAMIC_RULES` by which qparams follow from x alone, or None
            when they are parameters or buffers.
        initialized: whether `initialize` ran, or nothing needs it. A static quantizer refuses to work before.
        observer: set while calibrating; x then passes through unchanged and is only looked at.
        step_codes: set while a weight's codes are kept from one forward pass to the next.
        stochastic: whether codes are drawn at random so that their expectation is x: for gradients.
        codebook_dtype: how codebooks are stored, where not as scales are.
        enabled: whether it quantizes in forward passes; `qat.transforms.plain` switches it off for a while.
        strength: share of the quantization error that training sees, a 0-dim tensor from 0 to 1 that is read in every
            forward pass, so that a compiled one need not be compiled again; None: all of it, as evaluation always does.
    """

    rule: str | None = None
    stochastic: bool = False
    codebook_dtype: torch.dtype | None = None
    strength: Tensor | None = None
    enabled: bool = True

    def __init__(
        self, shape: Sequence[int], format: Format, granularity: str | Granularity, scale_dtype: str = "bfloat16"
    ) -> None:
        super().__init__()
        if scale_dtype not in STORAGE_DTYPES:
            raise InputError(f"scale_dtype '{scale_dtype}' is none of {', '.join(STORAGE_DTYPES)}.")
        self.shape = tuple(shape)
        self.format = format
        self.granularity = parse_granularity(granularity)
        self.scale_dtype = STORAGE_DTYPES[scale_dtype]
        self.param_shape = self.granularity.param_shape(self.shape)
        self.initialized = True
        self.observer: Observer | None = None
        self.step_codes: StepCodes | None = None

    @abstractmethod
    def qparams(self, x: Tensor) -> QParams:
        """Scale, zero point and codebook for `x`, rounded (straight through) to their storage types."""

    def initialize_from(self, view: Tensor) -> None:
        """Fill parameters and buffers in place from representative values `[groups, n]`."""

    def initialize_weighted(self, view: Tensor, importance: Tensor) -> None:
        """As `initialize_from`, with how much the error of each value counts; ignored where scales bound all alike."""
        self.initialize_from(view)

    def adopt(self, params: ViewParams) -> bool:
        """Hold `params`, which a search found for its view, from now on; whether it is one that can."""
        return False

    @final
    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Quantize to other bits from now on, with a grid of the same kind over the range that it spans now.

        With r the width of the old grid over that of the new, in codes, scales become r times what they are and zero
        points 1/r of it; scales that follow from x do so by themselves. Parameters stay the same objects.

        Raises:
            InputError: if the grid has these bits only.
        """
        format = self.format.with_bits(bits)
        low, high = self.format.range()
        new_low, new_high = format.range()
        if self.rule is None:
            self.rescale_((high - low) / (new_high - new_low))
        self.format = format
        if self.step_codes is not None:
            self.step_codes.renew()

    def rescale_(self, ratio: float) -> None:
        """Multiply scales by `ratio` and divide zero points by it, in place.

        Raises:
            InputError: if this quantizer cannot.
        """
        raise InputError(
            f"The scales of {type(self).__name__} are for {self.format.bits} bits only: take "
            "quantizer@scheme.weight=lsq or minmax."
        )

    def make_observer(self) -> Observer:
        """What to gather from activations before `initialize_from`."""
        return MinMaxObserver()

    def set_mask(self, mask: Tensor | None) -> None:
        super().set_mask(mask)
        if self.step_codes is not None:
            self.step_codes.renew()

    @final
    @torch.no_grad()
    def initialize(self, x: Tensor, importance: Tensor | None = None) -> None:
        """Fill parameters and buffers in place from `x`.

        Args:
            x: the tensor to quantize.
            importance: how much the squared error of each element counts, shaped like `x`; None: all alike.

        Raises:
            InputError: if x holds an infinity or NaN, or is a shard.
        """
        refuse_shards(x)
        _refuse_infinity(x)
        x, view = self.masked(x), self.granularity.view
        if importance is None:
            self.initialize_from(view(x))
        else:
            self.initialize_weighted(view(x), view(importance))
        self.initialized = True
        if self.step_codes is not None:
            self.step_codes.renew()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`: same shape and dtype, differentiable to x and to every learned parameter."""
        if self.observer is not None:
            self.observer.update(self.granularity.view(x.detach()))
            return x
        x = self.masked(x)
        if not self.enabled:
            return x
        x_hat = self._drawn(x) if self.stochastic else self._fake_quantized(x)
        if self.strength is None or not self.training:
            return x_hat
        return torch.lerp(x, x_hat, self.strength.to(x.dtype))

    def _fake_quantized(self, x: Tensor) -> Tensor:
        if self.rule is not None and self.follows_rule:
            codebook = getattr(self, "codebook", None)
            rule = self.rule, self.format, self.granularity, self.scale_dtype
            return ops.fake_quantize_dynamic(x, *rule, codebook)
        qparams = self.ready_qparams(x)
        if self.clips:
            return ops.fake_quantize(x, qparams, self.format, self.granularity)
        return straight_through(x, ops.fake_quantize(x.detach(), qparams, self.format, self.granularity))

    @property
    def follows_rule(self) -> bool:
        """Whether the qparams are those of `rule`, beside a codebook that is constant, and nothing else is done."""
        return self.rule is not None

    @property
    def holds_zero(self) -> bool:
        return self.format.holds_zero

    @property
    def clips(self) -> bool:
        """Whether x beyond the grid gets no gradient. It does where the scale follows from x, which alone moves it."""
        return self.rule is None

    def _drawn(self, x: Tensor) -> Tensor:
        """Stochastically rounded values, straight through."""
        qparams = self.ready_qparams(x)
        codes = ops.quantize(x.detach(), qparams, self.format, self.granularity, stochastic=True)
        return straight_through(x, ops.dequantize(codes, qparams, self.format, self.granularity, x.dtype))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x @ self(weight)^T + bias, with one byte a weight kept for the backward pass."""
        if not self.enabled:
            return F.linear(x, self.masked(weight), bias)
        pruned = self.mask, self.dense_gradient
        if self.rule is not None and self.follows_rule and not ops.keeps_codes(weight):
            rule = ops.rule_arguments(self.rule, self.format, self.scale_dtype, getattr(self, "codebook", None))
            return rule_quantized_linear(x, weight, bias, rule, self.granularity, *pruned)
        qparams, codes = self._of_weight(weight)
        grid = qparams, self.format, self.granularity, self.clips
        return fake_quantized_linear(x, weight, bias, *grid, *pruned, codes)

    def _of_weight(self, weight: Tensor) -> tuple[QParams, Tensor | None]:
        """The qparams of `weight`, and its codes where those of the step are kept."""
        detached = weight.detach() if self.mask is None else self.masked(weight.detach())
        if not self._keeps_step_codes:
            return self.ready_qparams(detached), None
        assert self.step_codes is not None
        return self.step_codes.of(detached, self.ready_qparams, self.rule is not None, self.format, self.granularity)

    @property
    def _keeps_step_codes(self) -> bool:
        return self.step_codes is not None and self.training and torch.is_grad_enabled()

    @final
    def codes(self, x: Tensor, stored: bool = False) -> tuple[Tensor, QParams]:
        """What a product of codes multiplies: those of `x`, and their qparams, differentiable to what is learned.

        `stored`: x is a weight, not what an operator before has just made; the codes of the step serve, where they are
        kept.
        """
        if stored and self._keeps_step_codes:
            qparams, kept = self._of_weight(x)
            assert kept is not None
            return self.granularity.of_codes(self.format.block).unview(kept, codes_shape(x.shape, self.format)), qparams
        x = self.masked(x)
        if self.rule is not None and self.follows_rule:
            rule = self.rule, self.format, self.granularity, self.scale_dtype
            return product_ops.dynamic_codes_to_multiply(x, *rule, stored)
        qparams = self.ready_qparams(x)
        return product_ops.codes_to_multiply(x, qparams, self.format, self.granularity, stored), qparams

    @final
    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Quantize `x` for storage: `self(x)` equals `self.quantize(x).dequantize()` to the bit.

        A stochastic quantizer draws anew at each call, so that only the expectations are equal.

        Raises:
            InputError: if x holds an infinity or NaN, which no grid holds.
        """
        refuse_shards(x)
        _refuse_infinity(x)
        x = self.masked(x)
        qparams = self.ready_qparams(x)
        codes = ops.quantize(x, qparams, self.format, self.granularity, self.stochastic)
        return QuantizedTensor(codes, self.to_storage(qparams), self.format, self.granularity, x.dtype)

    @final
    def ready_qparams(self, x: Tensor) -> QParams:
        """`qparams(x)`, refused while they hold nothing, and for a shard of x."""
        self.require_initialized()
        refuse_shards(x)
        return self.qparams(x)

    @final
    def require_initialized(self) -> None:
        """Refuse a static quantizer that was never calibrated."""
        if not self.initialized:
            raise InputError(
                f"{type(self).__name__} is static and was never calibrated: run qat.calibrate(model, batches) first, "
                "or choose a dynamic quantizer."
            )

    @final
    def to_storage(self, qparams: QParams) -> QParams:
        """Cast each field to its storage type; exact, because `qparams` already rounded."""
        scale, zero_point, codebook, offset = qparams
        return QParams(
            scale if isinstance(scale, QuantizedTensor) else scale.to(self.scale_dtype),
            None if zero_point is None else zero_point.to(torch.uint8),
            None if codebook is None else codebook.to(self.codebook_dtype or self.scale_dtype),
            offset,
        )

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialized)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialized = bool(state)

    def extra_repr(self) -> str:
        learned = ", ".join(name for name, _ in self.named_parameters(recurse=False))
        return f"{self.format.name}, {self.granularity}" + (f", learns {learned}" if learned else "")


def check_bits(format: Format, bits: int | None) -> Format:
    """`format`, unless `bits` are given and not its own."""
    if bits is not None and bits != format.bits:
        raise InputError(
            f"{format.name} has {format.bits} bits, not {bits}: set the bits beside it to {format.bits} (as in "
            f"scheme.weight.bits={format.bits}), or choose another grid."
        )
    return format


def _refuse_infinity(x: Tensor) -> None:
    if not all_finite(x):
        raise InputError(f"A tensor {list(x.shape)} holds NaN or infinity, which no grid holds. {_DIVERGED}")


class NoQuantizer(Masked, nn.Identity):
    """Leaves a tensor as it is, in a quantizer's place: no caller needs a branch, no scheme another shape.

    Of a weight that is pruned it leaves what the mask keeps.
    """

    rule = None
    initialized = True

    def __init__(self, shape: Sequence[int] = (), bits: int | None = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.masked(weight), bias)
