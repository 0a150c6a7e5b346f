"""Ship a converted model: write it, read it back, and hold it and the engine that serves it to what was trained."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from qat.atomic import replaced_file
from qat.export.artifact import bits_per_weight, quantized_elements
from qat.export.card import Recipe, model_card
from qat.export.consumers import NotInstalled
from qat.export.grids import layer_grids
from qat.export.parity import Parity, check_consumer, check_logits, check_stored, parity
from qat.export.targets import Target
from qat.nn import PackedTensor
from qat.nn.kv_quantizer import kv_layers
from qat.transforms import quantizes_weights

# As many tokens are compared: their logits of a large vocabulary take a gigabyte.
PROBE_TOKENS = 2048


class Probe(NamedTuple):
    """Tokens `[batch, tokens]`, and the logits that the trained, fake-quantized model finds for them."""

    ids: Tensor
    trained: Tensor


def probe_ids(batch: dict[str, Tensor]) -> Tensor:
    """The first windows of `batch`, as many as are compared."""
    ids = batch["input_ids"]
    return ids[: max(1, PROBE_TOKENS // ids.shape[1])]


def check_shipped(
    target: Target,
    folder: Path,
    model: nn.Module,
    read: nn.Module,
    probe: Probe,
    logits: Callable[[nn.Module], Tensor],
    asks_engine: bool = True,
) -> dict[str, Any]:
    """Hold `folder`, which `target` wrote of `model` and read back as `read`, to what was trained.

    Args:
        logits: what a model finds for the probe.
        asks_engine: whether the engine is loaded too, which one of several processes does.

    Returns:
        What `parity.json` holds.

    Raises:
        GridContractError: if a stored number, a logit, or what the engine computes is not what it must be.
    """
    check_stored(model, read)
    found = logits(read)
    check_logits(probe.trained, found, exact=probe.trained.device.type == "cpu")
    report: dict[str, Any] = {
        "target": target.title,
        "tokens": probe.ids.numel(),
        "trained, fake-quantized": parity(probe.trained, probe.trained, probe.ids)._asdict(),
        "packed, read back": parity(probe.trained, found, probe.ids)._asdict(),
        "engine": _engine(target, folder, model, probe) if asks_engine else _unchecked("another process asks it"),
    }
    return report | _sizes(folder, model)


def _engine(target: Target, folder: Path, model: nn.Module, probe: Probe) -> dict[str, Any]:
    """What the engine finds, checked; or that it is not here."""
    try:
        consumer = target.consumer(folder)
    except NotInstalled as absent:
        return _unchecked(str(absent))
    if consumer is None:
        return _unchecked("this project's own loader is the engine")
    found: Parity = parity(probe.trained, consumer.logits(probe.ids), probe.ids)
    plain = all(grid.input is None for grid in layer_grids(model).values()) and next(kv_layers(model), None) is None
    same = target.exact_engine and plain
    check_consumer(found, consumer.name, same, target.most_kl)
    return {"name": consumer.name} | found._asdict()


def _unchecked(why: str) -> dict[str, Any]:
    return {"name": None, "not checked": why}


def _sizes(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Bytes on disk, and bits of a quantized weight: those of codes and qparams, and those that the files spend."""
    weights = [file for pattern in ("*.safetensors", "*.gguf", "*.onnx*") for file in folder.glob(pattern)]
    size = sum(file.stat().st_size for file in weights)
    found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in folder.iterdir()), "bytes_of_weights": size}
    if not quantizes_weights(model):
        return found
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedTensor))
    others = {t.data_ptr(): t.nbytes for name, t in model.state_dict().items() if not name.startswith(packed)}
    full = sum(others.values())
    spent = 8 * (size - full) / quantized_elements(model)
    return found | {"bits_per_weight_claimed": bits_per_weight(model), "bits_per_weight_actual": spent}


def write_reports(folder: Path, recipe: Recipe, rows: Collection[dict[str, Any]], report: dict[str, Any]) -> None:
    """Put `parity.json` and the model card beside an export."""
    with replaced_file(folder / "parity.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replaced_file(folder / "README.md") as temporary:
        temporary.write_text(model_card(recipe, rows, report))


def engine_line(report: dict[str, Any]) -> str:
    """What is said of the engine on the console."""
    engine = report["engine"]
    if engine["name"] is None:
        return f"in its engine: not checked, {engine['not checked']}"
    return (
        f"in {engine['name']}: the same likeliest token for {engine['top1_agreement']:.2%}, perplexity "
        f"{engine['perplexity']:.3f} beside {report['trained, fake-quantized']['perplexity']:.3f}"
    )
