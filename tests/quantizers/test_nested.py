"""One set of codes for several widths."""

import copy
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.numerics.formats import LevelFormat
from qat.numerics.nested import sliced
from qat.quantizers import KMeansQuantizer, LSQQuantizer, NestedQuantizer
from qat.quantizers.oscillation import check_settles
from qat.transforms import nested_widths, slice_bits
from tests.conftest import tiny_llama

NESTED = partial(NestedQuantizer, granularity="per_group_32")


def made(x, **options):
    quantizer = NestedQuantizer(x.shape, granularity="per_group_16", **options)
    quantizer.initialize(x)
    return quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_bits_of_a_code_are_the_code_of_that_width(dtype):
    """Values on the borders of cells, beyond the range, and at zero included."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :5] = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-8])
    quantizer = made(x)
    scale = quantizer.qparams(x).scale.float()
    x[1] = (torch.arange(64) - 32.0).mul(4 * scale[1].repeat_interleave(16)).to(dtype)  # borders at 6 bits
    stored = quantizer.quantize(x)
    assert stored.codes.max() == 255
    for bits in range(1, 9):
        own = sliced(stored, bits)
        assert torch.equal(own.codes, stored.codes >> (8 - bits))
        assert own.format == LevelFormat(2**bits)
        assert own.qparams.scale.dtype == torch.bfloat16
        if bits not in quantizer.widths:
            continue
        quantizer.at(bits)
        assert torch.equal(quantizer(x), own.dequantize())
        again = quantizer.quantize(x)
        assert torch.equal(again.codes, own.codes)
        assert torch.equal(again.qparams.scale, own.qparams.scale)
        quantizer.at(8)


def test_the_first_scale_is_the_best_of_the_middle_width():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    alone = LSQQuantizer(x.shape, bits=4, granularity="per_group_16", grid="stretched")
    alone.initialize(x)
    quantizer = made(x, bits=8, also=[2, 4])
    assert quantizer.widths == (8, 4, 2)
    assert torch.equal(quantizer.qparams(x).scale * 16, alone.qparams(x).scale)
    assert quantizer.format == LevelFormat(256)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_are_those_of_a_learned_scale_at_that_width(bits):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    quantizer = made(x)
    alone = LSQQuantizer(x.shape, bits=bits, granularity="per_group_16", grid="stretched")
    alone.initialize(x)
    with torch.no_grad():
        alone.log_scale.copy_(quantizer.log_scale + 8 - bits)
    quantizer.at(bits)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    found = []
    for own in (quantizer, alone):
        leaf = x.clone().requires_grad_()
        (own(leaf) * weight).sum().backward()
        found.append((leaf.grad, own.log_scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"also": []}, r"also is \[\]: widths from 1 to 7"),
        ({"also": [8]}, r"also is \[8\]"),
        ({"also": [4, 4]}, r"each once"),
        ({"bits": 4}, r"widths from 1 to 3, each once, below bits=4"),
        ({"bits": 9}, "1 to 8 bits, not 9"),
    ],
)
def test_widths_that_are_none_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        NestedQuantizer((4, 64), **options)


@pytest.mark.parametrize("tied", [False, True])
def test_an_artifact_serves_at_every_width(tmp_path, tied):
    ids = torch.arange(24)[None] % 96
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tied).eval()
    rules = {"down": {"match": "*.down_proj", "weight": partial(KMeansQuantizer, bits=3)}}
    qat.prepare(model, qat.Scheme(weight=NESTED, rules=rules, head=tied, embedding=tied))
    expected = {}
    for bits in (8, 4, 2):
        own = copy.deepcopy(model)
        for module in own.modules():
            if isinstance(module, NestedQuantizer):
                module.at(bits)
        expected[bits] = own(ids).logits
    assert nested_widths(model) == [4, 2]
    qat.save(qat.convert(model), tmp_path / "a")
    for bits, logits in expected.items():
        assert torch.equal(qat.load(tmp_path / "a", bits=bits)(ids).logits, logits)
    assert torch.equal(qat.load(tmp_path / "a")(ids).logits, expected[8])
    smaller = qat.load(tmp_path / "a", bits=2)
    if tied:
        assert smaller.lm_head.weight is smaller.get_input_embeddings().weight
    assert qat.export.artifact.bits_per_weight(smaller) < 3
    assert qat.save(smaller, tmp_path / "b").is_dir()  # and it is an artifact like any other
    assert torch.equal(qat.load(tmp_path / "b")(ids).logits, expected[2])


def test_other_codes_have_no_first_bits():
    model = qat.convert(qat.prepare(tiny_llama(), qat.Scheme(weight=partial(LSQQuantizer, bits=4))))
    with pytest.raises(InputError, match="No weight has nested codes of 2 bits or more, but codes of int4"):
        slice_bits(model, 2)
    quantizer = LSQQuantizer((4, 64), bits=4)
    quantizer.initialize(torch.randn(4, 64))
    with pytest.raises(InputError, match="Codes of int4 have no first bits"):
        sliced(quantizer.quantize(torch.randn(4, 64)), 2)
    x = torch.randn(4, 64)
    with pytest.raises(InputError, match="Codes of 8 bits have no first 9"):
        sliced(made(x).quantize(x), 9)


def test_what_changes_or_freezes_codes_of_one_width_is_refused():
    quantizer = made(torch.randn(4, 64))
    with pytest.raises(InputError, match="take turns: leave out callbacks"):
        quantizer.set_bits(4)
    assert quantizer.format == LevelFormat(256)
    with pytest.raises(InputError, match="widths that take turns: take quantizer"):
        check_settles(quantizer)
