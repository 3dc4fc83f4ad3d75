"""The study: its jobs are valid and of one size, its script trains what is missing and chooses rates, its page is made from its results."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

from pipeline.job.read import job_digest, job_toml, read_job, read_members
from pipeline.plan.families import read_shape
from pipeline.plan.trained import trained
from pipeline.planning.job import make_plan

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs" / "study"
ENCODER = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
ENCODER |= {"intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 2}
MATCHED = ("lora", "adapter_houlsby", "adapter_lin", "adapter_pfeiffer", "adapter_drop", "prefix_layer")


@pytest.fixture
def study(monkeypatch):
    """The script, as Python finds it when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("study")


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("make_study")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder in which the jobs find all that they name: bases without weights, empty folders of data."""
    folder, sizes = tmp_path_factory.mktemp("study"), sizes_of_base()
    shape = {"model_type": "gpt2", "vocab_size": sizes["VOCABULARY"], "n_embd": sizes["WIDTH"], "n_layer": sizes["LAYERS"]}
    shape |= {"n_head": sizes["HEADS"], "n_positions": sizes["CONTEXT"]}
    for name, keys in (("base", shape), ("start", shape), ("encoder", ENCODER), ("text", {})):
        (folder / "runs" / "study" / name).mkdir(parents=True)
        (folder / "runs" / "study" / name / "config.json").write_text(json.dumps(keys))
    for name in ("e2e", "glue"):
        (folder / "data" / name).mkdir(parents=True)
    return folder


def sizes_of_base() -> dict[str, int]:
    """As benchmarks/study_base.py has them, which imports torch."""
    return {name: int(value) for line in re.findall(r"^([A-Z, ]+) = ([\d, ]+)$", (ROOT / "benchmarks" / "study_base.py").read_text(), re.M)
            for name, value in zip(line[0].split(", "), line[1].split(", "), strict=True)}  # fmt: skip


def test_every_job_has_a_place_in_the_study_and_is_valid_and_planned(study, here, monkeypatch):
    monkeypatch.chdir(here)
    units = study.units()
    assert sorted([*(unit.job for unit in units), "pretrain"]) == sorted(file.stem for file in JOBS.glob("*.toml"))
    before = set()
    for unit in units:
        members = read_members(JOBS / f"{unit.job}.toml")
        assert study.planned(unit) == len(members) + (2 if unit.rate_of is None else 0)
        assert re.search(r"^# Expected: ", (JOBS / f"{unit.job}.toml").read_text(), re.MULTILINE)
        assert unit.rate_of is None or unit.rate_of in before, "it would wait for what comes later"
        before.add(unit.job)
        plan = make_plan(members[0][1], "a100-80g", 1, None, None)
        assert plan["fits"], unit.job
    assert make_plan(read_job(JOBS / "pretrain.toml"), "a100-80g", 1, None, None)["fits"]
    assert Counter(unit.part for unit in units) == {"e2e": 10, "sst2": 10, "rank": 1, "weights": 1, "few": 5}


def test_methods_of_matched_size_are_within_a_tenth_of_each_other(here, monkeypatch):
    monkeypatch.chdir(here)
    for part, base in (("e2e", "base"), ("sst2", "encoder")):
        shape = read_shape(here / "runs" / "study" / base)
        counts = {method: trained(shape, *read_job(JOBS / f"{part}_{method}.toml").methods) for method in MATCHED}
        assert max(counts.values()) <= 1.1 * min(counts.values()), counts
    shape = read_shape(here / "runs" / "study" / "base")
    sizes = {trained(shape, *job.methods) for _, job in read_members(JOBS / "weights.toml")}
    four = {trained(shape, *job.methods) for member, job in read_members(JOBS / "rank.toml") if member.settings["methods.0.rank"] == 4}
    assert sizes == four
    assert len(sizes) == 1


def test_all_methods_of_a_part_learn_from_the_same(here, monkeypatch):
    monkeypatch.chdir(here)
    for part in ("e2e", "sst2"):
        jobs = [read_job(file).model_copy(update={"methods": (), "sweep": None}) for file in JOBS.glob(f"{part}_*.toml")]
        assert len(jobs) == 10
        assert all(job == jobs[0] for job in jobs)


def write_results(folder: Path, job: str, overrides: list[str]) -> int:
    """In place of `zlora sweep`: what a finished member leaves. Its score is highest at the middle rate."""
    trained_now = 0
    for member, own in read_members(Path(job), tuple(overrides)):
        run = folder / member.name
        if (run / "result.json").exists():
            continue
        trained_now += 1
        (run / "delta").mkdir(parents=True)
        (run / "job.toml").write_text(job_toml(own))
        (run / "environment.json").write_text('{"ranks": 1}')
        score = {0.01: 0.6, 0.001: 0.6, 0.03: 0.55}.get(own.train.learning_rate, 0.5) + own.train.seed / 100
        valid = {"accuracy": score} if own.task.kind == "glue" else {"BLEU": score, "perplexity": 3.0}
        result = {"job_digest": job_digest(own), "steps": own.train.steps, "loss": 1.0, "seconds": 60.0, "valid": valid}
        (run / "result.json").write_text(json.dumps(result))
        (run / "delta" / "manifest.json").write_text(json.dumps({"parameters": 1000 * getattr(own.methods[0], "rank", 5)}))
    return trained_now


@pytest.fixture
def finished(study, here, tmp_path, monkeypatch):
    """A study whose commands write made-up results: (it, the words of every command)."""
    monkeypatch.chdir(here)
    asked = argparse.Namespace(
        out=tmp_path, data=here / "data", encoder=here / "runs" / "study" / "encoder", smoke=False, only=list(study.PARTS)
    )
    asked.only.remove("base")
    monkeypatch.setattr(study, "POLL_S", 0.01)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((here / "runs" / "study" / "base" / "config.json").read_text())
    (tmp_path / "pretrain" / "delta").mkdir(parents=True)
    (tmp_path / "pretrain" / "delta" / "manifest.json").write_text('{"parameters": 5000000}')
    (tmp_path / "pretrain" / "result.json").write_text('{"seconds": 900.0, "steps": 1000, "valid": {"perplexity": 9.5}}')
    said: list[list[str]] = []

    def zlora(self, log, *words):
        words = [str(word) for word in words]
        said.append(words)
        if words[0] == "sweep":
            write_results(
                Path(words[words.index("--run") + 1]), words[1], [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            )
        return 0

    monkeypatch.setattr(study.Study, "zlora", zlora)
    this = study.Study(asked)
    assert study.run(this)
    return this, said


def test_rates_are_chosen_with_one_seed_and_used_by_what_follows(study, finished):
    this, said = finished
    names = Counter(re.sub(r",seed=\d", "", run.name) for run in study.finished(this.out / "e2e_lora"))
    assert names == {"learning_rate=0.003": 1, "learning_rate=0.01": 3, "learning_rate=0.03": 1}
    assert study.chosen(this.out / "e2e_full") == 0.001, "of equals the smallest"
    assert len(study.finished(this.out / "rank")) == len(study.finished(this.out / "weights")) == 18
    for words in said:
        if words[0] == "sweep" and Path(words[1]).stem in ("rank", "weights", "few_lora"):
            assert "train.learning_rate=0.01" in words
    scored = [words for words in said if words[0] == "evaluate"]
    assert len(scored) == 10 * 3
    assert all(words[2:4] == ["--split", "test"] for words in scored)


def test_what_is_finished_is_passed_over(study, finished):
    this, _ = finished
    before = {file: file.stat().st_mtime_ns for file in this.out.glob("*/*/result.json")}
    assert len(before) == 2 * 10 * 5 + 18 + 18 + 5 * 6
    assert study.run(this)
    assert {file: file.stat().st_mtime_ns for file in this.out.glob("*/*/result.json")} == before


def test_the_page_has_the_results_of_the_runs(study, maker, finished, tmp_path):
    this, _ = finished
    found = json.loads(json.dumps(study.study(this.out, study.METHODS, study.FEW))) | {"measured_on": ["- made up"]}
    found["left"] = study.left(this.out)
    assert found["left"] == {}
    assert {part: len(rows) for part, rows in found["parts"].items()} == {"e2e": 10, "sst2": 10, "rank": 7, "weights": 7, "few": 15}
    page = maker.page(found)
    # Seeds 1, 2, 3 at the middle rate: 61, 62, 63.
    assert "| LoRA | 8,000 | 0.01 | 62.0 ± 1.0 | 3.00 ± 0.00 | 70.4 |" in page
    assert "| Adapter-P | 15,000 | " in page
    assert "| 64 | 64,000 | 62.0 ± 1.0 | 3.00 ± 0.00 | 69.24 |" in page
    assert "| q+k+v+o r=2 | 2,000 | 62.0 ± 1.0 |" in page
    assert "| LoRA | 62.0 ± 1.0 | 62.0 ± 1.0 | 62.0 ± 1.0 | " in page
    assert "| e2e_lora | 0.003: 51.0 | 0.01: 61.0 | 0.03: 56.0 | 0.01 |" in page
    assert "Not run." not in page
    by_hand = page.replace("Not written yet.", "The order is the paper's.")
    assert maker.page(found, by_hand) == by_hand
    maker.draw(found, tmp_path)
    assert {file.name for file in tmp_path.glob("*.png")} == {f"study-{name}.png" for name in ("methods", "rank", "few")}
    assert len(named := re.findall(r"images/(study-\w+\.png)", page)) == 3
    assert all((tmp_path / name).exists() for name in named)


def test_a_part_that_is_not_run_is_said(study, maker, finished, tmp_path):
    this, _ = finished
    for folder in (this.out / "rank", *this.out.glob("sst2_*")):
        shutil.rmtree(folder)
    found = json.loads(json.dumps(study.study(this.out, study.METHODS, study.FEW))) | {"measured_on": [], "left": study.left(this.out)}
    page = maker.page(found)
    assert found["left"] == {"rank": 18, "sst2": 50}
    assert "- **not finished**: 18 runs of `rank`" in page
    assert set(found["parts"]) == {"e2e", "weights", "few"}
    assert len(re.findall(r"^Not run\.$", page, re.MULTILINE)) == 2
    assert re.findall(r"images/study-(\w+)\.png", page) == ["methods", "few"]
    maker.draw(found, tmp_path)
    assert not (tmp_path / "study-rank.png").exists()


def test_a_smoke_test_has_a_few_of_each_part(study, here, monkeypatch):
    monkeypatch.chdir(here)
    for unit in study.units(smoke=True):
        members = read_members(JOBS / f"{unit.job}.toml", (*study.SMOKE, *study.cut_short(unit.job)))
        assert 2 <= len(members) <= 4
        assert {job.train.steps for _, job in members} == {2}


def test_a_study_that_is_stopped_ends_what_runs(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PROGRAM", "import time; time.sleep(60)")
    this = study.Study(argparse.Namespace(out=tmp_path))
    timer = threading.Timer(0.5, this.stop)
    timer.start()
    with pytest.raises(study.Stop):
        this.zlora("a job", "sweep")
    with pytest.raises(study.Stop):
        this.zlora("another", "sweep")
    assert not this.running


def test_the_recorded_study_is_what_its_page_says(maker):
    if not maker.RESULTS.exists():
        pytest.skip("not recorded: run python benchmarks/study.py --encoder FOLDER --record")
    text = maker.TARGET.read_text()
    assert maker.page(json.loads(maker.RESULTS.read_text()), text) == text, "run: python docs/make_study.py"
