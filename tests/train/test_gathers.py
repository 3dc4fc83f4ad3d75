"""Gathers of a step, once ZeRO-3 has its trace: the fewest that the memory configuration allows, as the plan says, each weight by name."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.training import write_job

SMALL = 200
"""Elements of what always stays gathered: norms and biases."""
LEAN = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
MICRO_BATCHES = 3
FORWARD_ONLY = {"gpt2": "transformer.wpe.weight", "llama": "layers.0.self_attn.k_proj.weight"}
"""Nothing below it is trained, so no backward pass comes to it."""
TABLES = ("wte.weight", "embed_tokens.weight", "lm_head.weight")


def gathered_by_name(ranks, job: str, overrides: tuple[str, ...]) -> dict:
    """Two steps, an evaluation between them: how often each weight was gathered in which pass; broken traces; the plan."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from pipeline.evaluate.measure import measure
    from pipeline.job.read import read_job
    from pipeline.model import gathers
    from pipeline.model.zero3 import gathered
    from pipeline.plan.memory import memory
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.tasks.batch import collate
    from pipeline.train.step import Stepper

    asked = read_job(Path(job), overrides)
    session = open_session(asked, ranks, Screen(io.StringIO(), shown=False))
    stepper = Stepper(session.engine, session.root, session.delta, asked.train, ranks, fp16=False)
    data = session.training_set().sequences
    batches = [collate([data[i] for i in range(4)], [0, 1, 2, 3], True, ranks.device)] * MICRO_BATCHES
    names = {p.ds_id: name for name, p in session.root.named_parameters()}
    sizes = {name: p.ds_numel for name, p in session.root.named_parameters()}
    counts: Counter[tuple[str, str]] = Counter()
    coordinator, real = gathers.Coordinator, getattr(gathers.Coordinator, gathers._GATHER)

    def gather(self, params, forward):
        missing = [names[p.ds_id] for p in params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        counts.update((name, "forward" if forward else "backward") for name in missing)
        return real(self, params, forward)

    def one_step(number: int) -> dict:
        counts.clear()
        stepper(number, batches, 100, 0.01)
        return dict(counts)

    one_step(0)
    setattr(coordinator, gathers._GATHER, gather)
    try:
        with gathers.watched_gathers() as watched:
            first = one_step(1)
            with gathered(session.root):
                measure(session.root, data, ranks, 256, True)
            second = one_step(2)
    finally:
        setattr(coordinator, gathers._GATHER, real)
        session.engine.release()
    large = [name for name, size in sizes.items() if size > SMALL]
    return {
        "steps": [first, second],
        "elements": sum(count * sizes[name] for (name, _), count in second.items()),
        "planned": memory(session.setting).gathered.in_step(MICRO_BATCHES),
        "invalidations": watched.invalidations,
        "large": [name for name in large if not name.endswith(TABLES)],
        "tables": [name for name in large if name.endswith(TABLES)],
        "trained": list(session.delta.tensors()),
    }


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("kept", [True, False], ids=["room", "lean"])
def test_each_weight_is_gathered_as_rarely_as_can_be(base, kept, request, ranks2, tmp_path):
    config = tmp_path / "zero.json"
    section = {"stage": 3, "stage3_param_persistence_threshold": SMALL, **({} if kept else LEAN)}
    config.write_text(json.dumps({"zero_optimization": section}))
    job = write_job(tmp_path, request.getfixturevalue(f"{base}_base"))
    for found in ranks2.run(gathered_by_name, str(job), (f"memory.config={config}",)):
        assert found["tables"]
        (alone,) = [name for name in found["large"] if name.endswith(FORWARD_ONLY[base])]
        others = [name for name in found["large"] if name != alone]
        # With room each once a step; without, once for each pass of each micro-batch.
        wanted = {(alone, "forward"): MICRO_BATCHES} | {(name, "forward"): 1 if kept else MICRO_BATCHES for name in others}
        if not kept:
            wanted |= {(name, "backward"): MICRO_BATCHES for name in others}
        # No table of the vocabulary and nothing trained is among them, and an evaluation changes nothing.
        assert found["steps"] == [wanted, wanted]
        assert not {name for name, _ in wanted} & {*found["tables"], *found["trained"]}
        assert found["elements"] == found["planned"]
        assert found["invalidations"] == 0
