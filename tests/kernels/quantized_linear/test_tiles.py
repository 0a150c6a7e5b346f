"""Tile order: nothing is lost, and each lane finds in its registers what the tensor core takes from it."""

import pytest
import torch

from qat.errors import InputError
from qat.kernels.quantized_linear import tiles
from tests.kernels.quantized_linear import lanes

KINDS = [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, False)]


@pytest.mark.parametrize(("bits", "tables"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (33, 300), (100, 576), (7, 1000)], ids=str)
def test_codes_come_back(bits, tables, shape, monkeypatch):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    words = tiles.to_tiles(codes, bits, tables)
    assert words.dtype == torch.int32
    assert words.shape == tiles.tiles_shape(*shape, bits)
    assert torch.equal(tiles.from_tiles(words, bits, *shape, tables), codes)
    monkeypatch.setattr(tiles, "_BLOCK", 1)  # a row of tiles at a time
    assert torch.equal(tiles.to_tiles(codes, bits, tables), words)
    assert torch.equal(tiles.from_tiles(words, bits, *shape, tables), codes)


@pytest.mark.parametrize(("bits", "size"), [(2, 2), (3, 3), (4, 4), (8, 8)])
def test_whole_units_take_no_more_than_their_bits(bits, size):
    words = tiles.to_tiles(torch.zeros(64, 512, dtype=torch.uint8), bits)
    assert words.numel() * 32 == 64 * 512 * size


@pytest.mark.parametrize(("bits", "tables"), KINDS)
def test_tensor_cores_multiply_what_the_lanes_hold(bits, tables):
    """The product by the fragments of the PTX ISA, lane by lane, equals the product of the matrices."""
    rows, columns = 32, 512
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    x = torch.randint(-8, 9, (8, columns))
    words = tiles.to_tiles(codes, bits, tables)
    y = torch.zeros(rows, 8, dtype=torch.int64)
    for row in range(rows // 16):
        for step in range(columns // 256):
            first = step * bits * tiles.CHUNK
            chunks = words[row, first : first + bits * tiles.CHUNK].view(bits, tiles.CHUNK).tolist()
            for tile in range(lanes.TILES_OF_STEP):
                y[16 * row : 16 * row + 16] += tile_product(chunks, tile, bits, tables, x[:, 256 * step :])
    assert torch.equal(y, codes.long() @ x.T)


def tile_product(chunks, tile, bits, tables, x):
    """Four instructions m16n8k16 on the fragments of 32 lanes: `[16, 8]`."""
    y = torch.zeros(16, 8, dtype=torch.int64)
    held = [
        lanes.codes_of_tile(lanes.tile_words(lanes.registers(chunks, lane), tile, bits), bits, tables)
        for lane in range(32)
    ]
    for q in range(4):
        a, b = torch.full((16, 16), -1), torch.full((16, 8), -99)
        for lane in range(32):
            for register, places in enumerate(lanes.fragment_a(lane)):
                for half, (row, k) in enumerate(places):
                    a[row, k] = held[lane][q][register][half]
            columns = lanes.x_registers(lane, tile)
            for register, places in enumerate(lanes.fragment_b(lane)):
                for half, (k, token) in enumerate(places):
                    b[k, token] = x[token, columns[2 * q + register][half]]
        assert a.min() >= 0  # every place of both operands is held by one lane
        assert b.min() > -99
        y += a @ b
    return y


def test_the_result_is_held_once():
    places = [place for lane in range(32) for place in lanes.fragment_c(lane)]
    assert sorted(places) == [(row, column) for row in range(16) for column in range(8)]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_stand_where_lanes_look(group, dtype):
    scale = (torch.rand(21, 5) + 0.1).to(dtype)
    words = tiles.to_scale_words(scale, group)
    each = 256 // group
    for row in range(21):
        for column in range(5):
            tile, half, lane = row // 16, row % 16 // 8, row % 8
            own = words[tile, column // each, lane]
            if dtype == torch.bfloat16:
                found = (own[column % each] >> 16 * half).to(torch.int16).view(torch.bfloat16)
            else:
                found = own[2 * (column % each) + half].view(torch.float32)
            assert found == scale[row, column]
    assert words.shape == (2, -(-5 // each), 8, each * (1 if dtype == torch.bfloat16 else 2))


def test_scales_that_bfloat16_holds_take_two_bytes():
    scale = torch.full((16, 4), 0.5)
    assert torch.equal(tiles.to_scale_words(scale, 64), tiles.to_scale_words(scale.bfloat16(), 64))


def test_zero_points_stand_as_scales_do():
    zeros = torch.randint(0, 256, (40, 9)).float()
    words = tiles.to_zero_words(zeros, 32)
    assert torch.equal(tiles.rows_of_pairs(words)[:40, :9], zeros.short())


@pytest.mark.parametrize(("bits", "tables"), [(5, False), (8, True)])
def test_other_bits_are_refused(bits, tables):
    with pytest.raises(InputError, match="2, 3 and 4 bits"):
        tiles.to_tiles(torch.zeros(16, 64, dtype=torch.uint8), bits, tables)
