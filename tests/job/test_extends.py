"""`extends`: a job file laid over another, and every mistake told by the file that makes it."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import job_toml, read_job
from tests.jobs import SHORT


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "jobs").mkdir()
    write("jobs/common.toml", SHORT + "[train]\nepochs = 3.0\nseed = 7\nbatch_examples = 4\n[evaluate]\nbeams = 4\n")


def write(name, text):
    from pathlib import Path

    Path(name).write_text(text)
    return Path(name)


def read(text, *overrides):
    return read_job(write("jobs/job.toml", f'extends = "common.toml"\n{text}'), overrides)


def refused_file(text):
    with pytest.raises(JobError) as caught:
        read_job(write("jobs/job.toml", text))
    return str(caught.value)


def refused(text, *overrides):
    with pytest.raises(JobError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_keys_are_laid_over_one_by_one():
    job = read("[train]\nseed = 8\n[evaluate]\nlength_penalty = 0.9\n")
    assert (job.train.seed, job.train.batch_examples, job.train.epochs) == (8, 4, 3.0)
    assert (job.evaluate.beams, job.evaluate.length_penalty) == (4, 0.9)


def test_the_resolved_job_stands_alone(tmp_path):
    job = read("[train]\nseed = 8\n")
    assert "extends" not in job_toml(job)
    assert read_job(write("alone.toml", job_toml(job))) == job


def test_a_list_takes_the_place_of_the_whole():
    job = read('[[methods]]\nkind = "lora"\nrank = 2\n')
    assert [method.rank for method in job.methods] == [2]


def test_a_section_of_another_kind_takes_the_place_of_the_whole():
    assert read('[task]\nkind = "e2e"\n').task.model_dump()["data"] is None
    assert read('[task]\nkind = "jsonl"\nseparator = "!"\n').task.data.endswith("train.jsonl")


def test_what_others_report_takes_the_place_of_the_whole():
    row = '[published]\nsource = "{}"\nscores = {{ "test BLEU" = 0.7{} }}\n'
    write("jobs/common.toml", SHORT + row.format("a", ', "test TER" = 0.4') + 'spread = { "test TER" = 0.1 }\n')
    assert read("").published.spread == {"test TER": 0.1}
    found = read(row.format("b", "")).published
    assert (found.source, found.scores, found.spread) == ("b", {"test BLEU": 0.7}, {})
    said = 'jobs/job.toml: published: spread has "test TER", and scores has not.'
    assert refused(row.format("b", "") + 'spread = { "test TER" = 0.1 }\n').startswith(said)


def test_one_of_two_keys_takes_the_place_of_the_other():
    job = read("[train]\nsteps = 9\n")
    assert (job.train.steps, job.train.epochs) == (9, None)
    job = read("[train]\nsteps = 9\n", "train.epochs=2.0")
    assert (job.train.steps, job.train.epochs) == (None, 2.0)


def test_files_extend_others_in_a_row_each_from_its_own_folder():
    write("jobs/middle.toml", 'extends = "common.toml"\n[train]\nseed = 1\nclip_norm = 0.0\n')
    job = read_job(write("top.toml", 'extends = "jobs/middle.toml"\n[train]\nseed = 2\n'))
    assert (job.train.seed, job.train.clip_norm, job.train.batch_examples) == (2, 0.0, 4)


def test_of_several_files_a_later_one_lies_over_an_earlier_one():
    write("jobs/method.toml", '[[methods]]\nkind = "lora"\nrank = 2\n[train]\nseed = 8\nsteps = 9\n')
    job = read_job(write("jobs/job.toml", 'extends = ["common.toml", "method.toml"]\n[train]\nclip_norm = 0.0\n'))
    assert (job.methods[0].rank, job.evaluate.beams) == (2, 4)
    assert (job.train.seed, job.train.steps, job.train.epochs, job.train.batch_examples, job.train.clip_norm) == (8, 9, None, 4, 0.0)
    job = read_job(write("jobs/job.toml", 'extends = ["method.toml", "common.toml"]\n'))
    assert (job.methods[0].rank, job.train.seed, job.train.epochs) == (8, 7, 3.0)
    write("jobs/method.toml", '[[methods]]\nkind = "lora"\nrank = 0\n[train]\nseed = -1\n')
    message = refused_file('extends = ["common.toml", "method.toml"]\n[train]\nseed = 1\n')
    assert message.startswith("jobs/method.toml: methods[0].rank = 0: ")
    message = refused_file('extends = ["method.toml", "common.toml"]\n[train]\nseed = -1\n')
    assert message.startswith("jobs/job.toml: train.seed = -1: ")


@pytest.mark.parametrize("method", ['kind = "lorra"', 'kind = "lora"\nrnak = 2', 'kind = "lora"\nrank = 0', "rank = 2"])
def test_a_mistake_in_a_list_is_that_of_the_file_whose_list_it_is(method):
    assert refused(f"[[methods]]\n{method}\n").startswith("jobs/job.toml: methods[0]")
    assert refused(f'[[methods]]\nkind = "bitfit"\n[[methods]]\n{method}\n').startswith("jobs/job.toml: methods[1]")


def test_a_mistake_is_told_by_its_file():
    assert refused("[train]\nsed = 1\n").startswith('jobs/job.toml: train.sed: unknown key. Did you mean "seed"?')
    write("jobs/common.toml", SHORT + "[train]\nseed = -1\n")
    assert refused("[train]\nepochs = 1.0\n").startswith("jobs/common.toml: train.seed = -1: ")
    assert refused("[train]\nseed = -2\n").startswith("jobs/job.toml: train.seed = -2: ")
    write("jobs/common.toml", SHORT.replace('kind = "lora"', 'kind = "lora"\nrank = 0'))
    assert refused("").startswith("jobs/common.toml: methods[0].rank = 0: ")
    assert refused("", "methods.0.rank=-3").startswith("jobs/common.toml: methods[0].rank = -3: ")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ('"absent.toml"', 'jobs/job.toml: extends = "jobs/absent.toml": there is no such file'),
        ("3", "jobs/job.toml: extends = 3: not text"),
        ('["common.toml", 3]', 'jobs/job.toml: extends = ["common.toml", 3]: not text'),
        ('["common.toml", "job.toml"]', 'jobs/job.toml: extends = "job.toml": the files extend one another in a circle'),
        ('"job.toml"', 'jobs/job.toml: extends = "job.toml": the files extend one another in a circle'),
    ],
)
def test_what_cannot_be_extended_is_refused(named, said):
    with pytest.raises(JobError) as caught:
        read_job(write("jobs/job.toml", f"extends = {named}\n"))
    assert str(caught.value).startswith(said)


def test_a_circle_of_two_is_refused():
    write("jobs/common.toml", 'extends = "job.toml"\n')
    assert "in a circle" in refused("")
