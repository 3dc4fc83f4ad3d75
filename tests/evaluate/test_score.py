"""Scores of a split are those of `zlora score` on its predictions, on every rank; metrics that take long hold nobody up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from pipeline.compare.collect import collect
from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.evaluate.metrics.own import exact_match
from pipeline.job.errors import JobError
from pipeline.job.metrics import METRICS, SCRIPTS
from tests.lives import Life
from tests.training import train_here, write_job
from tests.whole import test_commands as processes
from tests.whole.test_commands import ENVIRONMENT

ROWS = [
    ("name[The Eagle], food[French], area[city centre]", ["The Eagle is French .", "In the city centre is the French Eagle ."]),
    ("name[The Mill], priceRange[cheap]", ["The Mill is cheap ."]),
    ("name[Blue Spice], near[The Mill]", ["Blue Spice is near The Mill .", "Near The Mill is Blue Spice ."]),
]


def write_e2e(folder, base):
    data = folder / "data"
    data.mkdir(parents=True)
    lines = ["mr,ref", *(f'"{mr}","{text}"' for mr, texts in ROWS for text in texts)]
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (data / name).write_text("\n".join(lines) + "\n")
    job = write_job(folder, base)
    task = f'kind = "jsonl"\ndata = "{folder / "train.jsonl"}"\nseparator = " ->"'
    assert task in job.read_text()
    text = job.read_text().replace(task, f'kind = "e2e"\ndata = "{data}"')
    job.write_text(text + '[evaluate]\nmax_new_tokens = 12\nevery_steps = 15\nscript = "pymteval"\nbest_metric = "ROUGE_L"\n')
    return job


def test_a_task_is_scored_by_its_own_metrics(gpt2_base, ranks2, zlora, tmp_path):
    run = tmp_path / "run"
    # Long and at a high rate: something of the texts should be right.
    shown = ranks2.run(train_here, str(write_e2e(tmp_path, gpt2_base)), str(run), ("train.steps=30", "train.learning_rate=0.03"))[0]
    told = json.loads((run / "result.json").read_text())
    predictions = run / "predictions" / "valid-000030.jsonl"
    _, out, _ = zlora("score", "--task", "e2e", "--script", "pymteval", "--predictions", predictions, "--json")
    report = json.loads(out)
    assert report["metrics"]["BLEU"] > 0
    assert told["valid"].keys() == report["metrics"].keys() | {"loss", "perplexity"}
    assert {name: told["valid"][name] for name in report["metrics"]} == report["metrics"]
    assert told["best"]["metric"] == "ROUGE_L"
    for note in report["notes"]:
        assert shown.count(note) == 1, "once, not at each scoring"
    done = processes.zlora("evaluate", run, "--split", "valid", "--delta", "last", "--json", cwd=tmp_path)
    again = json.loads(done.stdout)
    assert again["notes"] == report["notes"]
    assert {name: again["metrics"][name] for name in report["metrics"]} == pytest.approx(report["metrics"], rel=1e-9)
    done = processes.zlora("evaluate", run, "--split", "valid", cwd=tmp_path)
    step = told["best"]["step"]
    assert zlora("merge", gpt2_base, run / "best", "--out", tmp_path / "merged")[0] == 0
    assert f"valid by the best delta of {run}, after {step} steps" in done.stdout
    assert f"{told['best']['value']:.4f}" in done.stdout
    kept = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert kept[0] == again
    assert [(row["delta"], row["changed"]) for row in kept] == [("last", {}), ("best", {})]
    (found,) = collect([run])
    assert found.results["valid ROUGE_L"] == told["valid"]["ROUGE_L"] == again["metrics"]["ROUGE_L"]
    assert found.results["best valid ROUGE_L"] == kept[1]["metrics"]["ROUGE_L"]
    assert found.results["best valid BLEU"] == kept[1]["metrics"]["BLEU"]
    assert (run / "predictions" / "valid-best.jsonl").read_bytes() == (run / "predictions" / f"valid-{step:06d}.jsonl").read_bytes()


@pytest.mark.parametrize("kind", METRICS)
def test_the_names_are_known_beforehand(kind, monkeypatch):
    from pipeline.evaluate.metrics import meteor

    monkeypatch.setattr(meteor, "meteor", lambda *_: 0.5)
    numbers = kind in ("stsb", "regression")
    text = {"wikisql": "SELECT a FROM b"}.get(kind, "1.5" if numbers else "1")
    for script in (None, *SCRIPTS.get(kind, ())):
        # Correlation needs values that differ.
        found = [text, "2.5" if numbers else text]
        assert tuple(metrics_of(kind, found, [[other] for other in found], script)[0]) == METRICS[kind]


def test_exact_match_is_of_any_reference_but_for_space_around():
    assert exact_match([" a b", "a  b", "c", ""], [["x", "a b "], ["a b"], ["C"], [" "]]) == 0.5


def test_a_wikisql_question_counts_as_often_as_it_was_asked():
    groups = [["SELECT a FROM t", "SELECT b FROM t"], ["SELECT c FROM t"]]
    assert metrics_of("wikisql", ["SELECT a FROM t", "SELECT c FROM t"], groups)[0]["lf_accuracy"] == pytest.approx(2 / 3)


def alone(ranks, outcome):
    from pipeline.evaluate.alone import on_first_rank

    def work():
        if outcome == "refused":
            raise JobError("x: y.")
        return outcome, ranks.rank

    try:
        return on_first_rank(ranks, "metrics", work)
    except JobError as error:
        return str(error), error.everywhere


def test_every_rank_has_the_first_ones_answer_or_refusal(ranks3):
    assert ranks3.run(alone, "answer") == [("answer", 0)] * 3
    assert ranks3.run(alone, "refused") == [("x: y.", True)] * 3


def slowly(ranks, seconds):
    """How often a rank says that it gets on while the first one works, and how long the rank was there."""
    from pipeline.evaluate.alone import on_first_rank

    real, said, start = ranks.watch.at, [], time.monotonic()
    ranks.watch.at = lambda phase: said.append(phase)
    try:
        on_first_rank(ranks, "metrics", lambda: time.sleep(seconds))
    finally:
        del ranks.watch.at
    assert ranks.watch.at == real
    return len(said), time.monotonic() - start


def test_no_rank_waits_silently_while_the_first_one_works(ranks2):
    for said, waited in ranks2.run(slowly, 2.2):
        assert waited >= 2.0
        assert said >= 4


def test_a_request_to_stop_does_not_wait_for_long_metrics(gpt2_base, tmp_path):
    """A METEOR that never ends."""
    job, tools = write_e2e(tmp_path, gpt2_base), tmp_path / "tools"
    tools.mkdir()
    (tools / "meteor.jar").write_text("")
    java = tools / "java"
    java.write_text(f"#!/bin/sh\necho $$ > {tools}/pid\nexec sleep 1000\n")
    java.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tools}:{ENVIRONMENT['PATH']}", "METEOR_JAR": str(tools / "meteor.jar")}
    command = [sys.executable, "-m", "pipeline", "train", str(job), "--ranks", "2", "--run", "run", "--set", "evaluate.every_steps=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (tools / "pid").exists() or not (tools / "pid").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    start = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, time.monotonic() - start < 20) == (75, True), errors
    assert "after step 2 of 4; everything is saved" in errors
    pid, deadline = (tools / "pid").read_text().strip(), time.monotonic() + 5
    while subprocess.run(["ps", "-p", pid], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline, "Java is left behind"
        time.sleep(0.1)


def test_three_ranks_score_seven_prompts_under_the_watchdog(gpt2_base, tmp_path):
    """Uneven shares and uneven lengths while each pass gathers the base: no rank waits for a pass that another does not make."""
    job = write_job(tmp_path, gpt2_base)
    rows = [{"prompt": "x" * (1 + 9 * number), "completion": f" {number}"} for number in range(7)]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"task.valid={tmp_path}/valid.jsonl", "train.steps=2", "train.timeout_s=60", "evaluate.gather=each_pass")
    # Batches of one prompt or two.
    settings += ("evaluate.batch_tokens=150", "evaluate.max_new_tokens=20")
    life = Life(job, tmp_path / "run", settings, count=3)
    assert life.end(120) == [0, 0, 0], life.said.read_text()
    predicted = [json.loads(line) for line in (tmp_path / "run/predictions/valid-000002.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in predicted] == [row["prompt"] for row in rows]
