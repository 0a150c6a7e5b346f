"""Where the time and the memory of a training step go."""

import json
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_modules.attribution import FAKE_QUANTIZATION, FUSED, IDLE, OPTIMIZER, attribute, peak_allocated
from lightning_modules.compilation import CompiledBlocks
from qat.atomic import replaced_file
from qat.errors import InputError
from qat.quantizers import Quantizer
from qat.quantizers.mask import Masked

_MIB = 2**20


class Profile(Callback):
    """Records a few steps after warm-up, prints one table of time and memory, and writes it as `profile.json`.

    Time is that of the device: of kernels on a GPU, else of operators on the CPU; what is left of the steps' wall time
    is idle, recording included, which goes on between operators. What inductor fuses has a row of its own, and the
    table says what is in there. In blocks that another backend compiles the search for scales is elementwise.
    Activations are the peak of allocated memory less everything that has a row of its own.

    Args:
        folder: where profile.json is written.
        steps: optimizer steps to record; None: none.
        warmup: optimizer steps before.
    """

    def __init__(self, folder: str, steps: int | None = None, warmup: int = 3) -> None:
        if (steps is not None and steps < 1) or warmup < 0:
            raise InputError(
                f"callbacks.profile records {steps} steps after {warmup}: steps starts at 1, null is off; warmup at 0."
            )
        self.path, self.steps, self.warmup = Path(folder) / "profile.json", steps, warmup
        self.console = Console()
        self._profiler: profile | None = None
        self._optimizer_scope: Any = None
        self._gradients = 0
        self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = trainer.global_step + self.warmup
        left = trainer.estimated_stepping_batches - trainer.global_step
        if self.steps is not None and self.warmup + self.steps > left:
            raise InputError(
                f"callbacks.profile records steps {self.warmup + 1} to {self.warmup + self.steps}, and {left} are "
                "left: lower its steps or warmup, or raise trainer.max_steps."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.steps is None:
            return
        if self._profiler is not None and trainer.global_step >= self._first + self.steps:
            self._stop(trainer, pl_module)
        elif self._profiler is None and trainer.global_step == self._first:
            self._start(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._profiler is not None:
            self._gradients = _bytes(p.grad for p in pl_module.parameters() if p.grad is not None)
            # Lightning runs the forward and backward passes inside optimizer.step, so torch's own scope says nothing.
            self._optimizer_scope = record_function(OPTIMIZER)
            self._optimizer_scope.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer_scope is not None:
            self._optimizer_scope.__exit__(None, None, None)
            self._optimizer_scope = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profiler is not None:
            self._stop(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._profiler is not None:
            _end_scopes(pl_module)
            self._profiler.stop()
            self._profiler = None

    def _start(self, pl_module: LightningModule) -> None:
        activities = [ProfilerActivity.CPU]
        if pl_module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats()
        if getattr(pl_module, "compiled", None) is None:  # graphs hold no scopes
            _begin_scopes(pl_module)
        self._profiler = profile(activities=activities, profile_memory=pl_module.device.type == "cpu")
        self._profiler.start()
        self._started = _now(pl_module)

    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._profiler is not None
        assert self.steps is not None
        wall = _now(pl_module) - self._started
        self._profiler.stop()
        _end_scopes(pl_module)
        found = {
            "steps": self.steps,
            "device": pl_module.device.type,
            "ms_a_step": wall * 1e3 / self.steps,
            "time": self._time(wall * 1e6, on_gpu=pl_module.device.type == "cuda"),
            "memory": self._memory(trainer, pl_module),
            "notes": notes(getattr(pl_module, "compiled", None)),
        }
        self._profiler, self.steps = None, None
        with replaced_file(self.path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
        self.console.print(table(found))

    def _time(self, wall: float, on_gpu: bool) -> list[dict[str, Any]]:
        """A row for each category; `wall` in microseconds."""
        assert self._profiler is not None
        assert self.steps is not None
        spent = attribute(self._profiler.events(), on_gpu)
        spent[IDLE].microseconds = wall - sum(own.microseconds for name, own in spent.items() if name != IDLE)
        return [
            {
                "what": name,
                "ms": own.microseconds / 1e3 / self.steps,
                "share": own.microseconds / wall,
                "calls": own.calls / self.steps,
            }
            for name, own in spent.items()
        ]

    def _memory(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        """A row for each owner, in MiB, at the peak of a step, where the gradients of the step before still are."""
        assert self._profiler is not None
        quantizers = {id(t): t for m in pl_module.modules() if isinstance(m, Masked) for t in _tensors(m)}
        states = [value for optimizer in trainer.optimizers for s in optimizer.state.values() for value in s.values()]
        own = {
            "parameters": _bytes(p for p in pl_module.parameters() if id(p) not in quantizers),
            "gradients": self._gradients,
            "optimizer state": _bytes(states),
            "quantizers": _bytes(quantizers.values()),
        }
        if pl_module.device.type == "cuda":
            activations = torch.cuda.max_memory_allocated() - sum(own.values())
        else:
            assert self._profiler.profiler is not None
            activations = peak_allocated(self._profiler.profiler.kineto_results.events())
        sizes = own | {"activations": max(0, activations)}
        whole = sum(sizes.values())
        return [{"what": name, "mib": size / _MIB, "share": size / whole} for name, size in sizes.items()]


def notes(compiled: CompiledBlocks | None) -> list[str]:
    """What cannot be told apart in the time of a step whose blocks are `compiled`; None are not."""
    if compiled is None or compiled.backend != "inductor":
        return []
    found = [
        f"{FUSED}: norms, activations and elementwise operators, and what quantizers compute in plain PyTorch: scales, "
        "codes that are multiplied, on a CPU all of uniform grids. One kernel computes several of them, so what "
        f"{FAKE_QUANTIZATION} takes in there is not known; its row is that of its own kernels."
    ]
    if compiled.cuda_graphs:
        found.append(
            f"CUDA graphs: kernels are told by their names alone; one whose name says nothing counts as {FUSED}. "
            "Memory that a graph keeps for itself counts as free, and so is in no row."
        )
    return found


def table(found: dict[str, Any]) -> Table:
    """The contents of profile.json, to read."""
    caption = "\n".join(found["notes"]) or None
    shown = Table(title=f"a training step on the {found['device']}, mean of {found['steps']}", caption=caption)
    shown.add_column("")
    for heading in ("a step", "share", "calls"):
        shown.add_column(heading, justify="right")
    for row in found["time"]:
        shown.add_row(row["what"], f"{row['ms']:.2f} ms", f"{row['share']:.1%}", f"{row['calls']:.0f}")
    shown.add_row("all", f"{found['ms_a_step']:.2f} ms", "", "", style="bold", end_section=True)
    for row in found["memory"]:
        shown.add_row(row["what"], f"{row['mib']:.1f} MiB", f"{row['share']:.1%}", "")
    shown.add_row("peak", f"{sum(row['mib'] for row in found['memory']):.1f} MiB", "", "", style="bold")
    return shown


def _begin_scopes(module: nn.Module) -> None:
    """Have every quantizer's search for qparams recorded under its name, which is made of operators like any other."""
    for quantizer in (m for m in module.modules() if isinstance(m, Quantizer)):
        quantizer.qparams = _recorded(quantizer.qparams)  # type: ignore[method-assign]


def _end_scopes(module: nn.Module) -> None:
    for quantizer in (m for m in module.modules() if isinstance(m, Quantizer)):
        quantizer.__dict__.pop("qparams", None)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def recorded(*args: Any) -> Any:
        with record_function(FAKE_QUANTIZATION):
            return function(*args)

    return recorded


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
