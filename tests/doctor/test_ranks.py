"""What the doctor does on ranks: steps that are true training, bandwidth by its formula, clocks, a shared folder; on made-up nodes."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from pipeline.doctor import links
from pipeline.doctor.network import judge_network, network_of
from pipeline.doctor.proof import Proof, judge_proof

MIB = 1 << 20


def steps_on_rank(ranks, folder):
    from pipeline.doctor.steps import take_steps

    return take_steps(ranks, Path(folder))


def test_the_proof_is_training_and_begins_at_transformers_own_loss(ranks2, tmp_path):
    first, second = ranks2.run(steps_on_rank, str(tmp_path))
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 3
    assert first["losses"] == sorted(first["losses"], reverse=True)
    model, expected = GPT2LMHeadModel.from_pretrained(tmp_path / "base"), []
    for rank in range(2):
        tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            expected.append(float(model(tokens, labels=tokens).loss))
    # LoRA changes nothing before its first step.
    assert first["losses"][0] == pytest.approx(sum(expected) / 2, rel=1e-4)
    found = judge_proof(Proof(**{**first, "on": "CPU", "losses": tuple(first["losses"]), "grad_norms": tuple(first["grad_norms"])}))
    assert found.state == "good", found
    assert first["memory_bytes"] > 100 * MIB


def measured_on_rank(ranks, hosts, run, ahead=0.0, ticking=False):
    """On made-up nodes; `ahead`: of the second node's clock; `ticking`: a stopwatch that says 1 s whatever it measures."""
    import itertools
    import time
    from types import SimpleNamespace

    from pipeline.doctor import links

    links._TIMES = {1 << 20: 20, 4 << 20: 2}
    host = hosts[ranks.rank]
    seconds = itertools.count()
    watch = SimpleNamespace(perf_counter=lambda: float(next(seconds)), monotonic=time.monotonic, sleep=time.sleep, time=time.time)
    real, links.time = links.time, watch if ticking else links.time
    try:
        return links.measure(ranks, host, Path(run), lambda: time.time() + (ahead if host != hosts[0] else 0.0))
    finally:
        links.time = real


def network(pool, *arguments, **options):
    """As it comes out of JSON, the same from every rank but for what only one knows."""
    from functools import partial

    answers = pool.run(partial(measured_on_rank, **options), *arguments)
    assert all(answer["links"] == answers[0]["links"] and answer["clocks"] == answers[0]["clocks"] for answer in answers)
    return network_of(json.loads(json.dumps(answers[0])))


def test_two_nodes_of_two_ranks_are_measured_within_and_between(ranks4, tmp_path):
    found = network(ranks4, ["a", "a", "b", "b"], str(tmp_path / "runs"), ahead=5.0)
    assert (found.backend, found.ranks, found.nodes, found.row) == ("gloo", 4, ("a", "b"), "cpu")
    assert [(link.place, link.collective, link.bytes // MIB) for link in found.links] == [
        (place, collective, size) for place in ("within", "between") for size in (1, 4) for collective in ("all-gather", "all-reduce")
    ]
    assert all(1e6 < link.bytes_s < 1e12 for link in found.links)
    assert 0 <= found.joined_s <= found.waited_s
    assert (found.unshared, found.unlocked) == ((), ())
    assert list(tmp_path.iterdir()) == []
    ahead, bound = found.clocks["b"]
    assert abs(ahead - 5.0) <= bound + 0.05
    findings = {finding.name: finding for finding in judge_network(found, 2)}
    assert "b is 5.0 s ahead of a" in findings["clocks"].value
    assert findings["clocks"].state == "problem"
    assert [findings[name].state for name in ("rendezvous", "nodes alike", "run folder")] == ["good"] * 3


def test_bandwidth_is_bytes_over_time_of_the_slowest_and_a_nodes_rails_add_up(ranks4, tmp_path):
    found = network(ranks4, ["a", "a", "b", "b"], str(tmp_path), ticking=True)
    rates = {(link.place, link.collective, link.bytes): link.bytes_s for link in found.links}
    # Of two ranks: half of an all-gather's output comes in; twice that of an all-reduce. All `times` of them took 1 s.
    for size, times in ((1 << 20, 20), (4 << 20, 2)):
        assert rates["within", "all-gather", size] == pytest.approx(size / 2 * times)
        assert rates["within", "all-reduce", size] == pytest.approx(size * times)
        assert rates["between", "all-gather", size] == pytest.approx(2 * size / 2 * times)
        assert rates["between", "all-reduce", size] == pytest.approx(2 * size * times)


def test_nodes_of_unequal_size_talk_by_as_many_rails_as_the_smallest_has(ranks4, tmp_path):
    found = network(ranks4, ["a", "a", "a", "b"], str(tmp_path), ticking=True)
    rates = {(link.place, link.collective, link.bytes): link.bytes_s for link in found.links}
    assert rates["within", "all-gather", 1 << 20] == pytest.approx((1 << 20) * 2 / 3 * 20, rel=1e-3)
    assert rates["between", "all-gather", 1 << 20] == pytest.approx((1 << 20) / 2 * 20)
    assert abs(found.clocks["b"][0]) < 1.0


def test_ranks_alone_on_their_nodes_have_nothing_within(ranks2, tmp_path):
    found = network(ranks2, ["a", "b"], str(tmp_path))
    assert {link.place for link in found.links} == {"between"}
    assert any("nothing to measure: one rank on a node" in finding.value for finding in judge_network(found, 2))


def test_what_another_node_sees_of_the_first_ones_file(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "_SEEN_S", 0.2)
    file = tmp_path / "file"
    assert links._other_side(file) == "unshared"
    file.write_text("")
    assert links._other_side(file) == "unlocked"
    with file.open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert links._other_side(file) == ""
