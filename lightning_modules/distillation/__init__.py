"""Distillation: training towards the full-precision model, by its logits, hidden states and attention."""

from lightning_modules.distillation.attention import AttentionRelations
from lightning_modules.distillation.hidden import HiddenStates
from lightning_modules.distillation.objective import Distillation

__all__ = ["AttentionRelations", "Distillation", "HiddenStates"]
