"""Safetensors, written and read tensor by tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.errors import InputError
from qat.export.tensor_files import TensorFiles, write_tensors

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "halves": torch.randn(3, 5).to(torch.bfloat16),
    "transposed": torch.randn(4, 6).t(),
    "scalar": torch.tensor(3.0),
    "nothing": torch.empty(0, 3),
    "eights": torch.ones(3).to(torch.float8_e4m3fn),
    "exponents": torch.ones(5).to(torch.float8_e8m0fnu),
    "words": torch.arange(9, dtype=torch.int32),
}
INDEX = "model.safetensors.index.json"


def written(folder, shard_bytes=10**9):
    folder.mkdir(exist_ok=True)
    write_tensors(folder, lambda: iter(TENSORS.items()), shard_bytes)
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 40, 1])
def test_what_is_written_is_read_by_us_and_by_the_library(shard_bytes, tmp_path):
    folder = written(tmp_path, shard_bytes)
    files = TensorFiles(folder)
    paths = list(folder.glob("*.safetensors"))
    assert len(paths) == {10**9: 1, 40: 4, 1: len(TENSORS)}[shard_bytes]
    library = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert set(files) == set(library) == set(TENSORS)
    for name, tensor in TENSORS.items():
        for found in (files[name], library[name]):
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())
        assert files.shape(name) == list(tensor.shape)


def test_every_number_lies_at_a_multiple_of_its_size(tmp_path):
    data = (written(tmp_path) / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_the_index_is_that_of_transformers(tmp_path):
    index = json.loads((written(tmp_path, 40) / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(InputError, match=r"it has no model\.safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_refused_unopened(name, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('a pickle ran')",))

    torch.save(Evil(), tmp_path / name)
    with pytest.raises(InputError, match=f"{name}, a pickle, which can run code"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "model.bin"])
def test_an_index_that_leads_out_of_the_folder(place, tmp_path):
    save_file({"bytes": TENSORS["bytes"]}, tmp_path / "secret.safetensors")
    folder = written(tmp_path / "model", 40)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["bytes"] = place
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="no safetensors file of its folder"):
        TensorFiles(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"weight_map": {"bytes": 3}}', "is damaged"),
        ('{"weight_map": {"bytes": "absent.safetensors"}}', r"absent\.safetensors cannot be read"),
        (
            '{"weight_map": {"unknown": "model-00001-of-00004.safetensors"}}',
            "holds unknown, and it does not",
        ),
    ],
)
def test_a_damaged_index(content, message, tmp_path):
    folder = written(tmp_path, 40)
    (folder / INDEX).write_text(content)
    with pytest.raises(InputError, match=message):
        TensorFiles(folder)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_file(kept, tmp_path):
    path = written(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        TensorFiles(tmp_path)


def test_an_unknown_tensor(tmp_path):
    with pytest.raises(InputError, match="has no tensor absent"):
        TensorFiles(written(tmp_path))["absent"]
