"""Data modules: text from files, from the hub, or from a model, as windows of tokens."""

from lightning_modules.data.generated import GeneratedDataModule
from lightning_modules.data.module import CausalLMDataModule, HubDataModule, TextDataModule, packaged_text

__all__ = ["CausalLMDataModule", "GeneratedDataModule", "HubDataModule", "TextDataModule", "packaged_text"]
