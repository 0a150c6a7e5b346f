"""The tokenizer of a GGUF file: what llama.cpp finds there, and what transformers makes of it."""

import logging

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qat.errors import InputError
from qat.export.gguf.target import FILE, Gguf
from qat.export.gguf.tokenizer import tokenizer_metadata
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.export.exported import same_files
from tests.export.test_gguf import quantized

VOCABULARY = 320
TEXT = "The year 2026 isn't over; I've seen 13 cats,  and  they'll sleep.\n\n naïve ünïcödé 日本 🦙 x=3.14\t!?"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


SPLITS = {
    "gpt-2": (WORDS, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), None),
    "dbrx": (split(LLAMA_3), None),
    "qwen2": (split(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()),
}
UNKNOWN = {
    "expression": (split(r"\p{L}+|\p{N}+"), None),
    "space in front": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "digits together": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), WORDS]), None),
    "normalizer": (WORDS, normalizers.Lowercase()),
}


def byte_level(pre_tokenizer=WORDS, normalizer=None, bos=False, **options):
    """A trained byte-level BPE with two special tokens and one that is added without being special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_tokens(["<think>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    names = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("name", SPLITS)
def test_the_way_of_splitting_has_a_name(name, caplog):
    tokenizer = byte_level(*SPLITS[name])
    with caplog.at_level(logging.WARNING):
        assert tokenizer_metadata(tokenizer, VOCABULARY)["tokenizer.ggml.pre"] == name
    assert not caplog.records


def test_words_that_are_tokens_are_not_merged_in_llama_3():
    tokenizer = byte_level(*SPLITS["dbrx"])
    tokenizer.backend_tokenizer.model.ignore_merges = True
    assert tokenizer_metadata(tokenizer, VOCABULARY)["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_way_of_splitting_is_the_default_and_said_so(name, caplog):
    tokenizer = byte_level(*UNKNOWN[name])
    with caplog.at_level(logging.WARNING):
        assert tokenizer_metadata(tokenizer, VOCABULARY)["tokenizer.ggml.pre"] == "default"
    assert "may give other tokens" in caplog.text


def test_a_tokenizer_that_llama_cpp_does_not_have(caplog):
    with caplog.at_level(logging.WARNING):
        assert tokenizer_metadata(tiny_tokenizer(), 96) == {"tokenizer.ggml.model": "no_vocab"}
    assert "WordLevel" in caplog.text


def test_no_tokenizer_needs_no_warning(caplog):
    assert tokenizer_metadata(None, 96) == {"tokenizer.ggml.model": "no_vocab"}
    assert not caplog.records


def test_what_the_file_says():
    tokenizer = byte_level(bos=True, chat_template="{{ messages }}")
    said = tokenizer_metadata(tokenizer, VOCABULARY)
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    known = tokenizer.get_vocab()
    assert len(tokens) == len(types) == VOCABULARY
    assert {token: tokens.index(token) for token in known} == known
    assert types[known["<|end|>"]] == gguf.TokenType.CONTROL
    assert types[known["<think>"]] == gguf.TokenType.USER_DEFINED
    assert types[known["a"]] == gguf.TokenType.NORMAL
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCABULARY - 1}]", gguf.TokenType.UNUSED)
    assert said["tokenizer.ggml.bos_token_id"] == said["tokenizer.ggml.eos_token_id"] == 0
    assert said["tokenizer.ggml.padding_token_id"] == 1
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    assert tokenizer_metadata(byte_level(), VOCABULARY)["tokenizer.ggml.add_bos_token"] is False


def test_more_tokens_than_the_model_has_are_refused():
    with pytest.raises(InputError, match=r"a token 300.*the model has 300"):
        tokenizer_metadata(byte_level(), 300)


@pytest.mark.parametrize("name", ["gpt-2", "dbrx", "qwen2"])
def test_transformers_reads_the_same_tokenizer(name, tmp_path):
    """From the file alone; smollm's way of splitting it does not know."""
    tokenizer = byte_level(*SPLITS[name], chat_template="{{ messages[0].content }}")
    folder = Gguf().write(quantized(tiny_llama(vocab_size=VOCABULARY)), tmp_path / "gguf", tokenizer)
    (folder / FILE).rename(tmp_path / FILE)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    text = f"<think>{TEXT}<|end|>"
    assert read(text).input_ids == tokenizer(text).input_ids
    assert read.decode(read(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert (read.eos_token, read.pad_token) == ("<|end|>", "<|pad|>")
    assert read.chat_template == tokenizer.chat_template


def test_the_tokenizer_beside_the_file_is_the_whole_one(tmp_path):
    """Also where GGUF has no place for it; and written again with it, the folder is the same."""
    for number, tokenizer in enumerate((byte_level(*SPLITS["smollm"], bos=True), tiny_tokenizer(chat=True))):
        one, two = tmp_path / f"one{number}", tmp_path / f"two{number}"
        Gguf().write(quantized(tiny_llama(vocab_size=VOCABULARY)), one, tokenizer)
        read = AutoTokenizer.from_pretrained(one)
        assert read(TEXT).input_ids == tokenizer(TEXT).input_ids
        Gguf().write(Gguf().read(one), two, read)
        assert (one / FILE).read_bytes() == (two / FILE).read_bytes()
        tokenizer = AutoTokenizer.from_pretrained(two)
        assert same_files(two, Gguf().write(Gguf().read(two), tmp_path / f"three{number}", tokenizer))
