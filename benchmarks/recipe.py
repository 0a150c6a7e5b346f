"""The training that accuracy benchmarks share: the same model, tokens, order and schedule for every arm.

SmolLM2-135M off its grid, Adam, 8 x 512 tokens a step, bf16 autocast, cosine to a tenth; one seed. Perplexity is over
512-token windows.
"""

import math
import subprocess
import sys
import time

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.off_grid import rotate_
from lightning_modules.causal_lm import parameter_groups
from lightning_modules.models import load_smollm2

MODEL = "smollm2-rotated"
BATCH, LENGTH = 8, 512
LR, QUANTIZER_LR, WARMUP = 5e-5, 1e-3, 15


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """SmolLM2 off its grid; or with other weights."""
    model = rotate_(load_smollm2("~/.cache/lightning-qat").model)
    if weights is not None:
        model.load_state_dict(weights)
    return model.to(device())


def fit(model: nn.Module, train: Tensor, steps: int) -> nn.Module:
    """Train on the same windows in the same order, whatever the arm. Returns `model`."""
    torch.manual_seed(0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(parameter_groups(model, QUANTIZER_LR), LR, (0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    for step in range(steps):
        batch = train[order[(torch.arange(BATCH) + step * BATCH) % len(order)]].to(device(), torch.int64)
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def _rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean next-token loss over all windows, in the precision of training."""
    model.eval()
    losses = []
    for batch in windows.to(device(), torch.int64).split(16):
        with torch.autocast(batch.device.type, torch.bfloat16):
            losses.append(model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch))
    return math.exp(float(torch.stack(losses).sum()) / len(windows))


def run_all(module: str, arms: list[str], jobs: int) -> None:
    """Run `python -m module ... --arm ARM` for each arm, `jobs` processes at a time; the first that fails stops all."""
    waiting, running = list(arms), []
    for _ in track(arms, description=f"{len(arms)} arms"):
        while waiting and len(running) < jobs:
            command = [sys.executable, "-m", module, *sys.argv[1:], "--arm", waiting.pop(0)]
            running.append(subprocess.Popen(command))
        while all(process.poll() is None for process in running):
            time.sleep(0.2)
        ended = next(process for process in running if process.poll() is not None)
        running.remove(ended)
        if ended.returncode:
            for process in running:
                process.kill()
            raise SystemExit(f"{' '.join(map(str, ended.args))} failed")
