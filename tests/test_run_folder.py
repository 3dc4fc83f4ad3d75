"""What gives way to a new run, and what never does."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.run_folder import WRITTEN, clear, refuse_earlier, remove_if_empty_handed


@pytest.fixture
def run(tmp_path):
    """An earlier run beside somebody's own file."""
    for name in WRITTEN:
        if "." in name:
            (tmp_path / name).write_text("x")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("x")
    (tmp_path / "logs").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    return tmp_path


def test_an_earlier_run_needs_fresh(run):
    with pytest.raises(JobError, match=r"holds an earlier run.*--fresh"):
        refuse_earlier(run, fresh=False)
    refuse_earlier(run, fresh=True)


def test_clearing_leaves_logs_and_foreign_files(run):
    clear(run)
    assert sorted(p.name for p in run.iterdir()) == ["logs", "thesis.tex"]
    refuse_earlier(run, fresh=False)


def test_a_folder_that_no_run_wrote_is_left_alone(run):
    (run / "metrics.jsonl").unlink()
    with pytest.raises(JobError, match="is not a run folder"):
        refuse_earlier(run, fresh=True)


def test_a_failed_start_leaves_no_folder_but_keeps_anything_else(tmp_path):
    (tmp_path / "empty" / "logs").mkdir(parents=True)
    (tmp_path / "full" / "delta").mkdir(parents=True)
    for name in ("empty", "full", "absent"):
        remove_if_empty_handed(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
