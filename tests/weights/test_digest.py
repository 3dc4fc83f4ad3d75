"""Digests of a base: equal to sha256sum's, remembered by path, size and time, and a hub cache's own names taken as they are."""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest

from pipeline.weights import digest
from pipeline.weights.digest import base_digest, file_digests, sha256_of


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """A memory of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zlora" / "digests.json"


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    written = {"b.safetensors": b"", "a.safetensors": os.urandom(5_000_000), "c.safetensors": b"text\n"}
    for name, content in written.items():
        (folder / name).write_bytes(content)
    return tuple(folder / name for name in written)


def forbid_reading(monkeypatch):
    def fail(file):
        raise AssertionError(f"{file} was read again")

    monkeypatch.setattr(digest, "sha256_of", fail)


def test_digests_are_sha256sums(files):
    lines = subprocess.run(["sha256sum", *sorted(f.name for f in files)], cwd=files[0].parent, capture_output=True, text=True, check=True)
    expected = dict(reversed(line.split("  ")) for line in lines.stdout.splitlines())
    assert file_digests(files) == expected
    # The base's digest is the sha256 of what sha256sum prints for its files in order of name.
    assert base_digest(expected) == hashlib.sha256(lines.stdout.encode()).hexdigest()


def test_the_bases_digest_depends_on_every_name_and_content_and_on_no_order():
    files = {"a": "1" * 64, "b": "2" * 64}
    assert base_digest(files) == base_digest(dict(reversed(files.items())))
    others = [{"a": "2" * 64, "b": "1" * 64}, {"a": "1" * 64}, {"a": "1" * 64, "c": "2" * 64}]
    assert len({base_digest(d) for d in [files, *others]}) == 4


def test_a_file_is_read_once(files, monkeypatch):
    before = file_digests(files)
    forbid_reading(monkeypatch)
    assert file_digests(files) == before


def test_a_changed_file_is_read_again_even_at_the_same_size(files):
    before = file_digests(files)
    file = files[2]
    file.write_bytes(b"TEXT\n")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    after = file_digests(files)
    assert after[file.name] == hashlib.sha256(b"TEXT\n").hexdigest() != before[file.name]
    assert {name for name in before if before[name] != after[name]} == {file.name}


def test_another_size_is_read_again_even_at_the_same_time(files):
    file = files[2]
    file_digests(files)
    time = file.stat().st_mtime_ns
    file.write_bytes(b"longer text\n")
    os.utime(file, ns=(time, time))
    assert file_digests(files)[file.name] == hashlib.sha256(b"longer text\n").hexdigest()


def test_a_hub_caches_blob_name_is_taken_as_it_is(tmp_path, monkeypatch):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / name)
    forbid_reading(monkeypatch)
    assert file_digests((link,)) == {"model.safetensors": name}


def test_a_link_to_a_file_of_another_name_is_read(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "other.safetensors")
    assert file_digests((link,)) == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}


def test_a_file_that_merely_has_such_a_name_is_read(tmp_path):
    file = tmp_path / ("ab" * 32)
    file.write_bytes(b"weights")
    assert file_digests((file,))[file.name] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_memory_is_forgotten(files, memory, content):
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    assert file_digests(files)[files[2].name] == hashlib.sha256(b"text\n").hexdigest()


def test_a_memory_that_cannot_be_written_stops_nothing(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_digests(files)[files[2].name] == sha256_of(files[2])
