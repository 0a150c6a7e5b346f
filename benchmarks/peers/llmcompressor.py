"""GPTQ and AWQ by llm-compressor: `PYTHON -m benchmarks.peers.llmcompressor FOLDER`, see benchmarks/peers/job.py.

Its defaults: GPTQ with static activation order, 1 % damping and blocks of 128, AWQ with duo scaling and 20 ratios,
block after block on the outputs of the quantized ones before. A DataLoader is taken as it is, neither shuffled nor
padded nor cut. `options.observer` replaces the rule for scales, `memoryless_minmax`, by another: `memoryless_mse`.
"""

from typing import Any

import torch
from compressed_tensors.quantization import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.job import Job, leave, linear_layers, loss, read_job, timed


def main() -> None:
    """Quantize the model of one job."""
    job, folder = read_job()
    if not torch.accelerator.is_available():
        # AWQ pins its inputs for faster copies to an accelerator, and fails where there is none.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    model, windows = job.load_model(), job.windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = DataLoader([{"input_ids": window} for window in windows], batch_size=job.batch_size)
    measured = timed(job.device, lambda: _quantize(job, model, batches))
    first_loss = loss(model, windows[: job.batch_size], job.device)
    settings = {"act_order": "static" if job.method == "gptq" else None, "observer": _observer(job)}
    leave(folder, measured, _weights(model, before), first_loss, settings, ("llmcompressor", "compressed-tensors"))


def _quantize(job: Job, model: Any, batches: DataLoader) -> None:
    # The processor would be a tokenizer, which windows of tokens do not need, and must not be None. Hidden states stay
    # on the device, not on the CPU as by default: the model is small.
    oneshot(model=model, dataset=batches, recipe=_recipe(job), processor=object(), sequential_offload_device=job.device)


def _recipe(job: Job) -> list[Any]:
    weights = {"num_bits": job.bits, "type": "int", "strategy": "group", "group_size": job.group_size}
    weights |= {"symmetric": job.symmetric, "observer": _observer(job)}
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if job.method == "gptq":
        return [GPTQModifier(**scheme)]
    return [AWQModifier(), QuantizationModifier(**scheme)]


def _observer(job: Job) -> str:
    return job.options.get("observer", "memoryless_minmax")


@torch.no_grad()
def _weights(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was changed, linear layers dequantized: AWQ leaves them scaled, and changes the norms before them."""
    changed = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    changed = {name: tensor for name, tensor in changed.items() if not torch.equal(tensor.cpu(), before[name])}
    for name, layer in linear_layers(model).items():
        scheme = layer.quantization_scheme.weights
        changed[f"{name}.weight"] = forward_quantize(layer, layer.weight, "weight", scheme)
    return changed


if __name__ == "__main__":
    main()
