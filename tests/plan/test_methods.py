"""The plan beside what a method trains: what every rank holds, what a step computes and sums. What is kept is in test_measured.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.job.read import read_job
from pipeline.planning.job import make_plan

ROOT = Path(__file__).parent.parent.parent
GPT3 = "jobs/gpt3/175b_lora_wikisql.toml"
LAYERS, WIDTH, VOCABULARY, CONTEXT = 96, 12288, 50257, 2048
PLAIN = "memory.gradient_checkpointing=false"
MATMULS = LAYERS * 12 * WIDTH**2


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def plan_of(kind: str, *overrides: str, ranks: int = 64, gpu: str = "a100-80g", tokens: int | None = None) -> dict:
    job = GPT3 if kind == "lora" else f"jobs/gpt3/175b_{kind}_wikisql.toml"
    return make_plan(read_job(Path(job), overrides), gpu, ranks, None, tokens)


@pytest.mark.parametrize("ranks", [64, 96])
def test_full_holds_runs_of_matrices_and_whole_vectors(ranks):
    plan = plan_of("full", ranks=ranks)
    matrices = [VOCABULARY * WIDTH, CONTEXT * WIDTH] + LAYERS * [3 * WIDTH**2, WIDTH**2, 4 * WIDTH**2, 4 * WIDTH**2]
    vectors = LAYERS * (4 + 3 + 1 + 4 + 1) * WIDTH + 2 * WIDTH
    held = vectors + sum(-(-size // ranks) for size in matrices)
    parts = plan["parts_bytes"]
    assert plan["trained_parameters"] == plan["base"]["parameters"] == vectors + sum(matrices)
    assert (parts["delta"], parts["gradients"], parts["optimizer"]) == (4 * held, 4 * held + 8, 8 * held)
    assert plan["methods"] == ["full"]
    assert plan["paper"] is None


def test_work_follows_what_is_trained():
    def per_token(kind: str, *overrides: str) -> float:
        return plan_of(kind, PLAIN, *overrides)["work"]["flops_per_step"] / (128 * 384)

    assert per_token("full") == pytest.approx(6 * MATMULS, rel=0.02)
    assert per_token("lora") == pytest.approx(4 * MATMULS, rel=0.02)
    assert per_token("bitfit") == pytest.approx(4 * MATMULS, rel=0.02)
    # Forward everywhere; backward, gradients of weights included, in 2 of 96 layers.
    top = per_token("full", "methods.0.kind=full_top")
    assert top == pytest.approx((2 + 4 * 2 / 96) * MATMULS, rel=0.02)


def test_full_sums_each_gradient_into_runs_once_a_micro_batch():
    full, lora = plan_of("full"), plan_of("lora")
    assert lora["communication"]["reduced_bytes_per_step"] == 4 * (lora["trained_parameters"] + 2)
    micro_batches = full["work"]["micro_batches_per_rank"]
    assert full["communication"]["reduced_bytes_per_step"] == pytest.approx(4 * full["trained_parameters"] * micro_batches, rel=0.001)


def test_only_top_layers_keep_activations():
    full, top = (plan_of("full", PLAIN, *more)["parts_bytes"]["activations"] for more in ((), ("methods.0.kind=full_top",)))
    assert top < full / 20


def test_special_tokens_lengthen_every_example():
    plan = plan_of("prefix_layer_8_8")
    assert plan["setting"]["example_tokens"] == 384 + 16
    assert plan_of("prefix_layer_8_8", "train.max_tokens=2048")["setting"]["example_tokens"] == CONTEXT
    assert plan_of("prefix_layer_8_8", tokens=100)["setting"]["example_tokens"] == 116


def test_added_tokens_are_trained_beside_the_method():
    plain, added = plan_of("lora"), plan_of("lora", 'base.added_tokens=["<a>", "<b>"]')
    assert added["trained_parameters"] - plain["trained_parameters"] == 2 * WIDTH


def test_offloading_leaves_masters_on_the_gpu():
    there, away = (plan_of("full", f"memory.config={name}")["parts_bytes"] for name in ("zero3.json", "zero3_offload.json"))
    assert away["base_shard"] == 0
    assert away["delta"] == there["delta"]
    changed = {change["what"]: change for change in plan_of("full")["answers"]["changes"]}
    assert "masters, gradients and moments stay" in changed["shards in main memory"]["cost"]


def test_the_first_rank_puts_the_state_together():
    full = plan_of("full")
    state = 12 * full["trained_parameters"]
    assert full["beside_bytes"]["state_file"] == state
    assert full["beside_bytes"]["host_per_node"] > 2 * state
    # A whole matrix on its device, beside what it holds.
    assert full["phases_bytes"]["save"] > full["phases_bytes"]["step"] + 4 * 4 * WIDTH**2
