"""The parts of a profile one by one: the stopwatch, the storages, the counted work, the sentences."""

import inspect
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.job.read import read_job
from pipeline.model.gathers import Coordinator, watched_gathers
from pipeline.plan.work import model_flops
from pipeline.profile import stopwatch as watches
from pipeline.profile.judge import Facts, judge
from pipeline.profile.modules import alike
from pipeline.profile.stopwatch import Places, Stopwatch
from pipeline.profile.storages import GATHERED, Storages, timeline
from pipeline.runs.session import open_session
from pipeline.screen import Screen
from pipeline.tasks.batch import collate
from pipeline.train import loop, step
from pipeline.train.step import Stepper
from tests.training import write_job


@pytest.fixture
def clock(monkeypatch):
    """Goes on by one at every look."""
    moments = iter(range(1000))
    monkeypatch.setattr(watches.time, "perf_counter", lambda: float(next(moments)))


def test_every_second_is_counted_once_and_belongs_to_the_innermost(clock):
    watch = Stopwatch()
    watch.push("before any phase")
    watch.phase("forward")  # 0
    watch.push("layer")  # 1
    watch.push("gather")  # 2
    watch.pop("gather")  # 3
    watch.pop("layer")  # 4
    watch.pop("never pushed")
    watch.phase("backward")  # 5
    watch.push("layer")  # 6
    watch.push("forgotten")  # 7
    watch.pop("layer")  # 8
    watch.stop()  # 9
    assert watch.seconds() == {
        ("forward", "forward"): 2,
        ("forward", "layer"): 2,
        ("forward", "gather"): 1,
        ("backward", "backward"): 2,
        ("backward", "layer"): 1,
        ("backward", "forgotten"): 1,
    }
    assert watch.begins() == [(0.0, "forward"), (5.0, "backward")]


def test_places_of_the_loop_are_phases_and_what_came_before_is_counted_apart(clock):
    places, watch = Places(0), Stopwatch()  # 0
    places.at("loading the base")  # 1
    places.at("loading the base")  # 2
    places.at("dealing examples", 1)  # 3
    places.at("micro-batch 1 of 2")
    assert places.seconds == {"starting": 1, "loading the base": 2}
    places.stopwatch = watch
    for place in ("dealing examples", "micro-batch 1 of 2", "micro-batch 2 of 2", "all-reduce of the gradient", "updating the delta"):
        places.at(place)
    assert [name for _, name in watch.begins()] == ["data", "forward", "forward", "reduce", "optimizer"]


def test_the_loop_s_own_places_are_known_to_the_stopwatch():
    """A place that is renamed would end up under "other"."""
    said = re.findall(r'watch\.at\(f?"([^"]+)"', inspect.getsource(loop) + inspect.getsource(step))
    # Before the first step.
    said.remove("rehearsing the longest examples")
    assert len(said) == 4
    assert {watches.phase_of(place) for place in said} == {"data", "forward", "reduce", "optimizer"}


def test_storages_are_followed_from_birth_to_end():
    before = torch.zeros(256)
    with Storages() as storages:
        storages.know([before])
        before + 0  # born and gone: 1 KiB
        kept = torch.ones(512)
        view = kept[:7]
        storages.maker = GATHERED
        gathered = torch.ones(1024)
        storages.keep()
        assert storages.live == {"gathered": 4096, "working": 2048}
        del gathered
        before.add_(1)
        del kept
        assert storages.live == {"gathered": 0, "working": 2048}
        del view
    assert storages.live == {"gathered": 0, "working": 0}
    assert storages.total == 6144
    rows = timeline(storages.changes, 0.0)
    assert [(row["gathered"], row["kept"], row["working"]) for row in rows] == [
        (0, 0, 1024), (0, 0, 0), (0, 2048, 0), (4096, 2048, 0), (0, 2048, 0), (0, 0, 0),
    ]  # fmt: skip


def test_a_long_timeline_keeps_its_heights():
    with Storages() as storages:
        for size in (1, 5, 900, 5, 1) * 50:
            torch.empty(size)
    rows = timeline(storages.changes, 0.0, points=20)
    assert len(rows) <= 20
    assert max(row["working"] for row in rows) == 3600


def test_like_modules_share_a_name():
    assert alike("model.transformer.h.11.attn.c_attn") == "transformer.h.*.attn.c_attn"
    assert alike("model.encoder.layer.0") == "encoder.layer.*"


