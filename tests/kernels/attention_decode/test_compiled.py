"""What Triton's compiler makes of the kernels for an H100, which needs no GPU."""

import re
from functools import lru_cache

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qat.kernels.attention_decode import kernel  # noqa: E402
from qat.kernels.attention_decode.triton import CHOICES, RECENT, grid_of  # noqa: E402

TYPES = {"key_codes": "*i32", "value_codes": "*i32", "key_zero": "*u8", "value_zero": "*u8", "mask": "*u8"}
TYPES |= {"sums": "*fp32", "highest": "*fp32", "mass_of": "*fp32", "scaling": "fp32", "lowest": "fp32"}
BITS = pytest.mark.parametrize("bits", [2, 4, 8])


@lru_cache
def compiled(bits, granularity="per_token", dim=128, tokens=64):
    """`attend` for compute capability 9.0: the heads of Llama-8B, bfloat16; tensors begin at multiples of 16 bytes."""
    grid = tuple(grid_of(f"uint{bits}", granularity, True, dim, torch.bfloat16))
    sizes = {"KV_HEADS": 8, "GROUP": 4, "QUERIES": 1, "HEADS": 8, "DIM": dim, "WIDTH": dim, "T": tokens}
    constants = sizes | {"RECENT": RECENT, "MASK": "none", "KEYS": grid, "VALUES": grid}
    names = kernel.attend.arg_names
    numbers = dict.fromkeys(kernel.CHANGING, "i32")
    types = {name: TYPES.get(name) or numbers.get(name, "*bf16") for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel.attend, signature, constexprs=constants, attrs=aligned)
    choice = CHOICES[bits]
    options = {"num_warps": 1, "enable_fp_fusion": False, "num_stages": choice.stages, "maxnreg": choice.registers}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def loop(text):
    """The lines of the loop over blocks of codes: the first one in `text`."""
    begin = text.index("scf.for")
    indent = text[text.rindex("\n", 0, begin) + 1 : begin]
    return text[begin : text.index(f"\n{' ' * (len(indent) - len(indent.lstrip()))}}}", begin)]


@BITS
def test_codes_are_copied_ahead_by_16_bytes_a_lane(bits):
    copies = [line for line in loop(compiled(bits)["ttgir"]).splitlines() if "async_copy_global_to_local" in line]
    wide = [line for line in copies if "contiguity = 4 : i32" in line]
    assert len(wide) == 2  # keys and values
    assert "tt.load" not in loop(compiled(bits)["ttgir"])  # scales and zero points are copied ahead too
    assert "cp.async.cg.shared.global [" in compiled(bits)["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", compiled(bits)["ptx"])


@BITS
def test_what_was_decoded_stays_in_its_registers(bits):
    """Between decoding and the tensor core stands no layout conversion: only words go through shared memory."""
    lines = loop(compiled(bits)["ttgir"]).splitlines()
    moved = [line for line in lines if "convert_layout" in line or "local_alloc" in line]
    assert all(re.search(r"tensor<(64x8|64|8)x", line) for line in moved), moved  # scores, weights, scales
    assert not [
        line
        for line in lines
        if "local_load" in line and re.search(r"-> tensor<\d+x\d+xbf16", line) and "x8xbf16" not in line
    ]


@BITS
def test_a_warp_waits_for_no_other(bits):
    assert 'ttg.num-warps" = 1' in compiled(bits)["ttgir"]


@BITS
def test_products_are_those_of_the_tensor_core(bits):
    pairs, totals = 16 // bits, 8 if bits != 8 else 4
    assert compiled(bits)["ttgir"].count("tt.dot ") >= pairs + totals
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in compiled(bits)["ptx"]
