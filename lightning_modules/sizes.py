"""How large models are, in memory and on disk."""

from pathlib import Path

from torch import nn

MIB = 2**20


def parameter_bytes(model: nn.Module) -> int:
    """What the parameters take in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def full_bits(model: nn.Module) -> float:
    """Bits of a weight in full precision."""
    return 8.0 * next(model.parameters()).element_size()


def folder_bytes(folder: str | Path) -> int:
    """What the files of a folder take on disk."""
    return sum(file.stat().st_size for file in Path(folder).iterdir())


def tensor_bytes(model: nn.Module) -> int:
    """What parameters and stored buffers take in memory; shared ones count once."""
    found = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(found.values())