@pytest.mark.parametrize("base", ["gpt2_base", "llama_base"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_work_is_what_torch_counts(base, recomputed, request, ranks1, tmp_path):
    """Independent: torch's own counter of matrix products. It knows no attention on a CPU, and the rule counts the lowest layer's
    backward pass whole, which needs no gradient of its input."""
    ((rule, again, attention, counted),) = ranks1.run(counted_flops, str(request.getfixturevalue(base)), str(tmp_path), recomputed)
    assert (again > 0) == recomputed
    assert rule + again - attention == pytest.approx(counted, rel=0.05)


def counted_flops(ranks, base: str, folder: str, recomputed: bool) -> tuple[float, ...]:
    """On a rank: FLOPs of one step by the rule, those of recomputing, those of attention among both, and torch's count without them."""
    job = read_job(
        write_job(Path(folder), Path(base)),
        ("memory.config=zero0.json", f"memory.gradient_checkpointing={str(recomputed).lower()}"),
    )
    session = open_session(job, ranks, Screen(io.StringIO(), shown=False))
    data, examples = session.training_set().sequences, list(range(12))
    stepper = Stepper(session.engine, session.root, session.delta, job.train, ranks, fp16=False)
    batch = collate([data[i] for i in examples], examples, True, ranks.device)
    targets = sum(data.targets(i) for i in examples)
    with FlopCounterMode(display=False) as counter:
        stepper(0, [batch], targets, 1e-3)
    lengths = [data.tokens(i) for i in examples]
    shape = session.setting.shape
    # Scores and sums, 2 FLOPs a product, over half of the pairs; forward once or twice, backward twice.
    passes = 4 if recomputed else 3
    attention = passes * shape.layers * 2 * 2 * shape.heads * shape.head_width * sum(n * n for n in lengths) / 2
    return (*model_flops(session.setting, lengths, targets), attention, float(counter.get_total_flops()))


def test_a_broken_trace_is_counted(monkeypatch):
    monkeypatch.setattr(Coordinator, "_invalidate_trace", lambda coordinator: "ended")
    with watched_gathers() as counted:
        assert Coordinator._invalidate_trace(None) == "ended"
    Coordinator._invalidate_trace(None)
    assert counted.invalidations == 1


FACTS = Facts(
    shares={"data": 0.01, "gather": 0.05, "forward": 0.4, "backward": 0.5, "reduce": 0.03, "optimizer": 0.01, "save": 0.0},
    slowest_over_mean=1.0,
    padding_share=0.0,
    invalidations=0,
    micro_batch_tokens=1000,
    micro_batches=4,
    sharded=True,
    whole_fits=False,
    largest_micro_batch_tokens=6000,
    peak_bytes=50,
    capacity_bytes=100,
    largest_part="kept",
    largest_part_share=0.6,
    advice=("recompute activations (a step takes 1.30 times as long)",),
    predicted={"kept": (100, 101)},
)
SAID = {
    "compute-bound": ({}, ["compute-bound: 90 %"]),
    "data-bound": ({"shares": {"data": 0.4, "forward": 0.6}}, ["40 % of a step is dealing", "XDG_CACHE_HOME"]),
    "gather-bound, room": (
        {"shares": {"gather": 0.6, "forward": 0.2, "backward": 0.1}},
        ["60 % of a step is waiting for gathered weights", "train.micro_batch_tokens to 2,000 or more (the plan has room for 6,000)"],
    ),
    "gather-bound, whole fits": ({"shares": {"gather": 0.6}, "whole_fits": True}, ["zero0.json gathers nothing"]),
    "gather-bound, one micro-batch": ({"shares": {"gather": 0.6}, "micro_batches": 1}, ["raise train.batch_examples"]),
    "a slow rank": ({"shares": {"reduce": 0.3}, "slowest_over_mean": 1.5}, ["waiting for the slowest rank", "1.50 times as long"]),
    "a slow link": ({"shares": {"reduce": 0.3}}, ["the link is slow"]),
    "saves": ({"shares": {"save": 0.3}}, ["train.save_every_steps"]),
    "full": ({"peak_bytes": 95}, ["memory-bound: 95 % is full, 60 % of it kept", "recompute activations"]),
    "padding": ({"padding_share": 0.25}, ["25 % of the computed tokens are padding"]),
    "a broken trace": ({"invalidations": 3}, ["broke 3 times"]),
    "unlike the plan": ({"predicted": {"kept": (130, 100)}}, ["kept: the plan said 1.30 times"]),
}


@pytest.mark.parametrize(("facts", "parts"), SAID.values(), ids=SAID)
def test_what_bounds_a_step_is_said_with_what_to_change(facts, parts):
    (said,) = judge(replace(FACTS, **facts))  # nothing else is
    for part in parts:
        assert part in said


def test_the_largest_share_comes_first():
    said = judge(replace(FACTS, shares={"data": 0.25, "gather": 0.5, "forward": 0.25}))
    assert [text[:4] for text in said] == ["50 %", "25 %"]
