"""`zlora deltas list`: what is in a folder of deltas, good and bad, told without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from pipeline.deltas.library import look_through
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml, read_job
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.index import open_checkpoint
from tests.bases import make_llama
from tests.deltas.conftest import make_delta
from tests.training import write_job


@pytest.fixture(scope="module")
def shelf(llama_base, deltas, tmp_path_factory):
    """Deltas at several depths: good, copied, of another base, broken in four ways."""
    root = tmp_path_factory.mktemp("shelf")
    other = make_llama(tmp_path_factory.mktemp("other") / "base", seed=1)
    shutil.copytree(deltas["qv"], root / "a" / "one" / "delta")
    shutil.copytree(deltas["qv"], root / "b" / "copy")
    shutil.copytree(deltas["labels"], root / "labels")
    make_delta(other, root / "foreign", 3)
    for name in ("cut", "unread", "bare", "peft"):
        shutil.copytree(deltas["mlp"], root / "broken" / name)
    file = root / "broken" / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (root / "broken" / "unread" / "manifest.json").write_text("{")
    (root / "broken" / "bare" / "adapter_model.safetensors").unlink()
    (root / "broken" / "peft" / "manifest.json").rename(root / "broken" / "peft" / "adapter_config.json")
    shutil.copytree(deltas["qv"], root / "a" / "one" / "state" / "x")
    return root


def test_each_is_told_as_it_is(shelf, llama_base):
    found = look_through(shelf)
    assert found.base_digest == base_digest(file_digests(open_checkpoint(llama_base).files))
    rows = {row.folder: row for row in found.rows}
    assert list(rows) == ["a/one/delta", "b/copy", *(f"broken/{name}" for name in ("bare", "cut", "peft", "unread")), "foreign", "labels"]
    problems = {name: row.problem for name, row in rows.items() if row.problem}
    assert set(problems) == {name for name in rows if name.startswith("broken/")}
    for name, said in (("bare", "is missing"), ("cut", "not a whole safetensors"), ("unread", "cannot be read"), ("peft", "zlora import")):
        assert said in problems[f"broken/{name}"]
    assert {name: row.same_as for name, row in rows.items() if row.same_as} == {"b/copy": "a/one/delta"}
    assert [name for name, row in rows.items() if row.other_base] == ["foreign"]
    one = rows["a/one/delta"]
    assert one.bytes == (shelf / "a/one/delta/adapter_model.safetensors").stat().st_size
    assert (one.method, one.task, one.score) == ("lora rank 2", None, None)
    assert rows["labels"].method == "lora rank 2 + head"


def test_another_base_may_be_the_one_that_is_asked_for(shelf):
    rows = {row.folder: row for row in look_through(shelf).rows}
    asked = look_through(shelf, rows["foreign"].base_digest)
    assert {row.folder for row in asked.rows if row.other_base} == {"a/one/delta", "b/copy", "labels"}


def test_task_and_score_are_of_the_run_and_of_that_step(llama_base, deltas, tmp_path):
    job = read_job(write_job(tmp_path, llama_base))
    run = tmp_path / "run"
    shutil.copytree(deltas["qv"], run / "delta")
    manifest = run / "delta" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"job_digest": job_digest(job), "step": 6}))
    (run / "job.toml").write_text(job_toml(job))
    rows = [{"step": step, "split": "valid", "BLEU": step + 0.5, "loss": 1.0} for step in (4, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = look_through(tmp_path).rows
    assert (row.task, row.score, row.step) == ("jsonl", "valid BLEU 6.5000", 6)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"job_digest": "0" * 64}))
    (row,) = look_through(tmp_path).rows
    assert (row.task, row.score) == (None, None), "a run of another job says nothing of it"


def test_the_command_needs_no_torch(shelf):
    program = (
        "import sys\nfrom pipeline.cli import main\nsys.argv = ['zlora', 'deltas', 'list', sys.argv[1], *sys.argv[2:]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = [subprocess.run([sys.executable, "-c", program, str(shelf), *more], capture_output=True, text=True) for more in ([], ["--json"])]
    assert [one.stderr for one in done] == ["set()\n"] * 2
    for said in ("lora rank 2 + head", "broken: ", "another base: foreign", "the same tensors: b/copy and a/one/delta"):
        assert said in done[0].stdout
    found = json.loads(done[1].stdout)
    assert found["schema_version"] == 1
    assert len(found["deltas"]) == 8


def test_a_folder_without_any_is_refused(tmp_path):
    with pytest.raises(JobError, match="no delta is here"):
        look_through(tmp_path)
    with pytest.raises(JobError, match="no such folder"):
        look_through(tmp_path / "absent")
