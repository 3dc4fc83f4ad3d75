"""The whole look at a job, on two ranks of a sharded base."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.job.read import read_job
from pipeline.screen import Screen
from tests.training import read_run, trained, write_job

KEYS = {
    "schema_version": 1,
    "job": {"base", "dtype", "methods", "memory", "batch_examples", "micro_batch_tokens"},
    "speed": {
        *("step_s", "examples_per_s", "tokens_per_s", "target_tokens_per_s", "padding_share", "model_flops_per_s"),
        *("recomputed_flops_per_s", "matrix_product_flops_per_s", "share_of_matrix_products", "makers_flops_per_s", "utilisation"),
    },
    "time": {"step_s", "split_s", "split_most_s", "shares", "save_s", "save_every_steps"},
    "gathers": {"calls", "gathered_bytes", "received_bytes", "exchanged_bytes", "predicted_gathered_bytes", "trace_invalidations"},
    "memory": {
        *("parts", "most_of_a_rank_bytes", "peak_memory_bytes", "capacity_bytes", "micro_batches", "timeline", "phases"),
    },
    "cost_of_looking": {"clock", "memory", "modules", "trace"},
}
PARTS = ["base_shard", "delta", "gradients", "optimizer", "gathered", "kept", "forward", "backward"]


def profile_here(ranks, job: str, run: str, overrides: tuple[str, ...], steps: int) -> tuple[dict, str]:
    """On a rank of a pool: the report and what the screen showed; nothing of the looking may be left."""
    import torch.distributed as dist

    from pipeline.model.gathers import Coordinator
    from pipeline.profile.run import profile

    before = [dict(vars(Coordinator)), dist.reduce_scatter_tensor]
    shown = io.StringIO()
    report = profile(read_job(Path(job), overrides), Path(run), ranks, Screen(shown, shown=ranks.first), steps)
    assert [dict(vars(Coordinator)), dist.reduce_scatter_tensor] == before
    return report, shown.getvalue()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, gpt2_base, ranks2):
    folder = tmp_path_factory.mktemp("profiled")
    job = write_job(folder, gpt2_base)
    # So that even a small base's matrices are gathered again and again.
    lean = {"stage": 3, "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 5000, "stage3_max_live_parameters": 15000}
    (folder / "lean.json").write_text(json.dumps({"zero_optimization": lean | {"stage3_max_reuse_distance": 0}}))
    overrides = ("train.micro_batch_tokens=64", "memory.gradient_checkpointing=true", f"memory.config={folder / 'lean.json'}")
    (report, shown), (nothing, silence) = ranks2.run(profile_here, str(job), str(folder / "run"), overrides, 3)
    assert (nothing, silence) == ({}, "")
    return job, folder / "run", report, shown


def test_the_report_has_every_key_and_is_the_file(profiled):
    _, run, report, _ = profiled
    assert json.loads((run / "profile" / "profile.json").read_text()) == json.loads(json.dumps(report))
    for key, wanted in KEYS.items():
        assert (report[key] if key == "schema_version" else set(report[key])) == wanted, key
    assert set(report) == {*KEYS, "environment", "steps", "start_s", "modules", "says"}
    assert report["steps"] == {"plain": 3, "clock": 3, "memory": 1, "modules": 1, "trace": 1, "first": 2}


def test_gathers_are_those_of_the_plan_and_the_trace_holds(profiled):
    _, _, report, _ = profiled
    moved = report["gathers"]
    assert moved["gathered_bytes"] == moved["predicted_gathered_bytes"] > 0
    assert moved["received_bytes"] == moved["gathered_bytes"] // 2
    assert moved["trace_invalidations"] == 0


def test_memory_is_by_part_and_beside_the_plan(profiled):
    _, _, report, _ = profiled
    parts = report["memory"]["parts"]
    assert list(parts) == PARTS
    for name in PARTS[:5]:
        assert parts[name]["measured"] == parts[name]["predicted"] > 0, name
    for name in PARTS[5:]:
        assert parts[name]["predicted"] == pytest.approx(parts[name]["measured"], rel=0.1), name
    fixed = sum(parts[name]["measured"] for name in PARTS[:4])
    heights = [row["gathered"] + row["kept"] + row["working"] for row in report["memory"]["timeline"]]
    assert max(heights) + fixed == parts["backward"]["measured"]
    assert max(row["gathered"] for row in report["memory"]["timeline"]) == parts["gathered"]["measured"]
    names = [one["phase"] for one in report["memory"]["phases"]]
    assert (names[0], names[-1]) == ("data", "optimizer")
    assert names.count("forward") == names.count("backward") == len(report["memory"]["micro_batches"])


def test_the_split_is_the_whole_step(profiled):
    _, _, report, _ = profiled
    split = report["time"]["split_s"]
    assert list(split) == ["data", "gather", "forward", "backward", "reduce", "optimizer", "other", "save"]
    assert all(seconds > 0 for name, seconds in split.items() if name != "other")
    assert sum(share for name, share in report["time"]["shares"].items() if name != "save") == pytest.approx(1)
    names = [row["module"] for row in report["modules"]]
    assert {"transformer.h.*.attn.c_attn", "transformer.h.*.mlp.c_fc", "lm_head"} <= set(names)
    adapted = report["modules"][names.index("transformer.h.*.attn.c_attn")]
    assert min(adapted["forward_s"], adapted["backward_s"]) > 0


def test_what_is_looked_at_is_drawn_traced_and_on_the_board(profiled):
    _, run, _, shown = profiled
    folder = run / "profile"
    picture = np.asarray(Image.open(folder / "profile.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"transformer.h.0.attn.c_attn", "transformer.h.2.mlp.c_proj"} <= names
    assert any("allgather" in str(name) or "all_gather" in str(name) for name in names)
    board = EventAccumulator(str(folder)).Reload()
    tags = board.Tags()
    assert tags["images"] == ["profile"]
    assert {"profile_time/gather_s", "profile_speed/tokens_per_s", "profile_memory/kept_bytes"} <= set(tags["scalars"])
    assert all(text in shown for text in ("what it says", "slowest modules", str(folder / "trace.json.gz")))


def test_training_begins_in_the_same_folder_as_if_nobody_had_looked(profiled, ranks2, tmp_path):
    job, run, _, _ = profiled
    assert trained(ranks2, job, run).losses == trained(ranks2, job, tmp_path / "other").losses
    assert (run / "profile" / "profile.json").is_file()
    assert read_run(run).losses


def test_a_trained_matrix_s_sum_is_not_taken_for_computing(tmp_path, gpt2_base, ranks2):
    """Under `full`, gradients of sharded matrices are summed in the backward pass."""
    job = write_job(tmp_path, gpt2_base)
    job.write_text(job.read_text().replace('kind = "lora"\ntargets = ["q", "v"]\nrank = 3\nalpha = 12\n', 'kind = "full"\n'))
    (report, _), _ = ranks2.run(profile_here, str(job), str(tmp_path / "run"), (), 2)
    assert report["gathers"]["trace_invalidations"] == 0
    assert report["time"]["split_s"]["reduce"] > 0
    assert report["memory"]["parts"]["optimizer"]["measured"] == report["memory"]["parts"]["optimizer"]["predicted"]


def test_a_base_that_is_whole_gathers_nothing(tmp_path, gpt2_base, ranks1):
    job = write_job(tmp_path, gpt2_base)
    ((report, shown),) = ranks1.run(profile_here, str(job), str(tmp_path / "run"), ("memory.config=zero0.json",), 2)
    assert report["gathers"]["calls"] == report["time"]["split_s"]["gather"] == 0
    assert "gathers of a step" not in shown
    kept = report["memory"]["parts"]["kept"]
    assert kept["predicted"] == pytest.approx(kept["measured"], rel=0.1)
