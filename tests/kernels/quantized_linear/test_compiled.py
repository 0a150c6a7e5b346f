"""What Triton's compiler makes of the kernels for an H100, which needs no GPU."""

import re

import pytest
import torch

from qat.kernels.quantized_linear.choice import SHARED_BYTES, shared_bytes
from qat.kernels.quantized_linear.launches import Ring, Skinny, Wide
from qat.kernels.quantized_linear.layout import TABLE, Layout
from qat.kernels.quantized_linear.weight import tiled
from tests.kernels.quantized_linear.weights import KINDS, ids, quantized

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


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_all_that_a_tile_is_decoded_from_lies_as_its_words(kind):
    """One operand that is loaded otherwise would take all to its layout, where the assembly reads others' words."""
    weight = tiled(quantized(kind, (64, 256)))
    one_table = weight.table is None or len(weight.table) == 1
    layout, how = weight.layout._replace(rows=4096, columns=4096), Wide(128, 32)
    constants = tiled_product.constants_of(layout, torch.bfloat16, False, one_table)
    types = TYPES | {"x": "*bf16", "scale": "*i32" if layout.group else "*fp32"}
    assert_own_words(compiled(wide.dequantize, constants | {"ROWS": 64, "COLUMNS": 4096}, types))
    assert_own_words(compiled_wide(layout, how, one_table))


@pytest.mark.parametrize("layout", [LAYOUTS[0], Layout(4096, 4096, 4, TABLE, group=64)], ids=["int4", "table of 16"])
@pytest.mark.parametrize("how", [Wide(64, 64, depth=4), Wide(128, 256, warps=8), Wide(256, 128, warps=8)], ids=str)
def test_weights_pass_from_registers_to_the_tensor_core(layout, how):
    made = compiled_wide(layout, how, False)
    assert_own_words(made)
    before, after = made.asm["ptx"].split("wgmma.mma_async", 1)
    assert "st.shared" not in before
    assert "st.shared" not in after.rsplit("wgmma.mma_async", 1)[0]


# Four neighbours in a thread and the threads of a warp in their order, as Triton writes it in either kind of layout.
OWN_WORDS = (
    "blocked<{sizePerThread = [1, 4], threadsPerWarp = [1, 32]",
    "linear<{register = [[0, 1], [0, 2]], lane = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]",
)


def assert_own_words(made):
    text = made.asm["ttgir"]
    layouts = dict(re.findall(r"(#\w+) = #ttg.(.*)", text))
    found = re.findall(r"elementwise_inline_asm .*?packed_element = 4.*? -> tensor<\d+x128xi32, (#\w+)>", text)
    assert found
    for name in found:
        assert layouts[name].startswith(OWN_WORDS), layouts[name]


@pytest.mark.parametrize(
    "how", [Wide(), Wide(64, 64, depth=4), Wide(128, 256, warps=8), Wide(256, 128, warps=8)], ids=str
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shared_memory_is_what_the_rule_thinks(how, bits):
    layout = Layout(4096, 4096, bits, center=0, group=64)
    if shared_bytes(layout, how) <= SHARED_BYTES:
        assert compiled_wide(layout, how).metadata.shared <= shared_bytes(layout, how)


def compiled_wide(layout, how, one_table=True):
    constants = tiled_product.constants_of(layout, torch.bfloat16, False, one_table, how.depth)
    constants |= tiled_product.sizes_of(how) | {"HAS_BIAS": False}
    types = TYPES | {"x": "*bf16", "scale": "*i32" if layout.group else "*fp32"}
    return compiled(wide.wide, constants, types, num_warps=how.warps)
