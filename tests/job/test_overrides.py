"""`--set key=value`: how values are read, what is refused, and what it replaces."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from tests.jobs import SHORT, write_job


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("train.steps=20", "train", "steps", 20),
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("train.packing=false", "train", "packing", False),
        ("train.adam_betas=[0.8, 0.9]", "train", "adam_betas", (0.8, 0.9)),
        ("base.dtype=fp32", "base", "dtype", "fp32"),
        ('base.dtype="fp32"', "base", "dtype", "fp32"),
        ("base.model=gpt2-medium", "base", "model", "gpt2-medium"),
        ("task.separator= => ", "task", "separator", " => "),
        ("task.separator=a=b", "task", "separator", "a=b"),
        (" train.seed = 3", "train", "seed", 3),
    ],
)
def test_a_value_is_read_as_toml_or_else_as_text(tmp_path, text, section, key, value):
    job = read_job(write_job(tmp_path), (text,))
    assert getattr(getattr(job, section), key) == value


@pytest.mark.parametrize("text", ["methods.0.rank=3", "methods[0].rank=3"])
def test_an_entry_of_a_list_is_named_as_in_the_messages_too(tmp_path, text):
    assert read_job(write_job(tmp_path), (text,)).methods[0].rank == 3


def test_a_later_one_wins_over_an_earlier_one_and_over_the_file(tmp_path):
    file = write_job(tmp_path, f"{SHORT}[train]\nseed = 5\n")
    assert read_job(file, ("train.seed=6", "train.seed=7")).train.seed == 7


@pytest.mark.parametrize(("mine", "other"), [("steps=20", "epochs=5"), ("epochs=5", "steps=20"), ("warmup_steps=3", "warmup_ratio=0.5")])
def test_one_of_two_exclusive_keys_takes_the_place_of_the_files_other(tmp_path, mine, other):
    train = read_job(write_job(tmp_path, f"{SHORT}[train]\n{other}\n"), (f"train.{mine}",)).train
    key, value = mine.split("=")
    assert getattr(train, key) == float(value)
    assert getattr(train, other.split("=")[0]) is None


def test_both_of_two_exclusive_keys_are_refused(tmp_path):
    with pytest.raises(JobError, match="epochs and steps are both given"):
        read_job(write_job(tmp_path), ("train.epochs=1", "train.steps=2"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("methods.rank=3", "methods.0.rank"),
        ("methods.1.rank=3", "1 is not one of the 1 entries"),
        ("methods.x.rank=3", "x is not one of the 1 entries"),
        ("base.model.name=3", "base.model is a value"),
    ],
)
def test_a_malformed_one_is_refused_with_its_own_text(tmp_path, text, part):
    with pytest.raises(JobError) as caught:
        read_job(write_job(tmp_path), (text,))
    assert f"--set {text}" in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train.stepz=3", 'train.stepz: unknown key. Did you mean "steps"?'),
        ("trian.steps=3", 'trian: unknown key. Did you mean "train"?'),
        ("train.steps=many", 'train.steps = "many": '),
        ("train.steps=", 'train.steps = "": '),
    ],
)
def test_a_mistake_is_checked_as_in_the_file(tmp_path, text, part):
    with pytest.raises(JobError) as caught:
        read_job(write_job(tmp_path), (text,))
    assert part in str(caught.value)
