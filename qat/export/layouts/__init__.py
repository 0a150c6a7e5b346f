"""How engines store quantized linear layers: one module for each layout."""

from qat.export.layouts.base import Layout as Layout
from qat.export.layouts.gptq import Gptq as Gptq

# By the quant_method that the config.json of a checkpoint names.
LAYOUTS: dict[str, type[Layout]] = {layout.method: layout for layout in (Gptq,)}
