"""Layers whose forward is not ours: it is called as it is, with other tensors in the place of its weights."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class StandIn(nn.Module):
    """Stands in the place of a module, holds its tensors under their names, and answers as it would.

    The module itself stays behind as `shell`, without tensors of its own: its forward is called with them and with the
    weights that take the place of the quantized ones. It is no submodule, so every tensor has one name.
    """

    shell: nn.Module

    def _take_over(self, module: Any, without: Collection[str] = ()) -> None:
        shell = shell_of(module)
        for name, parameter in module._parameters.items():
            if name not in without:
                self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name in shell._modules:
            self.add_module(name, getattr(module, name))
        self.__dict__["shell"] = shell

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "shell" not in self.__dict__:
                raise
            return getattr(self.__dict__["shell"], name)

    def train(self, mode: bool = True) -> Any:
        self.shell.training = mode
        return super().train(mode)

    def extra_repr(self) -> str:
        return type(self.shell).__name__

    def _run(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Call the module's own forward with `weights` in the place of its Parameters of those names."""
        tensors: dict[str, Any] = {**self._parameters, **self._buffers, **weights}
        return functional_call(self.shell, tensors, args, kwargs, tie_weights=False)

    def _restored(self) -> Any:
        """The module itself, with the tensors that are held here."""
        module = shell_of(self.shell)
        module._parameters.update({name: self._parameters[name] for name in module._parameters})
        module._buffers.update({name: self._buffers[name] for name in module._buffers})
        return module


def shell_of(module: Any) -> Any:
    """A copy of `module`, or of what it stands for, with the same submodules and without tensors of its own."""
    shell = copy.copy(getattr(module, "shell", module))
    shell._parameters = dict.fromkeys(shell._parameters)
    shell._buffers = dict.fromkeys(shell._buffers)
    shell._modules = dict(shell._modules)
    return shell
