"""The whole job: build, prepare, fit, test, export; the same for every method, which only chooses the parts."""

import copy
import math
import shlex
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ProgressBar as LightningProgressBar
from pytorch_lightning.loggers import Logger, WandbLogger
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_modules.allocator import keep_freed_memory
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.checks import (
    check_module,
    check_numbers,
    check_positions_and_tokens,
    check_strategy,
    emulates_fp8,
)
from lightning_modules.data import CausalLMDataModule
from lightning_modules.distillation import Distillation
from lightning_modules.distillation.fill import fill
from lightning_modules.distillation.recording import cache_for, windows_needed
from lightning_modules.loggers import CSVLogger
from lightning_modules.models import LoadedModel, load_hf
from lightning_modules.report import Report, plot_training
from lightning_modules.shipping import Probe, check_shipped, engine_line, probe_ids, write_reports
from lightning_modules.sizes import MIB, folder_bytes, full_bits, parameter_bytes, tensor_bytes
from qat import convert, load, prepare
from qat.atomic import replaced_folder
from qat.errors import InputError
from qat.export.artifact import bits_per_weight
from qat.export.card import Recipe
from qat.export.parity import check_logits
from qat.export.targets import Target
from qat.nn.kv_quantizer import kv_layers
from qat.nn.packed import dtype_name
from qat.transforms import (
    Scheme,
    discard,
    is_quantized,
    nested_widths,
    quant_layers,
    quantizes_weights,
    restructure,
    uncalibrated,
)
from qat.transforms.masks import sparsity
from qat.transforms.unpack import adopt_grids

LOADED = "as loaded, on its grid"
FULL, SMALLER, ROUNDED = "full precision", "without the parts that were removed", "rounded to nearest"
TRAINED, TUNED, SHIPPED = "after training, fake-quantized", "after training", "converted, saved, loaded"
SAVED = "saved, loaded"
# Transforms that choose a grid, on which weights are then rounded to nearest.
_ONLY_FIT = ("calibrate", "fisher", "hessian")


