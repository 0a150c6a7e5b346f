"""What Triton's compiler makes of the kernels for an H100, which needs no GPU."""

import re

import pytest
import torch

from qat.kernels.quantized_linear.choice import Ring, Skinny
from qat.kernels.quantized_linear.layout import TABLE, Layout

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qat.kernels.quantized_linear import ring, skinny, streamed_product, tiled_product, wide  # noqa: E402

TYPES = {"x": "*i32", "codes": "*i32", "scale": "*i32", "zero": "*i32", "table": "*i32"}
LAYOUTS = [Layout(4096, 4096, 4, center=8, group=64), Layout(4096, 4096, 3, TABLE, group=64)]


def compiled(kernel, constants, types, **options):
    """`kernel` for compute capability 9.0; tensors begin at multiples of 16 bytes."""
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {
        name: types.get(name, "*bf16" if name in ("bias", "values", "y", "w") else "i32") for name in kernel.arg_names
    }
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False} | options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["int4", "table of 8"])
@pytest.mark.parametrize("how", [Skinny(), Ring()], ids=["skinny", "ring"])
def test_threads_hold_four_consecutive_elements(layout, how):
    """The assembly takes a tensor for four registers of each lane, which Triton promises nowhere."""
    constants = streamed_product.constants_of(layout, torch.bfloat16, False, True, False, 1, how)
    kernel = skinny.skinny
    if isinstance(how, Ring):
        kernel, constants = ring.ring, constants | ring.constants_of(layout, False, how)
    text = compiled(kernel, constants, TYPES, num_warps=how.warps, maxnreg=how.registers).asm["ttgir"]
    layouts = dict(re.findall(r"(#\w+) = #ttg.blocked<{(.*?)}>", text))
    found = re.findall(r"elementwise_inline_asm .*?packed_element = 4.*? -> tensor<\d+xf32, (#\w+)>", text)
    assert found
    for name in found:
        assert layouts[name].startswith("sizePerThread = [4], threadsPerWarp = [32]"), text


def test_weights_pass_from_registers_to_the_tensor_core():
    constants = tiled_product._constants(LAYOUTS[0], torch.bfloat16, False, True)
    sizes = {"COLUMNS": 4096, "HAS_BIAS": False, "ROWS": 64, "TOKENS": 64, "SPLITS": 1, "STAGES": 3}
    made = compiled(wide.wide, constants | sizes, TYPES | {"x": "*bf16"}, num_warps=4)
    assert "wgmma" in made.asm["ptx"]
    assert "st.shared" not in made.asm["ptx"].split("wgmma")[0]
