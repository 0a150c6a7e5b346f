"""The blocks of a model, compiled while it trains: one graph for all blocks that are alike."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from qat.errors import InputError, nearest
from qat.kernels.linear import fused_by_a_compiler
from qat.transforms.blocks import block_list
from qat.transforms.layers import plain_layers, quant_layers

_MORE_BACKENDS = ("aot_eager", "eager")  # they trace and compile nothing: to find out what does not trace
_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_ROOM = 8  # graphs of one block: training, evaluation, each with another batch size


class CompiledBlocks:
    """Compiles every block of `model` in place, each as one graph without breaks.

    Blocks are compiled and not the whole model, because blocks that are alike share their graph: 30 of them take the
    compile time of one. State dicts keep their names. A step in which somebody looks at a module of a block by a hook
    runs without the graphs, which know of none.

    Args:
        model: has a list of blocks; prepared already.
        backend: of torch.compile, `inductor` or another that is installed.
        cuda_graphs: record the graphs of blocks as CUDA graphs, and so launch each by one call; inductor only. Their
            outputs, gradients too, are good until the next step.

    Raises:
        InputError: if the model has no blocks, or as `check_compile`.
    """

    def __init__(self, model: nn.Module, backend: str, cuda_graphs: bool = False) -> None:
        check_compile(backend, cuda_graphs)
        layers = [*plain_layers(model), *(name for name, _ in quant_layers(model))]
        _, self.blocks = block_list(model, layers)
        self.backend, self.cuda_graphs, self._model = backend, cuda_graphs, type(model).__name__
        self._modules = [module for block in self.blocks for module in block.modules()]
        options = _options(backend, cuda_graphs)
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True, options=options)
        # Blocks share one cache of graphs; where a plan gives each other bits, none shares its graph.
        config, room = torch._dynamo.config, _ROOM * len(self.blocks)
        self._limits = {name: getattr(config, name) for name in _LIMITS}
        for name, limit in self._limits.items():
            setattr(config, name, max(limit, room))

    def undo(self) -> None:
        """Let the blocks run as they did before, and give back what CUDA graphs hold: memory, and gradients in it.

        The limits of torch's compiler, which are those of the whole process, are again what they were.
        """
        for name, limit in self._limits.items():
            setattr(torch._dynamo.config, name, limit)
        for block in self.blocks:
            block._compiled_call_impl = None
        if self.cuda_graphs:
            for parameter in (p for block in self.blocks for p in block.parameters()):
                parameter.grad = None
            torch._dynamo.reset()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A forward pass of the model.

        Raises:
            InputError: if a block cannot be one graph, or the backend fails.
        """
        eagerly = self._is_watched()
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with ExitStack() as stack:
                if eagerly:
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                elif self.backend == "inductor":
                    stack.enter_context(fused_by_a_compiler())
                yield
        except TorchDynamoException as error:
            raise InputError(
                f"module.compile={self.backend} cannot compile the blocks of {self._model}: "
                f"{str(error).strip().splitlines()[0]} Leave it out; QAT_TRACEBACK=1 shows where."
            ) from error

    def _is_watched(self) -> bool:
        hooks = (h for m in self._modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
        # Those of FSDP2 gather the weights before a graph runs.
        return any(not hook.__module__.startswith("torch.distributed") for hook in hooks)


def check_compile(backend: str | None, cuda_graphs: bool) -> None:
    """Whether there is such a backend of torch.compile, and it records CUDA graphs where they are asked for.

    Raises:
        InputError: if not.
    """
    if backend is not None:
        known = [*torch._dynamo.list_backends(), *_MORE_BACKENDS]
        if backend not in known:
            raise InputError(f"module.compile is '{backend}'.{nearest(str(backend), known)}")
    if cuda_graphs and backend != "inductor":
        raise InputError(
            "module.cuda_graphs=true records what inductor compiles: set module.compile=inductor, or leave it out."
        )


def check_cuda_graphs(trainer: Any, device: str, checkpointing: bool) -> None:
    """Whether blocks that train so can be recorded.

    Raises:
        InputError: if not.
    """
    option, mend = "module.cuda_graphs=true", "or leave it out."
    accumulates = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
    if device != "cuda":
        raise InputError(f"{option} is for GPUs, and this run is on {device}: set trainer.accelerator=gpu, {mend}")
    if trainer.accumulate_grad_batches != 1 or accumulates:
        raise InputError(
            f"{option} keeps gradients until the next batch: set trainer.accumulate_grad_batches=1 with a larger "
            f"data.batch_size, {mend}"
        )
    if trainer.world_size > 1:
        raise InputError(f"{option} is for one device: set trainer.devices=1, {mend}")
    if checkpointing:
        raise InputError(f"{option} runs each block once a pass: set module.gradient_checkpointing=false, {mend}")


def _options(backend: str, cuda_graphs: bool) -> dict[str, Any] | None:
    """Inductor keeps in float32 what is rounded to bfloat16 and back, and on a GPU divides by less than full precision.

    Scales and codes would then train on another grid than the one that ships.
    """
    if backend != "inductor":
        return None
    # The option has moved between versions of torch.
    division = [name for name in torch._inductor.list_options() if name.endswith("division_rounding")]
    graphs = ["triton.cudagraphs"] if cuda_graphs else []
    return dict.fromkeys(["emulate_precision_casts", *division, *graphs], True)
