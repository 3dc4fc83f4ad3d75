"""Ranged reads equal slices of what the safetensors library reads, in the file's dtype and converted."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.job.errors import JobError
from pipeline.weights.index import open_checkpoint
from pipeline.weights.read import Reader

LARGE = 1_300_000
"""Elements: more than one piece of the converting buffer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tensors = {
        "fp32": torch.randn(13, 7),
        "bf16": torch.randn(13, 7).to(torch.bfloat16),
        "fp16": torch.randn(5, 3, 2).to(torch.float16),
        "fp64": torch.randn(11, dtype=torch.float64),
        "int64": torch.arange(9),
        "bool": torch.tensor([True, False, True, True]),
        "large": torch.randn(LARGE).to(torch.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def slices(numel):
    yield from ((0, numel), (0, 0), (numel, 0), (0, 1), (numel - 1, 1), (numel // 3, numel // 2))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp64", "int64", "bool", "large"])
def test_a_run_of_elements_equals_the_librarys_slice(folder, name):
    entry = open_checkpoint(folder).entries[name]
    with safe_open(folder / "model.safetensors", "pt") as library, Reader() as reader:
        whole = library.get_tensor(name).flatten()
        wanted = 0
        for first, count in slices(entry.numel):
            out = torch.zeros(count, dtype=entry.dtype)
            reader.read(entry, first, out)
            assert torch.equal(out, whole[first : first + count])
            wanted += count * entry.dtype.itemsize
        assert reader.bytes_read == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp64", "large"])
def test_conversion_is_torchs_own(folder, name, dtype):
    entry = open_checkpoint(folder).entries[name]
    with safe_open(folder / "model.safetensors", "pt") as library, Reader() as reader:
        whole = library.get_tensor(name).flatten()
        for first, count in slices(entry.numel):
            out = torch.zeros(count, dtype=dtype)
            reader.read(entry, first, out)
            assert torch.equal(out, whole[first : first + count].to(dtype))
        # Nothing but the asked elements is read, whatever they become.
        assert reader.bytes_read == sum(count for _, count in slices(entry.numel)) * entry.dtype.itemsize


def test_a_part_of_a_larger_destination_is_filled_and_nothing_beside_it(folder):
    entry = open_checkpoint(folder).entries["fp32"]
    with safe_open(folder / "model.safetensors", "pt") as library, Reader() as reader:
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full((20,), -1.0, dtype=dtype)
            reader.read(entry, 3, out[5:15])
            assert torch.equal(out[5:15], library.get_tensor("fp32").flatten()[3:13].to(dtype))
            assert (out[:5] == -1).all()
            assert (out[15:] == -1).all()


def test_a_file_cut_short_after_its_header_was_read_is_refused_by_tensor(tmp_path):
    save_file({"w": torch.randn(100)}, tmp_path / "model.safetensors")
    entry = open_checkpoint(tmp_path).entries["w"]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with Reader() as reader:
        reader.read(entry, 0, torch.empty(99))
        with pytest.raises(JobError, match=r'model\.safetensors: ends inside tensor "w"'):
            reader.read(entry, 0, torch.empty(100))
