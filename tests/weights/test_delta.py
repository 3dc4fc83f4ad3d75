"""A delta folder: what was written is read back, and damage or another thing in its place is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.job.errors import JobError
from pipeline.weights.delta import keys_of, read_delta, write_delta
from pipeline.weights.digest import sha256_of
from pipeline.weights.manifest import Module

NAME = "transformer.h.0.attn.c_attn"
MODULE = Module(name=NAME, tensor="h.0.attn.c_attn.weight", transposed=True, rank=2, alpha=4.0)
FIELDS = {
    "base": "gpt2",
    "base_digest": "0" * 64,
    "base_files": {},
    "job_digest": "1" * 64,
    "step": 3,
    "parameters": 16,
    "modules": (MODULE,),
}


def tensors(module=NAME):
    generator = torch.Generator().manual_seed(0)
    a_key, b_key = keys_of(module)
    return {a_key: torch.randn(2, 4, generator=generator), b_key: torch.randn(4, 2, generator=generator)}


@pytest.fixture
def delta(tmp_path):
    write_delta(tmp_path / "delta", tensors(), {"peft_type": "LORA"}, FIELDS)
    return tmp_path / "delta"


def refused(folder):
    with pytest.raises(JobError) as caught:
        read_delta(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_what_was_written_is_read_back(delta):
    stored = read_delta(delta)
    manifest, pairs = stored.manifest, stored.pairs
    a, b = tensors().values()
    assert manifest.modules == (MODULE,)
    assert (manifest.base, manifest.step, manifest.parameters) == ("gpt2", 3, 16)
    assert torch.equal(pairs[NAME][0], a)
    assert torch.equal(pairs[NAME][1], b)
    assert sorted(path.name for path in delta.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]


def test_a_newer_delta_takes_the_place_of_the_older(delta):
    write_delta(delta, tensors(), {}, {**FIELDS, "step": 9})
    assert read_delta(delta).manifest.step == 9
    assert [path.name for path in delta.parent.iterdir()] == ["delta"]


def test_empty_tensors_are_never_written(tmp_path):
    with pytest.raises(AssertionError, match="empty"):
        write_delta(tmp_path / "delta", {**tensors(), "x": torch.empty(0)}, {}, FIELDS)
    assert not list(tmp_path.iterdir())


def test_a_folder_or_file_that_is_no_delta_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        assert "this is not a delta" in refused(place)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"null"])
def test_a_damaged_manifest_is_refused_by_name(delta, content):
    (delta / "manifest.json").write_bytes(content)
    assert "manifest.json: cannot be read" in refused(delta)


def test_a_manifest_of_another_version_is_refused_with_both(delta):
    change_manifest(delta, schema_version=99)
    message = refused(delta)
    assert "99" in message
    assert "reads 2" in message


def test_one_changed_byte_is_noticed(delta):
    file = delta / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "sha256" in refused(delta)


def test_a_truncated_or_missing_tensor_file_is_refused_by_name(delta):
    file = delta / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "adapter_model.safetensors: cannot be read" in refused(delta)
    file.unlink()
    assert "adapter_model.safetensors: cannot be read" in refused(delta)


def test_a_module_without_its_pair_is_refused_by_name(delta):
    file = delta / "adapter_model.safetensors"
    kept = load_file(file)
    kept.pop(keys_of(NAME)[1])
    save_file(kept, file)
    change_manifest(delta, sha256=sha256_of(file))
    assert "lora_B.weight, though manifest.json names it" in refused(delta)
