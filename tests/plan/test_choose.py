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
from pipeline.plan.hardware import GIB, gpu_of
from pipeline.plan.memory import Setting, beside, memory, setting
from pipeline.plan.work import work
from pipeline.planning.job import make_plan
from tests.training import trained, write_job

ROOT = Path(__file__).parent.parent.parent
GPT3 = Path("jobs/gpt3/175b_lora_wikisql.toml")
AUTO = "memory.config=auto"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def asked_of(ranks: int, *overrides: str, **known) -> Setting:
    job = read_job(GPT3, (AUTO, *overrides))
    return replace(setting(job, None, read_shape(ROOT / "jobs" / "gpt3" / "175b"), gpu_of("a100-80g"), ranks, None, 0, None), **known)


DISK = "memory.nvme_path=/scratch"


@pytest.mark.parametrize(
    ("ranks", "overrides", "main_memory_gib", "group", "offload"),
    [
        (8, (), None, None, None),
        (8, (DISK,), 100, None, None),
        (16, (), None, 8, None),
        (12, (), None, None, None),
        (2, (), None, None, "cpu"),
        (2, (DISK,), None, None, "cpu"),
        (2, (DISK,), 500, None, "cpu"),
        (2, (DISK,), 200, None, "nvme"),
    ],
)
def test_the_fastest_that_fits_is_chosen(ranks, overrides, main_memory_gib, group, offload):
    asked = asked_of(ranks, *overrides, main_memory_bytes=main_memory_gib and main_memory_gib * GIB)
    choice = choose(asked)
    section = choice.config["zero_optimization"]
    assert (section["stage"], section.get("zero_hpz_partition_size"), section.get("offload_param", {}).get("device")) == (3, group, offload)
    assert choice.fits
    assert (choice.setting.group, choice.setting.offload, choice.setting.auto) == (group, offload, False)
    assert set(choice.reasons) == set(section)
    assert not memory(replace(choice.setting, stage=0, offload=None)).peak < asked.gpu.memory_bytes
    if offload == "nvme":
        assert section["offload_param"]["nvme_path"] == "/scratch"
        assert "of 200.0 GiB" in choice.reasons["offload_param"]


def test_a_base_that_is_trained_is_not_sharded_within_nodes():
    assert choose(asked_of(16)).setting.group == 8
    assert choose(asked_of(16, trains_matrices=True)).setting.group is None


def test_where_nothing_fits_that_is_said():
    assert not choose(asked_of(2, main_memory_bytes=200 * GIB)).fits


def test_a_group_within_a_node_gathers_nothing_between_nodes_and_holds_as_much_as_a_node_alone():
    within = choose(asked_of(32)).setting
    alone, over_all = replace(within, ranks=8, nodes=1, group=None), replace(within, group=None)
    assert within.shard_bytes == alone.shard_bytes == pytest.approx(4 * over_all.shard_bytes, rel=1e-4)
    moved = {name: work(asked, memory(asked)) for name, asked in (("within", within), ("all", over_all))}
    assert moved["within"].between_nodes_bytes == 0 < moved["all"].between_nodes_bytes
    assert moved["within"].communication_s < moved["all"].communication_s
    halves = replace(within, group=16)
    assert 0 < work(halves, memory(halves)).between_nodes_bytes < moved["all"].between_nodes_bytes


def test_shards_on_disk_need_disk_and_no_memory():
    place = {name: beside(replace(asked_of(16), auto=False, stage=3, offload=name)) for name in (None, "cpu", "nvme")}
    base = place[None].base_on_disk
    assert place["cpu"].host_per_node - place[None].host_per_node == pytest.approx(base / 2, rel=1e-3)
    assert place["nvme"].nvme_per_node == pytest.approx(base / 2, rel=1e-3)
    assert place["nvme"].host_per_node == place[None].host_per_node
    assert place[None].nvme_per_node == place["cpu"].nvme_per_node == 0


def test_one_gpu_copies_what_is_not_on_it():
    one = replace(asked_of(1), auto=False, stage=3)
    assert memory(one).gathered.fetched == 0
    away = memory(replace(one, offload="cpu"))
    assert away.gathered.fetched > one.shape.parameters
    assert away.parts["gathered"] > 0 == away.parts["base_shard"]


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


def test_a_run_trains_sharded_where_that_is_chosen(ranks4, tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    expected = trained(ranks4, job, tmp_path / "whole", "memory.config=zero0.json").losses
    for place, group, device in ((1, 2, None), (2, None, None), (3, None, "nvme")):
        losses, section = ranks4.run(_train_sharded, str(job), str(tmp_path / str(place)), place)[0]
        assert section["stage"] == 3
        assert section["stage3_max_reuse_distance"] == 0
        assert (section.get("zero_hpz_partition_size"), section.get("offload_param", {}).get("device")) == (group, device)
        assert losses == pytest.approx(expected, rel=1e-5)


def _train_sharded(ranks, job: str, run: str, place: int):
    """By the plan's choice of that place, as two ranks on each of two nodes."""
    import os
    from unittest import mock

    from pipeline.plan.choose import _candidates
    from pipeline.runs import session
    from tests.training import read_run, train_here

    real = session.choose

    # On so small a base sharding saves nothing, so the plan would not choose it.
    session.choose = lambda asked: list(_candidates(asked))[place]
    try:
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
            train_here(ranks, job, run, (AUTO, f"memory.nvme_path={Path(job).parent}"))
    finally:
        session.choose = real
    if not ranks.first:
        return None
    section = json.loads((Path(run) / "deepspeed.json").read_text())["config"]["zero_optimization"]
    return read_run(Path(run)).losses, section
