"""The launcher with small stand-ins for ranks: one error shown once, the right exit code, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.cluster import launch as launcher
from pipeline.cluster.failures import ATTENDED, REPORTS, report_failure, reported, to_go_on
from pipeline.cluster.launch import CPU_RANK, returns_at_once
from pipeline.job.errors import JobError

# Called as `RANK_PROGRAM -m pipeline CODE`: runs CODE where a rank would train.
RANK = """#!{python}
import os, signal, sys, time
from pathlib import Path
from pipeline.cluster.failures import report_failure
from pipeline.cluster.launch import die_with_parent
rank, out = int(os.environ["RANK"]), Path(os.environ["OUT"])
def together(count, pause=0.0):
    "Goes on when so many ranks have come this far, `pause` seconds after them."
    (out / f"ready.{{rank}}").touch()
    while len(list(out.glob("ready.*"))) < count: time.sleep(0.01)
    time.sleep(pause)
exec(sys.argv[3])
"""
SAY = "report_failure('{message}', {code}, sys.stderr); os._exit({code})"
SLEEP = "time.sleep(60)"
FIRST, SECOND = "together(2)", "together(2, 0.1)"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(code, ranks)` launches ranks that run `code`; returns the exit code and how long it took."""
    program = tmp_path / "rank"
    program.write_text(RANK.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OUT", str(tmp_path))

    def run(code, ranks):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", str(program))
            start = time.monotonic()
            code = launcher.launch([code], ranks)
        assert not list((tmp_path / "tmp").iterdir()), "the launcher leaves its own files behind"
        return code, time.monotonic() - start

    return run


def by_rank(*codes):
    return "\n".join(f"if rank == {rank}: {code}" for rank, code in enumerate(codes))


def say(message, code):
    return SAY.format(message=message, code=code)


def alive(pid):
    try:
        # A process that nobody has asked about yet is a zombie: dead all the same.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(folder, count, seconds=10):
    """Of ranks that wrote theirs into `folder`."""
    deadline = time.monotonic() + seconds
    while len(files := list(folder.glob("pid.*"))) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(file.suffix[1:]) for file in files]


def gone_within(folder_pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(alive, folder_pids)):
        if time.monotonic() > deadline:
            for pid in filter(alive, folder_pids):
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


WRITE_PID = "(out / f'pid.{os.getpid()}').touch()"


def test_every_rank_gets_its_place_and_a_common_meeting_point(run, tmp_path, capfd):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ZLORA_RENDEZVOUS")
    code = f"(out / f'rank.{{rank}}').write_text(' '.join(os.environ[n] for n in {names}))"
    assert run(code, 3)[0] == 0
    rows = [(tmp_path / f"rank.{rank}").read_text().split() for rank in range(3)]
    assert [row[:4] for row in rows] == [[str(rank), str(rank), "3", "3"] for rank in range(3)]
    assert len({row[4] for row in rows}) == 1
    assert capfd.readouterr() == ("", "")


def test_a_rank_that_dies_ends_the_others_within_seconds_and_its_error_is_shown_once(run, tmp_path, capfd):
    waits = f"{WRITE_PID}; together(3); {SLEEP}"
    dies = f"together(3); {say('rank 1 failed: KeyError(3)', 1)}"
    code, seconds = run(by_rank(waits, dies, waits), 3)
    assert code == 1
    assert seconds < 10
    assert capfd.readouterr() == ("", "rank 1 failed: KeyError(3)\n")
    assert not any(map(alive, pids(tmp_path, 2)))


