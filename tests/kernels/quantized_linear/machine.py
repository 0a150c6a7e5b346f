"""Inline assembly under Triton's interpreter: the machine of `ptx.py` with 32 lanes for each warp.

A tensor of 128 elements a warp is four registers of each lane, four consecutive elements a lane: what Triton's compiler
makes of it too (`test_compiled.test_threads_hold_four_consecutive_elements`).
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from tests.kernels.quantized_linear import lanes, ptx
from tests.kernels.quantized_linear.ptx_floats import FROM_BITS

FLOAT = {tl.float32: np.float32, tl.int32: np.uint32}


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, **_):
    """As `tl.inline_asm_elementwise`, for tensors of 128 elements a warp."""
    assert pack == 4
    asm, constraints, dtype = (getattr(own, "value", own) for own in (asm, constraints, dtype))
    names = [f"${i}" for i in range(len(constraints.split(",")))]
    outs, ins = names[: 4 * len(dtype)], names[4 * len(dtype) :]
    registers = dict.fromkeys(outs)
    for i, tensor in enumerate(args):
        data = tensor.handle.data.reshape(-1, 32, 4)  # warp, lane, register
        for register in range(4):
            own = data[..., register]
            registers[ins[4 * i + register]] = (
                own if own.dtype == np.float32 else own.astype(np.int64).astype(np.uint32)
            )
    found = run(asm, registers)
    results = []
    for i, kind in enumerate(dtype):
        data = np.stack([found[name] for name in outs[4 * i : 4 * i + 4]], axis=-1).reshape(-1)
        data = data.reshape(args[0].handle.data.shape)
        results.append(tl.tensor(TensorHandle(data, kind.scalar), args[0].type))
    return tl.tuple(results)


def run(text, registers):
    return ptx.run(text.split("\n"), registers, {"mma": mma})


def mma(operation, d, a, b, c, read):
    """D = A B + C of m16n8k16, by the fragments of the ISA; float32 sums in the order of k."""
    kind = "bf16" if ".bf16." in operation else "f16"
    left, right = (np.stack([halves(read(name), kind) for name in names], axis=-2) for names in (a, b))
    shape = left.shape[:-3]  # of warps
    matrix_a, matrix_b = np.full((*shape, 16, 16), np.nan), np.full((*shape, 16, 8), np.nan)
    for lane in range(32):
        for register, places in enumerate(lanes.fragment_a(lane)):
            for half, (row, k) in enumerate(places):
                matrix_a[..., row, k] = left[..., lane, register, half]
        for register, places in enumerate(lanes.fragment_b(lane)):
            for half, (k, column) in enumerate(places):
                matrix_b[..., k, column] = right[..., lane, register, half]
    product = matrix_a @ matrix_b
    out = [np.broadcast_to(np.asarray(read(name), np.float32), (*shape, 32)).copy() for name in c]
    for lane in range(32):
        for register, (row, column) in enumerate(lanes.fragment_c(lane)):
            out[register][..., lane] += product[..., row, column].astype(np.float32)
    return dict(zip(d, out, strict=True))


def halves(register, kind):
    return np.stack(
        [FROM_BITS[kind](np.asarray(register) >> np.uint32(at) & np.uint32(0xFFFF)) for at in (0, 16)], axis=-1
    )
