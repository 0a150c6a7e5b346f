"""Full precision, post-training quantization and quantized training, with the same text, order and seeds."""

from lightning_modules.comparison.run import Comparison as Comparison
