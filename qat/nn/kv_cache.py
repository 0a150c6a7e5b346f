"""A cache of transformers that stores keys and values as packed codes."""

from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from qat.errors import InputError
from qat.nn.deferred import FEW, deferred
from qat.nn.kv_quantizer import KVQuantizer, kv_layers
from qat.nn.kv_storage import StoredTokens


class QuantizedLayer(CacheLayerMixin):
    """The cache of one attention layer; its keys and values have a schedule each."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.is_croppable = quantizer.is_immediate
        self.layout = quantizer.layout
        self._sees_alike = quantizer.is_immediate
        self.stored_keys = StoredTokens(quantizer.key_quantizer, quantizer.key_schedule)
        self.stored_values = StoredTokens(quantizer.value_quantizer, quantizer.value_schedule)

    @property
    def _both(self) -> tuple[StoredTokens, StoredTokens]:
        return self.stored_keys, self.stored_values

    @property
    def nbytes(self) -> int:
        """Bytes that the layer's tokens occupy."""
        return sum(stored.nbytes for stored in self._both)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens `[batch, kv_heads, T, head_dim]`; return all `[batch, kv_heads, L, head_dim]` for attention.

        What had left the window before the call comes dequantized, everything later in full precision. No gradient
        reaches the tokens of earlier calls. Where new tokens, one or a few, see all others alike, keys and values come
        `deferred`, and attention decodes them by itself.
        """
        self.is_initialized = True
        if self._hands_over(key_states, value_states):
            for stored, new in zip(self._both, (key_states, value_states), strict=True):
                stored.add(new)
            return deferred(self.stored_keys), deferred(self.stored_values)
        return self.stored_keys.append(key_states), self.stored_values.append(value_states)

    def _hands_over(self, key: Tensor, value: Tensor) -> bool:
        """Whether attention to these tokens may look at what is stored, with them in it, instead of at values."""
        tokens = key.shape[-2]
        alike = tokens == 1 or (self._sees_alike and tokens <= FEW)
        return alike and self.get_seq_length() > 0 and not (key.requires_grad or value.requires_grad)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.stored_keys.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False
        for stored in self._both:
            stored.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for stored in self._both:
            stored.map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for stored in self._both:
            stored.map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; older versions of transformers say by a positive number how many to keep.

        Raises:
            InputError: if tokens that remain would have to return to full precision.
        """
        # Assisted decoding counts in tensors.
        change, length = int(tokens_to_remove), self.get_seq_length()
        kept = max(0, length + change) if change <= 0 else min(change, length)
        for stored in self._both:
            stored.check_crop(kept)
        for stored in self._both:
            stored.crop(kept)


class QuantizedCache(Cache):
    """A KV cache for `model.generate` and for calls of the model, in codes of the model's own KV quantizers.

    Passed as `past_key_values`; a model with KV quantizers makes one by itself wherever transformers would make its
    default cache.

    Args:
        model: with KV quantizers in its attention layers (`qat.transforms.kv.quantize_kv`).

    Raises:
        InputError: if it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(layers=[QuantizedLayer(kv) for kv in _by_layer(model)])

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies: codes, scales, zero points and tokens in full precision."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedLayer))

    def check_serves(self, model: nn.Module) -> None:
        """Refuse a model whose keys and values are quantized in another way."""
        if [layer.layout for layer in self.layers] != [kv.layout for kv in _by_layer(model)]:  # type: ignore[union-attr]
            raise InputError(
                "past_key_values was made for a model whose cache has another layout: pass QuantizedCache(model) of "
                "this one."
            )


def _by_layer(model: nn.Module) -> list[KVQuantizer]:
    """The KV quantizers of `model` in the order of its layers."""
    found: dict[int, KVQuantizer] = {int(module.layer_idx): kv for _, module, kv in kv_layers(model)}  # type: ignore[arg-type]
    if sorted(found) != list(range(len(found))) or not found:
        raise InputError("The model has no KV quantizers: call quantize_kv(model, key, value) first.")
    return [found[index] for index in range(len(found))]


def use_quantized_cache(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook that puts a QuantizedCache in the place of an empty default cache.

    `generate` makes a DynamicCache before it calls the model, and from then on passes what the model returned, so
    replacing it here is enough. While training or calibrating, a call without a cache gets none from here.

    Raises:
        InputError: for a cache of another kind, an empty one of another model, or a default one that holds tokens.
    """
    if next(kv_layers(decoder), None) is None:
        return args, kwargs  # its quantizers were taken away for a while
    names = list(signature(decoder.forward).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    given, wanted = named.get("past_key_values"), named.get("use_cache")
    if given is None:
        wanted = getattr(decoder.config, "use_cache", False) if wanted is None else wanted
        busy = decoder.training or any(kv.is_observing for _, _, kv in kv_layers(decoder))
        cache = QuantizedCache(decoder) if wanted and not busy else None
    elif isinstance(given, QuantizedCache):
        # While it is empty: walking the model at every token of a generation would show in its time.
        if given.get_seq_length() == 0:
            given.check_serves(decoder)
        cache = given
    else:
        cache = _in_place_of(given, decoder)
    position = names.index("past_key_values")
    if position < len(args):
        return (*args[:position], cache, *args[position + 1 :]), kwargs
    return args, kwargs | {"past_key_values": cache}


def _in_place_of(given: Any, decoder: nn.Module) -> QuantizedCache:
    if type(given) is DynamicCache and not given.offloading and given.get_seq_length() == 0:
        return QuantizedCache(decoder)
    raise InputError(
        f"The model quantizes its keys and values, but past_key_values is another cache ({type(given).__name__}). "
        "Leave past_key_values and cache_implementation out, or pass an own QuantizedCache(model)."
    )
