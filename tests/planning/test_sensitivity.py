"""Every signal against its definition, by brute force on tiny models."""

import copy
import json
import math
from functools import partial
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from qat.errors import InputError
from qat.numerics.metrics import sqnr
from qat.planning import SIGNALS, Candidate, integers, planned_layers, sensitivity
from qat.planning import divergence as divergence_module
from qat.planning.fisher import fisher, gradient
from qat.planning.hutchinson import hessian_traces, quadratic_forms
from qat.planning.kfac import kfac
from qat.planning.predictions import calibration, predictions
from qat.planning.rounding import errors, quantized
from qat.quantizers import MinMaxQuantizer, NoQuantizer
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, tiny_gpt2, tiny_mixtral

CANDIDATES = integers((2, 4), group_size=16) | {
    "fp8": Candidate(partial(MinMaxQuantizer, bits=8, format="fp8_e4m3")),
    "full": Candidate(NoQuantizer),
}


def batches(count=4, length=32, seed=0, vocabulary=96):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, vocabulary, (count, 2, length), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in draws]


def smallest():
    """So small that every derivative can be taken one by one."""
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return tiny_llama(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3).eval()


def loss_of(model, data):
    """Mean loss of the predicted tokens."""
    with torch.enable_grad():
        parts = [predictions(model, batch) for batch in data]
        return F.cross_entropy(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def exact_fisher(model, weight, data):
    """E_t sum_y p(y) (d log p(y) / dw)^2, every token and every label on its own."""
    total, tokens = torch.zeros_like(weight), 0
    for batch in data:
        logits, labels = predictions(model, batch)
        log_p = logits.log_softmax(-1)
        for row in log_p:
            for value in row:
                (grad,) = torch.autograd.grad(value, weight, retain_graph=True)
                total += value.exp().detach() * grad.square()
        tokens += len(labels)
    return total / tokens


def test_fisher_is_the_fisher_information():
    model, data = smallest(), batches(1, 16, vocabulary=12)
    layers = planned_layers(model)
    layer = layers["model.layers.0.mlp.down_proj"]
    exact = exact_fisher(model, layer.module.weight, data)
    error = errors(layer, CANDIDATES["int2"])
    expected = 0.5 * float((exact * error["weight"].square()).sum())
    found = fisher(model, [layer], data * 400)(layer, error)  # draws of labels average out
    assert found == pytest.approx(expected, rel=0.08)


def exact_factors(model, layer, data):
    """x_t, and E g_to^2 of the loss's gradient to the layer's output, every token and every label on its own."""
    seen = []
    handle = layer.module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    log_p = torch.cat([predictions(model, batch)[0] for batch in data]).log_softmax(-1)
    handle.remove()
    ((x, output),) = seen
    squares = torch.zeros_like(output)
    for value in log_p.flatten():
        squares += value.exp().detach() * torch.autograd.grad(value, output, retain_graph=True)[0].square()
    return x.detach().flatten(0, -2), squares.flatten(0, -2), len(log_p)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_kfac_is_the_product_of_its_factors(name):
    model, data = smallest(), batches(1, 16, vocabulary=12)
    layer = planned_layers(model)[f"model.layers.0.{name}"]
    x, squares, tokens = exact_factors(model, layer, data)
    error = errors(layer, CANDIDATES["int2"])
    energy = (squares.sum(1, keepdim=True) * (x @ error["weight"].T).square()).sum(0)
    expected = 0.5 * float(energy @ squares.sum(0) / squares.sum()) / tokens
    found = kfac(model, [layer], data * 400)(layer, error)  # draws of labels average out
    assert found == pytest.approx(expected, rel=0.08)


def test_fisher_predicts_the_divergence_of_small_errors():
    """0.5 e^T F e is KL to second order; errors of a weight that hang on no other leave its diagonal."""
    model, data = smallest(), batches(1, 16, vocabulary=12)
    layer = planned_layers(model)["model.layers.0.mlp.up_proj"]
    exact = exact_fisher(model, layer.module.weight, data)
    row, column = divmod(int(exact.argmax()), exact.shape[1])
    with torch.no_grad():
        before = torch.cat([predictions(model, batch)[0] for batch in data]).log_softmax(-1)
        layer.module.weight[row, column] += 0.02
        after = torch.cat([predictions(model, batch)[0] for batch in data]).log_softmax(-1)
    divergence = float(F.kl_div(after, before, log_target=True, reduction="sum")) / len(before)
    assert divergence == pytest.approx(0.5 * float(exact.max()) * 0.02**2, rel=0.05)


def test_gradient_is_the_first_order_and_fishers_second():
    model, data = smallest(), batches(2, 16, vocabulary=12)
    layer = planned_layers(model)["model.layers.0.self_attn.o_proj"]
    (grad,) = torch.autograd.grad(loss_of(model, data), layer.module.weight)
    error = errors(layer, CANDIDATES["int2"])
    first = abs(float((grad * error["weight"]).sum()))
    second = fisher(model, [layer], data)(layer, error)
    assert gradient(model, [layer], data)(layer, error) == pytest.approx(first + second, rel=1e-4)


def exact_hessian(model, weight, data):
    (grad,) = torch.autograd.grad(loss_of(model, data), weight, create_graph=True)
    rows = [torch.autograd.grad(g, weight, retain_graph=True)[0].flatten() for g in grad.flatten()]
    return torch.stack(rows)


def test_the_hessian_is_multiplied_exactly():
    model, data = smallest(), batches(1, 16, vocabulary=12)
    model.set_attn_implementation("eager")
    weight = model.model.layers[0].self_attn.k_proj.weight
    signs = torch.randint(0, 2, weight.shape).float() * 2 - 1
    hessian = exact_hessian(model, weight, data)
    expected = float(signs.flatten() @ hessian @ signs.flatten())
    found = quadratic_forms(loss_of(model, data), [weight], [signs])
    assert found[0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_hutchinsons_mean_is_the_trace():
    model, data = smallest(), batches(1, 16, vocabulary=12)
    layers = planned_layers(model)
    traces = hessian_traces(model, list(layers.values()), data * 300)
    model.set_attn_implementation("eager")
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"):
        exact = float(exact_hessian(model, layers[name].module.weight, data).trace())
        assert traces[name] == pytest.approx(exact, rel=0.15)


def test_hutchinsons_cost_follows_from_the_trace():
    model, data = smallest(), batches(4, 16, vocabulary=12)
    layers = planned_layers(model)
    table = sensitivity(model, data, layers, CANDIDATES, "hutchinson")
    traces = hessian_traces(model, list(layers.values()), data)
    for name, layer in layers.items():
        squares = float(errors(layer, CANDIDATES["int2"])["weight"].square().sum())
        assert table[name]["int2"] == pytest.approx(max(0.0, 0.5 * traces[name] / layer.weights * squares), rel=1e-5)


def logits(model, data):
    with torch.no_grad():
        return torch.cat([predictions(model, batch)[0] for batch in data])


@pytest.mark.parametrize("name", ["llama, untied", "gpt2", "gemma3", "mixtral"])
def test_kl_is_that_of_the_model_with_one_layer_rounded(name):
    model, data = LANGUAGE_MODELS[name]().eval(), batches(5)
    layers = planned_layers(model)
    table = sensitivity(model, data, layers, CANDIDATES, "kl")
    before = logits(model, data)
    for layer in layers.values():
        alone = copy.deepcopy(model)
        for weight, q in quantized(layer, CANDIDATES["int2"]).items():
            module = alone.get_submodule(layer.name)
            layer.kind.as_matrix(module, getattr(module, weight).data).copy_(q.dequantize())
        after = logits(alone, data)
        divergence = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
        assert table[layer.name]["int2"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-7)
        assert table[layer.name]["full"] == 0
    assert torch.equal(logits(model, data), before)  # nothing stays quantized


def test_output_is_the_share_of_the_output_that_is_error():
    model, data = tiny_llama().eval(), batches()
    layers = planned_layers(model)
    table = sensitivity(model, data, layers, CANDIDATES, "output")
    for name, layer in layers.items():
        seen = []
        handle = layer.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        logits(model, data)
        handle.remove()
        x = torch.cat(seen)
        (q,) = quantized(layer, CANDIDATES["int4"]).values()
        decibels = sqnr(x @ layer.module.weight.T, x @ q.dequantize().T)
        assert -10 * math.log10(table[name]["int4"]) == pytest.approx(decibels, abs=1e-3)


def test_entropy_gives_more_to_weights_that_fill_the_grid():
    model = tiny_llama()
    even, spiky = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    with torch.no_grad():
        even.weight.uniform_(-1, 1)
        spiky.weight.copy_(torch.randn_like(spiky.weight) ** 5)
    layers = planned_layers(model)
    candidates = integers((2, 4, 8), group_size=64)
    table = sensitivity(model, [], layers, candidates, "entropy")
    assert table["model.layers.0.mlp.up_proj"]["int2"] > 2 * table["model.layers.0.mlp.gate_proj"]["int2"]
    for own in table.values():
        assert own["int2"] > own["int4"] > own["int8"] == 0


def test_entropy_is_counted_in_codes():
    model = tiny_llama()
    layer = planned_layers(model)["model.layers.1.mlp.down_proj"]
    candidates = integers((3, 8), group_size=64)
    table = sensitivity(model, [], {layer.name: layer}, candidates, "entropy")[layer.name]

    def bits(candidate):
        shares = torch.unique(quantized(layer, candidate)["weight"].codes, return_counts=True)[1] / layer.weights
        return float(-(shares * shares.log2()).sum())

    lost = bits(candidates["int8"]) - bits(candidates["int3"])
    assert table["int3"] == pytest.approx(layer.weights * (4**lost - 1), rel=1e-4)


@pytest.mark.parametrize("signal", SIGNALS)
def test_fewer_bits_cost_more_in_every_layer(signal):
    model = tiny_llama().eval()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    table = sensitivity(model, batches(), planned_layers(model), CANDIDATES, signal)
    assert len(table) == 14
    for name, own in table.items():
        assert own["int2"] > own["int4"] >= 0 or (signal == "hutchinson" and own["int2"] == 0), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "signal"),
    [*product((tiny_gpt2, tiny_mixtral), ("fisher", "hutchinson", "entropy")), (tiny_gpt2, "kfac")],
)
def test_other_kinds_of_layers(build, signal):
    model = build().eval()
    layers = planned_layers(model)
    table = sensitivity(model, batches(5), layers, CANDIDATES, signal)
    assert table.keys() == layers.keys()
    assert all(math.isfinite(cost) for own in table.values() for cost in own.values())


