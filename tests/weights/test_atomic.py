"""Whole or not at all: a failing block leaves nothing behind, a filled folder is refused, an older one gives way when told."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder, refuse_filled, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill_and_fail(folder, replace, failure):
    with new_folder(folder, replace) as partial:
        (partial / "new.txt").write_text("new")
        raise failure


def test_a_folder_appears_under_its_name_only_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as partial:
        (partial / "a.txt").write_text("a")
        (partial / "sub").mkdir()
        (partial / "sub" / "b.txt").write_text("b")
        assert not out.exists()
    assert (out / "a.txt").read_text() == "a"
    assert (out / "sub" / "b.txt").read_text() == "b"
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("failure", [ValueError, JobError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("replace", [False, True])
def test_a_failing_block_leaves_nothing_behind(tmp_path, failure, replace):
    with pytest.raises(failure):
        fill_and_fail(tmp_path / "out", replace, failure)
    assert names(tmp_path) == []


def test_a_failing_block_leaves_the_older_folder_as_it_was(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(ValueError):
        fill_and_fail(out, True, ValueError)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old.txt"]


def test_a_filled_folder_or_a_file_is_refused_by_name_and_untouched(tmp_path):
    filled, file = tmp_path / "filled", tmp_path / "file"
    filled.mkdir()
    (filled / ".hidden").write_text("x")
    file.write_text("x")
    for taken in (filled, file):
        with pytest.raises(JobError) as caught, new_folder(taken):
            pytest.fail("the block must not run")
        assert str(taken) in str(caught.value)
    assert names(tmp_path) == ["file", "filled"]
    assert names(filled) == [".hidden"]


def test_an_empty_or_absent_folder_is_welcome(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse_filled(empty)
    refuse_filled(tmp_path / "absent")
    with new_folder(empty) as partial:
        (partial / "a.txt").write_text("a")
    assert names(tmp_path) == ["empty"]
    assert names(empty) == ["a.txt"]


def test_the_current_folder_can_be_the_destination(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with new_folder(type(here)()) as partial:
        (partial / "a.txt").write_text("a")
    assert names(here) == ["a.txt"]
    assert names(tmp_path) == ["here"]


def test_an_older_folder_gives_way_when_told(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with new_folder(out, replace=True) as partial:
            (partial / f"{text}.txt").write_text(text)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["two.txt"]


def test_others_may_read_what_was_written(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        write_text(partial / "a.txt", "a")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.txt"
    write_text(file, "één")
    assert file.read_text(encoding="utf-8") == "één"

    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(file, "two")
    assert file.read_text(encoding="utf-8") == "één"
    assert names(file.parent) == ["a.txt"]


def test_json_that_cannot_be_written_leaves_the_older_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"é": [1, 2.5, None]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    assert names(tmp_path) == ["a.json"]


def test_what_cannot_be_moved_away_is_known_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "rmdir", lambda self: (_ for _ in ()).throw(OSError(errno.EBUSY, "Device or resource busy", str(self))))
    with pytest.raises(OSError, match="busy"), new_folder(tmp_path / "mount"):
        pytest.fail("the work had begun")
