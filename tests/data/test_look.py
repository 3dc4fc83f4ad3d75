"""`zlora data`: its counts and its errors are those of training, its marks are what is learnt; it needs no torch and no weights."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.look import _histogram, _statistics, look
from pipeline.data.show import show_data
from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.screen import Screen
from pipeline.tasks.open import sources_of
from pipeline.tasks.prepare import encoder_of, split_store
from pipeline.tasks.sequences import fit
from pipeline.tasks.tokens import Tokens
from pipeline.weights.digest import cache_folder
from tests.bases import VOCABULARY
from tests.hub_server import Repository, serving
from tests.training import read_run, train_here, write_examples

ROOT = Path(__file__).parents[2]
CONTEXT = 128
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REPORT = {"schema_version", "base", "context_tokens", "max_tokens", "splits", "absent", "training", "refusal", "examples"}
SPLIT = {
    *("split", "source", "files", "examples", "tokens", "targets", "lengths"),
    *("histogram", "labels", "too_long", "left", "dropped"),
}


def write(folder: Path, base: Path, task: str, train: str = "") -> Path:
    job = folder / "job.toml"
    head = f'[base]\nmodel = "{base}"\ndtype = "fp32"\n[[methods]]\nkind = "lora"\n'
    job.write_text(f"{head}[task]\n{task}\n[train]\nmicro_batch_tokens = 1024\n{train}\n")
    return job


def pairs_job(folder: Path, base: Path, task: str = "", train: str = "") -> Path:
    """24 training examples, of which some have more than 20 tokens, a bad row, and 6 test examples."""
    (folder / "own").mkdir()
    file = write_examples(folder / "own" / "train.jsonl")
    file.write_text(file.read_text() + '{"prompt": "a"}\n')
    write_examples(folder / "own" / "test.jsonl", 6)
    return write(folder, base, f'kind = "jsonl"\ndata = "{folder / "own"}"\nbad_rows = "drop"\n{task}', train)


def seen(job: Path, *overrides: str, examples: int = 3) -> dict:
    return look(read_job(job, overrides), examples, Screen(io.StringIO()))


def part_of(report: dict, split: str, source: str | None = None) -> dict:
    (found,) = (row for row in report["splits"] if row["split"] == split and source in (None, row["source"]))
    return found


def shown(report: dict) -> str:
    stream = io.StringIO()
    show_data(Screen(stream), report)
    return flat(stream.getvalue())


def flat(text: str) -> str:
    """Without the ends of lines that the width makes."""
    return " ".join(text.split())


def training_refuses(ranks, job: str, run: str, overrides: tuple[tuple[str, ...], ...]) -> list[str]:
    """On a rank of a pool."""
    said = []
    for each in overrides:
        with pytest.raises(JobError) as caught:
            train_here(ranks, job, run, each)
        said.append(str(caught.value))
    return said


def program(*arguments, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Whose last line on standard error says whether torch was imported."""
    code = (
        "import sys\nfrom pipeline.cli import main\nsys.argv[0] = 'zlora'\n"
        "try: main()\nfinally: print('torch' if sys.modules.get('torch') else 'no torch', file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env=settings, check=False)


def test_the_keys_are_these(tmp_path, gpt2_base):
    report = seen(pairs_job(tmp_path, gpt2_base))
    row, training = part_of(report, "train"), report["training"]
    assert set(report) == REPORT
    assert set(row) == SPLIT
    assert set(row["files"][0]) == {"file", "examples"}
    assert set(row["lengths"]) == {"min", "median", "mean", "p95", "p99", "max"}
    assert set(row["histogram"][0]) == {"from", "to", "examples"}
    assert set(row["too_long"]) == {"limit_tokens", "examples", "rule", "refusal"}
    assert set(row["left"]) == {"examples", "tokens", "targets"}
    assert set(row["dropped"][0]) == {"reason", "examples", "first"}
    assert set(training) == {"batch_examples", "epoch_examples", "epoch_steps", "epochs", "steps", "sources"}
    assert set(training["sources"][0]) == {"source", "weight", "examples", "epoch_examples"}
    assert set(report["examples"][0]) == {"source", "place", "label", "tokens"}
    assert set(report["examples"][0]["tokens"][0]) == {"id", "text", "learnt", "special"}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("rule", ["drop", "truncate"])
def test_counts_are_those_of_training_which_starts_with_the_same_cache(tmp_path, gpt2_base, ranks1, rule):
    job = pairs_job(tmp_path, gpt2_base, f'too_long = "{rule}"', "max_tokens = 20\nbatch_examples = 7\nepochs = 1")
    report = seen(job)
    row, training = part_of(report, "train"), report["training"]
    kept = {path: path.stat().st_mtime_ns for path in (cache_folder() / "tokens").iterdir()}
    said = flat(ranks1.run(train_here, str(job), str(tmp_path / "run"), ())[0])
    assert {path: path.stat().st_mtime_ns for path in (cache_folder() / "tokens").iterdir()} == kept
    assert f"{training['steps']} of 7 examples, {row['left']['examples']} examples in all" in said
    assert f"{row['too_long']['examples']} examples: truncated or left out" in said
    (left_out,) = row["dropped"]
    assert f"{left_out['examples']} x {left_out['reason']} (the first: {left_out['first']})" in said
    steps = read_run(tmp_path / "run").steps
    assert len(steps) == training["steps"]
    assert sum(step["tokens"] for step in steps) == row["left"]["tokens"] < row["tokens"]
    assert sum(step["target_tokens"] for step in steps) == row["left"]["targets"] <= row["targets"]
    assert row["too_long"]["examples"] > 0
    assert row["left"]["examples"] == (24 if rule == "truncate" else 24 - row["too_long"]["examples"])


def test_what_training_would_refuse_is_said_in_its_own_line(tmp_path, gpt2_base, ranks1):
    job = pairs_job(tmp_path, gpt2_base, train="max_tokens = 20")
    done = program("data", "job.toml", "--json", cwd=tmp_path)
    report, error = json.loads(done.stdout), done.stderr.splitlines()[0]
    assert (done.returncode, error) == (2, f"error: {report['refusal']}")
    assert 'Set task.too_long = "truncate" or "drop"' in error
    assert (report["training"], part_of(report, "train")["left"]) == (None, None)
    assert report["refusal"] in shown(report)
    assert report["examples"]
    small = ("train.max_tokens=128", "train.micro_batch_tokens=9")
    (said,) = ranks1.run(training_refuses, str(job), str(tmp_path / "run"), ((), small))
    assert said == [report["refusal"], seen(job, *small)["refusal"]]


def test_a_split_that_is_only_scored_refuses_by_the_context(tmp_path, gpt2_base):
    job = pairs_job(tmp_path, gpt2_base)
    file = tmp_path / "own" / "test.jsonl"
    file.write_text(json.dumps({"prompt": "Blue " * 200, "completion": "x"}) + "\n")
    refusal = part_of(seen(job), "test")["too_long"]["refusal"]
    assert f"{file}:1: " in refusal
    assert f"more than the {CONTEXT} that fit" in refusal
    # Only the split that training scores ends it, and only where all of it is scored.
    asked = (("valid", "", None), ("test", "", refusal), ("test", "evaluate.max_prompts=1", None))
    for split, more, expected in asked:
        assert seen(job, f"evaluate.split={split}", *filter(None, [more]))["refusal"] == expected


def test_errors_are_those_of_training_and_leave_no_report(tmp_path, gpt2_base):
    pairs_job(tmp_path, gpt2_base)
    done = program("data", "job.toml", "--json", "--set", "task.bad_rows=refuse", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f'error: {tmp_path}/own/train.jsonl:25: "completion" is missing or not text' in done.stderr
    (tmp_path / "bare").mkdir()
    shutil.copy(gpt2_base / "config.json", tmp_path / "bare")
    with pytest.raises(JobError, match="no tokenizer is here"):
        seen(tmp_path / "job.toml", f"base.model={tmp_path / 'bare'}")


def test_marked_tokens_are_those_that_the_loss_counts(tmp_path, gpt2_base):
    job = pairs_job(tmp_path, gpt2_base, 'too_long = "truncate"\nseparator = "<|endoftext|>"', "max_tokens = 20")
    asked, tokens = read_job(job), Tokens(gpt2_base)
    (task,) = sources_of(asked.task)
    data, _ = fit(split_store(task, "train", encoder_of(task, tokens, VOCABULARY, 20, False), Screen(io.StringIO())), 20, "truncate")
    report = seen(job, examples=24)
    assert len(report["examples"]) == 24
    for index, example in enumerate(report["examples"]):
        sequence = data[index]
        assert example["place"] == data.source(index)
        assert tuple(token["id"] for token in example["tokens"]) == sequence.tokens
        inside = [any(first <= place < end for first, end in sequence.spans) for place in range(len(sequence))]
        assert [token["learnt"] for token in example["tokens"]] == inside
        assert [token["special"] for token in example["tokens"]] == [token == tokens.end_id for token in sequence.tokens]
        assert "".join(token["text"] for token in example["tokens"]) == tokens.tokenizer.decode(sequence.tokens)
    first = json.loads((tmp_path / "own" / "train.jsonl").read_text().splitlines()[0])
    text = shown(report)
    assert f"{first['prompt']}<|endoftext|>⟦{first['completion']}<|endoftext|>⟧" in text
    assert text.count("⟦") == 24 + 1, "each example, and the title"


def test_a_conversations_answers_are_marked_and_characters_of_several_tokens_are_whole(tmp_path, gpt2_base):
    base = shutil.copytree(gpt2_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TURNS)
    turns = [("user", "Tee?"), ("assistant", "日本 \x1b[31m"), ("user", "Ja"), ("assistant", "The Eagle")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    report = seen(write(tmp_path, base, f'kind = "chat"\ndata = "{tmp_path / "chat.jsonl"}"'))
    (example,) = report["examples"]
    learnt = "".join(token["text"] for token in example["tokens"] if token["learnt"])
    assert learnt == "日本 \x1b[31m<|endoftext|>The Eagle<|endoftext|>"
    text = shown(report)
    assert "⟦日本 \\x1b[31m<|endoftext|>⟧" in text, "data must not steer the terminal"
    assert "⟦The Eagle<|endoftext|>⟧" in text


def test_colours_mark_the_same_tokens(tmp_path, gpt2_base, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(seen(pairs_job(tmp_path, gpt2_base), examples=1))
    assert "\x1b[1;32m" in text or "\x1b[1;4;32m" in text
    assert "⟦" not in text


def test_labels_are_counted_and_withheld_ones_too(tmp_path, gpt2_base):
    folder = tmp_path / "CoLA"
    folder.mkdir()
    for name, labels in (("train.tsv", "11101"), ("dev.tsv", "10")):
        (folder / name).write_text("".join(f"gj04\t{label}\t\tThe mill {number}.\n" for number, label in enumerate(labels)))
    (folder / "test.tsv").write_text("index\tsentence\n0\tThe Eagle.\n1\tThe mill.\n")
    report = seen(write(tmp_path, gpt2_base, f'kind = "glue"\nname = "cola"\ndata = "{folder}"'))
    assert part_of(report, "train")["labels"] == {"classes": {"unacceptable": 1, "acceptable": 4}, "withheld": 0}
    assert part_of(report, "test")["labels"] == {"classes": {"unacceptable": 0, "acceptable": 0}, "withheld": 2}
    assert (part_of(report, "train")["targets"], report["examples"][0]["label"]) == (5, "acceptable")
    text = shown(report)
    assert "unacceptable 1 (20.0 %) · acceptable 4 (80.0 %)" in text
    assert "the labels of 2 texts" in text
    (absent,) = seen(tmp_path / "job.toml", "task.form=text")["absent"]  # which cannot be scored; training does not look at it
    assert (absent["split"], "test.tsv:2: labels of this split are withheld" in absent["reason"]) == ("test", True)
    (folder / "test.tsv").unlink()
    (absent,) = seen(tmp_path / "job.toml")["absent"]
    assert (absent["split"], "test.tsv" in absent["reason"]) == ("test", True)
    (folder / "dev.tsv").unlink()
    with pytest.raises(JobError, match=r"dev\.tsv"):  # which training scores
        seen(tmp_path / "job.toml")


def test_numbers_as_labels_show_where_they_lie(tmp_path, gpt2_base):
    (tmp_path / "train.csv").write_text("text,label\na mill,0.5\na pub,2\na cafe,5\n")
    report = seen(write(tmp_path, gpt2_base, f'kind = "regression"\ndata = "{tmp_path / "train.csv"}"'))
    assert part_of(report, "train")["labels"] == {"numbers": {"min": 0.5, "mean": 2.5, "max": 5.0}, "withheld": 0}
    assert [example["label"] for example in report["examples"]] == [0.5, 2.0, 5.0]


def test_a_mix_shows_what_an_epoch_takes_of_each_source(tmp_path, gpt2_base, ranks1):
    one, two = write_examples(tmp_path / "one.jsonl", 24), write_examples(tmp_path / "two.jsonl", 10)
    sources = "".join(
        f'[[task.sources]]\nkind = "jsonl"\ntitle = "{file.stem}"\ndata = "{file}"\nweight = {weight}\n'
        for file, weight in ((one, 0.5), (two, 3.0))
    )
    job = write(tmp_path, gpt2_base, f'kind = "mix"\n{sources}', "epochs = 2\nbatch_examples = 8")
    report = seen(job, examples=1)
    training = report["training"]
    assert [(part["source"], part["epoch_examples"]) for part in training["sources"]] == [("one", 12), ("two", 30)]
    assert (training["epoch_examples"], training["epoch_steps"], training["steps"]) == (42, 5.25, 11)
    assert [example["source"] for example in report["examples"]] == ["one", "two"]
    said = flat(ranks1.run(train_here, str(job), str(tmp_path / "run"), ())[0])
    assert "11 of 8 examples, 34 examples in all" in said
    text = shown(report)
    assert "train: one" in text
    assert "30, of 10 with weight 3" in text


def test_statistics_are_numpys_and_every_length_is_in_one_bin():
    rng = np.random.default_rng(0)
    for lengths in (rng.geometric(0.02, 5000), rng.integers(1, 9, 40), np.array([7]), np.array([3] * 99 + [90_000])):
        lengths = lengths.astype(np.int32)
        found, ordered = _statistics(lengths), np.sort(lengths)
        assert (found["min"], found["median"], found["max"]) == (ordered[0], np.median(lengths), ordered[-1])
        assert (lengths <= found["p95"]).mean() >= 0.95 > (lengths < found["p95"]).mean()
        bins = _histogram(lengths)
        assert len(bins) <= 12
        assert [after["from"] - before["to"] for before, after in pairwise(bins)] == [1] * (len(bins) - 1)
        for part in bins:
            assert part["examples"] == ((lengths >= part["from"]) & (lengths <= part["to"])).sum()
        assert sum(part["examples"] for part in bins) == len(lengths)


def test_texts_of_many_tokens_are_shown_by_both_ends(tmp_path, gpt2_base):
    report = seen(pairs_job(tmp_path, gpt2_base), examples=1)
    (example,) = report["examples"]
    tokens = [{"id": 5, "text": f" {number}", "learnt": number > 500, "special": False} for number in range(1000)]
    report["examples"] = [{**example, "tokens": tokens}]
    text = shown(report)
    assert "⋯ 680 tokens ⋯" in text
    assert " 239 " in text
    assert " 240 " not in text
    assert " 920" in text
    assert text.rstrip().endswith("999⟧")


def test_neither_torch_nor_weights_are_needed(tmp_path, llama_base):
    pairs_job(tmp_path, "tests/llama")
    files = {path.name: path.read_bytes() for path in llama_base.iterdir()}
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    with serving({"tests/llama": Repository(files)}) as hub:
        done = program("data", "job.toml", "--json", cwd=tmp_path, HF_ENDPOINT=hub.url, **settings)
        fetched = [request for request in hub.requests if request.startswith("GET ")]
    assert done.returncode == 0, done.stderr
    assert done.stderr == "no torch\n", "and no library's warnings"
    assert fetched
    assert not any(".safetensors" in request and "index" not in request for request in fetched)
    # What training itself makes of the same base, with torch, is what is in the cache.
    kept = list((cache_folder() / "tokens").iterdir())
    report = seen(tmp_path / "job.toml", f"base.model={llama_base}")
    assert list((cache_folder() / "tokens").iterdir()) == kept
    assert replace_base(json.loads(done.stdout)) == replace_base(report)


def replace_base(report: dict) -> dict:
    return {**report, "base": ""}
