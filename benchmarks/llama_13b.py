"""A Llama of 13 billion parameters quantized by GPTQ on one GPU: seconds, memory, and the size of what is saved.

    python -m benchmarks.llama_13b                       int4 in groups of 128 and of 64; results/llama_13b.json
    python -m benchmarks.llama_13b --structured 0.8      also after 80 % of its heads and channels were removed
    python -m benchmarks.llama_13b --layers 2            only so many of the 40 layers
    python -m benchmarks.llama_13b --tiny                the same code on a model of toy size, on a CPU; writes nothing

The model has the shape of LLaMA-13B and random weights in bf16, made layer by layer; calibration is on random tokens,
128 windows of 2048. Time and memory do not depend on what the numbers are, and nothing is said of accuracy. The model
stays in the memory of the host and its blocks go to the GPU one at a time, so 64 GiB of the one and 24 GiB of the other
are enough; both peaks are recorded. Each row is a process of its own, kept in --work: a run that stopped goes on.

With --layers all 40 are counted by what those took: `seconds` is the mean of a layer times 40, and `bytes` the measured
folder plus what the missing layers add, as layers are alike; `layers_done` says how many there were. `bf16_bytes` is
the model before anything, `seconds_to_prune` and `seconds_to_save` are not part of `seconds`. Every packed layer must
hold the weights that GPTQ left, to the bit. How fast such a model decodes is decode.json's to say.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from benchmarks.record import record
from qat.atomic import replaced_file
from qat.export.artifact import bits_per_weight
from qat.nn import PackedLayer
from qat.quantizers import LSQQuantizer
from qat.transforms import gptq, quant_layers, structured

LARGE = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "vocab_size": 32000}
TINY = {"hidden_size": 640, "intermediate_size": 1280, "num_attention_heads": 10, "vocab_size": 256}
LAYERS = {False: 40, True: 3}
GROUPS = (128, 64)
_BATCH = 4
_STD = 0.02


@dataclass(frozen=True)
class Arm:
    """What one row measures.

    Attributes:
        group: weights that share a scale.
        structured: share of heads and channels that are removed first.
        layers: how many there are.
        windows, length: of random calibration tokens.
    """

    group: int
    structured: float
    layers: int
    windows: int
    length: int
    tiny: bool

    @property
    def name(self) -> str:
        pruned = f"structured-{self.structured:g}-" if self.structured else ""
        return f"{pruned}gptq-int4-g{self.group}"

    @property
    def shape(self) -> dict[str, int]:
        return TINY if self.tiny else LARGE


def main() -> None:
    options = _options()
    if options.arm:
        print(json.dumps(measure(Arm(**json.loads(options.arm)))))
        return
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU; --tiny runs the same code on a small model anywhere.")
    rows = [_kept(options.work, arm) for arm in arms(options)]
    for row in rows:
        print(row)
    if not options.tiny:
        words = f"--layers {options.layers} --windows {options.windows}"
        words += f" --structured {options.structured:g}" if options.structured else ""
        record("llama_13b", f"python -m benchmarks.llama_13b {words}", rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="how many to make and quantize; all")
    parser.add_argument("--windows", type=int, default=128, help="of random tokens")
    parser.add_argument("--length", type=int, help="tokens of each; 2048")
    parser.add_argument("--structured", type=float, default=0.0, help="share of heads and channels, as an arm more")
    parser.add_argument("--work", type=Path, default=Path("outputs/llama_13b"), help="where rows are kept")
    parser.add_argument("--tiny", action="store_true", help="toy size, on any machine")
    parser.add_argument("--arm", help="measure one arm, given as JSON, in this process and print it")
    options = parser.parse_args()
    options.layers = options.layers or LAYERS[options.tiny]
    options.length = options.length or (64 if options.tiny else 2048)
    return options


def arms(options: argparse.Namespace) -> list[Arm]:
    """One for each group size; with the first of them also the pruned model."""
    sizes = (options.layers, options.windows, options.length, options.tiny)
    found = [Arm(group, 0.0, *sizes) for group in GROUPS]
    return [*found, Arm(GROUPS[0], options.structured, *sizes)] if options.structured else found


def _kept(work: Path, arm: Arm) -> dict[str, Any]:
    """The row of `arm`, measured in a fresh process unless it was before."""
    words = [*(f"{value:g}" for value in (arm.layers, arm.windows, arm.length)), *(["tiny"] if arm.tiny else [])]
    path = work / f"{'-'.join([arm.name, *words])}.json"
    if not path.is_file():
        command = [sys.executable, "-m", "benchmarks.llama_13b", "--arm", json.dumps(asdict(arm))]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        with replaced_file(path) as temporary:
            temporary.write_text(output.splitlines()[-1])
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def measure(arm: Arm) -> dict[str, Any]:
    """The row of one arm."""
    device = torch.device("cpu" if arm.tiny else "cuda")
    model = random_model(arm, device)
    before, batches = parameters(model), random_batches(arm)
    row: dict[str, Any] = {"arm": arm.name, "model": "toy" if arm.tiny else "13b", "windows": arm.windows}
    row |= {"length": arm.length, "layers": LAYERS[arm.tiny], "layers_done": arm.layers}
    row["seconds_to_prune"] = 0.0
    if arm.structured:
        prune = partial(structured, heads=arm.structured, channels=arm.structured, multiple_of=arm.group)
        row["seconds_to_prune"] = seconds(lambda: prune(model, batches, device=device), device)
    weight = partial(LSQQuantizer, bits=4, granularity=f"per_group_{arm.group}")
    # GPTQ finds the scales on the GPU, block by block; here they would be found for the whole model on the host.
    qat.prepare(model, qat.Scheme(weight=weight), initialize=False)
    took = seconds(lambda: gptq(model, batches, device=device), device)
    row |= {"seconds": whole(took, 0, arm), "seconds_measured": took, "peak_gib": peak_gib(device)}
    found: list[int] = []
    row["seconds_to_save"] = seconds(lambda: found.append(saved_bytes(model, device)), device)
    row |= {"removed": 1 - of_blocks(parameters(model)) / of_blocks(before), "bits_per_weight": bits_per_weight(model)}
    outside = 2 * (sum(before.values()) - of_blocks(before))
    row |= {"bytes": round(whole(found[0], outside, arm)), "bytes_measured": found[0]}
    row["bf16_bytes"] = round(whole(2 * sum(before.values()), outside, arm))
    return row | {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def whole(measured: float, outside: float, arm: Arm) -> float:
    """What all layers take, by what `layers_done` of them did; `outside` of the measured is in no layer."""
    return outside + (measured - outside) / arm.layers * LAYERS[arm.tiny]


def random_model(arm: Arm, device: torch.device) -> Any:
    """The model on the host, in bf16. What a block adds to the residual stream shrinks with the number of layers."""
    config = LlamaConfig(**arm.shape, num_hidden_layers=arm.layers, tie_word_embeddings=False)
    with init_empty_weights(include_buffers=False):  # rotary frequencies are computed, not stored
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    torch.manual_seed(0)
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            new = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() > 1:
                writes = name.endswith(("o_proj", "down_proj"))
                new.normal_(std=_STD / (2 * LAYERS[arm.tiny]) ** 0.5 if writes else _STD)
            module.register_parameter(own, nn.Parameter(new.cpu()))
    return model


def random_batches(arm: Arm) -> list[dict[str, Tensor]]:
    """Windows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(arm.shape["vocab_size"], (arm.windows, arm.length), generator=generator)
    return [{"input_ids": part} for part in ids.split(_BATCH)]


