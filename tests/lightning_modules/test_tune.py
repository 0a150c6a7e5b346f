"""`qat-tune`: launches for the layers of an artifact."""

from functools import partial

import pytest
import torch
from torch import nn

import qat
from lightning_modules import tune
from qat.errors import InputError
from qat.kernels.quantized_linear import tuned
from qat.kernels.quantized_linear.choice import rule
from qat.kernels.quantized_linear.launches import Skinny
from qat.quantizers import MinMaxQuantizer


@pytest.fixture
def weights():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    scheme = qat.Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_group_32"), kv=None, head=True)
    return tune.kinds_of_weights(qat.convert(qat.prepare(model, scheme)))


def test_one_weight_of_each_kind(weights):
    assert [key[:2] for key in weights] == [(32, 64), (64, 32)]


def test_what_is_found_is_kept_and_shown_beside_the_rule(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    tuned.tuned_on.cache_clear()
    key, weight = next(iter(weights.items()))
    own, ruled = Skinny(8, 8, 96), rule(weight.layout, 1)
    monkeypatch.setattr(tune, "fastest_first", lambda weight, count, tried: [(own, 2.0), (ruled, 3.0)])
    table = tune._tuned("a GPU", key, weight, [1, 4])
    assert list(table.columns[2].cells) == ["2.0", "2.0"]
    assert next(iter(table.columns[3].cells)) == "3.0"
    assert tuned.tuned_on("a GPU") == {key: ((1, own), (4, own))}
    assert tune._is_known("a GPU", key, 4)
    assert not tune._is_known("a GPU", key, 16)
    tuned.tuned_on.cache_clear()


@pytest.mark.parametrize("given", [[], [0], ["many"], None])
def test_tokens_are_numbers(given):
    with pytest.raises(InputError, match="tokens=\\[1,16,64\\]"):
        tune._tokens(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qat-tune", "artifact=nowhere"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "qat-tune needs a CUDA GPU" in capsys.readouterr().err
