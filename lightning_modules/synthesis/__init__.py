"""Text that a model writes for its own training, without any data."""

from lightning_modules.synthesis.writing import Settings, write

__all__ = ["Settings", "write"]
