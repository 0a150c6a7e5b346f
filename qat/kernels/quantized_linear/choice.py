"""Which kernel multiplies how many tokens by a weight, and how it is launched.

What `qat-tune` found on this machine's GPU comes first, then what was measured on an H200, for GPUs of that kind; what
is not among them follows a rule. Nothing is tried at run time: the first call costs a compilation and no more. From 17
tokens on the rule estimates the time of each launch.
"""

from functools import lru_cache

from qat.kernels.quantized_linear.launches import Choice, Dequantize, Key, Launches, Ring, Skinny, Wide, key_of
from qat.kernels.quantized_linear.layout import INTEGERS, Layout
from qat.kernels.quantized_linear.step import words_of_scales, words_of_zeros
from qat.kernels.quantized_linear.tiles import CHUNK
from qat.kernels.quantized_linear.tuned import tuned_on
from qat.kernels.quantized_linear.weight import TiledWeight

# Multiprocessors of an H100 or H200; a grid of fewer programs leaves some without work.
_PROCESSORS = 132


# From `python -m benchmarks.kernels --tune`.
MEASURED_ON = "NVIDIA H200"
MEASURED: dict[Key, Launches] = {
    Key(8192, 8192, 4, INTEGERS, 64): ((1, Ring(4, 4, 255)), (16, Skinny(8, 2, 255, True))),
}

# What a program may have of a multiprocessor's shared memory. A ring is declared in assembly, which ends at 48 KiB with
# what Triton needs to add the warps' sums.
SHARED_BYTES, RING_BYTES = 227 * 1024, 44 * 1024
CHUNK_BYTES = 4 * CHUNK
# Clocks a microsecond, what tensor cores keep up of 4096 operations a clock, and gigabytes a second of memory, of the
# second-level cache, and of a kernel that copies.
_CLOCKS, _TENSOR_SHARE, _MEMORY, _CACHE, _COPY = 1700, 0.8, 4300, 5500, 3900
# Microseconds of one more kernel in a graph, and of filling and emptying a program's pipeline.
_LAUNCH_US, _FILL_US = 1.5, 1.5

# Tiles of `Wide` that compile without spilling registers. Tall ones read x less often, broad ones decode less often;
# where four warps hold 128 rows, or eight 256, what is not decoding costs half as much a weight.
SHAPES = (
    *(Wide(rows, tokens, stages=6) for tokens in (16, 32) for rows in (64, 128)),
    *(Wide(rows, 64, stages=4) for rows in (64, 128)),
    *(Wide(256, 64, stages=4, warps=8), Wide(64, 128)),
    *(Wide(rows, tokens, warps=8) for rows, tokens in ((128, 128), (128, 256), (256, 128))),
)


def choice(weight: TiledWeight, tokens: int, gpu: str = MEASURED_ON) -> Choice:
    """How to multiply `tokens` by `weight` on a GPU of that name."""
    for table in (tuned_on(gpu), MEASURED if gpu == MEASURED_ON else {}):
        for tried, how in table.get(key_of(weight), ()):
            # Far fewer tokens want another kernel.
            if tried / 4 < tokens <= tried:
                return how
    return rule(weight.layout, tokens)


