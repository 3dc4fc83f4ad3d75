"""What a whole run takes: its examples and steps, GPU hours, and their price by the user's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.job.task import Glue
from pipeline.plan.examples import examples_of, steps_of
from pipeline.plan.hardware import gpu_of
from pipeline.planning.job import make_plan
from pipeline.tasks.open import open_split
from tests.training import write_job


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "config" / "zlora" / "settings.toml"
    file.parent.mkdir(parents=True)
    return file


@pytest.fixture
def job(tmp_path, gpt2_base):
    return write_job(tmp_path, gpt2_base)


def whole_run(job: Path, *overrides: str, **options: object) -> dict:
    return make_plan(read_job(job, overrides), "a100-80g", 2, None, None, **options)["whole_run"]


def without_steps(job: Path, epochs: float) -> Path:
    lines = [line for line in job.read_text().splitlines() if not line.startswith(("steps", "epochs", "batch_examples"))]
    job.write_text("\n".join(lines).replace("[train]", f"[train]\nepochs = {epochs}\nbatch_examples = 8"))
    return job


def test_rows_of_a_training_file_are_counted(job):
    asked = read_job(without_steps(job, 3.0), ())
    data = Path(asked.task.data)
    rows = sum(bool(line.strip()) for line in (data if data.is_file() else data / "train.jsonl").read_text().splitlines())
    found = whole_run(job)
    assert found["examples"] == rows
    assert found["examples_from"].startswith("rows of ")
    assert found["steps"] == -(-3 * rows // 8)
    assert whole_run(job, examples=801)["steps"] == -(-3 * 801 // 8)
    assert whole_run(job, "task.train_examples=5")["examples"] == 5
    assert whole_run(job, "train.steps=7")["steps"] == 7


def test_a_price_comes_from_the_settings_or_the_command(job, settings):
    assert whole_run(job, examples=1000)["cost"] is None
    settings.write_text('currency = "EUR"\n[price_per_gpu_hour]\na100-80g = 2\n')
    found = whole_run(job, examples=1000)
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    assert (found["currency"], found["price_from"]) == ("EUR", str(settings))
    assert whole_run(job, examples=1000, price=5.0)["cost"] == pytest.approx(5 * found["gpu_hours"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[price", "not readable TOML"),
        ("curency = 'EUR'", '"curency" is not a key of it. It has currency and'),
        ("currency = 3", "currency = 3: not a text"),
        ("price_per_gpu_hour = 3", "price_per_gpu_hour: not a table"),
        ("[price_per_gpu_hour]\na100 = 3", '"a100" is not a GPU of the plan. Use v100-16g'),
        ("[price_per_gpu_hour]\na100-80g = 'much'", "price_per_gpu_hour.a100-80g = 'much': not a price"),
    ],
)
def test_settings_that_cannot_be_used_are_named_by_file_and_key(job, settings, text, says):
    settings.write_text(text)
    with pytest.raises(JobError) as caught:
        whole_run(job)
    assert str(caught.value).startswith(f"{settings}: ")
    assert says in str(caught.value)


def test_official_sizes_are_those_of_the_files(shared_data):
    for name in ("cola", "sst2", "rte", "stsb"):
        task = Glue(kind="glue", name=name, data=str(shared_data / "glue"))
        assert examples_of(task).count == sum(1 for _ in open_split(task, "train").read()), name


def test_steps_of_epochs_are_the_paper_s(job):
    train = read_job(job, ()).train.model_copy(update={"steps": None, "epochs": 5.0, "batch_examples": 8})
    assert steps_of(train, 42_061) == 26_289


def test_ranks_of_this_machine_share_its_memory(job):
    whole = gpu_of("cpu").memory_bytes
    for ranks in (1, 2, 4, 64):
        plan = make_plan(read_job(job, ()), "cpu", ranks, None, None)
        assert plan["capacity_bytes"] == whole // ranks
        assert plan["setting"]["nodes"] == 1
