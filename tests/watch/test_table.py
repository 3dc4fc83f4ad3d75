"""The table of `zlora status` as a terminal shows it: narrow, low, with many runs, and with names that would steer it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import screen as screens
from pipeline.cluster.record import Began, Ended, Submitted, note
from pipeline.commands import watch
from pipeline.job.errors import JobError
from pipeline.job.printable import printable
from pipeline.screen import Screen
from pipeline.watch.logs import shown
from pipeline.watch.status import Status, find_runs, statuses
from pipeline.watch.table import table

ROOT = Path(__file__).parents[2]
STEERING = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp\r\u2028\udc80"
SAID = "running: gathering the base for the next pass"


def status(name, state="running", words=SAID, **more):
    values = {"job": "123456", "nodes": "node[001-128]", "step": 1200, "steps": 50_000, "loss": 2.3456, "tokens_per_s": 123456.0}
    values |= {"left_s": 90_000.0, "saved_step": 1000, "saved_age_s": 70.0, "restarts": 3, "why": None, "allocation_left": None, "then": {}}
    return Status(run=name, state=state, words=words, **{**values, **more})


def drawn(found, width, height=None, notes=()):
    console = Console(file=io.StringIO(), width=width, height=height or 50, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table(found, notes, width, height))
    return capture.get().splitlines()


def test_a_wide_terminal_has_every_column():
    heads, row = drawn([status("runs/study")], 160)
    assert heads.split() == ["run", "state", "job", "nodes", "step", "loss", "tokens/s", "left", "saved", "restarts"]
    end = "123456  node[001-128]  1,200 / 50,000  2.3456   123,456  1 d 1 h  step 1,000, 1 min ago         3"
    assert row == f"  runs/study  {SAID}  {end}"


def test_a_narrow_terminal_drops_what_matters_least_and_no_name():
    heads, row = drawn([status("runs/study")], 80)
    assert heads.split() == ["run", "state", "step"]
    assert "runs/study" in row
    heads, *rows = drawn([status("runs/study", words="running: step")], 80)
    assert heads.split() == ["run", "state", "step", "loss", "left"]
    assert len(rows) == 1
    name = "rank=16,learning_rate=0.0002,seed=" * 4 + "7"
    _, *rows = drawn([status(name, words="finished"), status("b", words="finished")], 60)
    assert "".join(row.split()[0] for row in rows[:-1]) == name, "folded, not cut"
    for width in (20, 40, 60, 80, 100, 120):
        assert all(len(line) <= width for line in drawn([status("runs/study")] * 3, width))


def test_a_column_that_has_nothing_is_not_there():
    nothing = dict.fromkeys(("job", "nodes", "loss", "tokens_per_s", "left_s", "saved_step", "saved_age_s"))
    heads, _ = drawn([status("a", **nothing, restarts=0)], 160)
    assert heads.split() == ["run", "state", "step"]


def test_a_low_terminal_shows_first_what_lives_and_counts_the_rest():
    many = [status(f"runs/{number:03}", "finished", "finished", why="Done.") for number in range(150)]
    many[70] = status("runs/070", "failed", "diverged", why="diverged: loss is nan at step 7")
    many[140] = status("runs/140")
    lines = drawn(many, 100, 10, ("squeue: no answer.",))
    assert len(lines) <= 10
    assert [line.split()[0] for line in lines[1:8]] == ["000", "001", "002", "003", "004", "070", "140"]
    assert lines[8] == "and 143 more; of all 150: 1 running, 1 failed, 148 finished"
    assert lines[9] == "squeue: no answer."
    lines = drawn(many[65:75], 100, 20)
    assert len(lines) == 12
    assert lines[-1] == "070: diverged: loss is nan at step 7"


def test_it_is_redrawn_in_its_place_until_ctrl_c(tmp_path, monkeypatch):
    """Two frames, the second after a run has gone on."""
    for name in ("a", "b"):
        (tmp_path / name / "logs").mkdir(parents=True)
        (tmp_path / name / "logs" / "rank0.json").write_text(json.dumps({"rank": 0, "host": "h", "phase": "backward", "since": 1.0}))
    out, frames = io.StringIO(), []
    real = Console(file=out, width=80, height=12, force_terminal=True, color_system=None)
    monkeypatch.setattr(screens, "Console", lambda **_: real)

    def sleep(_):
        frames.append(out.getvalue())
        if len(frames) == 2:
            raise KeyboardInterrupt
        (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 7, "loss": 1.5, "tokens": 1, "step_s": 1.0}\n')

    monkeypatch.setattr(screens.time, "sleep", sleep)
    watch.status([tmp_path], watch=True)
    assert "1.5000" not in frames[0]
    second = frames[1].removeprefix(frames[0])
    assert "1.5000" in second
    assert second.count("\x1b[1A") == frames[0].count("\n"), "over the first, line by line"
    assert "ended without a word" in second


def test_where_there_is_no_terminal_nothing_gives_way():
    out = io.StringIO()
    name = "study/" + "x" * 100
    Screen(out).draw(table([status(name, why="y" * 200)]))
    heads, row, why = (line.rstrip() for line in out.getvalue().splitlines())
    assert heads.split()[-1] == "restarts"
    assert row.split()[0] == name
    assert why == f"{name}: {'y' * 200}"


def test_what_would_steer_a_terminal_is_shown_as_text(tmp_path):
    found = [status(STEERING, why=STEERING, then={"merge": STEERING}, nodes=None)]
    out = io.StringIO()
    screen = Screen(out)
    screen.draw(table(found, [STEERING]))
    screen.print(STEERING)
    screen.table(STEERING, [(STEERING, STEERING)])
    screen.columns(STEERING, [STEERING], [[STEERING]])
    out.write(str(JobError(f"{STEERING}: is not there.")))
    assert not set(out.getvalue()) & set("\x1b\x07\x9b\u202e\r\u2028\udc80")
    assert out.getvalue().count("\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202egnp\\r\\u2028\\udc80") == 14
    assert printable("ünï 名前 👩‍🚀\tx\n") == "ünï 名前 👩‍🚀\tx\n"
    pieces = [b"\x1b[2Jstep 1\rstep 2\n\xe5\x90", b"\x8d\xff\n"]
    assert b"".join(shown(iter(pieces))).decode() == "\\x1b[2Jstep 1\rstep 2\n名\ufffd\n"


@pytest.fixture
def five_hundred(tmp_path):
    for number in range(500):
        run = tmp_path / "runs" / f"study_{number // 50}" / f"rank={number % 50}"
        (run / "logs").mkdir(parents=True)
        job = str(number + 1)
        note(run, Submitted(job, "slurm/1.sbatch", "t", "0", "0", 1, 1, ()))
        note(run, Began(job, 0, "node1"))
        note(run, Ended(job, 0, 0, "Done.", 15, "done"))
        (run / "environment.json").write_text("{}")
        (run / "job.toml").write_text("[train]\nsteps = 400\n")
        rows = [json.dumps({"step": step, "loss": 2.0, "tokens": 100, "step_s": 0.5, "more": "x" * 300}) for step in range(300)]
        (run / "metrics.jsonl").write_text("\n".join(rows))
        for rank in range(8):
            (run / "logs" / f"rank{rank}.json").write_text(json.dumps({"rank": rank, "phase": "done", "host": "h", "since": 1.0}))
        (run / "state" / "step-15").mkdir(parents=True)
    return tmp_path


def test_five_hundred_runs_are_looked_at_at_once(five_hundred, monkeypatch):
    monkeypatch.setenv("PATH", str(five_hundred))
    monkeypatch.chdir(five_hundred)
    begun = time.process_time()
    found, _ = statuses(find_runs([]))
    spent = time.process_time() - begun
    assert len(found) == 500
    assert [one.run.rpartition("=")[2] for one in found[:50]] == [str(number) for number in range(50)], "as people count"
    assert {one.words for one in found} == {"finished"}
    # 0.3 s here; of the processor, since others may use the machine.
    assert spent < 2.0
    command = "import sys; from pipeline.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    words = [sys.executable, "-c", command, "status"]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "False")
    assert len(done.stdout.splitlines()) == 502, "a head, the runs, and that there is no squeue"
