"""The contract's checks can fail: each of them, on the smallest difference."""

import copy
import math
from functools import partial

import pytest
import torch

from qat.export.parity import GridContractError, Parity, check_consumer, check_logits, check_stored, parity
from qat.quantizers import LSQQuantizer, TableQuantizer
from tests.export.exported import converted, logits, token_ids

LAYER = "model.layers.1.self_attn.v_proj"
GRIDS = {
    "zero_point": partial(LSQQuantizer, bits=4, granularity="per_group_32", symmetric=False),
    "codebook": partial(TableQuantizer, bits=4),
}


def test_logits_to_the_bit_or_within_a_tolerance():
    found = torch.randn(1, 3, 5)
    nudged = found.clone()
    nudged[0, 0, 0] += 1e-6
    assert check_logits(found, found.clone(), exact=True) == 0
    with pytest.raises(GridContractError):
        check_logits(found, nudged, exact=True)
    assert check_logits(found, nudged, exact=False) < 1e-5
    with pytest.raises(GridContractError):
        check_logits(found, found + 1, exact=False)


@pytest.mark.parametrize("changed", ["codes", "scale", "zero_point", "codebook", "model.norm.weight"])
def test_one_stored_number(changed):
    """The first layer that differs is named, and what of it does."""
    model = converted("llama, tied", GRIDS.get(changed, GRIDS["zero_point"]))
    other = copy.deepcopy(model)
    check_stored(model, other)
    weight = other.get_submodule(LAYER).weight
    tensor = other.get_parameter(changed) if "." in changed else getattr(weight, changed)
    with torch.no_grad():
        tensor.view(-1)[-1] += 1
    named = changed if "." in changed else f"{changed} of {LAYER}.weight"
    with pytest.raises(GridContractError, match=named):
        check_stored(model, other)


def test_a_layer_that_was_left_in_full_precision():
    model = converted("llama, tied", GRIDS["zero_point"])
    other = converted("llama, tied", GRIDS["zero_point"], exclude=["*.1.self_attn.v_proj"])
    with pytest.raises(GridContractError, match=f"{LAYER} is quantized in the trained model"):
        check_stored(model, other)


def test_the_figures_are_those_of_their_definition():
    ids = token_ids(2, 6)
    model, other = converted("llama, tied", GRIDS["zero_point"]), converted("llama, tied", GRIDS["codebook"])
    p, q = logits(model, ids), logits(other, ids)
    found = parity(p, q, ids)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    assert found.max_abs_delta_logit == float((p - q).abs().max())
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert found.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).float().mean())
    nll = -log_q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert parity(p, p, ids)[:3] == (0, 0, 1)


def test_logits_of_another_shape_or_without_a_number():
    ids = token_ids(1, 3)
    found = torch.randn(1, 3, 96)
    with pytest.raises(GridContractError, match=r"logits \[1, 3, 95\]"):
        parity(found, found[..., 1:], ids)
    with pytest.raises(GridContractError, match="not finite"):
        parity(found, found * math.inf, ids)


@pytest.mark.parametrize(
    ("found", "same_arithmetic", "passes"),
    [
        (Parity(1.0, 5e-3, 1.0, 9.0), True, True),
        (Parity(0.1, 5e-3, 0.998, 9.0), True, False),
        (Parity(0.1, 5e-3, 0.998, 9.0), False, True),
        (Parity(0.1, 2e-2, 1.0, 9.0), False, False),
    ],
)
def test_what_an_engine_may_differ_by(found, same_arithmetic, passes):
    if passes:
        check_consumer(found, "an engine", same_arithmetic, 1e-2)
    else:
        with pytest.raises(GridContractError, match="an engine"):
            check_consumer(found, "an engine", same_arithmetic, 1e-2)
