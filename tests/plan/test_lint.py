"""Lint of memory configurations: each costly key named with what it costs, and a mended configuration that costs nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.job.files import shipped
from pipeline.job.read import read_job
from pipeline.planning import make_plan

ROOT = Path(__file__).parent.parent.parent
GOOD = {"stage": 3, "stage3_prefetch_bucket_size": 500_000_000, "stage3_max_live_parameters": 4_000_000_000}
REUSE = {"stage3_max_reuse_distance": 2_000_000_000}


@pytest.fixture
def lint_of(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def lint(section: dict, *overrides: str, job: str = "jobs/gpt3/175b_lora_wikisql.toml", ranks: int = 16) -> dict:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": section}))
        return make_plan(read_job(Path(job), (f"memory.config={file}", *overrides)), "a100-80g", ranks, None, None)

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
    again = lint_of(plan["lint"]["mended"])
    assert again["lint"]["findings"] == []
    assert "GiB a GPU more" not in says or again["peak_bytes"] < plan["peak_bytes"]


def test_what_is_gathered_again_for_nothing_is_counted(lint_of, gpt2_base, tmp_path):
    job = tmp_path / "small.toml"
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job.write_text(
        f'[base]\nmodel = "{gpt2_base}"\n[[methods]]\nkind = "lora"\n[task]\nkind = "jsonl"\ndata = "{tmp_path / "data.jsonl"}"\n'
    )
    section = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000, "stage3_max_reuse_distance": 0}
    (found,) = lint_of(section, job=str(job))["lint"]["findings"]
    assert found["key"] == "stage3_max_reuse_distance"
    assert "gathers 1.36 times as many bytes" in found["costs"]


def test_no_shipped_configuration_costs_anything_on_a_large_base(lint_of):
    files = sorted(shipped("ds_configs").glob("*.json"))
    assert len(files) == 2
    for file in files:
        plan = lint_of(json.loads(file.read_text())["zero_optimization"])
        assert plan["lint"]["findings"] == [], file
