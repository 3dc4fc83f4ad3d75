"""`zlora plan`: what it answers, its JSON's keys, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.plan.hardware import GIB, gpu_of, gpus
from pipeline.planning.job import make_plan
from tests.training import write_job

ROOT = Path(__file__).parent.parent.parent
GPT3 = "jobs/gpt3/175b_lora_wikisql.toml"
KEYS = Path(__file__).parent / "plan_keys.txt"
"""Renew it by hand when keys are added; a key that goes or changes its meaning raises schema_version."""


def plan_of(
    *overrides: str, gpu: str = "a100-80g", ranks: int | None = None, job: str | Path = GPT3, nodes: int | None = None, tokens=None
):
    return make_plan(read_job(Path(job), overrides), gpu, ranks, nodes, tokens)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def keys_of(value: object, path: str = "") -> set[str]:
    match value:
        case dict():
            return {key for name, inner in value.items() for key in keys_of(inner, f"{path}.{name}" if path else name)}
        case [first, *_]:
            return keys_of(first, f"{path}[]")
        case _:
            return {path}


def test_the_command_answers_without_torch_and_keeps_its_keys():
    script = "import sys; from pipeline.cli import app\ntry: app()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    words = [sys.executable, "-c", script, "plan", GPT3, "--gpu", "V100-32", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
    plan = json.loads(done.stdout)
    # What depends on the GPU or on what could be changed is a key of its own.
    found = {key for key in keys_of(plan) if ".keys." not in key}
    assert sorted(found) == KEYS.read_text().split()


def test_people_read_tables_and_the_arithmetic_on_request():
    words = [sys.executable, "-m", "pipeline", "plan", GPT3, "--gpu", "v100-32g", "--gpus", "32"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "174,604,259,328 parameters, 18,874,368 trained" in shown
    assert "32 x v100-32g on 4 nodes, fp16" in shown
    assert "paper 1.2 TB; ours 2.8 TB" in " ".join(shown.split())
    assert "arithmetic" not in shown
    explained = subprocess.run([*words, "--explain"], capture_output=True, text=True, check=True).stdout
    assert "174,604,259,328 parameters x 2 / 32" in explained


def test_gpt3_beside_the_paper():
    plan = plan_of(gpu="v100-32g")
    ours = {figure["what"]: figure["ours_bytes"] for figure in plan["paper"]}
    assert ours["training memory, LoRA"] == pytest.approx(350e9, rel=0.01)
    assert ours["checkpoint, LoRA"] == pytest.approx(35e6, rel=0.1)
    assert ours["100 tasks"] == pytest.approx(354e9, rel=0.01)
    # Two bytes a parameter need 11 GPUs of 32 GiB before anything else.
    assert 11 < plan["answers"]["fewest_gpus"]["v100-32g"] <= 32
    assert plan["fits"]
    assert plan["setting"]["gpus"] == plan["answers"]["fewest_gpus"]["v100-32g"]


def test_the_fewest_and_the_largest_are_that():
    fewest = plan_of()["answers"]["fewest_gpus"]["a100-80g"]
    assert plan_of(ranks=fewest)["fits"]
    assert not plan_of(ranks=fewest // 2)["fits"]
    largest = plan_of(ranks=8)["answers"]["largest_micro_batch_tokens"]
    small_scoring = "evaluate.batch_tokens=64"
    assert plan_of(f"train.micro_batch_tokens={largest}", small_scoring, ranks=8)["fits"]
    assert not plan_of(f"train.micro_batch_tokens={largest + 64}", small_scoring, ranks=8)["fits"]


def test_a_change_that_is_named_does_what_it_says():
    plan = plan_of("memory.gradient_checkpointing=false", ranks=8)
    assert not plan["fits"]
    named = {change["what"]: change for change in plan["answers"]["changes"]}
    change = named["recompute activations"]
    changed = plan_of("memory.gradient_checkpointing=true", ranks=8)
    assert change["keys"] == {"memory.gradient_checkpointing": True}
    assert change["peak_bytes"] == changed["peak_bytes"] < plan["peak_bytes"]
    assert change["step_s"] == changed["work"]["step_s"] > plan["work"]["step_s"]
    assert plan_of("evaluate.batch_tokens=16384", ranks=8)["answers"]["changes"][0]["what"] == "generate fewer texts at once"


def test_changes_of_where_shards_are_are_named():
    def named(config, ranks):
        changes = plan_of(f"memory.config={config}", ranks=ranks)["answers"]["changes"]
        return {change["what"]: change for change in changes}

    whole, node, over_all = (named(name, 32) for name in ("zero0.json", "zero3_node.json", "zero3.json"))
    assert whole["shard the base within each node"]["keys"] == {"memory.config": "zero3.json", "zero_hpz_partition_size": 8}
    assert whole["shard the base within each node"]["peak_bytes"] > whole["shard the base"]["peak_bytes"]
    assert whole["shard the base within each node"]["step_s"] <= whole["shard the base"]["step_s"]
    assert node["shard the base over all GPUs"]["keys"] == {"zero_hpz_partition_size": 1}
    assert "shard the base over all GPUs" not in over_all
    assert over_all["shards on disk"]["peak_bytes"] == over_all["shards in main memory"]["peak_bytes"]
    assert over_all["shards on disk"]["step_s"] > over_all["shards in main memory"]["step_s"]
    plan = plan_of("memory.config=zero3_node.json", ranks=32)
    assert plan["setting"]["group"] == 8
    assert plan["communication"]["between_nodes_bytes_per_step"] == 0
    assert plan["answers"]["fewest_gpus"]["a100-80g"] == 8


def test_work_by_the_4n_rule():
    plan = plan_of("memory.gradient_checkpointing=false", ranks=8)
    tokens = 128 * 384
    matmuls = 96 * 12 * 12288**2
    # Attention, the head and the delta add a few percent.
    assert plan["work"]["flops_per_step"] / tokens == pytest.approx(4 * matmuls, rel=0.05)
    assert plan_of(ranks=8)["work"]["flops_per_step"] / tokens == pytest.approx(6 * matmuls, rel=0.05)
    on_nodes = plan_of(ranks=16, nodes=2)["communication"]
    # Two passes over the layers, half of each on the other node; the token embedding is used twice more.
    assert on_nodes["between_nodes_bytes_per_step"] == pytest.approx(2 * matmuls * 2 / 2, rel=0.05)


def test_a_task_with_labels_generates_nothing(tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    assert plan_of(job=job, gpu="cpu", ranks=1)["phases_bytes"]["generate"] > 0
    (tmp_path / "rows.csv").write_text("text,label\na,yes\nb,no\n")
    text = job.read_text()
    start = text.index("[task]")
    task = f'[task]\nkind = "classification"\ndata = "{tmp_path / "rows.csv"}"\nlabels = ["no", "yes"]\n'
    job.write_text(text[:start] + task + text[text.index("[train]") :])
    found = plan_of(job=job, gpu="cpu", ranks=1)
    assert found["phases_bytes"]["generate"] == 0
    # 3 layers, q and v, rank 3, width 32; and the head.
    assert found["trained_parameters"] == 3 * 2 * 3 * (32 + 32) + 2 * 32


@pytest.mark.parametrize(
    ("overrides", "options", "says"),
    [
        (("base.dtype=bf16",), {"gpu": "v100-32g"}, "v100-32g does not compute in bf16. Use --set base.dtype=fp16"),
        ((), {"gpu": "a100"}, "several of that name. Use one of v100-16g, v100-32g"),
        ((), {"gpu": "tpu"}, "none of that name"),
        (("memory.config=zero3_node.json",), {"ranks": 12}, "--gpus 12: zero_hpz_partition_size = 8 does not divide them. Use a multiple"),
        ((), {"ranks": 2, "nodes": 4}, "--nodes 4: more than the 2 GPUs"),
        (("train.micro_batch_tokens=100",), {}, "an example may have 384 tokens. Set it to that or more"),
        (("methods.0.targets=['query']",), {}, '"query" is not a target of this base'),
    ],
)
def test_what_cannot_be_planned_is_said(overrides, options, says):
    with pytest.raises(JobError, match=says.replace("[", r"\[").replace("(", r"\(")):
        plan_of(*overrides, **options)


def test_gpus_by_name():
    assert gpu_of("A100-80").name == gpu_of("a100-80g").name == "a100-80g"
    assert gpu_of("h200").memory_bytes == 141 * GIB
    assert {"v100-16g", "v100-32g", "a100-40g", "a100-80g", "h100-80g", "h200-141g", "l40s-48g", "cpu"} == set(gpus())


def test_activations_are_told_kept_and_recomputed():
    plain, again = plan_of("memory.gradient_checkpointing=false"), plan_of("memory.gradient_checkpointing=true")
    assert plain["activations_bytes"] == again["activations_bytes"]
    assert plain["activations_bytes"] == {"kept": plain["parts_bytes"]["activations"], "recomputed": again["parts_bytes"]["activations"]}
    assert plain["activations_bytes"]["kept"] > 5 * again["activations_bytes"]["recomputed"]
