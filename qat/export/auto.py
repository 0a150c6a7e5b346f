"""Opens the native artifact by `AutoModelForCausalLM.from_pretrained`: `import qat.export.auto` is enough.

transformers asks the class that is registered for the `quant_method` of `config.json` to put packed layers in the place
of plain ones; it fills them itself.
"""

import re
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.export.artifact import CONFIG, METHOD, pack_layers, read_config
from qat.nn import PackedTensor
from qat.transforms.kv import restore_kv


@register_quantization_config(METHOD)
class ArtifactConfig(QuantizationConfigMixin):
    """Says no more than that the folder is an artifact; what its layers are stands in `quant_config.json`."""

    def __init__(self, quant_method: Any = METHOD, **others: Any) -> None:
        self.quant_method = quant_method


@register_quantizer(METHOD)
class ArtifactQuantizer(HfQuantizer):
    """Builds the packed layers of an artifact."""

    requires_calibration = True  # it quantizes nothing itself: `qat.prepare` and `qat.convert` do

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> None:
        found: Any = cached_file(model.config._name_or_path, CONFIG)
        self._stored = read_config(found)
        pack_layers(model, self._stored)
        packed = {name for name, module in model.named_modules() if isinstance(module, PackedTensor)}
        # What transformers would tie are Parameters; packed tensors are tied below.
        model.all_tied_weights_keys = {
            name: source for name, source in model.all_tied_weights_keys.items() if not {name, source} & packed
        }
        model._keys_to_ignore_on_load_missing = [
            *(model._keys_to_ignore_on_load_missing or []),
            *(re.escape(name) for name in self._stored["tied"]),
        ]

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> nn.Module:
        owners = dict(model.named_modules(remove_duplicate=False))
        for name, source in self._stored["tied"].items():
            (path, _, leaf), (first, _, kept) = name.rpartition("."), source.rpartition(".")
            setattr(owners[path], leaf, getattr(owners[first], kept))
        if self._stored.get("attention") is not None:
            model.set_attn_implementation(self._stored["attention"])
        restore_kv(model, self._stored.get("kv"))
        return model.eval()

    def is_serializable(self) -> bool:
        """By `qat.save`, which knows how layers are stored."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Packed weights do not train; adapters beside them do."""
        return False
