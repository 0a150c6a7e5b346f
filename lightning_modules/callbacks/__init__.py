"""Callbacks: what a run watches and how it reports."""

from lightning_modules.callbacks.average import WeightEMA
from lightning_modules.callbacks.codebooks import CodebookRefresh, SoftKMeans
from lightning_modules.callbacks.monitor import QuantizerMonitor
from lightning_modules.callbacks.nested import NestedBits
from lightning_modules.callbacks.oscillation import OscillationDampening, OscillationFreezing
from lightning_modules.callbacks.precision import PrecisionSchedule
from lightning_modules.callbacks.profile import Profile
from lightning_modules.callbacks.progress import ProgressBar
from lightning_modules.callbacks.prune import PruneSchedule
from lightning_modules.callbacks.seed import StepSeed
from lightning_modules.callbacks.smooth_start import SmoothStart
from lightning_modules.callbacks.stop import GracefulStop, Stopped
from lightning_modules.checkpoint import LastCheckpoint

__all__ = [
    "CodebookRefresh",
    "GracefulStop",
    "LastCheckpoint",
    "NestedBits",
    "OscillationDampening",
    "OscillationFreezing",
    "PrecisionSchedule",
    "Profile",
    "ProgressBar",
    "PruneSchedule",
    "QuantizerMonitor",
    "SmoothStart",
    "SoftKMeans",
    "StepSeed",
    "Stopped",
    "WeightEMA",
]
