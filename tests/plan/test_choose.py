"""`[memory] config = "auto"`: what is chosen, and that a run trains by it and writes it down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.job.files import memory_config, shipped
from pipeline.job.read import read_job
from pipeline.job.zero import complete, deepspeed_config
from pipeline.plan.choose import choose
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import gpu_of
from pipeline.plan.memory import memory, setting
from pipeline.planning import make_plan
from tests.training import trained, write_job

ROOT = Path(__file__).parent.parent.parent
GPT3 = Path("jobs/gpt3/175b_lora_wikisql.toml")
AUTO = "memory.config=auto"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("ranks", "stage", "offload"), [(8, 3, False), (2, 3, True)])
def test_the_fastest_that_fits_is_chosen(ranks, stage, offload):
    job = read_job(GPT3, (AUTO,))
    asked = setting(job, None, read_shape(ROOT / "jobs" / "gpt3" / "175b"), gpu_of("a100-80g"), ranks, None, 0, None)
    choice = choose(asked)
    section = choice.config["zero_optimization"]
    assert (section["stage"], "offload_param" in section, choice.fits) == (stage, offload, True)
    assert set(choice.reasons) == set(section)
    assert not memory(replace(choice.setting, stage=0)).peak < asked.gpu.memory_bytes


def test_what_is_chosen_is_a_configuration_like_any_other(tmp_path):
    plan = make_plan(read_job(GPT3, (AUTO,)), "a100-80g", 8, None, None)
    file = tmp_path / "chosen.json"
    file.write_text(json.dumps(plan["chosen"]["config"]))
    assert deepspeed_config(file) == complete(plan["chosen"]["config"])
    again = make_plan(read_job(GPT3, (f"memory.config={file}",)), "a100-80g", 8, None, None)
    assert again["lint"]["findings"] == []
    assert again["peak_bytes"] == plan["peak_bytes"]
    assert plan["answers"]["fewest_gpus"]["a100-80g"] == 8
    assert memory_config("zero3.json") == (shipped("ds_configs") / "zero3.json").resolve()


def test_a_run_trains_by_what_was_chosen(ranks2, tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    by_plan = trained(ranks2, job, tmp_path / "auto", AUTO)
    by_hand = trained(ranks2, job, tmp_path / "whole", "memory.config=zero0.json")
    assert by_plan.losses == by_hand.losses
    written = json.loads((tmp_path / "auto" / "deepspeed.json").read_text())
    assert written["config"] == {"zero_optimization": {"stage": 0}}
    assert set(written["reasons"]) == {"stage"}
    assert not (tmp_path / "whole" / "deepspeed.json").exists()


def test_a_run_trains_sharded_where_that_is_chosen(ranks2, tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    losses, section = ranks2.run(_train_sharded, str(job), str(tmp_path / "sharded"))[0]
    assert section["stage"] == 3
    assert section["stage3_max_reuse_distance"] == 0
    assert losses == pytest.approx(trained(ranks2, job, tmp_path / "whole", "memory.config=zero0.json").losses, rel=1e-5)


def _train_sharded(ranks, job: str, run: str):
    from pipeline import session
    from pipeline.plan.choose import _candidates
    from tests.training import read_run, train_here

    real = session.choose

    # On so small a base sharding saves nothing, so the plan would not choose it.
    session.choose = lambda asked: list(_candidates(asked))[1]
    try:
        train_here(ranks, job, run, (AUTO,))
    finally:
        session.choose = real
    if not ranks.first:
        return None
    section = json.loads((Path(run) / "deepspeed.json").read_text())["config"]["zero_optimization"]
    return read_run(Path(run)).losses, section
