"""A state is whole or noticed: every bit of every file, every missing piece, every moment of being written."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess

import pytest
import torch

from pipeline.job.errors import JobError
from pipeline.weights import state as states
from pipeline.weights.record import DataFile
from pipeline.weights.state import Damaged, Progress, Record, State, newest_state, path_of, read_state, tidy, write_state

FILES = ("SHA256SUMS", "state.json", "tensors.safetensors")


def make(step, seed=0):
    generator = torch.Generator().manual_seed(seed + step)
    tensors = {
        f"{kind}/h.{n}.{key}": torch.randn(3, 5, generator=generator) for kind in ("weight", "exp_avg") for n in (0, 1) for key in "ab"
    }
    record = Record(
        progress=Progress(step=step, position_examples=8 * step, optimizer_steps=step, loss_scale=None, seconds=1.5),
        total_steps=100,
        learning_rate=0.1,
        seed=1,
        ranks=2,
        job={"train": {"steps": 100}},
        job_digest="a" * 64,
        base_digest="b" * 64,
        base_config="d" * 64,
        data=(DataFile(file="train.jsonl", examples=3, sha256="c" * 64),),
    )
    return State(record, tensors)


def same(a, b):
    return a.record == b.record and a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def refuse_to_warn(text):
    pytest.fail(f"nothing to warn of: {text}")


@pytest.fixture
def folder(tmp_path):
    """States of steps 10 and 20."""
    for step in (10, 20):
        write_state(tmp_path / "state", make(step), keep=2)
    return tmp_path / "state"


def test_what_is_written_is_read_back(folder):
    assert same(read_state(path_of(folder, 20)), make(20))
    assert same(newest_state(folder, refuse_to_warn), make(20))
    assert newest_state(folder.parent / "absent", refuse_to_warn) is None


def test_the_format_is_plain_and_other_programs_check_it(folder):
    path = path_of(folder, 20)
    assert path.name == "step-00000020"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=path, capture_output=True, check=False).returncode == 0
    record = json.loads((path / "state.json").read_text())
    assert record["progress"]["step"] == 20
    from safetensors import safe_open

    with safe_open(path / "tensors.safetensors", "pt") as file:
        assert set(file.keys()) == set(make(20).tensors)


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        write_state(tmp_path, make(step), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015", "step-00000020"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend"])
def test_every_damage_is_noticed_and_named(folder, file, damage):
    """At many random places of each file; all of them, where the file is short."""
    path = path_of(folder, 20)
    content = (path / file).read_bytes()
    rng = random.Random(f"{file}{damage}")
    bits = len(content) * 8
    places = range(bits) if file == "SHA256SUMS" and damage == "flip" else sorted(rng.sample(range(bits), 300))
    noticed = 0
    for place in places:
        match damage:
            case "flip":
                changed = bytearray(content)
                changed[place // 8] ^= 1 << place % 8
            case "truncate":
                changed = content[: place // 8]
            case _:
                changed = content + bytes(rng.randrange(256) for _ in range(1 + place % 64))
        (path / file).write_bytes(changed)
        with pytest.raises(Damaged, match="step-00000020"):
            read_state(path)
        noticed += 1
    assert noticed == len(places) >= 300
    warnings = []
    assert same(newest_state(folder, warnings.append), make(10))
    assert len(warnings) == 1
    assert "step-00000020" in warnings[0]
    assert "passed over for the older step-00000010" in warnings[0]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_noticed_and_named(folder, file):
    (path_of(folder, 20) / file).unlink()
    with pytest.raises(Damaged, match=f"{file}: is missing"):
        read_state(path_of(folder, 20))


@pytest.mark.parametrize("copied", range(3))
def test_a_half_copied_folder_is_noticed(folder, copied):
    half = folder / "step-00000030"
    half.mkdir()
    for name in FILES[:copied]:
        shutil.copy(path_of(folder, 20) / name, half)
    (half / FILES[copied]).write_bytes((path_of(folder, 20) / FILES[copied]).read_bytes()[:100])
    warnings = []
    assert same(newest_state(folder, warnings.append), make(20))
    assert len(warnings) == 1


def test_files_of_two_states_are_not_taken_for_one(folder):
    shutil.copy(path_of(folder, 10) / "tensors.safetensors", path_of(folder, 20))
    with pytest.raises(Damaged, match=r"tensors.safetensors: its sha256"):
        read_state(path_of(folder, 20))


def test_with_none_left_it_is_refused_with_what_to_do(folder):
    for step in (10, 20):
        (path_of(folder, step) / "state.json").write_text("{}")
    with pytest.raises(JobError, match=r"step-00000020/state.json: its sha256 .* No state of this run is whole \(2 looked at\).*--fresh"):
        newest_state(folder, refuse_to_warn)


def test_a_state_of_another_version_is_refused_not_passed_over(folder, monkeypatch):
    text = (path_of(folder, 20) / "state.json").read_text().replace('"seed"', '"sede"')
    (path_of(folder, 20) / "state.json").write_text(text)
    sums = "".join(states._sum(path_of(folder, 20) / name) for name in ("state.json", "tensors.safetensors"))
    (path_of(folder, 20) / "SHA256SUMS").write_text(sums)
    with pytest.raises(JobError, match="written by another version"):
        newest_state(folder, refuse_to_warn)


def test_a_state_of_another_schema_is_refused(folder):
    record = make(40).record.model_copy(update={"schema_version": 99})
    write_state(folder, State(record, make(40).tensors), keep=2)
    with pytest.raises(JobError, match="schema_version 99; this zlora reads 1"):
        newest_state(folder, refuse_to_warn)


def test_tidying_sets_damaged_later_states_aside_and_removes_halves(folder):
    (folder / ".step-00000030.partial-x").mkdir()
    (folder / ".step-00000010.old-y").mkdir()
    tidy(folder, 10)
    assert sorted(p.name for p in folder.iterdir()) == ["damaged-step-00000020", "step-00000010"]
    write_state(folder, make(20), keep=2)
    tidy(folder, 10)
    assert sorted(p.name for p in folder.iterdir()) == ["damaged-step-00000020", "step-00000010"]


CALLS = ("open", "mkdir", "replace", "rename", "fsync", "unlink", "rmdir", "chmod")


def die_at(call, folder):
    """In a child process: writes a state and dies before its `call`-th call to the system. Returns whether it died."""
    child = os.fork()
    if child == 0:
        left = call

        def dying(real):
            def function(*arguments, **named):
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return real(*arguments, **named)

            return function

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        write_state(folder, make(30), keep=2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_process_killed_before_any_system_call_of_a_write_leaves_a_whole_state(folder, tmp_path):
    seen = set()
    for call in range(200):
        copy = tmp_path / f"copy{call}"
        shutil.copytree(folder, copy)
        died = die_at(call, copy)
        found = newest_state(copy, refuse_to_warn)
        step = found.record.progress.step
        assert same(found, make(step))
        assert len([p for p in copy.iterdir() if p.name.startswith("step-")]) >= 2, "an older one to fall back to is always there"
        seen.add(step)
        tidy(copy, step)
        assert not list(copy.glob(".*")), "the next start removes what was left half-done"
        if not died:
            break
    assert call > 20
    assert seen == {20, 30}
    assert sorted(p.name for p in copy.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_full_disk_leaves_the_older_states_and_says_where(folder, monkeypatch):
    import errno

    before = sorted(p.name for p in folder.iterdir())

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_state(folder, make(30), keep=2)
    assert sorted(p.name for p in folder.iterdir()) == before
