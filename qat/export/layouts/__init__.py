"""How engines store quantized linear layers: one module for each layout."""

from qat.export.layouts.awq import Awq as Awq
from qat.export.layouts.base import Layout as Layout
from qat.export.layouts.bitsandbytes import BitsAndBytes as BitsAndBytes
from qat.export.layouts.compressed_tensors import CompressedTensors as CompressedTensors
from qat.export.layouts.gptq import Gptq as Gptq
from qat.export.layouts.llm_int8 import LlmInt8 as LlmInt8
from qat.export.layouts.modelopt import ModelOpt as ModelOpt

# All of them, by which a checkpoint is recognised.
LAYOUTS: tuple[type[Layout], ...] = (Gptq, Awq, CompressedTensors, BitsAndBytes, LlmInt8, ModelOpt)
