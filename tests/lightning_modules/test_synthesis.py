"""`qat-synthesize`: texts that a model writes as LLM-QAT says, and training on them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_modules import synthesize as synthesize_command
from lightning_modules.data import GeneratedDataModule
from lightning_modules.data.windows import NOT_LEARNED
from lightning_modules.models import LoadedModel
from lightning_modules.synthesis import Settings, write, writing
from lightning_modules.synthesis.sampling import first_tokens, sample_texts
from qat.errors import InputError
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.lightning_modules.test_cli import Shell, forks, shell, weights
from tests.lightning_modules.test_evaluation import composed

__all__ = ["Shell", "forks", "shell"]

SETTINGS = Settings(texts=40, length=24, batch_size=6)


@pytest.fixture
def loaded():
    """Its logits are large, so that some tokens are much likelier than others."""
    model = tiny_llama(tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return LoadedModel(model, tiny_tokenizer(), "tiny")


def texts_of(folder):
    """The texts apart: each starts where a token is marked."""
    tokens = np.load(folder / "tokens.npy")
    starts = np.flatnonzero(tokens & NOT_LEARNED)
    return [torch.from_numpy((part & ~NOT_LEARNED).astype(np.int64)) for part in np.split(tokens, starts)[1:]]


def greedy_prefix(model, text):
    """How many tokens after the first are the likeliest."""
    likeliest = model(input_ids=text[None]).logits[0, :-1].argmax(-1)
    same = (likeliest == text[1:]).long()
    return int(same.cumprod(0).sum())


def test_after_the_first_three_to_five_tokens_are_the_likeliest_and_the_rest_are_drawn(loaded, tmp_path):
    write(loaded, tmp_path / "text", SETTINGS)
    texts = texts_of(tmp_path / "text")
    assert len(texts) == SETTINGS.texts
    prefixes = [greedy_prefix(loaded.model, text) for text in texts]
    assert all(prefix >= min(3, len(text) - 1) for prefix, text in zip(prefixes, texts, strict=True))
    assert {3, 4, 5} <= set(prefixes)
    assert sum(prefix <= 6 for prefix in prefixes) > len(texts) / 2  # a drawn token may be the likeliest too
    assert all(len(text) == 24 or text[-1] == 0 for text in texts)
    assert all(not (text[1:-1] == 0).any() for text in texts)  # a text ends with its end
    assert len({tuple(text.tolist()) for text in texts}) == len(texts)


def test_drawn_tokens_have_the_distribution_of_the_model(loaded):
    """One step after a fixed token, temperature included: within four standard deviations, each of 96.

    Whatever the model's own settings leave out.
    """
    loaded.model.generation_config.update(min_p=0.5, top_p=0.3, bad_words_ids=[[3]], repetition_penalty=3.0)
    first, temperature = torch.full((4000,), 7), 1.7
    texts = torch.stack(sample_texts(loaded.model, first, 2, (0, 0), temperature, None, seed=0, batch=0))
    logits = loaded.model(input_ids=torch.tensor([[7]])).logits[0, -1]
    p = (logits / temperature).softmax(-1)
    found = torch.bincount(texts[:, 1], minlength=96) / len(first)
    assert ((found - p).abs() < 4 * (p * (1 - p) / len(first)).sqrt() + 1e-3).all()
    assert (p > 0.02).sum() > 3
    assert loaded.model.generation_config.min_p == 0.5  # as it was


def test_every_token_but_special_ones_is_the_first_equally_often():
    allowed = list(range(1, 96))
    first = first_tokens(allowed, 2 * 95 + 10, seed=3)
    assert sorted(first[:95].tolist()) == sorted(first[95:190].tolist()) == allowed
    assert not torch.equal(first[:95], first[95:190])
    assert not torch.equal(first, first_tokens(allowed, 200, seed=4))
    assert torch.equal(first[:50], first_tokens(allowed, 50, seed=3))


def test_the_same_seed_writes_the_same(loaded, tmp_path):
    def tokens(name, **changed):
        torch.manual_seed(len(name))  # what was drawn before does not matter
        return write(loaded, tmp_path / name, replace(SETTINGS, **changed)).read_bytes()

    assert tokens("a") == tokens("second") != tokens("third", seed=1)


def test_an_interrupted_text_goes_on_with_the_same_bits(loaded, tmp_path, monkeypatch):
    write(loaded, tmp_path / "whole", SETTINGS)
    calls = []

    def failing(*args):
        calls.append(args[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample_texts(*args)

    monkeypatch.setattr(writing, "sample_texts", failing)
    with pytest.raises(KeyboardInterrupt):
        write(loaded, tmp_path / "part", SETTINGS)
    with pytest.raises(InputError, match=r"is not complete: give the command that writes it again"):
        data_of(tmp_path / "part").setup()
    write(loaded, tmp_path / "part", SETTINGS)
    assert calls == [0, 1, 2, 3, 3, 4, 5, 6]  # nothing twice but the batch that was not finished
    for name in ("tokens.npy", "synthesis.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "part").iterdir()) == ["synthesis.json", "tokens.npy"]
    write(loaded, tmp_path / "part", SETTINGS)
    assert len(calls) == 8  # what is complete is not written again


def data_of(folder, tokenizer=None, **options):
    return GeneratedDataModule(tokenizer or tiny_tokenizer(), str(folder), sequence_length=16, batch_size=4, **options)


def test_windows_are_the_tokens_as_they_were_written(loaded, tmp_path, text_file):
    """Not decoded and encoded again; and the first token of a text, which nothing predicts, is not learned."""
    write(loaded, tmp_path / "text", SETTINGS)
    data = data_of(tmp_path / "text", val_share=0.1)
    data.setup()
    windows = [data.train_windows[index] for index in range(len(data.train_windows))]
    whole = torch.cat(texts_of(tmp_path / "text"))
    assert torch.equal(torch.cat([window["input_ids"] for window in windows]), whole[: 16 * len(windows)])
    assert windows[0]["labels"][0] == -100
    assert torch.equal(windows[0]["labels"][1:], windows[0]["input_ids"][1:])
    starts = (np.load(tmp_path / "text" / "tokens.npy") & NOT_LEARNED) != 0
    labels = torch.cat([window["labels"] for window in windows])
    assert torch.equal(labels == -100, torch.from_numpy(starts[: len(labels)]))
    elsewhere = data_of(tmp_path / "text", val_path=str(text_file), cache_dir=str(tmp_path / "cache"))
    elsewhere.setup()
    assert elsewhere.tokenizer.decode(elsewhere.held_out[0]["input_ids"]) == "the quick brown "


def test_folders_that_are_refused(loaded, tmp_path, text_file):
    write(loaded, tmp_path / "text", SETTINGS)
    other = LoadedModel(tiny_llama().eval(), loaded.tokenizer, "tiny")
    for model, settings, message in (
        (loaded, replace(SETTINGS, seed=1), r"with seed 0 \(now 1\): give a folder of its own"),
        (loaded, replace(SETTINGS, greedy=(3, 4)), r"with greedy \[3, 5\] \(now \[3, 4\]\)"),
        (other, SETTINGS, r"with model \w{16} \(now \w{16}\)"),
    ):
        with pytest.raises(InputError, match=message):
            write(model, tmp_path / "text", settings)
    with pytest.raises(InputError, match="holds no texts of a model: give a folder that is not there"):
        write(loaded, text_file.parent, SETTINGS)
    with pytest.raises(InputError, match=r"holds no text of a model. qat-synthesize folder=... writes"):
        data_of(text_file.parent).setup()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    with pytest.raises(InputError, match="has the tokens of tiny, and this model has others"):
        data_of(tmp_path / "text", tokenizer).setup()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("texts=0", "texts is 0"),
        ("length=1", "length is 1"),
        ("length=100", "knows 64 positions, not 100: set a smaller length"),
        ("greedy=[5,3]", r"greedy is \[5, 3\]; .* set it to \[3,5\]"),
        ("greedy=[3]", r"greedy is \[3\]"),
        ("greedy=[0.5,1]", r"greedy is \[0.5, 1\]"),
        ("greedy=3", r"greedy is 3; .* set it to \[3,5\]"),
        ("temperature=0", "temperature is 0; it divides logits"),
        ("batch_size=0", "batch_size is 0"),
        ("seed=-1", "seed is -1"),
        ("threads=0", "threads is 0"),
        ("accelerator=tpu", "accelerator is 'tpu'"),
    ],
)
def test_impossible_settings_are_refused(changed, message, tiny_folder, tmp_path):
    words = ("model=hf", f"model.name={tiny_folder}", f"folder={tmp_path}/text", "length=32", changed)
    with pytest.raises(InputError, match=message):
        synthesize_command._run(composed("synthesize", tmp_path, *words))
    assert not (tmp_path / "text").exists()


@pytest.mark.usefixtures("forks")
def test_from_no_data_to_a_trained_artifact(shell, tiny_folder, monkeypatch, capsys):
    """The command, and distillation from a cache on what it wrote."""
    monkeypatch.chdir(shell.folder)
    words = ("folder=generated", "texts=60", "length=40", "threads=1", "accelerator=cpu")
    synthesize_command._run(composed("synthesize", shell.folder, "model=hf", f"model.name={tiny_folder}", *words))
    made = json.loads((shell.folder / "generated" / "synthesis.json").read_text())
    assert (made["seed"], made["greedy"], made["name"]) == (0, [3, 5], str(tiny_folder))
    assert f"60 texts, {len(np.load('generated/tokens.npy'))} tokens: generated" in capsys.readouterr().out
    shell.options = [option for option in shell.options if not option.startswith(("data=", "data.path="))]
    options = ["method=distill", "debug=fast", "data=generated", "data.path=generated", "distill.weight=1"]
    output = shell.run(*options, "distill.top_k=8", "distill.cache=words", "hydra.run.dir=run")
    assert "the same logits as the trained model" in output
    assert weights(shell.folder / "run")
