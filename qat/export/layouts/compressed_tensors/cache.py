"""Keys and values in 8 bits with a static scale each: `kv_cache_scheme`.

    k_scale, v_scale  [1]   of an attention layer

Both sides quantize keys after their rotation, and every token from its first use on. The scheme is one for all layers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.export.layouts.base import CacheLayout, Config, Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments
from qat.export.layouts.compressed_tensors.floats import E4M3
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.scales import DTYPES, dtype_misfits, restored
from qat.nn import StoredActivation
from qat.nn.kv_quantizer import KVQuantizer
from qat.nn.packed import dtype_name
from qat.numerics.formats import Format, IntFormat
from qat.numerics.granularity import PerTensor
from qat.quantizers import Quantizer

_SCHEME = "kv_cache_scheme"
_INT8 = IntFormat(8)
_FORMATS: dict[tuple[str, int], Format] = {("float", 8): E4M3, ("int", 8): _INT8}
_LEAVES = ("k_scale", "v_scale")
_NEAREST = "kv@scheme.kv=token quantizer@scheme.kv.key=fp8_static quantizer@scheme.kv.value=fp8_static"


class StaticCache(CacheLayout):
    """fp8_e4m3 or int8, symmetric."""

    def misfits(self, kv: KVQuantizer, dtype: torch.dtype) -> Iterator[Misfit]:
        roles = {"key": kv.key_quantizer, "value": kv.value_quantizer}
        grids = {role: x for role, x in roles.items() if isinstance(x, Quantizer | StoredActivation)}
        formats = {x.format for x in grids.values()}
        if len(grids) < len(roles) or formats not in ({E4M3}, {_INT8}):
            yield Misfit("other keys or values than fp8_e4m3, or int8, for both", _NEAREST)
        if any(x.rule is not None or x.granularity != PerTensor() for x in grids.values()):
            yield Misfit("scales that are not static and per_tensor", _NEAREST)
        if kv.window:
            yield Misfit(f"{kv.window} tokens in full precision", "scheme.kv.window=0")
        for role, x in grids.items():
            yield from dtype_misfits(x.scale_dtype, dtype, f"kv.{role}")

    def config(self, layers: Mapping[str, KVQuantizer]) -> Config:
        schemes = [_scheme(_stored(kv.key_quantizer)).written() for kv in layers.values()]
        if any(scheme != schemes[0] for scheme in schemes):
            raise InputError("compressed-tensors has one format for keys and values of all layers: take the same.")
        return {_SCHEME: schemes[0]}

    def tensors(self, kv: KVQuantizer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for leaf, role in zip(_LEAVES, (kv.key_quantizer, kv.value_quantizer), strict=True):
            scale = _stored(role).qparams(torch.empty(0)).scale
            assert isinstance(scale, Tensor)
            yield leaf, scale.reshape(1).to(dtype)

    def is_said(self, config: Config) -> bool:
        return bool(config.get(_SCHEME))

    def is_quantized(self, names: set[str]) -> bool:
        return not names.isdisjoint(_LEAVES)

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> KVQuantizer:
        scheme = config[_SCHEME]
        said = Arguments.read(scheme, name)
        format = _FORMATS.get((said.type, said.num_bits))
        if format is None or said.dynamic or not said.symmetric or said.strategy != "tensor":
            raise InputError(f"The keys and values of {name} are quantized in a way that is not read here: {scheme}.")
        leaves = Leaves({leaf: x for leaf, x in tensors.items() if leaf.startswith(("k_", "v_", "q_"))}, name)
        key, value = (_restored(leaves.take(leaf, *DTYPES, shape=(1,)), format, name, dtype) for leaf in _LEAVES)
        leaves.finish()
        return KVQuantizer(key, value)


def _scheme(role: Quantizer | StoredActivation) -> Arguments:
    return Arguments("float" if role.format == E4M3 else "int", role.format.bits, "tensor")


def _stored(role: nn.Module) -> StoredActivation:
    assert isinstance(role, StoredActivation)
    return role


def _restored(stored: Tensor, format: Format, name: str, dtype: torch.dtype) -> StoredActivation:
    scale = restored(stored, dtype, name).reshape(1, 1)
    description: dict[str, Any] = {"format": format.name, "granularity": str(PerTensor()), "rule": None}
    own = dtype_name(scale.dtype)
    role = StoredActivation(description | {"scale_dtype": own, "scale": {"shape": [1, 1], "dtype": own}})
    role.load_state_dict({"scale": scale})
    return role
