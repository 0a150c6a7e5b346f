import json

import pytest
import torch

from lightning_modules.data import HubDataModule, TextDataModule
from lightning_modules.data.encode import encode_row
from lightning_modules.data.rows import read_rows, text_files
from lightning_modules.data.windows import ResumableSampler, WindowStream
from qat.errors import InputError
from tests.conftest import tiny_tokenizer


def module(path, tmp_path, **options):
    settings = {"sequence_length": 32, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    return TextDataModule(tiny_tokenizer(), str(path), **(settings | options))


def stream(data):
    return torch.cat([batch["input_ids"] for batch in data.train_dataloader()])


def test_the_order_depends_on_the_seed_alone(text_file, tmp_path):
    first, again = module(text_file, tmp_path), module(text_file, tmp_path)
    assert torch.equal(stream(first), stream(again))
    assert not torch.equal(stream(first), stream(module(text_file, tmp_path, seed=1)))
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_windows_are_the_text_in_order(text_file, tmp_path):
    data = module(text_file, tmp_path, val_share=0.5)
    data.setup()
    text = tiny_tokenizer().decode(torch.cat([data.train_windows[i]["input_ids"] for i in range(3)]))
    assert text.startswith("the quick brown fox")
    assert text in text_file.read_text().replace("<|endoftext|>\n", "").replace("\n", " ")


def test_resuming_in_the_middle_of_an_epoch_yields_the_rest(text_file, tmp_path):
    whole = stream(module(text_file, tmp_path))
    resumed = module(text_file, tmp_path)
    resumed.load_state_dict({"epoch": 0, "batches": 5})
    assert torch.equal(stream(resumed), whole[5 * 4 :])


def test_epochs_differ_and_processes_share_one():
    def order(epoch, rank=0, world_size=1):
        sampler = ResumableSampler(10, seed=3, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0)) == list(range(10))
    assert order(0) != order(1)
    halves = [order(0, rank, 2) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(10))


def test_streams_resume_too():
    rows = [{"text": f"row number {i} of the stream"} for i in range(40)]
    windows = list(WindowStream(lambda: rows, tiny_tokenizer(), 16))
    later = WindowStream(lambda: rows, tiny_tokenizer(), 16)
    later.skip = 7
    rest = list(later)
    assert len(rest) == len(windows) - 7
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rest, windows[7:], strict=True))


@pytest.mark.parametrize("chat", [True, False], ids=["template", "plain"])
def test_prompts_are_masked(chat):
    tokenizer = tiny_tokenizer(chat)
    ids, learned = encode_row({"instruction": "2+2?", "response": "four"}, tokenizer)
    answer = tokenizer.decode([i for i, learn in zip(ids, learned, strict=True) if learn])
    assert answer == "four<|end|>"
    assert "2+2?" in tokenizer.decode(ids)


def test_every_answer_of_a_chat_is_learned():
    tokenizer = tiny_tokenizer(chat=True)
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, ["a?", "one", "b?", "two"], strict=True)]
    ids, learned = encode_row({"messages": messages}, tokenizer)
    assert tokenizer.decode([i for i, learn in zip(ids, learned, strict=True) if learn]) == "one<|end|>two<|end|>"


def test_a_chat_is_the_whole_template_and_system_turns_are_read_only():
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a?"}]
    messages.append({"role": "assistant", "content": "one"})
    ids, learned = encode_row({"messages": messages}, tokenizer)
    assert tokenizer.decode(ids) == "[system]be brief[user]a?[assistant]one<|end|>"
    messages[-1]["content"] = "  one"
    ids, learned = encode_row({"messages": messages}, tokenizer)
    assert tokenizer.decode([i for i, learn in zip(ids, learned, strict=True) if learn]) == "  one<|end|>"
    messages[-1]["content"] = "one"
    ids, learned = encode_row({"messages": messages}, tokenizer)
    assert sum(learned) == len("one") + 1


