"""Lint of memory configurations: each costly key named with what it costs, and a mended configuration that costs nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.job.errors import JobError
from pipeline.job.files import shipped
from pipeline.job.read import read_job
from pipeline.job.zero import deepspeed_config
from pipeline.planning.job import make_plan, write_mended
from tests.training import write_job

GPT3 = "jobs/gpt3/175b_lora_wikisql.toml"
ROOT = Path(__file__).parent.parent.parent
GOOD = {"stage": 3, "stage3_prefetch_bucket_size": 500_000_000, "stage3_max_live_parameters": 4_000_000_000}
REUSE = {"stage3_max_reuse_distance": 2_000_000_000}


@pytest.fixture
def lint_of(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def lint(section: dict, *overrides: str, job: str = GPT3, ranks: int = 8, **top: object) -> dict:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": section, **top}))
        return make_plan(read_job(Path(job), (f"memory.config={file}", *overrides), lenient=True), "a100-80g", ranks, None, None)

    return lint


@pytest.mark.parametrize(
    ("section", "keys", "says"),
    [
        ({**GOOD, **REUSE}, [], ""),
        ({**GOOD, **REUSE, "contiguous_gradients": True, "sub_group_size": 1}, ["contiguous_gradients", "sub_group_size"], "no optimizer"),
        ({**GOOD, **REUSE, "stage3_prefetch_bucket_size": 0}, ["stage3_prefetch_bucket_size"], "every gather is waited for"),
        ({**GOOD, **REUSE, "stage3_max_live_parameters": 0}, ["stage3_max_live_parameters"], "nothing is gathered ahead"),
        (
            {**GOOD, "stage3_max_live_parameters": 10**12, "stage3_max_reuse_distance": 10**12},
            ["stage3_max_live_parameters", "stage3_max_reuse_distance"],
            "GiB a GPU more",
        ),
        ({"stage": 0, "stage3_max_reuse_distance": 5}, ["stage3_max_reuse_distance"], "does nothing"),
    ],
)
def test_costly_keys_are_named_and_mended(lint_of, section, keys, says):
    plan = lint_of(section)
    findings = plan["lint"]["findings"]
    assert [finding["key"] for finding in findings] == keys
    if not keys:
        assert plan["lint"]["mended"] is None
        return
    assert says in findings[0]["costs"]
    again = lint_of(plan["lint"]["mended"]["zero_optimization"])
    assert again["lint"]["findings"] == []
    assert "GiB a GPU more" not in says or again["peak_bytes"] < plan["peak_bytes"]


@pytest.fixture
def small(tmp_path, gpt2_base) -> str:
    """A job on a base that fits anywhere."""
    return str(write_job(tmp_path, gpt2_base))


def test_what_is_gathered_again_for_nothing_is_counted(lint_of, small):
    section = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000, "stage3_max_reuse_distance": 0}
    (found,) = lint_of(section, job=small, ranks=8)["lint"]["findings"]
    assert found["key"] == "stage3_max_reuse_distance"
    assert "gathers 1.20 times as many bytes" in found["costs"]


def test_no_shipped_configuration_costs_anything_on_a_large_base(lint_of):
    files = sorted(shipped("ds_configs").glob("*.json"))
    assert len(files) == 8
    for file in files:
        section = json.loads(file.read_text())["zero_optimization"]
        if section.get("offload_param", {}).get("device") == "nvme":
            section["offload_param"]["nvme_path"] = "/scratch"
        plan = lint_of(section)
        assert plan["lint"]["findings"] == [], file


def test_every_key_that_has_no_place_is_named_with_the_job_s_key_and_left_out(lint_of, tmp_path):
    section = {**GOOD, **REUSE, "stage3_max_live_paramters": 1, "sub_group_size": 1}
    plan = lint_of(section, fp16={"enabled": True}, train_micro_batch_size_per_gpu="auto", wandb={}, optmizer={})
    told = {finding["key"]: finding["costs"] for finding in plan["lint"]["findings"]}
    assert list(told) == ["fp16", "optmizer", "train_micro_batch_size_per_gpu", "wandb", "stage3_max_live_paramters", "sub_group_size"]
    assert "Set base.dtype" in told["fp16"]
    assert "Set train.micro_batch_tokens" in told["train_micro_batch_size_per_gpu"]
    assert "would ignore it" in told["optmizer"]
    assert "Did you mean stage3_max_live_parameters?" in told["stage3_max_live_paramters"]
    file = tmp_path / "mended.json"
    write_mended(plan, file)
    assert json.loads(file.read_text()) == {"zero_optimization": {**GOOD, **REUSE}}
    deepspeed_config(file)
    with pytest.raises(JobError, match="is there already"):
        write_mended(plan, file)


def test_a_file_that_costs_nothing_is_written_as_it_is_and_a_choice_as_it_was_made(lint_of, tmp_path):
    write_mended(lint_of({**GOOD, **REUSE}), tmp_path / "same.json")
    assert json.loads((tmp_path / "same.json").read_text()) == {"zero_optimization": {**GOOD, **REUSE}}
    plan = lint_of({}, "memory.config=auto")
    write_mended(plan, tmp_path / "chosen.json")
    assert json.loads((tmp_path / "chosen.json").read_text()) == plan["chosen"]["config"]


def test_bytes_between_nodes_that_need_not_cross_are_counted(lint_of, small):
    section = {"stage": 3, "stage3_param_persistence_threshold": 0}
    # Sixteen GPUs of two nodes, each of which has room for the whole base.
    plan = lint_of(section, job=small, ranks=16)
    (found,) = plan["lint"]["findings"]
    assert (found["key"], found["mended"]) == ("zero_hpz_partition_size", 8)
    moved = plan["communication"]["between_nodes_bytes_per_step"]
    assert f"{moved / 1e9:,.1f} GB of the base come to each node" in found["costs"]
    assert moved > 0
    mended = lint_of(plan["lint"]["mended"]["zero_optimization"], job=small, ranks=16)
    assert mended["communication"]["between_nodes_bytes_per_step"] == 0
    assert mended["lint"]["findings"] == []
    # One node has no other; and eight V100s do not hold 175B, so that must cross.
    assert lint_of(section, job=small, ranks=8)["lint"]["findings"] == []
    v100 = make_plan(read_job(Path(GPT3), ("memory.config=zero3.json",)), "v100-32g", 32, None, None)
    assert v100["lint"]["findings"] == []
