"""The index of a checkpoint against the safetensors library's own reading, and every kind of damage by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.job.errors import JobError
from pipeline.weights.index import open_checkpoint, read_header

INDEX = "model.safetensors.index.json"
TENSORS = {
    "wte.weight": torch.randn(7, 5),
    "bf16": torch.randn(3, 4).to(torch.bfloat16),
    "fp16": torch.randn(2, 2, 2).to(torch.float16),
    "fp64": torch.randn(3, dtype=torch.float64),
    "int64": torch.arange(5),
    "int32": torch.arange(5, dtype=torch.int32),
    "int16": torch.arange(5, dtype=torch.int16),
    "int8": torch.arange(5, dtype=torch.int8),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def same_as_the_library(checkpoint):
    """Compares names, types, shapes and the very bytes; returns how many tensors there were."""
    seen = 0
    for file in checkpoint.files:
        content = file.read_bytes()
        with safe_open(file, "pt") as library:
            names = set(library.keys())
            assert {entry.name for entry in checkpoint.entries.values() if entry.file == file} == names
            for name in names:
                entry, tensor = checkpoint.entries[name], library.get_tensor(name)
                assert (entry.dtype, entry.shape, entry.numel) == (tensor.dtype, tuple(tensor.shape), tensor.numel())
                stored = content[entry.start : entry.start + entry.bytes]
                assert stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                seen += 1
    return seen


def refused(folder):
    with pytest.raises(JobError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_by_the_library(file):
    with pytest.raises((SafetensorError, OSError)), safe_open(file, "pt") as library:
        library.keys()


def with_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_single_file_is_read_as_the_library_reads_it(single):
    checkpoint = open_checkpoint(single)
    assert same_as_the_library(checkpoint) == len(TENSORS)
    assert checkpoint.bytes == sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())


def test_shards_are_read_as_the_library_reads_them(llama_base):
    checkpoint = open_checkpoint(llama_base)
    assert len(checkpoint.files) > 1
    assert same_as_the_library(checkpoint) == len(json.loads((llama_base / INDEX).read_text())["weight_map"])


def test_entries_come_in_the_order_of_their_data(single):
    starts = [entry.start for entry in read_header(single / "model.safetensors")]
    assert starts == sorted(starts)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(single, kept):
    file = single / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    refused_by_the_library(file)
    message = refused(single)
    assert message.startswith(f"{file}: truncated: ")
    assert "Fetch" in message


def test_a_header_longer_than_its_file_is_refused_by_name(single):
    file = single / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused_by_the_library(file)
    assert refused(single).startswith(f"{file}: truncated: ")


@pytest.mark.parametrize("header", [b"{not json", b"\xff\xfe{}", b"[]", b"3", b'"text"'])
def test_a_corrupt_header_is_refused_by_name(single, header):
    file = single / "model.safetensors"
    with_header(file, header)
    refused_by_the_library(file)
    assert refused(single).startswith(f"{file}: not a safetensors file")


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]},
        {"dtype": "F32", "shape": [3]},
        {"dtype": "F32", "shape": ["3"], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]},
        [],
    ],
)
def test_an_unsound_tensor_is_refused_by_name(single, info):
    file = single / "model.safetensors"
    with_header(file, {"odd": info}, b"\0" * 12)
    refused_by_the_library(file)
    assert refused(single).startswith(f'{file}: tensor "odd" ')


def test_a_dtype_that_is_not_read_is_not_called_damage(single):
    file = single / "model.safetensors"
    with_header(file, {"odd": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}, b"\0" * 3)
    message = refused(single)
    assert message.startswith(f'{file}: tensor "odd" is stored as F8_E4M3, which is not read here')
    assert "BF16" in message


@pytest.fixture
def sharded(llama_base, tmp_path):
    return shutil.copytree(llama_base, tmp_path / "base")


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_naming_a_missing_file_is_refused_by_that_files_name(sharded):
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    message = refused(sharded)
    assert message.startswith(f"{gone}: ")
    assert "not here" in message


def test_an_index_naming_a_missing_tensor_is_refused_by_that_tensors_name(sharded):
    change_index(sharded, lambda names: names.update({"model.ghost.weight": sorted(names.values())[0]}))
    message = refused(sharded)
    assert INDEX in message
    assert '"model.ghost.weight"' in message


def test_an_index_naming_the_wrong_file_is_refused(sharded):
    def move(names):
        name = next(iter(names))
        names[name] = next(file for file in names.values() if file != names[name])

    change_index(sharded, move)
    assert "does not hold it" in refused(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}'])
def test_a_malformed_index_is_refused_by_name(sharded, text):
    (sharded / INDEX).write_text(text)
    assert refused(sharded).startswith(f"{sharded / INDEX}: not a valid safetensors index")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_folder_of_pickles_only_is_told_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    message = refused(tmp_path)
    assert str(tmp_path) in message
    assert f"{name}: convert it to safetensors" in message


def test_a_folder_without_weights_is_told_what_is_missing(tmp_path):
    message = refused(tmp_path)
    assert "model.safetensors" in message
    assert "convert" not in message


@pytest.mark.parametrize("damage", ["trailing", "gap", "overlap"])
def test_what_the_library_refuses_is_refused(damage, tmp_path):
    import struct

    file = tmp_path / "model.safetensors"
    second = {"trailing": (4, 8), "gap": (8, 12), "overlap": (2, 6)}[damage]
    header = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": o} for n, o in (("a", (0, 4)), ("b", second))}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(JobError, match="corrupt"):
        open_checkpoint(tmp_path)
