"""Distillation as a whole: against autograd on whole logits, while training, and in what it leaves behind."""

import copy
from functools import partial
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

import qat
from lightning_modules.callbacks import LastCheckpoint
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distillation import AttentionRelations, Distillation, HiddenStates
from lightning_modules.distillation.divergences import DIVERGENCES
from lightning_modules.distillation.teacher import confidence, make_teacher, share_frozen
from qat.errors import InputError
from qat.quantizers import MinMaxQuantizer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.lightning_modules.distillation.test_divergences import plain
from tests.lightning_modules.test_compilation import gradients
from tests.lightning_modules.test_loss import MODELS, SCHEMES, batch, with_auxiliary_loss, with_other_logits
from tests.lightning_modules.test_module import LSQ3, Batches, fit

WEIGHT2 = qat.Scheme(weight=partial(MinMaxQuantizer, bits=2, granularity="per_group_32"))
INSIDE = {"hidden": HiddenStates(0.5), "attention": AttentionRelations(2.0, [0, -1])}


def with_teacher(model, scheme=WEIGHT2, **options):
    """A student that is quantized and a distillation from what it was."""
    distillation = Distillation(**options)
    distillation.make_teacher(model)
    return qat.prepare(model, scheme), distillation


def loss_of(distillation, data):
    return distillation.loss(data, distillation.teacher_outputs(data), lambda data: model_loss(distillation, data))[0]


def model_loss(distillation, data):
    return distillation._require_fit().student(**data, use_cache=False).loss


def check(model, distillation, **expected_options):
    """The same loss and gradients as autograd's on the whole logits of both models."""
    data = batch()
    targets = F.pad(data["labels"], (0, 1), value=-100)[:, 1:].flatten()
    teacher = distillation.teacher(input_ids=data["input_ids"], use_cache=False).logits.flatten(0, 1)

    def expected():
        z = model(input_ids=data["input_ids"], use_cache=False).logits.flatten(0, 1)
        return plain("forward_kl", z, teacher, targets, **expected_options) / (targets != -100).sum()

    true = gradients(model, expected)
    for at_heads in (True, False):
        distillation.start(model, at_heads)
        assert (distillation._require_fit().head is not None) == at_heads
        found = gradients(model, lambda: loss_of(distillation, data))
        assert found.keys() == true.keys()
        for name, value in true.items():
            error = float((found[name] - value).abs().max())
            assert error <= 1e-4 * max(1e-6, float(value.abs().max())), name


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name):
    model, distillation = with_teacher(MODELS[name]().eval(), weight=0.7, temperature=2.0)
    check(model, distillation, weight=0.7, temperature=2.0)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_quantized_heads(name, tied):
    model, distillation = with_teacher(tiny_llama(tie_word_embeddings=tied), SCHEMES[name], weight=1.0)
    model.train()
    if name == "full precision":  # at the teacher itself the gradient is rounding errors
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(-30)
    check(model, distillation, weight=1.0)


@pytest.mark.parametrize("make", [with_auxiliary_loss, with_other_logits], ids=["auxiliary loss", "other logits"])
def test_heads_that_are_more_than_a_product_give_whole_logits(make):
    model = make().eval()
    teacher = copy.deepcopy(model) if make is with_auxiliary_loss else None
    distillation = Distillation(weight=0.25)
    if teacher is None:  # its forward is patched, and a copy would call the original
        model_before, data = model, batch()
        distillation.make_teacher(tiny_llama())
    else:
        distillation.make_teacher(model)
        model_before, data = qat.prepare(model, qat.Scheme(weight=LSQ3)).eval(), batch()
    distillation.start(model_before)
    assert distillation._require_fit().head is None
    output = model_before(**data)
    theirs = distillation.teacher(input_ids=data["input_ids"]).logits.flatten(0, 1)
    targets = F.pad(data["labels"], (0, 1), value=-100)[:, 1:].flatten()
    divergence = plain("forward_kl", output.logits.flatten(0, 1), theirs, targets) / (targets != -100).sum()
    torch.testing.assert_close(loss_of(distillation, data), 0.75 * output.loss + 0.25 * divergence)


@pytest.mark.parametrize("at_heads", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_batch_with_nothing_to_learn_teaches_nothing(at_heads, weight):
    terms = {} if weight else {"hidden": HiddenStates(1e-9)}
    model, distillation = with_teacher(tiny_llama(), weight=weight, **terms)
    distillation.start(model, at_heads)
    module = CausalLMModule(model, torch.optim.AdamW, distill=distillation)
    module.log_dict = lambda values: None
    data = batch()
    data["labels"].fill_(-100)
    found = gradients(model, lambda: module._distilled(data, {})())
    assert all(value.abs().max() < 1e-6 for value in found.values())


def test_the_teacher_stays_what_the_model_was(tmp_path):
    model, data = tiny_llama(), batch()
    before = model.eval()(input_ids=data["input_ids"]).logits.detach()
    distillation = Distillation(**INSIDE)
    distillation.make_teacher(model)
    qat.transforms.rotate(model, [])
    qat.prepare(model, WEIGHT2)
    module = CausalLMModule(
        model, partial(torch.optim.AdamW, lr=1e-2), gradient_checkpointing=True, distill=distillation
    )
    fit(tmp_path, module)
    assert torch.equal(distillation.teacher(input_ids=data["input_ids"]).logits, before)
    assert not distillation.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in distillation.teacher.parameters())
    assert not torch.equal(model.eval()(input_ids=data["input_ids"]).logits, before)


