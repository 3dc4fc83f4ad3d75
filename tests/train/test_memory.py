"""Only the delta is trained: what a rank holds, what the optimizer holds, what saving moves, and what stays untouched."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch

from tests.training import write_job

COLLECTIVES = ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "reduce_scatter_tensor", "gather", "all_gather_object")


def held_by_a_rank(ranks, job: str, run: str) -> dict:
    """Opens a job, takes two steps, saves; counts bytes and collectives."""
    import torch.distributed as dist

    from pipeline.job.read import job_digest, read_job
    from pipeline.methods.files import store
    from pipeline.model.zero3 import shard_of
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.tasks.batch import collate
    from pipeline.train.step import Stepper
    from pipeline.weights.digest import file_digests

    asked = read_job(Path(job))
    session = open_session(asked, ranks, Screen(io.StringIO(), shown=False))
    base = {name: shard_of(p).clone() for name, p in session.root.named_parameters()}
    data = session.training_set().sequences
    sequences = [data[index] for index in range(4)]
    stepper = Stepper(session.engine, session.root, session.delta, asked.train, ranks, fp16=False)
    for step in range(2):
        micro_batches = [collate(sequences, [0, 1, 2, 3], True, ranks.device)]
        stepper(step, micro_batches, 100, 0.01)
    session.engine.release()
    calls = []
    kept = {name: getattr(dist, name) for name in COLLECTIVES}
    for name in COLLECTIVES:
        setattr(dist, name, lambda *a, _name=name, **k: calls.append(_name))
    try:
        files = file_digests(session.base.checkpoint.files)
        if ranks.first:
            tensors = stepper.capture()
            values = {name.removeprefix("weight/"): t for name, t in tensors.items()}
            store(
                session.delta,
                values,
                Path(run),
                asked.base,
                files,
                session.base,
                job_digest(asked),
                2,
                ("", False),
            )
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    optimizer_state = [t for state in stepper.optimizer.state.values() for t in state.values() if t.dim()]
    registered = dict(session.root.named_parameters())
    return {
        "base_elements": sum(shard_of(p).numel() for p in registered.values()),
        "whole_elements": [int(p.ds_numel) for p in registered.values()],
        "gathered": [name for name, p in registered.items() if p.numel() > 0],
        "unchanged": all(torch.equal(base[name], shard_of(p)) for name, p in registered.items()),
        "base_gradients": [name for name, p in registered.items() if p.grad is not None or p.requires_grad],
        "optimized": sum(t.numel() for group in stepper.optimizer.param_groups for t in group["params"]),
        "optimizer_elements": sum(t.numel() for t in optimizer_state),
        "delta": session.delta.parameters,
        "delta_is_partitioned": [name for name, t in session.delta.tensors().items() if hasattr(t, "ds_id")],
        "collectives_while_saving": calls,
    }


def test_a_rank_holds_its_shard_and_the_delta_alone(gpt2_base, ranks2, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    before = hashlib.sha256((gpt2_base / "model.safetensors").read_bytes()).hexdigest()
    for held in ranks2.run(held_by_a_rank, str(job), str(tmp_path / "delta")):
        assert held["base_elements"] == sum(-(-numel // 2) for numel in held["whole_elements"])
        assert held["gathered"] == []
        assert held["unchanged"]
        assert held["base_gradients"] == []
        assert held["delta"] == held["optimized"] == 3 * 2 * 2 * 32 * 3, "3 layers, q and v, A and B, width 32, rank 3"
        assert held["optimizer_elements"] == 2 * held["delta"], "two Adam moments of the delta and nothing else"
        assert held["delta_is_partitioned"] == []
        assert held["collectives_while_saving"] == []
    assert hashlib.sha256((gpt2_base / "model.safetensors").read_bytes()).hexdigest() == before


def count_layer_passes(ranks, job: str, checkpointing: str) -> int:
    from pipeline.job.read import read_job
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.tasks.batch import collate
    from pipeline.train.step import Stepper

    asked = read_job(Path(job), (f"memory.gradient_checkpointing={checkpointing}",))
    session = open_session(asked, ranks, Screen(io.StringIO(), shown=False))
    passes = []
    session.root.model.transformer.h[0].attn.register_forward_hook(lambda *_: passes.append(1))
    data = session.training_set().sequences
    sequences = [data[index] for index in range(4)]
    Stepper(session.engine, session.root, session.delta, asked.train, ranks, fp16=False)(
        0, [collate(sequences, [0, 1, 2, 3], True, ranks.device)], 100, 0.01
    )
    assert all(float(t.grad.abs().sum()) > 0 for name, t in session.delta.tensors().items() if name.endswith(".b")), "the first layer too"
    session.engine.release()
    return len(passes)


def test_gradient_checkpointing_recomputes_the_first_layer_too(gpt2_base, ranks2, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    assert ranks2.run(count_layer_passes, str(job), "false") == [1, 1]
    assert ranks2.run(count_layer_passes, str(job), "true") == [2, 2]
