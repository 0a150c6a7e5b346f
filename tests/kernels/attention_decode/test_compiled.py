"""What Triton's compiler makes of the kernels for an H100, which needs no GPU."""

import re
from functools import lru_cache

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qat.kernels.attention_decode import kernel  # noqa: E402
from qat.kernels.attention_decode.triton import CHOICES, RECENT, grid_of, tokens_of_block  # noqa: E402

TYPES = {"key_codes": "*i32", "value_codes": "*i32", "key_zero": "*u8", "value_zero": "*u8"}
TYPES |= {"key_scale": "*bf16", "value_scale": "*bf16", "sums": "*fp32", "highest": "*fp32", "mass_of": "*fp32"}
BITS = pytest.mark.parametrize("bits", [2, 4, 8])


@lru_cache
def compiled(keys, values=None, granularity=("per_token", "per_token"), dim=128, mask="none", rows=(4, 1), like="bf16"):
    """`attend` for compute capability 9.0 and heads of Llama-8B, with `keys` and `values` bits."""
    bits, dtype = (keys, values or keys), {"bf16": torch.bfloat16, "fp16": torch.float16}[like]
    grids = [grid_of(f"uint{b}", name, True, dim, dtype) for b, name in zip(bits, granularity, strict=True)]
    choice, (group, queries) = CHOICES[keys], rows
    constants = {"KV_HEADS": 8, "GROUP": group, "QUERIES": queries, "HEADS": max(8, group * queries), "DIM": dim}
    constants |= {"WIDTH": 1 << (dim - 1).bit_length(), "T": tokens_of_block(*grids, choice.tokens), "RECENT": RECENT}
    constants |= {"MASK": mask, "KEYS": tuple(grids[0]), "VALUES": tuple(grids[1])}
    options = {"num_warps": 1, "num_stages": choice.stages, "maxnreg": choice.registers}
    types = TYPES | dict.fromkeys(kernel.CHANGING, "i32") | {"scaling": "fp32", "lowest": "fp32", "q": f"*{like}"}
    types |= {"mask": "*u8" if mask == "bool" else f"*{like}"}
    return made(kernel.attend, constants, types, like, **options)


def made(kernel, constants, types, like="bf16", **options):
    """What the compiler makes of `kernel`; tensors begin at multiples of 16 bytes."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{like}") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"enable_fp_fusion": False} | options
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
    assert all(re.search(r"tensor<((32|64)x8|32|64|8)x", line) for line in moved), moved  # scores, weights, scales
    assert not [
        line
        for line in lines
        if "local_load" in line and re.search(r"-> tensor<\d+x\d+xbf16", line) and "x8xbf16" not in line
    ]


@BITS
def test_products_are_those_of_the_tensor_core(bits):
    pairs, totals = 16 // bits, 4 if bits == 8 else 8
    assert loop(compiled(bits)["ttgir"]).count("tt.dot ") == pairs + totals + 1  # one for the zero points
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in compiled(bits)["ptx"]


@pytest.mark.parametrize(
    "form",
    [
        {"keys": 2, "granularity": ("per_block_32x1", "per_group_32")},
        {"keys": 4, "values": 2, "granularity": ("per_channel_-1", "per_tensor"), "like": "fp16"},
        {"keys": 4, "values": 8, "granularity": ("per_block_48x1", "per_block_4x1"), "dim": 96},
        {"keys": 4, "dim": 80, "mask": "bool"},
        {"keys": 8, "dim": 64, "mask": "add", "like": "fp16"},
        {"keys": 2, "dim": 64, "mask": "causal", "rows": (4, 8)},
        {"keys": 4, "rows": (32, 1)},
    ],
    ids=str,
)
def test_every_form_is_compiled(form):
    assert "mma.sync" in compiled(**form)["ptx"]


def test_the_sum_of_the_parts_is_compiled():
    constants = {"EACH": 4, "DIM": 128, "WIDTH": 128, "PARTS": 32}
    assert "ld.global" in made(kernel.add_parts, constants, TYPES | {"stretches": "i32"}, num_warps=8)["ptx"]