def test_frozen_parameters_are_shared_and_changed_ones_are_not():
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    distillation = Distillation()
    distillation.make_teacher(model)
    qat.prepare(model, WEIGHT2)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # as a transform might
    distillation.start(model)
    teacher = distillation.teacher
    own = {p.data_ptr() for p in model.parameters()}
    shared = [name for name, p in teacher.named_parameters() if p.data_ptr() in own]
    assert shared == ["model.embed_tokens.weight"]
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight is model.lm_head.weight
    assert share_frozen(teacher, model) == 0
    assert share_frozen(make_teacher(tiny_llama(), None, None), model) == 0  # other values


def test_a_teacher_of_16_bits():
    model, distillation = with_teacher(tiny_llama(), dtype="bfloat16")
    assert {p.dtype for p in distillation.teacher.parameters()} == {torch.bfloat16}
    assert distillation.teacher.model.rotary_emb.inv_freq.dtype == torch.float32
    distillation.start(model)
    assert torch.isfinite(loss_of(distillation, batch()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def module_of(distillation_options, **options):
    torch.manual_seed(0)
    model, distillation = with_teacher(tiny_llama(), **distillation_options)
    return CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), distill=distillation, **options)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_training_comes_nearer_to_the_teacher(tmp_path, name):
    """Weights of 2 bits, on four windows again and again."""
    module = module_of({"divergence": name, "weight": 1.0, "gamma": 0.5})
    rows = fit(tmp_path, module, max_steps=40, max_epochs=-1, log_every_n_steps=1)
    divergences = [row["train/divergence"] for row in rows.values() if "train/divergence" in row]
    assert len(divergences) == 40
    assert sum(divergences[-4:]) < 0.6 * sum(divergences[:4])


@pytest.mark.parametrize(
    ("term", "kind", "weight"), [("hidden", HiddenStates, 20), ("attention", AttentionRelations, 3e3)]
)
def test_terms_keep_the_student_near_its_teacher(tmp_path, term, kind, weight):
    """Beside the cross entropy, which leads it away."""
    ends = []
    for own in (1e-9, weight):
        module = module_of({"weight": 0.0, term: kind(own)})
        rows = fit(tmp_path / str(own), module, max_steps=40, max_epochs=-1, log_every_n_steps=1)
        ends.append(sum([row[f"train/{term}"] for row in rows.values() if f"train/{term}" in row][-4:]))
    assert ends[1] < 0.6 * ends[0]


@pytest.mark.parametrize(
    ("own", "other", "inside"),
    [
        ({}, {"gradient_checkpointing": True}, True),
        ({}, {"compile": "aot_eager"}, False),
        ({}, {"compile": "aot_eager", "gradient_checkpointing": True}, False),
        ({}, {"loss": "model"}, True),
    ],
    ids=["checkpointing", "compiled", "compiled and checkpointing", "whole logits"],
)
def test_training_goes_the_same_way(tmp_path, own, other, inside):
    states = []
    for name, options in (("own", own), ("other", other)):
        module = module_of(INSIDE if inside else {}, **options)
        fit(tmp_path / name, module)
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_teacher_is_compiled_while_its_student_trains(tmp_path):
    module = module_of({}, compile="aot_eager")
    blocks = module.distillation.teacher.model.layers
    seen = []
    module.distillation.teacher.model.register_forward_pre_hook(
        lambda *_: seen.append([block._compiled_call_impl is not None for block in blocks])
    )
    fit(tmp_path, module)
    assert all(seen[-1])
    assert module.compiled_teacher is None
    assert not any(block._compiled_call_impl for block in blocks)