def test_a_rank_that_ignores_the_request_to_end_is_ended(run, tmp_path):
    stubborn = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WRITE_PID}; together(2); {SLEEP}"
    code, seconds = run(by_rank(stubborn, f"together(2); {say('failed', 1)}"), 2)
    assert code == 1
    assert seconds < 15
    assert not any(map(alive, pids(tmp_path, 1)))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_rank_ended_by_a_signal_is_named_with_it_and_may_be_run_again(run, capfd, name):
    code, _ = run(by_rank(SLEEP, f"os.kill(os.getpid(), signal.{name})"), 2)
    assert code == 76
    error = capfd.readouterr().err
    assert error.startswith(f"rank 1 was ended by {name}.")
    assert ("memory" in error) == (name == "SIGKILL")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("first", "second", "code", "shown"),
    [
        # A user's mistake is the cause even where its echo is heard first.
        (f"{FIRST}; {say('connection closed by peer', 1)}", f"{SECOND}; {say('error: job.toml: wrong', 2)}", 2, "error: job.toml: wrong"),
        (f"{FIRST}; os.abort()", f"{SECOND}; {say('error: job.toml: wrong', 2)}", 2, "error: job.toml: wrong"),
        (f"{FIRST}; {say('connection closed by peer', 1)}", f"{SECOND}; {say('diverged: step 3', 4)}", 4, "diverged: step 3"),
        # Of a signal and a crash, the signal: a rank that the kernel ends says nothing, its peers do.
        (
            f"{FIRST}; {say('connection closed by peer', 1)}",
            f"{SECOND}; os.kill(os.getpid(), signal.SIGKILL)",
            76,
            "rank 1 was ended by SIGKILL",
        ),
        # Of two crashes, the earlier.
        (f"{SECOND}; {say('connection closed by peer', 1)}", f"{FIRST}; {say('rank 1 failed', 1)}", 1, "rank 1 failed"),
    ],
    ids=["mistake over crash", "mistake over abort", "divergence over crash", "signal over crash", "earlier crash"],
)
def test_the_cause_is_shown_and_not_its_echo(run, capfd, first, second, code, shown):
    assert run(by_rank(first, second), 2)[0] == code
    error = capfd.readouterr().err
    assert error.startswith(shown)
    assert error.count("\n") == 1


@pytest.mark.parametrize("code", [2, 4, 75, 3])
def test_the_ranks_exit_code_is_passed_on(run, capfd, code, monkeypatch):
    monkeypatch.setattr(launcher, "_LEAVE_S", 1.0)
    assert run(by_rank(SLEEP, say("words", code)), 2)[0] == code
    assert capfd.readouterr().err == "words\n"


def test_ranks_that_stop_on_request_are_waited_for(run, tmp_path, capfd):
    # The first rank still writes when the second is gone.
    first = f"together(2, 1.0); (out / 'saved').touch(); {say('Stopped.', 75)}"
    assert run(by_rank(first, f"{FIRST}; os._exit(75)"), 2)[0] == 75
    assert (tmp_path / "saved").exists()
    assert capfd.readouterr().err == "Stopped.\n"


def test_a_failure_while_stopping_is_the_failure(run, capfd):
    assert run(by_rank(f"{SECOND}; {say('error: disk full', 2)}", f"{FIRST}; os._exit(75)"), 2)[0] == 2
    assert capfd.readouterr().err == "error: disk full\n"


def test_what_a_rank_says_of_its_lost_peer_is_not_the_cause(run, capfd):
    echo = "report_failure('rank 0 lost the other ranks', 76, sys.stderr, True); os._exit(76)"
    assert run(by_rank(f"{FIRST}; {echo}", f"{SECOND}; {say('rank 1 failed: KeyError(3)', 1)}"), 2)[0] == 1
    assert capfd.readouterr().err == "rank 1 failed: KeyError(3)\n"


def test_requests_that_come_while_a_rank_starts_are_kept_for_it(tmp_path):
    code = (
        f"{WRITE_PID}\nwhile not (out / 'go').exists(): time.sleep(0.05)\n"
        f"from pipeline.cluster.stop import StopRequest\nStopRequest().listen(('SIGTERM',), lambda name: os._exit(75))\n{SLEEP}"
    )
    process = start_launcher(tmp_path, code, "('SIGTERM',)")
    ranks = pids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert all(map(alive, ranks))
    (tmp_path / "go").touch()
    error = process.communicate(timeout=15)[1]
    assert (process.returncode, error) == (75, "Rank 0 was asked to stop. Run again to continue.\n")


