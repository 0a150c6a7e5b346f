"""The language-modelling objective as a LightningModule."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.clipping import LayerClip, check_clipping
from lightning_modules.compilation import CompiledBlocks, check_compile, check_cuda_graphs
from lightning_modules.data.windows import IGNORED
from lightning_modules.distillation import Distillation
from lightning_modules.distillation.objective import split
from lightning_modules.finite import FiniteWatch, skip_unless_finite
from lightning_modules.freezing import freeze
from lightning_modules.loss import HeadLoss, check_loss, head_loss
from qat.errors import InputError
from qat.nn import QuantLayer
from qat.quantizers import NoQuantizer, Quantizer
from qat.transforms.masks import hold_masks_of
from qat.transforms.step_codes import ModelStepCodes

# Computes the loss of one batch, and how that becomes the loss of a step.
Loss = Callable[[], Tensor]
Passes = Callable[[Loss], Tensor]
_MEND = "Lower optimizer.lr or module.quantizer_lr, set trainer.gradient_clip_val, or train in 32-true."


class CausalLMModule(pl.LightningModule):
    """Next-token cross entropy for any transformers causal LM, quantized or not.

    Args:
        model: takes `input_ids` and `labels`, returns an object with `loss`.
        optimizer: called with parameter groups.
        scheduler: called with the optimizer and `num_training_steps`; None keeps the learning rate constant.
        quantizer_lr: learning rate of everything that quantizers learn (scales, zero points, codebooks); their
            parameters never decay. None: that of the weights.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: a backend of torch.compile, `inductor`, for the blocks of the model while it trains; None: none.
        cuda_graphs: record compiled blocks as CUDA graphs, for small layers, which a GPU computes faster than Python
            launches them.
        loss: how training computes it: by the `model`, or without the logits of all tokens, `chunked`, `liger` or
            `cce`; `auto` is chunked wherever that computes what the model does.
        distill: the objective of training instead of the cross entropy alone, its teacher made already when a fit
            begins; None, or an empty mapping: none. Evaluation is the cross entropy in any case.
        freeze: patterns of the names of parameters that do not train.

    Raises:
        InputError: if there is no such backend or loss, or it misses a package.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        quantizer_lr: float | None = None,
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        cuda_graphs: bool = False,
        loss: str = "auto",
        distill: Distillation | Mapping[str, Any] | None = None,
        freeze: Sequence[str] = (),
        layer_clip: float | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_compile(compile, cuda_graphs)
        check_loss(loss)
        self.model = model.train()
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.quantizer_lr = quantizer_lr
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.compile_backend = compile
        self.cuda_graphs = cuda_graphs
        self.compiled: CompiledBlocks | None = None
        self.compiled_teacher: CompiledBlocks | None = None
        self.codes: ModelStepCodes | None = None
        self.loss = loss
        self.distillation = distill if isinstance(distill, Distillation) else None
        self.frozen = freeze
        self.head_loss: HeadLoss | None = None
        self.layer_limits = layer_clip
        self.layer_clip: LayerClip | None = None
        self.watch = FiniteWatch(late=False)
        self.passes: Passes = _once
        self._nll = torch.zeros(2, dtype=torch.float64)

    def setup(self, stage: str) -> None:
        """Freeze what does not train, before parameters are shared out to processes and optimizers."""
        if stage == "fit":
            freeze(self.model, self.frozen)

    def on_fit_start(self) -> None:
        """What makes training fast is for this fit only: before it the model changes, and what ships has none of it."""
        self.head_loss = head_loss(self.model, self.loss)
        self.watch = FiniteWatch(late=self.device.type != "cpu")
        if self.layer_limits is not None:
            check_clipping(self.trainer.gradient_clip_val, self._scales_gradients)
            self.layer_clip = LayerClip(self.model, self.layer_limits)
        if self.distillation is not None:
            self.distillation.start(self.model, self.loss != "model", self.compile_backend is not None)
        if self.cuda_graphs:
            check_cuda_graphs(self.trainer, self.device.type, self.gradient_checkpointing)
        if self.compile_backend is not None:
            self.compiled = CompiledBlocks(self.model, self.compile_backend, self.cuda_graphs)
            if self.distillation is not None and self.distillation.teacher is not None:
                # Not as CUDA graphs: what it computes outlives its forward pass.
                self.compiled_teacher = CompiledBlocks(self.distillation.teacher, self.compile_backend)
        elif self.device.type == "cpu" and (self.gradient_checkpointing or self.trainer.accumulate_grad_batches > 1):
            self.codes = ModelStepCodes(self.model)

    def configure_callbacks(self) -> list[pl.Callback]:
        known = any(isinstance(callback, _EndsFit) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if known else [_EndsFit()]

    def on_fit_end(self) -> None:
        """Leave nothing of what made training fast, after an exception too."""
        self.head_loss = self.layer_clip = None
        self.passes = _once
        if self.distillation is not None:
            self.distillation.stop()
        if self.codes is not None:
            self.codes.stop()
            self.codes = None
        for compiled in (self.compiled_teacher, self.compiled):  # the last one first, as it found the process
            if compiled is not None:
                compiled.undo()
        self.compiled_teacher = self.compiled = None

    def on_train_end(self) -> None:
        self.watch.look()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep nothing of a run that diverged.

        Raises:
            InputError: if its last loss or gradient is no number.
        """
        self.watch.look()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the masks of pruned weights in full precision, which a transform had put there."""
        hold_masks_of(self, checkpoint["state_dict"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch, cached = split(batch)
        distilled = self.distillation is not None
        loss = self.passes(self._distilled(batch, cached) if distilled else partial(self._loss, batch))
        self.watch.see(loss, partial(self._explain, loss.detach(), batch, self.global_step))
        self.log("train/loss", loss.detach())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.codes is not None:
            self.codes.renew()

    def on_validation_epoch_start(self) -> None:
        self._nll = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        self._nll += torch.tensor([float(self._loss(batch)) * tokens, tokens], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        nll, tokens = self.all_gather(self._nll.to(self.device, torch.float32)).reshape(-1, 2).sum(0).tolist()
        if not tokens:
            raise InputError("No token of the evaluation text is learned: its chats hold no answer of an assistant.")
        loss = torch.tensor(nll / tokens)
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, prog_bar=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLMModule":
        """Cast and move, but leave computed buffers (rotary frequencies) in their dtype, as transformers does itself.

        Lightning's `bf16-true` casts every buffer; positions would be rounded to 8 bits, unlike in a reloaded model.
        """
        computed = [
            (module, name, module._buffers[name])
            for module in self.modules()
            for name in module._non_persistent_buffers_set
            if module._buffers[name] is not None
        ]
        super()._apply(fn, recurse)
        for module, name, before in computed:
            after = module._buffers[name]
            if after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and stop before a gradient that is no number reaches the weights.

        Raises:
            InputError: if the norm of the gradients is not finite; on a GPU with the next step, until which a fused
                optimizer leaves the weights as they are.
        """
        if self._scales_gradients:  # float16: its scaler skips such steps itself
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        layers = None if self.layer_clip is None else self.layer_clip.norms()
        if layers is None:
            norm = nn.utils.get_total_norm(p.grad for p in self.parameters() if p.grad is not None)
        else:
            norm = torch.linalg.vector_norm(layers)
        self.watch.see(norm, partial(self._explain_gradients, norm, self.global_step))
        skip_unless_finite(optimizer, norm)
        self.log("train/gradient_norm", norm)
        if self.layer_clip is not None and layers is not None:
            self.layer_clip.clip_(layers)
        elif gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            # Not Lightning's: it refuses to clip for a fused optimizer under autocast, bfloat16 included.
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    @property
    def _scales_gradients(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise InputError("How long to train is unknown: set trainer.max_steps.")
        try:
            optimizer = self.optimizer_factory(parameter_groups(self.model, self.quantizer_lr))
            if self.scheduler_factory is None:
                return optimizer
            schedule = self.scheduler_factory(optimizer, num_training_steps=int(steps))
        except (TypeError, ValueError) as error:
            raise InputError(f"The optimizer or its scheduler refused an option: {error}.") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _distilled(self, batch: dict[str, Tensor], cached: Mapping[str, Tensor]) -> Loss:
        """The loss of `batch` against what the teacher makes of it, once for all passes."""
        distillation = self.distillation
        assert distillation is not None
        with _compiled(self.compiled_teacher):
            teacher = distillation.teacher_outputs(batch, cached)

        def loss() -> Tensor:
            with _compiled(self.compiled):
                found, measured = distillation.loss(batch, teacher, self._cross_entropy)
            self.log_dict({f"train/{name}": value for name, value in measured.items()})
            return found

        return loss

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        with _compiled(self.compiled):
            return self._cross_entropy(batch)

    def _cross_entropy(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.head_loss is not None and self.head_loss.pays(batch):
            return self.head_loss(batch)
        output = self.model(**batch, use_cache=False)
        # The mean over no token at all (nothing but a long prompt) is NaN: such a batch teaches nothing instead.
        learned = (batch["labels"][:, 1:] != IGNORED).any()
        return torch.where(learned, output.loss, output.logits[..., :1, :1].float().sum() * 0)

    def _explain(self, loss: Tensor, batch: dict[str, Tensor], step: int) -> str:
        layer = first_non_finite(self.model, batch)
        return (
            f"The loss became {loss.item()} at step {step}. First layer with a non-finite output: "
            f"{layer or 'none, the loss itself overflows'}. {_MEND}"
        )

    def _explain_gradients(self, norm: Tensor, step: int) -> str:
        what = f"The norm of the gradients became {norm.item()} at step {step}."
        if self.watch.late:  # other gradients have taken the place of these
            return f"{what} {_MEND}"
        named = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        largest = {name: float(grad.abs().max().nan_to_num(math.inf)) for name, grad in named}
        worst = max(largest, key=lambda name: largest[name])
        return f"{what} First at fault: {worst}. {_MEND}"


def _once(loss: Loss) -> Tensor:
    return loss()


def _compiled(blocks: CompiledBlocks | None) -> AbstractContextManager[None]:
    """A forward pass of a model, whose blocks are compiled or not."""
    return nullcontext() if blocks is None else blocks.step()


class _EndsFit(pl.Callback):
    """Ends a fit of CausalLMModule that an exception breaks off, of which Lightning tells callbacks only."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        pl_module.on_fit_end()


def parameter_groups(model: nn.Module, quantizer_lr: float | None = None) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not; what quantizers learn has its own rate and does not either."""
    learned = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [p for p in trained if id(p) not in learned and p.ndim >= 2]},
        {"name": "vectors", "params": [p for p in trained if id(p) not in learned and p.ndim < 2], "weight_decay": 0.0},
        {"name": "quantizers", "params": [p for p in trained if id(p) in learned], "weight_decay": 0.0},
    ]
    if quantizer_lr is not None:
        groups[2]["lr"] = quantizer_lr
    return [group for group in groups if group["params"]]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # graphs call no hooks
def first_non_finite(model: nn.Module, batch: dict[str, Tensor]) -> str | None:
    """Name of the first submodule whose output holds a NaN or an infinity when `model` sees `batch`."""
    found: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not found and isinstance(first, Tensor) and not torch.isfinite(first).all():
                found.append(name)

        return hook

    layers = (
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantLayer) or not any(m.children())
    )
    handles = [m.register_forward_hook(check(name)) for name, m in layers if not isinstance(m, Quantizer | NoQuantizer)]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