class Job:
    """One run: the parts that the configuration chose, and the steps that they go through."""

    def __init__(self, cfg: DictConfig) -> None:
        check_numbers(cfg)
        check_module(cfg)
        pl.seed_everything(cfg.seed, verbose=False)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.cfg = cfg
        self.console = Console()
        self.folder = Path(cfg.paths.output_dir)
        self.loaded: LoadedModel = instantiate(cfg.model)
        self.data: CausalLMDataModule = instantiate(cfg.data, tokenizer=self.loaded.tokenizer)
        check_positions_and_tokens(self.loaded, cfg.data.sequence_length)
        self.data.setup()
        self.module: CausalLMModule = instantiate(cfg.module, model=self.loaded.model)
        self.trainer: pl.Trainer = instantiate(
            cfg.trainer,
            callbacks=_callbacks(cfg),
            logger=_loggers(cfg),
        )
        check_strategy(self.trainer)
        if not self.trainer.is_global_zero:
            self.console.quiet = True
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        self.trainer.precision_plugin.convert_module(self.module)
        self.targets: dict[str, Target] = instantiate(cfg.export)
        self.checkpoint: str | None = cfg.ckpt_path
        title = f"{self.loaded.name}: {cfg.title}"
        self.report = Report(self.folder, title, resume=cfg.resumed, writes=self.trainer.is_global_zero)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    def run(self) -> dict[str, dict[str, Any]]:
        """Go through all steps; what an interrupted run measured is not measured again.

        Returns:
            The rows of the report by name.
        """
        for logger in self.trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(self.cfg, resolve=True))
        try:
            return self._run()
        finally:
            if any(isinstance(logger, WandbLogger) for logger in self.trainer.loggers):
                import wandb

                wandb.finish()  # or the next job of a sweep would write into this one's run

    def _run(self) -> dict[str, dict[str, Any]]:
        parameters = sum(p.numel() for p in self.model.parameters())
        self._say(f"{self.report.title} ({parameters / 1e6:.0f} M parameters) -> {self.folder}")
        self._try_scheme()
        self._measure(LOADED if self.loaded.grids else FULL, parameter_bytes(self.model))
        self._make_teacher()
        self._shrink()
        self._prepare()
        quantized = is_quantized(self.model)
        if quantized:
            self._measure(self._untrained)
        if self.cfg.fit:
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=self.checkpoint, weights_only=True)
            self.module.distillation = None  # its teacher has done its work, and is as large as the model
            self._measure(TRAINED if quantized else TUNED)
        zeros = sparsity(self.model)
        if zeros:
            self._say(f"pruned: {zeros:.1%} of the weights that have a mask are zero")
        if quantized and self.cfg.export:
            self._export()
        elif self.cfg.export and (zeros or self.cfg.prune):
            self._export_full()
        elif self.cfg.export:
            self._say("Nothing was exported: the scheme quantizes no weight, key or value.")
        self._discard_blocks()
        self.report.print(self.console)
        self._draw()
        return self.report.rows

    @property
    def _untrained(self) -> str:
        """What the row of the model that is quantized and not trained is called."""
        methods = [name for name in self.cfg.transforms if name not in _ONLY_FIT]
        return f"quantized by {' and '.join(methods)}" if methods else ROUNDED

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _measure(self, row: str, size: int | None = None) -> None:
        """Add a row for the model as it is now: perplexity, bits per (quantized) weight, and `size` in bytes."""
        step = self.trainer.global_step
        if self.report.has(row, step):
            return
        model = self.module.model
        bits = bits_per_weight(model) if quantizes_weights(model) else full_bits(model)
        self.trainer.validate(self.module, datamodule=self.data, verbose=False, weights_only=True)
        if "val/perplexity" not in self.trainer.callback_metrics:
            raise InputError("Nothing was evaluated: set trainer.limit_val_batches to 1.0 or a number of batches.")
        perplexity = float(self.trainer.callback_metrics["val/perplexity"])
        mib = None if size is None else size / MIB
        if not math.isfinite(perplexity) and row in (TRAINED, TUNED):
            raise InputError(
                f"The perplexity is {perplexity} after training, which therefore diverged: nothing was exported. Lower "
                "optimizer.lr, or take more bits."
            )
        self.report.add(row, step=step, perplexity=perplexity, bits_per_weight=bits, mib=mib)
        self._say(f"{row}: perplexity {perplexity:.2f}")

    def _try_scheme(self) -> None:
        """Prepare a model without memory, so that a scheme that does not fit is refused before anything is computed."""
        scheme = instantiate(self.cfg.scheme)
        if not isinstance(scheme, Scheme):
            raise InputError(
                f"scheme is '{scheme}': choose one by scheme=w4, a quantizer by quantizer@scheme.weight=lsq."
            )
        try:
            with torch.device("meta"):
                shadow = type(self.model)(copy.deepcopy(self.model.config))
        except Exception:  # an architecture that cannot be built twice is found out later
            return
        for prune in instantiate(self.cfg.prune).values():
            prune(shadow, [])
        prepare(shadow, scheme, initialize=False)
        self._check_targets(shadow)
        groups = [max(kv.key_schedule.group, kv.value_schedule.group) for _, _, kv in kv_layers(shadow)]
        longest = scheme.kv.window + max(groups) if scheme.kv is not None and groups else 0
        if longest > self.cfg.data.sequence_length:
            raise InputError(
                f"No token would leave the window of the KV cache: it and a group are {longest} tokens, "
                f"data.sequence_length is {self.cfg.data.sequence_length}. Raise that, or lower scheme.kv.window."
            )

    def _check_targets(self, model: nn.Module) -> None:
        """Refuse a grid that a target cannot hold."""
        if is_quantized(model):
            for target in self.targets.values():
                target.check(model)

    def _make_teacher(self) -> None:
        """Make the teacher of a distillation, before anything changes the model."""
        distillation = self.module.distillation
        if distillation is None:
            return
        self.model.to(self.trainer.strategy.root_device)
        measured = distillation.needs_gamma
        if distillation.cache is not None:
            self._fill_cache(distillation)
        else:
            self._load_teacher(distillation)
            if measured:
                with self.trainer.precision_plugin.forward_context():
                    distillation.measure_gamma(self._calibration_batches())
        if measured:
            gamma = distillation.gamma
            self._say(f"teacher: gives the next token a probability of {gamma:.3f} on average (distill.gamma)")

    def _load_teacher(self, distillation: Distillation) -> None:
        distillation.make_teacher(self.model, self.loaded.tokenizer)
        self._say(f"teacher: {distillation.name or f'{self.loaded.name}, as it is now'}")

    def _fill_cache(self, distillation: Distillation) -> None:
        """Have the teacher's logits for all windows that will be seen on disk, and learn from these."""
        calibration = self.cfg.calibration_batches if distillation.needs_gamma else 0
        cache = cache_for(distillation, self.model, self.data, str(self.trainer.precision))
        self._once(cache.create)
        wanted = windows_needed(self.data, self.trainer, calibration)
        if cache.lacks(wanted):
            self._load_teacher(distillation)
            precision = self.trainer.precision_plugin.forward_context
            fill(cache, distillation, self.data, wanted, self.console, precision)
        self.trainer.strategy.barrier()  # also for a process that looked when others were done
        self._say(f"teacher: its logits for {len(wanted)} windows are in {cache.folder}")
        if distillation.needs_gamma:
            first = self.data.order()[: calibration * self.data.batch_size]
            distillation.gamma = cache.confidence(first, [self.data.train_windows[index]["labels"] for index in first])
        distillation.train_from_cache()
        self.data.beside = cache.window

    def _shrink(self) -> None:
        """Remove parts of the model; a resumed run takes up what it had left, since checkpoints hold tensors only."""
        prunes, folder = instantiate(self.cfg.prune), self.folder / "pruned"
        if not prunes:
            return
        if self.cfg.resumed and folder.is_dir():
            self.loaded = self.loaded._replace(model=self._reloaded(folder))
            self.module.model = self.model.train()
        else:
            self.model.to(self.trainer.strategy.root_device)
            for prune in prunes.values():
                prune(self.model, self._calibration_batches())
            self.save_plain(folder)
        self._measure(SMALLER, parameter_bytes(self.model))

    def save_plain(self, folder: Path) -> None:
        """Write the model as transformers does."""

        def write() -> None:
            with replaced_folder(folder) as temporary:
                self.model.save_pretrained(temporary)
                self.loaded.tokenizer.save_pretrained(temporary)

        self._once(write)

    def _once(self, write: Callable[[], Any]) -> None:
        """Let one process of all write; the others wait for what it wrote."""
        if self.trainer.is_global_zero:
            write()
        self.trainer.strategy.barrier()

    def _reloaded(self, folder: Path) -> nn.Module:
        """What `save_plain` wrote."""
        dtype = dtype_name(next(self.model.parameters()).dtype)
        trusted = self.cfg.model.get("trust_remote_code", False)
        return load_hf(str(folder), dtype, trusted, self.model.config._attn_implementation).model

    def _prepare(self) -> None:
        # A checkpoint will bring the quantizers' state, unless the rounding row is still to be measured.
        fresh = self.checkpoint is None or not self.report.has(self._untrained, 0)
        self.model.to(self.trainer.strategy.root_device)
        with Progress(console=self.console, transient=True) as progress:
            task = progress.add_task("fitting quantizers", total=None)
            prepare(
                self.model,
                instantiate(self.cfg.scheme),
                initialize=fresh,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if fresh and self.loaded.grids:
            same = adopt_grids(self.model, self.loaded.grids)
            self._say(
                f"{len(same)} of {len(self.loaded.grids)} quantized layers start on the grid that they were loaded from"
            )
        if emulates_fp8(self.model, self.trainer.strategy.root_device):
            self._say("compute=fp8: a CPU multiplies these codes in float32: the same values, and no time saved")
        self._check_targets(self.model)  # once more, now that tables have their values
        transforms = instantiate(self.cfg.transforms).values()
        if not fresh:
            restructure(self.model, transforms)
            return
        for transform in transforms:
            transform(self.model, self._calibration_batches())
        for name in uncalibrated(self.model):
            raise InputError(f"{name} is static but nothing calibrated it: add transforms=calibrate.")

    def _calibration_batches(self) -> list[dict[str, Tensor]]:
        device, wanted = self.trainer.strategy.root_device, self.cfg.calibration_batches
        batches = list(islice(self.data.calibration_dataloader(), wanted))
        if len(batches) < wanted:
            self._say(f"calibration: {len(batches)} batches, all that the training text fills, not {wanted}")
        return [{key: value.to(device) for key, value in batch.items()} for batch in batches]

    def _export(self) -> None:
        """Convert, and for each target save and reload, and hold the reloaded model to the trained one's logits."""
        ids, widths = probe_ids(next(iter(self.data.val_dataloader()))), nested_widths(self.model)
        probe = Probe(ids, self._logits(self.model, ids))
        convert(self.model)
        trusted = self.cfg.model.get("trust_remote_code", False)
        for name, target in self.targets.items():
            folder = self.folder / name
            self._once(partial(target.write, self.model, folder, tokenizer=self.loaded.tokenizer))
            for bits in widths:
                self.module.model = load(folder, trust_remote_code=trusted, bits=bits)
                self._measure(f"loaded at {bits} bits", tensor_bytes(self.module.model))
            self.module.model = target.read(folder, trusted)
            models, logits = (self.model, self.module.model), partial(self._logits, ids=ids)
            report = check_shipped(target, folder, *models, probe, logits, self.trainer.is_global_zero)
            self._measure(SHIPPED if name == next(iter(self.targets)) else f"{SHIPPED} as {name}", folder_bytes(folder))
            self._once(partial(write_reports, folder, self._recipe, self.report.rows.values(), report))
            self._say(f"{folder}: the same logits as the trained model")
            self._say(f"  {engine_line(report)}")

    @property
    def _recipe(self) -> Recipe:
        """What the model card says of this run."""
        command = None
        if HydraConfig.initialized():
            command = shlex.join(["python", "train.py", *HydraConfig.get().overrides.task])
        return Recipe(self.loaded.name, self.cfg.title, command)

    def _export_full(self) -> None:
        """Save and reload a pruned model that has no codes, and hold the reloaded one to the trained one's logits."""
        ids, folder = probe_ids(next(iter(self.data.val_dataloader()))), self.folder / "pretrained"
        trained = self._logits(self.model, ids)
        if any(True for _ in quant_layers(self.model)):
            convert(self.model)
        self.save_plain(folder)
        self.module.model = self._reloaded(folder)
        check_logits(trained, self._logits(self.module.model, ids), exact=trained.device.type == "cpu")
        self._measure(SAVED, folder_bytes(folder))
        self._say(f"{folder}: pruned, in full precision; quantize it by model=hf model.name={folder}")

    def _discard_blocks(self) -> None:
        """Remove what transforms kept of their work for a run that is killed before it has exported."""
        for options in self.cfg.transforms.values():
            if options.get("folder"):
                discard(options.folder)

    @torch.no_grad()
    def _logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        device = self.trainer.strategy.root_device
        model.to(device).eval()
        with self.trainer.precision_plugin.forward_context():
            return model(input_ids=ids.to(device), use_cache=False).logits

    def _draw(self) -> None:
        metrics, picture = self.folder / "metrics.csv", self.folder / "training.png"
        if not self.trainer.is_global_zero:
            return
        if metrics.is_file() and plot_training(metrics, picture, self.report.title):
            self._say(f"picture: {picture}")


def _loggers(cfg: DictConfig) -> list[Logger]:
    """The chosen logger, and always the CSV that the picture is drawn from."""
    chosen = instantiate(cfg.logger)
    return [chosen] if isinstance(chosen, CSVLogger) else [chosen, CSVLogger(cfg.paths.output_dir, cfg.resumed)]


def _callbacks(cfg: DictConfig) -> list[pl.Callback]:
    """The chosen callbacks; one that is set to null is left out."""
    chosen = [callback for callback in instantiate(cfg.callbacks).values() if callback is not None]
    return [c for c in chosen if cfg.trainer.enable_progress_bar or not isinstance(c, LightningProgressBar)]
