"""`zlora latency`: turns, what programs and people get, refusals. No time is asserted."""

from __future__ import annotations

import json

import pytest

from pipeline.latency.measure import LEAST_ROUNDS, WARM_UP_ROUNDS, in_turns
from pipeline.latency.variants import METHODS

SMALL = ("--batch", "2,1", "--sequence", "8,16", "--rounds", "3", "--bottleneck", "4")


def test_passes_go_in_turns_and_those_that_warm_up_do_not_count():
    calls, waited = [], []
    passes = [lambda name=name: calls.append(name) for name in "ABC"]
    rounds = list(in_turns(passes, 5, 1e9, lambda: waited.append(len(calls)), clock=lambda: float(len(calls))))
    assert "".join(calls) == "ABC" * (WARM_UP_ROUNDS + 5)
    assert rounds == [[1.0] * 3] * 5
    # Before each pass and behind it.
    assert waited == [number // 2 + number % 2 for number in range(2 * len(calls))]


def test_a_row_that_takes_too_long_has_the_fewest_rounds():
    assert len(list(in_turns([lambda: None], 50, 0.0, lambda: None))) == LEAST_ROUNDS


def test_programs_get_one_object_and_a_picture_is_drawn(zlora, gpt2_base, tmp_path):
    code, out, _ = zlora("latency", gpt2_base, *SMALL, "--json", "--plot", tmp_path / "heat.png")
    report = json.loads(out)
    assert code == 0
    assert set(report) == {
        *("schema_version", "base", "base_parameters", "weights", "dtype", "device", "host", "versions", "order", "warm_up_rounds"),
        *("variants", "certificate", "rows", "over_base"),
    }
    assert set(report["host"]) == {"cpu", "cores", "threads", "load", "system"}
    assert [one["method"] for one in report["variants"]] == list(METHODS)
    assert [(row["batch"], row["sequence"], row["rounds"]) for row in report["rows"]] == [(2, 8, 3), (1, 8, 3), (2, 16, 3), (1, 16, 3)]
    for row in report["rows"]:
        assert list(row["times"]) == report["order"]
        assert row["times"]["base"]["over_base"] == 0.0
        for time in row["times"].values():
            assert set(time) == {"median_ms", "quartiles_ms", "over_base", "over_base_quartiles"}
            assert 0 < time["quartiles_ms"][0] <= time["median_ms"] <= time["quartiles_ms"][1]
    certificate = report["certificate"]
    assert certificate["merged_and_lora"] < 1e-5 < 1e-3 < certificate["merged_and_base"]
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_people_see_a_row_for_each_size_and_only_what_was_asked_for(zlora, gpt2_base):
    code, out, _ = zlora("latency", gpt2_base, *SMALL, "--methods", "adapter-h")
    assert code == 0
    header, first = out.splitlines()[1:3]
    assert header.split() == ["batch", "tokens", "rounds", "base", "adapter-h", "4"]
    assert first.split()[:3] == ["2", "8", "3"]
    assert first.rstrip().endswith("%")
    assert "merged" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "lora,adapter"), '--methods: "adapter" is not one of base, merged, lora, adapter-l, adapter-h, again'),
        (("--sequence", "64,129"), "has 128 positions. Use 128 at most."),
        (("--batch", "0"), '--batch 0: "0" is no number of 1 or more'),
        (("--batch", "1;2"), '--batch 1;2: "1;2" is no number of 1 or more'),
        (("--bottleneck", "33"), "is 32 wide. Use 32 at most."),
        (("--rank", "33"), "--rank 33: "),
        (("--plot", "nowhere/heat.png"), "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, said, zlora, gpt2_base):
    code, out, error = zlora("latency", gpt2_base, "--sequence", 8, *words)
    assert (code, out) == (2, "")
    assert said in error


def test_a_folder_without_a_config_is_refused(zlora, tmp_path):
    code, _, error = zlora("latency", tmp_path)
    assert code == 2
    assert "its config.json cannot be read" in error
