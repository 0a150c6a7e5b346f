"""Schemes: which quantizer goes to which layer, as ordered rules."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qat.errors import InputError, nearest
from qat.kernels.low_bit_linear import PRODUCTS
from qat.quantizers import NoQuantizer

COMPUTE = ("fake", "int8", "fp8")

# Called with the shape of what it will quantize; a Hydra `_partial_` is one. None and NoQuantizer leave full precision.
QuantizerFactory = Callable[..., nn.Module] | None


@dataclass(frozen=True)
class KVCache:
    """What the keys and values of every attention layer get; see `qat.nn.kv_quantizer.KVQuantizer` for the layouts.

    Args:
        key, value: make the quantizers, or leave full precision.
        window: the number of latest tokens that stay in full precision.

    Raises:
        InputError: if `window` is no number of tokens.
    """

    key: QuantizerFactory = NoQuantizer
    value: QuantizerFactory = NoQuantizer
    window: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 0:
            raise InputError(f"scheme.kv.window is {self.window}; it is a number of tokens: set it to 0, 32, 128 ...")
        if self.window and not self.quantizes:
            raise InputError(f"scheme.kv.window is {self.window}, but no cache is quantized: choose kv@scheme.kv=kivi.")

    @property
    def quantizes(self) -> bool:
        """Whether keys or values get a quantizer."""
        return given(self.key) or given(self.value)


@dataclass(frozen=True)
class Rule:
    """What the layers that `match` get. A rule without any quantizer leaves them in full precision.

    Args:
        match: names as in `model.named_modules()`, with shell wildcards: `*.down_proj`, `model.layers.[01].*`.
        weight: a quantizer for each weight, or None.
        input, output: quantizers for activations, or None. A dynamic scale that is `per_tensor` spans the tokens of a
            call, which are many in training and one when generating with a cache; `per_token` serves both alike.
        grad: a dynamic quantizer for the gradient of the layer's output, on its way back into the layer.
        compute: how linear layers multiply while they train: `fake`, in the dtype of activations, what codes stand for;
            `int8` or `fp8`, the codes themselves.
        products: which of forward, dgrad and wgrad multiply codes; the last two need `grad`.

    Raises:
        InputError: if there is no such `compute` or no such product.
    """

    match: str | Sequence[str] = "*"
    weight: QuantizerFactory = NoQuantizer
    input: QuantizerFactory = NoQuantizer
    output: QuantizerFactory = NoQuantizer
    grad: QuantizerFactory = NoQuantizer
    compute: str = "fake"
    products: Sequence[str] = ("forward",)

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise InputError(f"compute is '{self.compute}'.{nearest(str(self.compute), COMPUTE)}")
        for product in self.products:
            if product not in PRODUCTS:
                raise InputError(f"products has '{product}'.{nearest(str(product), PRODUCTS)}")
        if "forward" not in self.products:
            raise InputError("dgrad and wgrad multiply the codes of the forward product: add forward to products.")
        if self.compute == "fake" and len(self.products) > 1:
            raise InputError("products says which products multiply codes: set compute=int8 or compute=fp8 beside it.")

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    @property
    def quantizes(self) -> bool:
        return self.packs or self.quantizes_activations or given(self.grad)

    @property
    def quantizes_activations(self) -> bool:
        return given(self.input) or given(self.output)

    @property
    def packs(self) -> bool:
        """Whether the weight gets codes."""
        return given(self.weight)

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Scheme:
    """Quantizers for a whole model.

    `weight`, `input`, `output`, `grad`, `compute` and `products` go to every layer that neither `exclude` nor an entry
    of `rules` matches. An embedding, whose input holds no activations, takes no `input` and no `grad`, and multiplies
    nothing.

    Args:
        kv: quantizers of the KV cache, for every attention layer, or None.
        rules: named rules, tried in order; the first that matches wins.
        exclude: layers that stay in full precision; comes before `rules`.
        head: quantize the output head too; it stays in full precision otherwise, whatever `rules` say.
        embedding: quantize embeddings too; they stay in full precision otherwise, whatever `rules` say. Either of
            `head` and `embedding` is enough for both where they share a weight.
    """

    weight: QuantizerFactory = NoQuantizer
    input: QuantizerFactory = NoQuantizer
    output: QuantizerFactory = NoQuantizer
    grad: QuantizerFactory = NoQuantizer
    kv: KVCache | None = KVCache()
    rules: Mapping[str, Rule | Mapping[str, Any]] = field(default_factory=dict)
    exclude: str | Sequence[str] = ()
    head: bool = False
    embedding: bool = False
    compute: str = "fake"
    products: Sequence[str] = ("forward",)

    @property
    def default(self) -> Rule:
        """What layers get that no rule matches."""
        return Rule("*", self.weight, self.input, self.output, self.grad, self.compute, self.products)

    def assign(self, names: Iterable[str], kept: Mapping[str, str] | None = None) -> dict[str, Rule]:
        """Find the rule of every layer of `names`; layers that stay in full precision are left out.

        Args:
            names: of the layers that can be quantized.
            kept: those that stay in full precision whatever rules say, each with its reason.

        Raises:
            InputError: if a rule or an excluded name is of no use, because it matches no layer or only layers that
                earlier ones take, or if nothing is left to quantize.
        """
        kept = kept or {}
        left = [name for name in names if name not in kept]
        chosen: dict[str, Rule] = {}
        for label, rule in self._ordered():
            matching = [name for name in left if rule.matches(name)]
            own = [name for name in matching if name not in chosen]
            if not own:
                raise InputError(f"The scheme's {label} {_why_useless(rule, matching, left, kept)}")
            chosen |= dict.fromkeys(own, rule)
        chosen |= {name: self.default for name in left if name not in chosen}
        quantized = {name: rule for name, rule in chosen.items() if rule.quantizes}
        if not quantized and self.default.quantizes:
            raise InputError("The scheme excludes every layer. To train without quantization, set scheme=none.")
        if not quantized and self.compute != "fake":
            raise InputError(f"compute={self.compute} multiplies codes, but nothing is quantized: set scheme=w8a8.")
        return quantized

    def _ordered(self) -> Iterator[tuple[str, Rule]]:
        """Every exception with what to call it, in the order in which they are tried."""
        for pattern in (self.exclude,) if isinstance(self.exclude, str) else self.exclude:
            yield f"exclude '{pattern}'", Rule(pattern)
        for key, given in self.rules.items():
            rule = given if isinstance(given, Rule) else _rule_from(key, given)
            yield f"rule '{key}' (match: {rule.match})", rule


def given(factory: QuantizerFactory) -> bool:
    """Whether `factory` makes a quantizer."""
    return factory is not None and getattr(factory, "func", factory) is not NoQuantizer


def _why_useless(rule: Rule, matching: list[str], names: list[str], kept: Mapping[str, str]) -> str:
    if matching:
        return f"is never used: earlier ones take {matching[0]} and whatever else it matches. Move it before them."
    for name, reason in kept.items():
        if rule.matches(name):
            return f"matches only {reason}."
    kinds = sorted({re.sub(r"\d+", "*", name) for name in names})
    return f"matches no layer.{nearest(rule.patterns[0], kinds)}"


def _rule_from(key: str, options: Mapping[str, Any]) -> Rule:
    known = [option.name for option in fields(Rule)]
    for option in options:
        if option not in known:
            raise InputError(f"The scheme's rule '{key}' has no option '{option}'.{nearest(option, known)}")
    if "match" not in options:
        raise InputError(f"The scheme's rule '{key}' says not what it matches: set scheme.rules.{key}.match.")
    return Rule(**options)