def test_accumulated_batches_have_the_gradient_of_one(tmp_path):
    model, distillation = with_teacher(tiny_llama(), divergence="cakld", gamma=0.3, **INSIDE)
    distillation.start(model)
    data = batch()
    data["labels"] = data["input_ids"].clone()  # as many learned tokens in every part
    whole = gradients(model, lambda: loss_of(distillation, data))
    parts = [{key: value[rows] for key, value in data.items()} for rows in (slice(0, 4), slice(4, 8))]
    summed = gradients(model, lambda: sum(loss_of(distillation, part) for part in parts) / 2)
    for name, value in whole.items():
        torch.testing.assert_close(summed[name], value, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_goes_the_same_way_and_the_checkpoint_has_no_teacher(tmp_path):
    whole = module_of(INSIDE)
    fit(tmp_path / "whole", whole, max_epochs=2, max_steps=4)
    last = LastCheckpoint(str(tmp_path / "first"), every_n_steps=1)
    fit(tmp_path / "first", module_of(INSIDE), last, max_epochs=1, max_steps=2)
    checkpoint = torch.load(last.path, weights_only=True)
    assert checkpoint["state_dict"].keys() == CausalLMModule(whole.model, torch.optim.AdamW).state_dict().keys()
    assert last.path.stat().st_size < 3.5 * sum(p.numel() * p.element_size() for p in whole.parameters())
    resumed = module_of(INSIDE)
    fit(tmp_path / "second", resumed, ckpt_path=str(last.path), max_epochs=2, max_steps=4)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_no_module_holds_the_teacher():
    module = module_of(INSIDE)
    students = {id(m) for m in module.model.modules()}
    assert {id(m) for m in module.modules()} == students | {id(module)}


def test_evaluation_is_the_cross_entropy():
    module, data = module_of(INSIDE), batch()
    module.on_validation_epoch_start()
    module.validation_step(data, 0)
    tokens = int((data["labels"][:, 1:] != -100).sum())
    expected = float(module.model(**data).loss) * tokens
    assert module._nll.tolist() == pytest.approx([expected, tokens])


def test_the_confidence_is_the_mean_probability_of_the_next_token():
    model, distillation = with_teacher(tiny_llama(), divergence="cakld")
    assert distillation.needs_gamma
    with pytest.raises(InputError, match=r"distill.gamma is not known: call measure_gamma\(batches\)"):
        distillation.start(model)
    data = list(islice(Batches().train_dataloader(), 2))
    gamma = distillation.measure_gamma(data)
    ids = torch.cat([part["input_ids"] for part in data])
    probabilities = distillation.teacher(input_ids=ids).logits[:, :-1].softmax(-1)
    assert gamma == pytest.approx(float(probabilities.gather(-1, ids[:, 1:, None]).mean()), rel=1e-5)
    assert not distillation.needs_gamma
    distillation.start(model)
    data[0]["labels"].fill_(-100)
    with pytest.raises(InputError, match=r"distill.gamma cannot be measured"):
        confidence(distillation.teacher, data[:1])


def test_another_teacher(tmp_path):
    """Deeper and wider than the student, of the same vocabulary."""
    torch.manual_seed(1)
    tiny_llama(hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    model = tiny_llama()
    distillation = Distillation(teacher=str(tmp_path), attention=AttentionRelations(1.0))
    distillation.make_teacher(model, tiny_tokenizer())
    distillation.start(qat.prepare(model, WEIGHT2))
    loss = loss_of(distillation, batch())
    loss.backward()
    assert distillation.teacher.config.hidden_size == 96
    assert torch.isfinite(loss)


def test_teachers_that_are_refused(tmp_path):
    tiny_llama(vocab_size=128).save_pretrained(tmp_path / "more")
    tiny_llama().save_pretrained(tmp_path / "other")
    for name in ("more", "other"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match=r"has 128 tokens in its vocabulary and the student 96.* distill.teacher=null"):
        Distillation(teacher=str(tmp_path / "more")).make_teacher(tiny_llama(), tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["<|more|>"])
    with pytest.raises(InputError, match=r"has other tokens than the student.* distill.teacher=null"):
        Distillation(teacher=str(tmp_path / "other")).make_teacher(tiny_llama(), other)
    with pytest.raises(InputError, match=r"is no teacher. .*there is no such folder"):
        Distillation(teacher=str(tmp_path) + "/none").make_teacher(tiny_llama())
    with pytest.raises(InputError, match="this one is quantized already"):
        Distillation().make_teacher(qat.prepare(tiny_llama(), WEIGHT2))
    with pytest.raises(InputError, match=r"distill.dtype is 'bf16'. Did you mean 'bfloat16'"):
        Distillation(dtype="bf16").make_teacher(tiny_llama())
    with pytest.raises(InputError, match=r"distill.top_k is 97, and the vocabulary has 96 tokens"):
        Distillation(top_k=97).make_teacher(tiny_llama())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "distill.temperature is 0; it divides logits"),
        ({"temperature": float("nan")}, "distill.temperature is nan"),
        ({"weight": 1.5}, "distill.weight is 1.5; it lies between 0 and 1"),
        ({"weight": 0}, "nothing is distilled: set it to 0.5"),
        ({"top_k": 0}, "distill.top_k is 0; it is a whole number from 1 on"),
        ({"divergence": "kl"}, "distill.divergence is 'kl'"),
        ({"divergence": "jsd", "beta": 2}, "distill.beta is 2"),
        ({"divergence": "cakld", "gamma": 2}, "distill.gamma is 2"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Distillation(**options)


def test_what_is_missing_is_said(tmp_path):
    model = qat.prepare(tiny_llama(), WEIGHT2)
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), distill=Distillation())
    with pytest.raises(InputError, match=r"There is no teacher: call distillation.make_teacher\(model\) before"):
        fit(tmp_path, module)
    with pytest.raises(InputError, match=r"distill.hidden looks into blocks, .* module.compile=null"):
        fit(tmp_path, module_of(INSIDE, compile="aot_eager"))
    _, distillation = with_teacher(tiny_llama())
    with pytest.raises(InputError, match=r"call distillation.start\(model\)"):
        distillation.teacher_outputs(batch())
