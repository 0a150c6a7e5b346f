"""Generation as it is asked for, without what a model's own settings would add."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Let `model.generate` know no settings but its arguments and the model's special tokens.

    Penalties, least probabilities and forbidden n-grams of a model's `generation_config` would join whatever is asked
    for: they hide what quantization did, and make text of another distribution than the model's.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(before, name, None) for name in _TOKENS})
    try:
        yield
    finally:
        model.generation_config = before
