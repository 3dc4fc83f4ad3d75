"""The main job through the command line: train, evaluate, merge; what a person sees; a rank that dies; torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.training import write_examples, write_job

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
NOISE = re.compile(r"warning|traceback|deprecat|\[rank|gloo|INFO|deepspeed", re.IGNORECASE)


def zlora(*arguments, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False)


@pytest.fixture(scope="module")
def place(gpt2_base, tmp_path_factory):
    """A folder with a job, its data with all splits, and a finished run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    write_job(folder, gpt2_base)
    data = folder / "data"
    data.mkdir()
    for split in ("train", "valid", "test"):
        write_examples(data / f"{split}.jsonl", 24 if split == "train" else 6)
    text = (folder / "job.toml").read_text().replace(str(folder / "train.jsonl"), str(data))
    (folder / "job.toml").write_text(text + "[evaluate]\nat_start = true\nevery_steps = 2\nmax_new_tokens = 8\n")
    done = zlora("train", "job.toml", "--ranks", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "screen.txt").write_text(done.stdout + done.stderr)
    return folder


def test_a_person_sees_what_matters_and_no_noise(place):
    screen = (place / "screen.txt").read_text()
    assert not NOISE.search(screen), screen
    assert len(screen.splitlines()) < 90
    for wanted in ("frozen", "trained", "per rank", "steps", "valid before training", "valid after 4 steps", "step 4/4", "runs/job/delta"):
        assert wanted in screen
    assert screen.count("frozen") == 1, "once, not once a rank"


def test_the_run_folder_has_everything(place):
    run = place / "runs" / "job"
    assert {p.name for p in run.iterdir()} == {
        "job.toml", "metrics.jsonl", "tensorboard", "state", "delta", "predictions", "result.json", "environment.json", "logs", ".lock",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row and "split" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    needed = {
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_scale",
        "target_tokens_per_s",
        "examples_per_s",
        "padding_share",
        "peak_memory_bytes",
    }
    assert all(needed <= row.keys() for row in steps)
    assert [row["step"] for row in rows if row.get("split") == "valid"] == [0, 2, 4]
    assert sorted(p.name for p in (run / "logs").iterdir()) == ["rank0.json", "rank0.txt", "rank1.json", "rank1.txt"]
    assert json.loads((run / "logs" / "rank1.json").read_text())["phase"] == "done"
    assert sorted(p.name for p in (run / "predictions").iterdir()) == [f"valid-{n:06d}.jsonl" for n in (0, 2, 4)]
    assert json.loads((run / "result.json").read_text())["valid"].keys() == {"BLEU", "exact_match", "loss", "perplexity"}


def test_tensorboard_has_scalars_texts_and_singular_values(place):
    folder = place / "runs" / "job" / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "train/loss", "train/learning_rate", "train/grad_norm", "speed/target_tokens_per_s", "speed/examples_per_s", "speed/step_s",
        "speed/data_s", "speed/save_stall_s", "memory/peak_GiB", "valid/BLEU", "valid/exact_match", "valid/loss", "valid/perplexity",
    }  # fmt: skip
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Tensors("valid/samples/text_summary")] == [0, 2, 4]
    for name, words in {"job": 'kind = "lora"', "plan": "| base shard |"}.items():
        (text,) = events.Tensors(f"run/{name}/text_summary")
        assert text.step == 0
        assert words in text.tensor_proto.string_val[0].decode()
    assert "run/warnings/text_summary" not in tags["tensors"]
    names = [f"weight_update/layer_{layer}.{role}.singular_values" for layer in range(3) for role in "qv"]
    assert sorted(tags["histograms"]) == names
    assert [event.step for event in events.Histograms(names[0])] == [0, 2, 4]
    assert len(list(folder.iterdir())) == 1, "one run, not one more for its settings"


def test_evaluate_prints_one_object_and_writes_predictions(place):
    done = zlora("evaluate", "runs/job", "--json", "--ranks", "2", cwd=place)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {
        *("schema_version", "run", "split", "delta", "delta_sha256", "changed", "step", "prompts"),
        *("too_long", "metrics", "notes", "predictions"),
    }
    assert answer["changed"] == {}
    assert (answer["split"], answer["delta"], answer["step"]) == ("test", "last", 4)
    assert answer["metrics"].keys() == {"BLEU", "exact_match", "loss", "perplexity"}
    rows = [json.loads(line) for line in (place / answer["predictions"]).read_text().splitlines()]
    assert len(rows) == answer["prompts"]
    assert set(rows[0]) == {"prompt", "prediction", "references"}
    # On one rank, and on the split scored in training: the scores written at the end of training.
    alone = json.loads(zlora("evaluate", "runs/job", "--json", "--split", "valid", cwd=place).stdout)
    last = json.loads((place / "runs" / "job" / "result.json").read_text())["valid"]
    assert alone["metrics"] == pytest.approx(last, rel=1e-5)


def test_merge_prints_one_object_and_the_folder_loads(place, gpt2_base):
    done = zlora("merge", gpt2_base, "runs/job/delta", "--out", "merged", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {
        *("schema_version", "base", "deltas", "dtype", "result", "tensors", "converted", "running", "logits")
    }
    merged, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (place / "merged", gpt2_base))
    assert not torch.equal(merged.transformer.h[0].attn.c_attn.weight, base.transformer.h[0].attn.c_attn.weight)


def test_a_finished_run_is_kept_and_told_how_to_go_on(place):
    before = {path: path.read_bytes() for path in (place / "runs" / "job").rglob("*") if path.is_file() and "logs" not in path.parts}
    done = zlora("train", "job.toml", "--ranks", "2", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "this run is finished: set train.epochs or train.steps higher to go on, or use --fresh to begin again" in done.stdout
    after = {path: path.read_bytes() for path in before}
    del before[place / "runs" / "job" / ".lock"], after[place / "runs" / "job" / ".lock"]
    assert after == before


def test_another_job_does_not_touch_the_run(place):
    before = (place / "runs" / "job" / "metrics.jsonl").read_bytes()
    done = zlora("train", "job.toml", "--set", "methods.0.rank=5", cwd=place)
    assert done.returncode == 2
    assert re.fullmatch(r"error: runs/job: holds a run of another job: methods\[0\].rank 3 -> 5\. .*--fresh.*\n", done.stderr)
    assert (place / "runs" / "job" / "metrics.jsonl").read_bytes() == before


def test_evaluating_with_another_base_is_refused(place, tmp_path):
    from tests.bases import make_gpt2

    other = make_gpt2(tmp_path / "other", seed=5)
    done = zlora("evaluate", "runs/job", "--set", f'base.model="{other}"', cwd=place)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*delta: was trained on a base with digest .*\n", done.stderr)


def test_a_killed_rank_ends_the_others_within_seconds(place):
    command = [sys.executable, "-m", "pipeline", "train", "job.toml", "--ranks", "2", "--run", "killed", "--set", "train.steps=100000"]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    metrics = place / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"grad_norm"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 15
    assert process.returncode == 76
    assert errors.count("\n") == 1
    assert errors.startswith("rank 1 was ended by SIGKILL.")
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)


def test_torchrun_starts_the_ranks_too(place):
    # "--": without it torchrun takes our --run for an abbreviation of its own --run-path.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "pipeline"]
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", "job.toml", "--run", "torchrun"], cwd=place, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [json.loads(line)["loss"] for line in (place / run / "metrics.jsonl").read_text().splitlines() if '"grad_norm"' in line]
        for run in ("runs/job", "torchrun")
    )
    assert ours == theirs
