"""`qat-eval` and `qat-generate`: what they measure, and as a user meets them."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from torch.nn import functional as F

import qat
from lightning_modules import evaluate as eval_command
from lightning_modules import generate as generate_command
from lightning_modules.data.windows import IGNORED
from lightning_modules.evaluation import Text, evaluate, windows
from lightning_modules.evaluation.tasks import check_tasks, task_scores
from lightning_modules.models import LoadedModel
from qat.errors import InputError
from qat.quantizers import MinMaxQuantizer
from tests.conftest import tiny_llama, tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


def text_of(tokens, learned=None):
    ids = torch.randint(96, (tokens,), generator=torch.Generator().manual_seed(1))
    return Text(ids, ids if learned is None else torch.where(learned, ids, IGNORED))


def quantized(model):
    scheme = qat.Scheme(weight=partial(MinMaxQuantizer, bits=3, granularity="per_channel"))
    return qat.convert(qat.prepare(copy.deepcopy(model), scheme)).eval()


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(100, 16, 16), (100, 16, 5), (97, 16, 1), (10, 16, 8), (33, 16, 16)]
)
def test_windows_predict_every_token_once(tokens, length, stride):
    found = list(windows(tokens, length, stride))
    predicted = [token for w in found for token in range(w.first, w.end)]
    assert predicted == sorted(set(predicted))
    missing = set(range(tokens)) - set(predicted)
    assert missing == ({w.start for w in found} | set(range(found[-1].end, tokens)) if stride == length else {0})
    assert all(w.end - w.start <= length and w.first > w.start for w in found)
    if stride < length:
        assert all(w.first - w.start >= length - stride for w in found[1:])


@pytest.mark.parametrize("stride", [16, 6])
def test_figures_are_those_of_the_definition(stride):
    model = tiny_llama(initializer_range=0.2).eval()
    other = quantized(model)
    learned = torch.rand(75, generator=torch.Generator().manual_seed(2)) < 0.7
    text = text_of(75, learned)
    found = evaluate(other, text, 16, stride, batch_size=3, reference=model)
    rows = []
    for w in windows(75, 16, stride):
        with torch.no_grad():
            log_p, log_q = (m(text.ids[None, w.start : w.end]).logits[0].log_softmax(-1) for m in (model, other))
        for token in range(w.first, w.end):
            if learned[token]:
                p, q, right = log_p[token - 1 - w.start], log_q[token - 1 - w.start], text.ids[token]
                rows.append((-q[right], q.argmax() == right, (p.exp() * (p - q)).sum(), p.argmax() == q.argmax()))
    nll, right, kl, agreement = (
        torch.tensor([float(value) for value in column]).mean() for column in zip(*rows, strict=True)
    )
    assert found.tokens == len(rows)
    expected = (float(nll.exp()), float(right), float(kl), float(agreement))
    assert found[1:] == pytest.approx(expected, rel=1e-4)
    assert found.kl > 0.01
    assert 0 < found.agreement < 1


def test_without_a_reference_there_is_nothing_to_compare():
    model = tiny_llama().eval()
    alone, itself = (evaluate(model, text_of(64), 32, 32, reference=r) for r in (None, model))
    assert (alone.kl, alone.agreement) == (None, None)
    assert (itself.kl, itself.agreement) == (0.0, 1.0)
    assert alone.perplexity == itself.perplexity


def test_the_perplexity_is_that_of_training():
    model, text = tiny_llama().eval(), text_of(64)
    ids = text.ids.view(2, 32)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 96), ids[:, 1:].reshape(-1))
    assert math.log(evaluate(model, text, 32, 32).perplexity) == pytest.approx(float(loss), rel=1e-5)


def test_what_cannot_be_measured_is_refused():
    model, text = tiny_llama().eval(), text_of(64)
    with pytest.raises(InputError, match="stride is 17"):
        evaluate(model, text, 16, 17)
    with pytest.raises(InputError, match="at least 2 tokens"):
        evaluate(model, text, 1, 1)
    with pytest.raises(InputError, match="predicts 96 tokens and its reference 128"):
        evaluate(model, text, 16, 16, reference=tiny_llama(vocab_size=128).eval())
    with pytest.raises(InputError, match="No token of the evaluation text"):
        evaluate(model, text_of(64, torch.zeros(64, dtype=torch.bool)), 16, 16)
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        evaluate(model, text, 16, 16)


def composed(command, folder, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        given = ["accelerator=cpu", "threads=1", f"hydra.runtime.output_dir={folder}", *overrides]
        cfg = compose(command, given, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@pytest.fixture
def artifact(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    return qat.save(quantized(model), tmp_path / "artifact", tokenizer=tiny_tokenizer())


@pytest.fixture
def options(tiny_folder, text_file, tmp_path):
    return [
        *("model=hf", f"model.name={tiny_folder}", "data=text", f"data.path={text_file}", "window=32"),
        f"paths.cache_dir={tmp_path}/cache",
    ]


def test_the_command_measures_an_artifact_beside_its_model(artifact, options, tmp_path, capsys):
    eval_command._run(composed("evaluate", tmp_path / "run", *options, f"artifact={artifact}", "stride=8"))
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    model, own = report["rows"]
    assert (report["window"], report["stride"]) == (32, 8)
    assert (model["kl"], model["bits_per_weight"]) == (None, 32.0)
    assert own["kl"] > 0
    assert 3 < own["bits_per_weight"] < 4
    assert own["mib"] == sum(file.stat().st_size for file in artifact.iterdir()) / 2**20
    output = capsys.readouterr().out
    assert "windows of 32, 8 apart" in output
    assert f"{own['perplexity']:.2f}" in output


def test_an_artifact_alone_brings_its_own_tokenizer(artifact, options, tmp_path):
    eval_command._run(composed("evaluate", tmp_path / "run", *options, f"artifact=[{artifact}]", "reference=false"))
    (own,) = json.loads((tmp_path / "run" / "eval.json").read_text())["rows"]
    assert own["model"] == str(artifact)
    assert own["kl"] is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("stride=64", "stride is 64"),
        ("batch_size=0", "batch_size is 0"),
        ("reference=false", "There is no model"),
        ("accelerator=tpu", "accelerator is 'tpu'"),
        ("task_folder=nowhere", "there is none: add tasks"),
        ("artifact=nowhere", "nowhere is not an artifact"),
        ("window=128", "knows 64 positions, not 128"),
        ("seed=-1", "seed is -1"),
        ("threads=0", "threads is 0"),
    ],
)
def test_mistakes_are_named(changed, message, options, tmp_path):
    cfg = composed("evaluate", tmp_path, *options, changed)
    with pytest.raises(InputError, match=message):
        eval_command._run(cfg)


def test_tasks_need_their_library(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lightning-qat\[eval\]"):
        check_tasks(["arc_easy"], None, None)
    check_tasks([], None, None)


def test_tasks_by_their_own_library(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lightning-qat[eval]'")
    rows = [{"question": "a", "choices": ["b", "c"], "answer": 0}] * 3
    (tmp_path / "letters.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/letters.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    loaded = LoadedModel(tiny_llama().eval(), tiny_tokenizer(), "tiny")
    found = task_scores(loaded, ["letters"], str(tmp_path), None, 1)
    assert found in ({"letters acc": 0.0}, {"letters acc": 1.0})
    check_tasks(["letters"], str(tmp_path), None)
    with pytest.raises(InputError, match=r"There is no task 'leters'\. Did you mean 'letters'"):
        check_tasks(["leters"], str(tmp_path), None)


def test_models_go_on_with_prompts_side_by_side(artifact, tiny_folder, tmp_path, capsys):
    words = ("model=hf", f"model.name={tiny_folder}", f"artifact={artifact}", 'prompt=["ab","cde"]', "max_new_tokens=5")
    generate_command._run(composed("generate", tmp_path, *words))
    output = capsys.readouterr().out
    assert output.index("ab") < output.index("cde")
    assert output.count("artifact") == 2 or output.count("╭") == 4


def test_a_continuation_is_what_the_model_generates(tmp_path):
    loaded = LoadedModel(tiny_llama().eval(), tiny_tokenizer(chat=True), "tiny")
    cfg = composed("generate", tmp_path, "prompt=abc", "max_new_tokens=6")
    ids = loaded.tokenizer("abc", return_tensors="pt")["input_ids"]
    expected = loaded.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 3:]
    assert generate_command.continuation(loaded, "abc", cfg) == loaded.tokenizer.decode(
        expected, skip_special_tokens=True
    )
    cfg.temperature = 1.0
    first, second = (generate_command.continuation(loaded, "abc", cfg) for _ in range(2))
    cfg.seed = 1
    assert first == second != generate_command.continuation(loaded, "abc", cfg)
    cfg.chat = True
    assert isinstance(generate_command.continuation(loaded, "abc", cfg), str)
    cfg.chat = False
    with pytest.raises(InputError, match="no tokens"):
        generate_command.continuation(loaded, "", cfg)


@pytest.mark.parametrize(
    "changed", ["max_new_tokens=0", "temperature=-1", "top_p=0", "top_p=much", "top_k=-1", "prompt=[]", "seed=-1"]
)
def test_impossible_draws_are_refused(changed, tmp_path):
    with pytest.raises(InputError, match=changed.partition("=")[0]):
        generate_command._run(composed("generate", tmp_path, "prompt=a", changed))


def test_what_would_be_ignored_or_does_not_fit_is_refused(artifact, tmp_path):
    alone = (f"artifact={artifact}", "reference=false", "prompt=abc")
    for changed, message in (
        (["top_k=3"], "temperature is 0"),
        (["max_new_tokens=62"], "knows 64 positions, not 65"),
        (["chat=true"], "has no chat template"),
    ):
        with pytest.raises(InputError, match=message):
            generate_command._run(composed("generate", tmp_path, *alone, *changed))


def test_a_broken_model_has_an_infinite_perplexity():
    model = tiny_llama().eval()
    model.model.norm.weight.data *= 1e6
    assert evaluate(model, text_of(64), 32, 32).perplexity == math.inf