def test_tokens_without_labels_do_not_count():
    model = tiny_llama().eval()
    data = batches()
    masked = [{"input_ids": b["input_ids"], "labels": b["labels"].clone()} for b in data]
    changed = [{"input_ids": b["input_ids"].clone(), "labels": b["labels"].clone()} for b in data]
    for batch in (*masked, *changed):
        batch["labels"][:, 20:] = -100
    for batch in changed:
        batch["input_ids"][:, 20:] = 0
    layers = planned_layers(model)
    tables = [sensitivity(model, d, layers, CANDIDATES, "kl") for d in (data, masked, changed)]
    first, second, third = (table["model.layers.0.mlp.up_proj"]["int2"] for table in tables)
    assert first != pytest.approx(second, rel=1e-4)
    assert second == pytest.approx(third, rel=1e-4)


class Killed(Exception):
    pass


def test_a_killed_kl_goes_on_where_it_was(tmp_path, monkeypatch):
    model, data = tiny_llama().eval(), batches()
    layers = planned_layers(model)
    expected = sensitivity(model, data, layers, CANDIDATES, "kl")
    whole, done = divergence_module._Reference.divergence, []

    def dying(self, layer, w_hat):
        if len(done) == 50:
            raise Killed
        done.append(layer.name)
        return whole(self, layer, w_hat)

    monkeypatch.setattr(divergence_module._Reference, "divergence", dying)
    with pytest.raises(Killed):
        sensitivity(model, data, layers, CANDIDATES, "kl", tmp_path)
    (file,) = tmp_path.glob("kl-*.jsonl")
    file.write_text(file.read_text() + '["torn')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(divergence_module._Reference, "divergence", lambda *a: done.append(1) or whole(*a))
    assert sensitivity(model, data, layers, CANDIDATES, "kl", tmp_path) == expected
    assert len(done) == 4 * 14 * 3  # batches, layers, candidates that quantize: each once
    lines = file.read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == len(done)