@lru_cache(4096)
def rule(layout: Layout, tokens: int) -> Choice:
    """Up to 16 tokens a kernel that streams the weight; then the launch that the estimate says is fastest."""
    steps = -(-layout.columns // 256)
    if tokens <= 16:
        return _streams(layout, tokens, steps)
    launches = [
        how._replace(splits=splits)
        for how in SHAPES
        for splits in (1, 2, 4)
        if steps >= 2 * splits - 1 and shared_bytes(layout, how) <= SHARED_BYTES
    ]
    fastest = min(launches, key=lambda how: wide_us(layout, tokens, how))
    return fastest if wide_us(layout, tokens, fastest) <= dequantize_us(layout, tokens) else Dequantize()


def _streams(layout: Layout, tokens: int, steps: int) -> Skinny | Ring:
    """A ring where there is much to stream; a small weight is over before it is full."""
    warps_k = 4 if steps >= 4 else 2 if steps >= 2 else 1
    large = layout.rows * steps >= 4 * _PROCESSORS * 16 * 16
    if large and _fits_ring(layout):
        return Ring(4, warps_k, 128 if tokens <= 8 else 168)
    return Skinny(4, warps_k, 168 if tokens <= 8 else 255, False)


def _fits_ring(layout: Layout) -> bool:
    """Whether four warps' two slots fit with float32 scales and zero points."""
    return ring_bytes(layout._replace(kind=INTEGERS, center=None), True, Ring(4, 4, stages=2)) <= RING_BYTES


def slot_bytes(layout: Layout, wide_scales: bool) -> int:
    """Bytes of a warp's slot of `ring.py`: chunks of codes, then of scales and zero points, 16 bytes a lane each."""
    words = words_of_scales(layout, wide_scales), words_of_zeros(layout) if layout.group else 0
    return CHUNK_BYTES * (layout.bits + sum(-(-count // 4) for count in words))


def ring_bytes(layout: Layout, wide_scales: bool, how: Ring) -> int:
    """Shared memory of a program of `ring.py`."""
    return slot_bytes(layout, wide_scales) * how.stages * how.warps


def shared_bytes(layout: Layout, how: Wide) -> int:
    """At most so much shared memory a program of `wide.py` takes: x in all stages, words in all but one."""
    chunks = how.depth * layout.bits // 4 if layout.bits != 3 else how.depth // 2 + 1
    groups = 256 // layout.group if layout.group else 0
    quadruples = -(-2 * groups // 4) + (-(-groups // 4) if layout.has_zeros else 0)
    x, words = how.tokens * how.depth * 64 * 2, how.rows // 16 * 512 * (chunks + quadruples)
    return how.stages * x + (how.stages - 1) * words


def wide_us(layout: Layout, tokens: int, how: Wide) -> float:
    """About how long `wide.py` takes: the busiest of a multiprocessor, the second-level cache, and memory.

    A multiprocessor multiplies and decodes at the same time, but not wholly: half of the shorter adds to the longer.
    """
    row_programs, blocks = -(-layout.rows // how.rows), -(-tokens // how.tokens)
    programs = row_programs * blocks * how.splits
    columns, weights = layout.columns / how.splits, layout.rows * layout.columns
    multiply = how.rows * how.tokens * columns / 2048 / _TENSOR_SHARE
    decode = how.rows * columns * _instructions(layout, how) / 128
    each = max(multiply, decode) + min(multiply, decode) / 2
    processor = -(-programs // _PROCESSORS) * each / _CLOCKS
    bytes_of_weight, bytes_of_x = weights * (layout.bits / 8 + 1 / 32), 2 * tokens * layout.columns
    cache = (bytes_of_weight * blocks + bytes_of_x * row_programs) / _CACHE / 1e3
    memory = (bytes_of_weight + bytes_of_x + 2 * tokens * layout.rows) / _MEMORY / 1e3
    order = _LAUNCH_US + 2 * bytes_of_x / _COPY / 1e3
    parts = 0.0 if how.splits == 1 else _LAUNCH_US + 8 * how.splits * tokens * layout.rows / _COPY / 1e3
    return order + _FILL_US + max(processor, cache, memory) + parts


def _instructions(layout: Layout, how: Wide) -> float:
    """Issue slots of a weight, as compiled; prmt, of which 16 entries need many, has half as many lanes."""
    own = 2.2 if layout.kind == INTEGERS else 4.4 if layout.bits == 4 else 2.6
    return own + 64 * how.warps / 4 / how.rows * 2


def dequantize_us(layout: Layout, tokens: int) -> float:
    """About how long a matrix and cuBLAS take; the product, at its best, or the time of reading the matrix."""
    weights = layout.rows * layout.columns
    copy = weights * (2 + layout.bits / 8 + 1 / 32) / _COPY / 1e3
    product = 2 * tokens * weights / (4096 * _PROCESSORS * _CLOCKS * _TENSOR_SHARE)
    return 2 * _LAUNCH_US + copy + max(product, 2 * weights / _MEMORY / 1e3)
