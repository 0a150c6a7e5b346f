"""A machine for the few instructions of PTX that decode, on numpy arrays: one lane each element."""

import re

import numpy as np

from tests.kernels.quantized_linear.ptx_floats import FROM_BITS, ROUND, TO_BITS

WIDTHS = {"bf16x2": "bf16", "f16x2": "f16"}


def run(lines, registers, matrices=None):
    """Execute `lines` on `registers`, name to uint32 or float32 array, and return all registers.

    `matrices`: what computes instructions of tensor cores, whose operands are vectors, by the first word of their name.
    """
    scopes = [dict(registers)]
    for line in "\n".join(lines).split("\n"):
        for statement in filter(None, (part.strip() for part in line.split(";"))):
            execute(statement, scopes, matrices)
    assert len(scopes) == 1
    return scopes[0]


def execute(statement, scopes, matrices):
    if statement == "{":
        scopes.append({})
    elif statement == "}":
        scopes.pop()
    elif statement.startswith(".reg"):
        _, kind, names = statement.split(maxsplit=2)
        assert kind in (".b16", ".b32", ".f32")
        for name in names.split(","):
            assert name.strip() not in scopes[-1], f"{name} is declared twice"
            scopes[-1][name.strip()] = None
    elif statement.startswith("mov.b32 {"):
        low, high, source = re.fullmatch(r"mov.b32 {(\w+), (\w+)}, (\S+)", statement).groups()
        for name, at in ((low, 0), (high, 16)):
            write(name, as_bits(value(source, scopes)) >> np.uint32(at) & np.uint32(0xFFFF), scopes)
    elif "{" in statement:
        operation = statement.split(maxsplit=1)[0]
        vectors = [[name.strip() for name in vector.split(",")] for vector in re.findall(r"{(.*?)}", statement)]
        found = matrices[operation.split(".")[0]](operation, *vectors, lambda name: value(name, scopes))
        for out, result in found.items():
            write(out, result, scopes)
    else:
        operation, operands = statement.split(maxsplit=1)
        out, *arguments = (operand.strip() for operand in operands.split(","))
        write(out, OPERATIONS[operation](*(value(argument, scopes) for argument in arguments)), scopes)


def write(out, result, scopes):
    scope = next(scope for scope in reversed(scopes) if out in scope)
    result = np.asarray(result)
    assert result.dtype in (np.uint32, np.float32)
    scope[out] = result


def value(operand, scopes):
    if re.fullmatch(r"0x[0-9A-Fa-f]+|\d+", operand):
        return np.uint32(int(operand, 0))
    if operand.startswith("0f"):
        return np.uint32(int(operand[2:], 16)).view(np.float32)
    found = next(scope[operand] for scope in reversed(scopes) if operand in scope)
    assert found is not None, f"{operand} is read before it is written"
    return found


def as_bits(a):
    return np.asarray(a).view(np.uint32) if np.asarray(a).dtype == np.float32 else a


def as_float(a):
    return np.asarray(a).view(np.float32) if np.asarray(a).dtype == np.uint32 else a


def prmt(a, b, selector):
    """Without the sign mode, which no selector here may ask for."""
    bytes = [np.asarray(source >> np.uint32(8 * i)) & np.uint32(255) for source in (a, b) for i in range(4)]
    shape = np.broadcast_shapes(*(np.shape(x) for x in (a, b, selector)))
    bytes = np.stack([np.broadcast_to(byte, shape) for byte in bytes])
    out = np.zeros(shape, np.uint32)
    for i in range(4):
        nibble = np.broadcast_to(selector >> np.uint32(4 * i), shape) & np.uint32(15)
        assert (nibble < 8).all()
        out |= np.take_along_axis(bytes, nibble[None].astype(np.int64), 0)[0] << np.uint32(8 * i)
    return out


def lop3(a, b, c, table):
    out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for entry in range(8):
        if int(table) >> entry & 1:
            out |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return out


def fma(kind):
    """Of both halves: exact in float64, which holds products and sums of what is multiplied here, then rounded once."""

    def compute(a, b, c):
        out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
        for at in (0, 16):
            x, y, z = (FROM_BITS[kind](np.asarray(v >> np.uint32(at)) & np.uint32(0xFFFF)) for v in (a, b, c))
            out |= TO_BITS[kind](x * y + z) << np.uint32(at)
        return out

    return compute


def multiply(a, b):
    """Two bfloat16 by two; float64 holds the products."""
    halves = []
    for at in (0, 16):
        x, y = (FROM_BITS["bf16"](np.asarray(v >> np.uint32(at)) & np.uint32(0xFFFF)) for v in (a, b))
        halves.append(ROUND["bf16"](x * y) << np.uint32(at))
    return halves[0] | halves[1]


def pair(kind):
    """Two float32, the upper half first, rounded."""
    return lambda high, low: ROUND[kind](as_float(low)) | ROUND[kind](as_float(high)) << np.uint32(16)


OPERATIONS = {
    "mov.b32": as_bits,
    "mov.f32": as_float,
    "fma.rn.f32": lambda a, b, c: (
        as_float(a).astype(np.float64) * as_float(b).astype(np.float64) + as_float(c).astype(np.float64)
    ).astype(np.float32),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "mul.rn.f32": lambda a, b: as_float(a) * as_float(b),
    "mul.rn.bf16x2": multiply,
    "cvt.f32.f16": lambda a: FROM_BITS["f16"](a).astype(np.float32),
    "cvt.rn.bf16x2.f32": pair("bf16"),
    "cvt.rn.f16x2.f32": pair("f16"),
    "fma.rn.bf16x2": fma("bf16"),
    "fma.rn.f16x2": fma("f16"),
}