def test_a_rank_that_ends_without_a_word_is_named(run, capfd):
    assert run(by_rank(SLEEP, "os._exit(3)"), 2)[0] == 3
    assert "rank 1 ended with exit code 3" in capfd.readouterr().err


def test_under_a_batch_script_the_ranks_words_are_handed_on_and_say_nothing_of_going_on(run, tmp_path, capfd, monkeypatch):
    outer = tmp_path / "outer"
    outer.mkdir()
    monkeypatch.setenv(REPORTS, str(outer))
    monkeypatch.setenv(ATTENDED, "7")
    asked = "from pipeline.cluster.failures import to_go_on; " + say("Stopped.' + to_go_on('Again.') + '", 75)
    assert run(by_rank(asked, asked), 2)[0] == 75
    assert capfd.readouterr() == ("", "")
    assert [(rank, told.exit_code, told.message) for rank, told in reported(outer).items()] == [(0, 75, "Stopped.")]
    monkeypatch.delenv(ATTENDED)
    assert to_go_on("Again.") == " Again."


def test_a_rank_without_a_launcher_tells_the_terminal(capsys, monkeypatch):
    monkeypatch.delenv("ZLORA_REPORTS", raising=False)
    report_failure("error: wrong", 2, sys.stderr)
    assert capsys.readouterr().err == "error: wrong\n"


LAUNCHER = """
import sys
from pipeline.cluster.launch import launch
sys.executable = {program!r}
sys.exit(launch([{code!r}], 2, {signals}))
"""


def start_launcher(tmp_path, code, signals="None"):
    program = tmp_path / "rank"
    program.write_text(RANK.format(python=sys.executable))
    program.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    text = LAUNCHER.format(program=str(program), code=code, signals=signals)
    return subprocess.Popen([sys.executable, "-c", text], env=environment, stderr=subprocess.PIPE, text=True)


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    process = start_launcher(tmp_path, f"die_with_parent(); {WRITE_PID}; {SLEEP}")
    ranks = pids(tmp_path, 2)
    process.kill()
    process.wait()
    assert gone_within(ranks, 5)


def test_ranks_end_when_their_launcher_was_killed_while_they_started(tmp_path):
    code = f"{WRITE_PID}\nwhile not (out / 'go').exists(): time.sleep(0.05)\ndie_with_parent(); {SLEEP}"
    process = start_launcher(tmp_path, code)
    ranks = pids(tmp_path, 2)
    process.kill()
    process.wait()
    (tmp_path / "go").touch()
    assert gone_within(ranks, 5)


def test_an_interrupt_ends_the_ranks_and_says_so_without_a_traceback(tmp_path):
    # From a keyboard the ranks get the signal too; here only the launcher does.
    process = start_launcher(tmp_path, f"{WRITE_PID}; {SLEEP}")
    ranks = pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=15)[1]
    assert process.returncode == 130
    assert "Stopped" in error
    assert "Traceback" not in error
    assert gone_within(ranks, 1)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), ("GPU-3af, GPU-77b,", 2)])
def test_the_visible_gpus_are_those_of_the_environment(monkeypatch, text, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert launcher.visible_gpus() == count


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(JobError, match="--ranks 3: this machine shows 2 GPUs"):
        launcher.launch(["train"], 3)


@pytest.mark.parametrize(
    ("value", "returns"), [(None, False), ("4194304", True), (CPU_RANK["MALLOC_MMAP_THRESHOLD_"], False), ("64K", False), ("", False)]
)
def test_whether_freed_memory_is_returned_is_read_from_whatever_is_set(value, returns, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if value is not None:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", value)
    assert returns_at_once() is returns
