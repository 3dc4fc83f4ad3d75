"""A merge that is killed goes on with the files that are finished, leaves nothing half-made under the final name, and ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.deltas import merge as merging
from pipeline.deltas.merge import merge
from pipeline.deltas.verify import verify
from pipeline.job.errors import JobError
from tests.deltas.conftest import weights

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
from pathlib import Path
from pipeline.deltas import pieces
from pipeline.deltas.merge import merge
real = pieces.make_piece
def slow(*arguments):
    time.sleep(0.05)
    print(".", end="", flush=True)
    return real(*arguments)
from pipeline.deltas import merge as merging
merging.make_piece = slow
merge(*map(Path, sys.argv[1:]), workers=2, say=print)
"""


def begun(base: Path, delta: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(base), str(delta), str(out)], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_goes_on_and_says_so(number, llama_base, deltas, tmp_path):
    out, work = tmp_path / "merged", tmp_path / ".merged.merging"
    process = begun(llama_base, deltas["qv"], out)
    while process.poll() is None:
        time.sleep(0.05)
        if (work / "journal.jsonl").is_file() and len((work / "journal.jsonl").read_text().splitlines()) >= 3:
            break
    with pytest.raises(JobError, match="another process is merging into it"):
        merge(llama_base, deltas["qv"], out)
    os.kill(process.pid, number)
    process.communicate()
    assert process.returncode
    assert not out.exists()
    finished = [row["file"] for row in map(json.loads, (work / "journal.jsonl").read_text().splitlines()) if "file" in row]
    assert len(finished) >= 2
    before = {name: (work / "result" / name).stat().st_mtime_ns for name in finished}
    # One of them is not what it was, and a line was cut off.
    data = bytearray((work / "result" / finished[0]).read_bytes())
    data[-1] ^= 1
    (work / "result" / finished[0]).write_bytes(data)
    with (work / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "model-0')
    said, written = [], []
    real = merging.write_file
    merging.write_file = lambda layout, *rest: written.append(layout.name) or real(layout, *rest)
    try:
        certificate = merge(llama_base, deltas["qv"], out, say=said.append)
    finally:
        merging.write_file = real
    assert said == [f"going on with an unfinished merge: {len(finished)} finished files of it are checked and kept"]
    assert finished[0] in written
    assert not set(finished[1:]) & set(written)
    assert {name: (out / name).stat().st_mtime_ns for name in finished[1:]} == {name: before[name] for name in finished[1:]}
    assert certificate == merge(llama_base, deltas["qv"], tmp_path / "fresh")
    assert weights(out) == weights(tmp_path / "fresh")
    assert verify(out)["kinds"] == ["merged"]
    assert not work.exists()


class Killed(BaseException):
    pass


def test_killed_before_any_call_that_changes_the_disk(llama_base, deltas, tmp_path, monkeypatch):
    merge(llama_base, deltas["qv"], tmp_path / "fresh")
    wanted, number, went_on = weights(tmp_path / "fresh"), 0, 0
    while True:
        left, said = number, []

        def counted(real):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*arguments, **options)

            return call

        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (merging.shutil, "rmtree")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                merge(llama_base, deltas["qv"], out, workers=1)
            except Killed:
                pass
            else:
                break
        assert not out.exists() or weights(out) == wanted, "whole or not there"
        merge(llama_base, deltas["qv"], out, say=said.append)
        went_on += any("going on" in text or "finished already" in text for text in said)
        assert weights(out) == wanted
        assert not (tmp_path / f".{out.name}.merging").exists()
        number += 1
    assert went_on > number / 2 > 5


def test_an_unfinished_merge_of_something_else_is_thrown_away(llama_base, deltas, tmp_path):
    out = tmp_path / "merged"
    process = begun(llama_base, deltas["qv"], out)
    assert process.stdout.read(20)
    process.kill()
    process.wait()
    said = []
    merge(llama_base, deltas["mlp"], out, say=said.append)
    assert said == [f"an unfinished merge of something else into {out} is thrown away"]
    merge(llama_base, deltas["mlp"], tmp_path / "fresh")
    assert weights(out) == weights(tmp_path / "fresh")
    with pytest.raises(JobError, match="already there and not empty"):
        merge(llama_base, deltas["mlp"], out)