def parameters(model: nn.Module) -> dict[str, int]:
    """Weights of every layer by name, packed or not."""
    found = {name: p.numel() for name, p in model.named_parameters() if "quantizer" not in name}
    packed = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedLayer))
    return found | {name: weight.shape.numel() for name, layer in packed for weight in layer.weights().values()}


def of_blocks(counts: dict[str, int]) -> int:
    """Weights in the blocks."""
    return sum(count for name, count in counts.items() if name.startswith("model.layers."))


def saved_bytes(model: Any, device: torch.device) -> int:
    """Pack the model, block by block on `device`, and save it; the size of the folder."""
    for block in model.model.layers:
        expected = {name: layer.weight.detach() for name, layer in quant_layers(block)}
        qat.convert(block.to(device))
        for name, weight in expected.items():
            if not torch.equal(block.get_submodule(name).weight.dequantize(), weight.to(device)):
                raise SystemExit(f"{name} does not hold the weights that GPTQ left.")
        block.cpu()
    with tempfile.TemporaryDirectory() as temporary:
        folder = qat.save(model, Path(temporary) / "model")
        return sum(file.stat().st_size for file in folder.iterdir())


def seconds(work: Any, device: torch.device) -> float:
    """What `work` takes; the peak of the device is counted from here on."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib(device: torch.device) -> float | None:
    """Of the GPU's allocator; a CPU has none of its own."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


if __name__ == "__main__":
    main()