@pytest.mark.parametrize("signal", ["fisher", "kl"])
def test_rows_are_those_of_the_same_model_data_and_candidates(tmp_path, signal):
    model, layers = tiny_llama().eval(), None
    layers = planned_layers(model)
    first = sensitivity(model, batches(), layers, CANDIDATES, signal, tmp_path)
    assert sensitivity(model, batches(), layers, CANDIDATES, signal, tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1
    sensitivity(model, batches(seed=1), layers, CANDIDATES, signal, tmp_path)
    assert sensitivity(model, batches(), layers, integers((2,), 32), signal, tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 2
    second = sensitivity(model, batches(), layers, CANDIDATES, signal, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert second != first


def test_too_little_data_is_refused():
    model = tiny_llama()
    layers = planned_layers(model)
    with pytest.raises(InputError, match=r"Too little data: 62 tokens .*down_proj has 128 inputs"):
        sensitivity(model, batches(1), layers, CANDIDATES)
    with pytest.raises(InputError, match="Too little data: 0 tokens"):
        sensitivity(model, [], layers, CANDIDATES)


@pytest.mark.parametrize("signal", ["kl", "kfac", "fisher", "gradient", "hutchinson", "output"])
def test_the_layer_that_makes_nan_is_named(signal):
    model = tiny_llama().eval()
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *_: torch.full((2, 32, 32), torch.nan))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.v_proj made NaN"):
        sensitivity(model, batches(), planned_layers(model), CANDIDATES, signal)


def test_a_weight_of_nan_is_named():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj"):
        sensitivity(model, [], planned_layers(model), CANDIDATES, "entropy")


def test_what_cannot_be_measured_is_refused():
    model = tiny_llama()
    with pytest.raises(InputError, match=r"no signal 'fischer'\. Did you mean 'fisher'"):
        sensitivity(model, batches(), planned_layers(model), CANDIDATES, "fischer")
    mixture = tiny_mixtral()
    for signal in ("output", "kfac"):
        with pytest.raises(InputError, match=f"{signal} is for linear layers"):
            sensitivity(mixture, batches(), planned_layers(mixture), CANDIDATES, signal)


def test_calibration_moves_to_the_model():
    model = tiny_llama()
    found = calibration(model, batches(), planned_layers(model))
    assert all(value.device == model.device for batch in found for value in batch.values())
