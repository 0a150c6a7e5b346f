import math

import pytest
import torch

from qat.numerics.formats import CodebookFormat, IntFormat, VectorFormat
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.metrics import clipped_share, code_entropy, code_use, entropy_coded_bits, sqnr, stored_bits
from qat.numerics.qtensor import QParams, QuantizedTensor


def test_sqnr_of_a_tenth_of_the_signal_is_twenty_decibels():
    x = torch.randn(100)
    assert abs(sqnr(x, x * 1.1) - 20) < 1e-3
    assert sqnr(x, x) == math.inf


def test_code_use_counts_each_codebook_row():
    codes = torch.tensor([[0, 1, 0, 1], [2, 2, 2, 2]], dtype=torch.uint8)
    qparams = QParams(torch.ones(2, 1), codebook=torch.randn(2, 1, 4))
    q = QuantizedTensor(codes, qparams, CodebookFormat(4), PerChannel(), torch.float32)
    assert code_use(q) == (2 / 4 + 1 / 4) / 2


def test_clipped_is_what_lies_half_a_step_beyond_the_grid():
    x = torch.tensor([[3.4, 3.6, -4.4, -4.6]])
    codes = torch.tensor([[3, 3, -4, -4]], dtype=torch.int8)
    q = QuantizedTensor(codes, QParams(torch.ones(1, 1)), IntFormat(3), PerChannel(), torch.float32)
    assert clipped_share(x, q) == clipped_share(x.bfloat16(), q) == 0.5
    table = QParams(torch.ones(1, 1), codebook=torch.tensor([[[-1.0, 1.0]]]))
    assert clipped_share(x, QuantizedTensor(codes, table, CodebookFormat(2), PerChannel(), torch.float32)) == 0


def test_stored_bits_count_scales():
    codes = torch.zeros(4, 64, dtype=torch.int8)
    q = QuantizedTensor(
        codes, QParams(torch.ones(4, 1, dtype=torch.bfloat16)), IntFormat(3), PerChannel(), torch.float32
    )
    assert stored_bits(q) == 4 * 64 * 3 + 4 * 16


def test_entropy_of_the_codes_of_each_row():
    codes = torch.tensor([[0, 1, 2, 3], [2, 2, 2, 2], [0, 0, 3, 3]], dtype=torch.uint8)
    qparams = QParams(torch.ones(3, 1, dtype=torch.bfloat16), codebook=torch.randn(3, 1, 4).bfloat16())
    q = QuantizedTensor(codes, qparams, CodebookFormat(4), PerChannel(), torch.float32)
    assert torch.allclose(code_entropy(q), torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))
    assert entropy_coded_bits(q) == pytest.approx(12 * 1 + 3 * 16 + 12 * 16)


def test_entropy_of_vector_codes():
    """A code for two weights, in groups of four weights."""
    codes = torch.tensor([[0, 1, 2, 3] * 8], dtype=torch.uint8)
    qparams = QParams(torch.ones(1, 16, dtype=torch.bfloat16), codebook=torch.randn(1, 1, 8).bfloat16())
    q = QuantizedTensor(codes, qparams, VectorFormat(4, 2), PerGroup(4), torch.float32)
    assert q.shape == (1, 64)
    assert code_entropy(q).tolist() == [2.0]
    assert entropy_coded_bits(q) == stored_bits(q)  # every code equally often: nothing to save


def test_entropy_of_signed_codes_is_that_of_the_whole_tensor():
    codes = torch.tensor([[-4, 3], [-4, 3]], dtype=torch.int8)
    q = QuantizedTensor(codes, QParams(torch.ones(2, 1)), IntFormat(3), PerChannel(), torch.float32)
    assert code_entropy(q).tolist() == [1.0]
