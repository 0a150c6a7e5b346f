"""Data modules: text from files or from the hub, as windows of tokens."""

from lightning_modules.data.module import CausalLMDataModule, HubDataModule, TextDataModule, packaged_text

__all__ = ["CausalLMDataModule", "HubDataModule", "TextDataModule", "packaged_text"]