REWRITES = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"
TWO_TURNS = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (REWRITES, TWO_TURNS, "renders earlier turns differently"),
        (REFUSES, TWO_TURNS, "refuses a chat: roles must alternate"),
        (None, TWO_TURNS[1:2], "starts with the assistant"),
        (None, [], "where a message belongs"),
        (None, "hello", "where a message belongs"),
        (None, ["hello"], "'hello' where a message belongs"),
        (None, [{"role": "user"}], "give each one a 'role' and a 'content'"),
    ],
    ids=["rewrites", "refuses", "assistant first", "empty", "text", "strings", "no content"],
)
def test_chats_that_cannot_be_encoded_are_refused(template, messages, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        encode_row({"messages": messages}, tokenizer)


def test_processes_share_a_stream_evenly():
    rows = [{"text": f"row number {i} of the stream"} for i in range(41)]
    whole = list(WindowStream(lambda: rows, tiny_tokenizer(), 16))
    halves = [list(WindowStream(lambda: rows, tiny_tokenizer(), 16, rank, 2)) for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == len(whole) // 2
    mixed = [window for pair in zip(*halves, strict=True) for window in pair]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(mixed, whole, strict=False))


def test_a_stream_has_one_reader(tmp_path):
    with pytest.raises(InputError, match=r"set it to 0"):
        HubDataModule(tiny_tokenizer(), str(tmp_path), streaming=True, num_workers=2)


@pytest.mark.parametrize("name", ["batch_size", "val_batch_size"])
def test_empty_batches_are_refused(text_file, tmp_path, name):
    with pytest.raises(InputError, match=f"data.{name} is 0; it starts at 1"):
        module(text_file, tmp_path, **{name: 0})


def test_another_tokenizer_does_not_reuse_tokens(text_file, tmp_path):
    module(text_file, tmp_path).setup()
    data = module(text_file, tmp_path)
    data.tokenizer.eos_token = "z"
    data.setup()
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_masked_tokens_have_the_ignored_label(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": "say x", "response": "x" * 20}) for _ in range(20)))
    data = module(file, tmp_path)
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"] == -100).any()
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert kept.any()


def test_parquet_and_folders(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["alpha beta", "gamma"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\nlines\n")
    rows = [row["text"] for file in text_files(tmp_path) for row in read_rows(file)]
    assert rows == ["alpha beta", "gamma", "one", "two\nlines"]


def written(tmp_path, name, data):
    file = tmp_path / name
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("short.txt", b"too short", "less than one window of 32"),
        ("one.txt", b"x" * 40, "one is held back"),
        ("few.txt", b"x" * 100, "less than one batch of 4: set data.batch_size to at most 2"),
        ("bad.jsonl", b'{"text": "a"}\n{broken\n', "line 2 is not JSON"),
        ("columns.jsonl", b'{"body": "a"}\n', "has the columns body"),
        ("list.jsonl", b"[1]\n", "no JSON object"),
        ("bad.parquet", b"nonsense", "no readable parquet"),
        ("text.docx", b"x", "unknown kind of file"),
    ],
)
def test_bad_text_is_refused_in_one_line(tmp_path, name, data, message):
    with pytest.raises(InputError, match=message):
        module(written(tmp_path, name, data), tmp_path).train_dataloader()


def test_missing_text_offers_the_nearest(tmp_path):
    (tmp_path / "book.txt").write_text("x")
    with pytest.raises(InputError, match=r"Did you mean '.*book.txt'"):
        module(tmp_path / "bok.txt", tmp_path).setup()
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="holds no text"):
        module(tmp_path / "void", tmp_path).setup()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_datasets_by_name(tmp_path, streaming, monkeypatch):
    """A local folder is a dataset of the hub's layout, so `datasets` itself is run, without a network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for split, count in (("train", 60), ("validation", 20)):
        lines = (json.dumps({"text": f"row {i} of {split}, " * 4}) for i in range(count))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    options = {"sequence_length": 32, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    data = HubDataModule(tiny_tokenizer(), str(tmp_path), **options)
    batches = list(data.train_dataloader())
    assert all(batch["input_ids"].shape[1] == 32 for batch in batches)
    resumed = HubDataModule(tiny_tokenizer(), str(tmp_path), **options)
    resumed.load_state_dict({"epoch": 0, "batches": 3})
    rest = list(resumed.train_dataloader())
    assert len(rest) == len(batches) - 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rest, batches[3:], strict=True))
    assert len(list(data.val_dataloader())) > 0


def test_an_unknown_dataset_is_refused(tmp_path):
    data = HubDataModule(tiny_tokenizer(), str(tmp_path / "nothing"), cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="Cannot load the dataset"):
        data.setup()
