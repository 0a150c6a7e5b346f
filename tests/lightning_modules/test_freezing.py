"""Training some of the parameters."""

import copy
from functools import partial

import pytest
import torch

import qat
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distillation import Distillation
from lightning_modules.freezing import freeze
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import LSQ3, TOKEN8, fit

WEIGHTS = {
    "lsq": qat.Scheme(weight=LSQ3, input=TOKEN8),
    "kmeans": qat.Scheme(weight=partial(KMeansQuantizer, bits=3)),
    "head": qat.Scheme(weight=LSQ3, head=True),
    "activations": qat.Scheme(weight=LSQ3, input=partial(LSQQuantizer, bits=8, granularity="per_tensor")),
}


def trained(tmp_path, model, **options):
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-2), **options)
    fit(tmp_path, module, max_steps=2)
    return module


@pytest.mark.parametrize("loss", ["chunked", "model"])
@pytest.mark.parametrize("scheme", WEIGHTS)
def test_only_what_quantizers_learn_trains_where_weights_are_frozen(tmp_path, scheme, loss):
    """The second phase of EfficientQAT (arXiv 2407.11062)."""
    model = qat.prepare(tiny_llama(), WEIGHTS[scheme])
    if scheme == "activations":
        qat.calibrate(model, [{"input_ids": torch.arange(8)[None]}])
    before = copy.deepcopy(dict(model.named_parameters()))
    learned = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".weight")}
    trained(tmp_path, model, freeze=["*.weight"], loss=loss)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= learned
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learned)


def test_a_frozen_parameter_changes_nothing_for_the_others(tmp_path):
    """Their first gradients are those of a model that trains as a whole."""
    model = qat.prepare(tiny_llama(), WEIGHTS["lsq"])
    other = copy.deepcopy(model)
    freeze(other, ["*.mlp.*.weight", "model.norm.*"])
    ids = torch.arange(24)[None] % 96
    for own in (model, other):
        own(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) if q.requires_grad else q.grad is None, name


def test_what_is_frozen_is_not_held_twice_by_student_and_teacher(tmp_path):
    model = tiny_llama()
    distillation = Distillation()
    distillation.make_teacher(model)
    teacher = distillation.teacher
    embedding = teacher.get_input_embeddings().weight
    qat.prepare(model, WEIGHTS["lsq"])
    trained(tmp_path, model, freeze=["model.embed_tokens.weight", "lm_head.*"], distill=distillation)
    assert teacher.get_input_embeddings().weight is model.get_input_embeddings().weight is not embedding


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*.weights"], r"module.freeze has '\*.weights', which matches no parameter. They are called model"),
        (["*"], "module.freeze leaves nothing to train"),
        ("*.weight", r"it is a list of patterns: set it to \['\*.weight'\]"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(InputError, match=message):
        freeze(tiny_llama(), patterns)
