"""Launches that were tuned on a GPU of this machine, kept on disk."""

import json
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from qat.atomic import replaced_file
from qat.kernels.quantized_linear.launches import KERNELS, Key, Launches

_LOGGER = logging.getLogger(__name__)


def path_for(gpu: str) -> Path:
    """The file of the GPUs called `gpu`, in $QAT_CACHE or ~/.cache/lightning-qat."""
    folder = Path(os.environ.get("QAT_CACHE", "~/.cache/lightning-qat")).expanduser()
    return folder / "launches" / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@lru_cache
def tuned_on(gpu: str) -> Mapping[Key, Launches]:
    """What `save` kept for GPUs called `gpu`; read once in a process. What cannot be read is warned of."""
    try:
        path = path_for(gpu)
        return dict(map(_read, json.loads(path.read_text()))) if path.is_file() else {}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOGGER.warning(
            f"Launches that were tuned for {gpu} cannot be read ({type(error).__name__}: {error}), and a rule takes "
            "their place: tune again with qat-tune."
        )
        return {}


def save(gpu: str, key: Key, launches: Launches) -> None:
    """Keep `launches` of layers like `key`, and what was kept of others and of other numbers of tokens."""
    known = tuned_on(gpu)
    entries = {**known, key: tuple(sorted({**dict(known.get(key, ())), **dict(launches)}.items()))}
    path = path_for(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps([_written(*entry) for entry in entries.items()], indent=1) + "\n")
    tuned_on.cache_clear()


def _written(key: Key, launches: Launches) -> dict[str, object]:
    own = [{"tokens": tokens, "kernel": type(how).__name__, **how._asdict()} for tokens, how in launches]
    return {**key._asdict(), "launches": own}


def _read(entry: dict[str, object]) -> tuple[Key, Launches]:
    launches = []
    own = entry.pop("launches")
    if not isinstance(own, list):
        raise TypeError("launches are a list")
    for one in own:
        tokens, kernel = one.pop("tokens"), one.pop("kernel")
        if not isinstance(tokens, int):
            raise TypeError(f"tokens are {tokens!r}")
        launches.append((tokens, KERNELS[kernel](**one)))
    return Key(**entry), tuple(launches)  # type: ignore[arg-type]
