"""`zlora score`: what it reads, what it prints, and every kind of bad input as one line with file and line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.evaluate.metrics.meteor import meteor
from pipeline.evaluate.metrics.read import read_scored
from pipeline.job.errors import JobError


def write(file, data):
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return file


def test_groups_are_read_as_the_official_script_reads_them(tmp_path):
    found = write(tmp_path / "found", "a\n\nc\n")
    wanted = write(tmp_path / "wanted", "a\r\n b \r\n\r\nb\n\nc\n\n")
    assert read_scored(found, wanted) == (["a", "", "c"], [["a", "b"], ["b"], ["c"]])
    wanted = write(tmp_path / "wanted", "\ufeffa\nb\nc")
    assert read_scored(found, wanted) == (["a", "", "c"], [["a"], ["b"], ["c"]])


def test_what_evaluate_wrote_needs_no_references(tmp_path):
    rows = [{"prompt": "p", "prediction": "a\nb", "references": ["c", "d"]}]
    file = write(tmp_path / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_scored(file, None) == (["a\nb"], [["c", "d"]])


BAD = {
    "too few references": ("a\nb\nc\n", "a\n\nb\n", r"found:3: predictions: 3, but groups of references in .*wanted: 2\."),
    "too many references": ("a\nb\n", "a\n\nb\n\nc\n", r"found:3: predictions: 2, but groups of references in .*wanted: 3\."),
    "an empty group": ("a\nb\n", "a\n\n\nb\n", r"wanted:3: an empty group of references"),
    "no predictions": ("", "a\n", r"found: is empty"),
    "no references": ("a\n", "", r"wanted: is empty"),
    "another encoding": ("a\nb\n", b"a\n\ncaf\xe9\n", r"wanted:3: not UTF-8 text \(byte 0xe9\)"),
}


@pytest.mark.parametrize(("found", "wanted", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_with_its_place(tmp_path, found, wanted, message):
    with pytest.raises(JobError, match=message) as error:
        read_scored(write(tmp_path / "found", found), write(tmp_path / "wanted", wanted))
    assert "\n" not in str(error.value)


def test_bad_json_lines_and_missing_files_are_one_line(tmp_path):
    file = write(tmp_path / "test.jsonl", '{"prediction": "a", "references": ["b"]}\n{"prediction": "a"}\n')
    with pytest.raises(JobError, match=r"test\.jsonl:2: not an object with"):
        read_scored(file, None)
    with pytest.raises(JobError, match="there is no such file"):
        read_scored(tmp_path / "gone", file)
    with pytest.raises(JobError, match="Add --references FILE"):
        read_scored(write(tmp_path / "found", "a"), None)


def test_of_what_generate_wrote_the_predictions_are_scored(tmp_path):
    wanted = write(tmp_path / "wanted", "a\n\nb\n")
    answers = write(tmp_path / "answers.jsonl", '{"prompt": "p", "prediction": "a\\nb"}\n{"prompt": "q", "prediction": ""}\n')
    assert read_scored(answers, wanted) == (["a\nb", ""], [["a"], ["b"]])
    queries = ['{"sel": 0, "agg": 0, "conds": []}', "SELECT 1"]  # of WikiSQL: lines are predictions themselves
    assert read_scored(write(tmp_path / "queries.jsonl", "\n".join(queries)), wanted)[0] == queries
    half = write(tmp_path / "half.jsonl", '{"prediction": "a"}\n{"prompt": "q"}\n')
    with pytest.raises(JobError, match=r"half\.jsonl: 2 lines, but only 1 are objects"):
        read_scored(half, wanted)


def test_what_cannot_be_scored_together_is_refused(tmp_path):
    mixed = [{"task": task, "prompt": "p", "prediction": "1", "references": ["1"]} for task in ("a", "b")]
    with pytest.raises(JobError, match=r"several tasks \(a, b\)"):
        read_scored(write(tmp_path / "mix.jsonl", "".join(json.dumps(row) + "\n" for row in mixed)), None)
    with pytest.raises(JobError, match=r"test\.jsonl:1: has no references: its label or text is withheld"):
        read_scored(write(tmp_path / "test.jsonl", '{"prediction": "1", "references": []}\n'), None)


def score(folder, *arguments):
    command = [sys.executable, "-m", "pipeline", "score", "--predictions", str(folder / "found"), "--references", str(folder / "wanted")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def files(tmp_path, monkeypatch):
    write(tmp_path / "found", "the eagle is a cheap pub\nalimentum is in the city centre\n")
    write(tmp_path / "wanted", "the eagle is a cheap pub\nthe eagle is cheap\n\nalimentum is in the centre\n")
    monkeypatch.setenv("PATH", str(tmp_path / "no-java-here"))
    return tmp_path


def test_json_is_one_object_and_a_missing_java_leaves_the_others(files):
    done = score(files, "--task", "e2e", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert list(report) == ["schema_version", "task", "script", "predictions", "metrics", "notes"]
    assert (report["schema_version"], report["task"], report["predictions"]) == (1, "e2e", 2)
    assert list(report["metrics"]) == ["BLEU", "NIST", "ROUGE_L", "CIDEr"]
    assert len(report["notes"]) == 1
    assert report["notes"][0].startswith("METEOR: left out: it needs Java 8 or later")


def test_a_person_gets_a_table_and_the_note(files):
    done = score(files, "--task", "webnlg")
    assert done.returncode == 0
    assert "BLEU" in done.stdout
    assert "TER" in done.stdout
    assert done.stderr.startswith("METEOR: left out: it needs Java 8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "e3e"], '--task "e3e": there is no such task. Use one of e2e, webnlg, '),
        (["--task", "e2e", "--script", "challenge"], '--script "challenge": e2e has mteval or pymteval.'),
        (["--task", "cola"], "references: number 1 has 2 of them; this task has one of each."),
    ],
)
def test_a_wrong_task_or_script_is_one_line(files, arguments, message):
    done = score(files, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_wrong_task_is_said_before_any_file_is_read(tmp_path):
    done = score(tmp_path, "--task", "e2f", "--predictions", "absent.txt")
    assert done.returncode == 2
    assert done.stderr.startswith('error: --task "e2f": there is no such task. Use one of e2e, ')


def test_a_wrong_meteor_jar_is_said(tmp_path, monkeypatch):
    java = tmp_path / "java"
    write(java, "#!/bin/sh\necho 'no such class' >&2\nexit 1\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("METEOR_JAR", str(tmp_path / "gone.jar"))
    with pytest.raises(JobError, match=r"METEOR_JAR=.*gone\.jar: there is no such file"):
        meteor(["a"], [["a"]])
    monkeypatch.setenv("METEOR_JAR", str(write(tmp_path / "not.jar", "")))
    note = meteor(["a"], [["a"]])
    assert "ended with code 1 and said: no such class" in note
