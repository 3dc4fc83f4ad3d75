"""The doors: help that loads nothing, and every kind of bad input as one line, exit code 2 and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from pipeline.cli import app
from pipeline.cluster.launch import PROGRAM
from pipeline.job.read import read_job
from pipeline.weights.delta import keys_of, write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.manifest import Module
from tests.jobs import SHORT, write_job

COMMANDS = sorted(get_command(app).commands)
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "datasets", "safetensors", "numpy"}
TENSOR = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(zlora):
    """Runs a command that must be refused; returns its one line. What was there before is all there is after."""

    def call(*arguments):
        before = content(Path.cwd())
        code, out, error = zlora(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", error), error
        assert content(Path.cwd()) == before
        return error

    return call


def content(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def modules_after(*commands):
    """Of each of the commands, one after another in a fresh process: what is imported when it has ended."""
    program = (
        "import json, sys\nfrom pipeline.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['zlora', *words]\n"
        "    try: main()\n    except SystemExit: pass\n"
        "    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(commands)], capture_output=True, text=True, check=True)
    assert done.stdout
    return [set(json.loads(line)) for line in done.stderr.splitlines()]


@pytest.fixture(scope="module")
def modules_after_help():
    return dict(zip(COMMANDS, modules_after(*([name, "--help"] for name in COMMANDS)), strict=True))


def test_help_loads_nothing_heavy():
    assert not modules_after(["--help"])[0] & (HEAVY | {"pydantic"})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_loads_nothing_heavy(name, modules_after_help):
    # pydantic is there: typer itself reads a command's parameters with it.
    assert not modules_after_help[name] & HEAVY


def test_check_loads_nothing_that_a_login_node_lacks(tmp_path):
    write_job(tmp_path)
    assert not modules_after(["check", "job.toml"])[0] & HEAVY


def test_help_lists_every_command(zlora):
    assert {"doctor", "check", "fetch", "data", "train", "evaluate", "generate", "score", "merge", "import"} <= set(COMMANDS)
    code, out, error = zlora("--help")
    assert (code, error) == (0, "")
    assert all(re.search(rf"^ +{name} +\S", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(zlora, name):
    code, out, _ = zlora(name, "--help")
    assert code == 0
    example = re.search(rf"Example: zlora {name} (.+)", out)
    assert example, out
    command = get_command(app).commands[name]
    command.make_context(name, example[1].split())


def test_an_unknown_command_or_option_is_answered_with_help(zlora):
    for arguments in (["chekc"], ["check", "--bogus"], ["check"], ["merge", "base"]):
        code, out, error = zlora(*arguments)
        assert (code, out) == (2, "")
        assert "--help" in error
        assert "Traceback" not in error


def test_check_prints_a_job_that_reads_back_as_the_same(zlora, tmp_path):
    job = write_job(tmp_path)
    code, out, error = zlora("check", job, "--set", "train.steps=20", "--set", "methods.0.rank=3")
    assert (code, error) == (0, "")
    (tmp_path / "resolved.toml").write_text(out)
    assert read_job(tmp_path / "resolved.toml") == read_job(job, ("train.steps=20", "methods.0.rank=3"))
    assert zlora("check", "resolved.toml") == (0, out, "")


BAD_JOBS = {
    "an unknown key": (f"{SHORT}[train]\nstepz = 1\n", [], ["job.toml: train.stepz: ", 'mean "steps"']),
    "a wrong type": (f'{SHORT}[train]\nsteps = "1"\n', [], ['job.toml: train.steps = "1": ', "integer"]),
    "a missing section": (SHORT.partition("[task]")[0], [], ["job.toml: task: missing. Add it."]),
    "a misspelt kind": (SHORT.replace('"jsonl"', '"json"'), [], ['task.kind = "json"', "'jsonl', 'csv', 'parquet'"]),
    "no TOML": ("[base]\nmodel = gpt2\n", [], ["job.toml: not valid TOML", "line 2"]),
    "no such data": (SHORT.replace("train.jsonl", "gone.jsonl"), [], ['task.data = "gone.jsonl"', "Correct the path"]),
    "no such base": (SHORT.replace('"base"', '"./gone"'), [], ['base.model = "./gone"', "Correct the path"]),
    "no such memory configuration": (f'{SHORT}[memory]\nconfig = "zero9"\n', [], ['memory.config: there is no file "zero9"', "zero3.json"]),
    "a malformed --set": (SHORT, ["--set", "train.steps"], ["--set train.steps: ", "section.key=value"]),
    "a wrong --set": (SHORT, ["--set", "train.steps=-1"], ["train.steps = -1", "greater than 0"]),
}


@pytest.mark.parametrize("command", ["check", "data", "train"])
@pytest.mark.parametrize(("text", "options", "parts"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_a_bad_job_is_one_line_with_place_value_and_repair(refused, tmp_path, command, text, options, parts):
    write_job(tmp_path, text)
    error = refused(command, "job.toml", *options)
    for part in parts:
        assert part in error


@pytest.mark.parametrize("command", ["check", "data", "train"])
def test_a_job_that_is_not_there_is_one_line(refused, tmp_path, command):
    assert "gone.toml: there is no such job file" in refused(command, "gone.toml")
    assert str(tmp_path) in refused(command, "gone.toml")


def test_a_run_folder_that_is_taken_is_refused_and_untouched(refused, tmp_path):
    write_job(tmp_path)
    run = tmp_path / "runs" / "job"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    error = refused("train", "job.toml")
    assert "runs/job: is not a run folder" in error
    (tmp_path / "file").write_text("")
    assert "file: is a file" in refused("train", "job.toml", "--run", "file")


def test_fresh_does_not_touch_what_no_run_wrote(refused, tmp_path):
    write_job(tmp_path)
    assert "job.toml" in refused("train", "job.toml", "--run", ".", "--fresh")


def test_evaluating_what_is_no_run_is_one_line(refused, tmp_path):
    for name in ("gone", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert f"{name}: not a run folder" in refused("evaluate", name)


def test_the_best_delta_of_a_run_without_one_is_one_line(refused, tmp_path):
    job = write_job(tmp_path)
    (tmp_path / "run").mkdir()
    job.rename(tmp_path / "run" / "job.toml")
    assert "run: has no best delta: none was asked for by evaluate.best_metric, or none scored yet" in refused(
        "evaluate", "run", "--delta", "best"
    )
    assert "Use --delta last." in refused("evaluate", "run", "--set", "evaluate.best_metric=BLEU")


def make_delta(folder, base, digest=None, scale=1.0, columns=32):
    """A delta on one module of a base, written by hand."""
    name = TENSOR.removesuffix(".weight")
    a_key, b_key = keys_of(name)
    fields = {
        "base": str(base),
        "base_digest": digest or base_digest(file_digests((base / "model.safetensors",))),
        "base_files": {},
        "job_digest": "",
        "step": 1,
        "parameters": 2 * columns + 192,
        "modules": (Module(name=name, tensor=TENSOR, transposed=True, rank=2, alpha=2.0),),
    }
    write_delta(folder, {a_key: torch.full((2, columns), scale), b_key: torch.ones(96, 2)}, {}, fields)
    return folder


def test_merging_is_refused_with_one_line_and_no_half_written_folder(refused, gpt2_base, tmp_path):
    delta = make_delta(tmp_path / "delta", gpt2_base)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "bare").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    cut = shutil.copytree(gpt2_base, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    torn = shutil.copytree(delta, tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"")
    cases = [
        (gpt2_base, delta, "taken", "taken: already there and not empty"),
        (gpt2_base, tmp_path / "bare", "out", "this is not a delta"),
        (gpt2_base, delta / "adapter_model.safetensors", "out", "this is not a delta"),
        (gpt2_base, torn, "out", "adapter_model.safetensors: cannot be read"),
        (tmp_path / "bare", delta, "out", "bare: neither model.safetensors nor"),
        (tmp_path / "pickled", delta, "out", "pytorch_model.bin: convert it to safetensors"),
        (cut, delta, "out", "model.safetensors: truncated"),
        (tmp_path / "gone", delta, "out", "gone"),
        (gpt2_base, make_delta(tmp_path / "foreign", gpt2_base, digest="0" * 64), "out", "was trained on 000000000000"),
        (gpt2_base, make_delta(tmp_path / "wide", gpt2_base, columns=33), "out", f'adapts tensor "{TENSOR}" of shape [33, 96]'),
    ]
    for base, chosen, out, part in cases:
        assert part in refused("merge", base, chosen, "--out", out)


def test_a_merge_that_fails_in_the_middle_leaves_nothing(refused, gpt2_base, tmp_path):
    delta = make_delta(tmp_path / "delta", gpt2_base, scale=3e38)
    error = refused("merge", gpt2_base, delta, "--out", "out")
    assert TENSOR in error
    assert "not finite" in error


def test_a_sound_merge_says_where_the_result_is(zlora, gpt2_base, tmp_path):
    delta = make_delta(tmp_path / "delta", gpt2_base)
    code, out, _ = zlora("merge", gpt2_base, delta, "--out", "out")
    assert code == 0
    assert "out/merge.json" in out
    assert (tmp_path / "out" / "merge.json").is_file()


def test_a_mistake_found_by_the_ranks_is_one_line_too_and_leaves_no_run_folder(gpt2_base, tmp_path):
    write_job(tmp_path, SHORT.replace('"base"', f'"{gpt2_base}"') + '[train]\nsteps = 2\n[memory]\nconfig = "zero0.json"\n')
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    command = [sys.executable, "-m", "pipeline", "train", "job.toml", "--ranks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r'error: [^\n]*train\.jsonl:2: "completion" is missing[^\n]*\n', done.stderr), done.stderr
    assert not (tmp_path / "runs" / "job").exists()


def test_a_users_folder_called_pipeline_is_not_run(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise SystemExit('the user\\'s package ran')")
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "check" in done.stdout


def test_what_the_system_refuses_is_one_line(refused, gpt2_base, tmp_path):
    (tmp_path / "file").write_text("")
    delta = make_delta(tmp_path / "delta", gpt2_base)
    error = refused("merge", gpt2_base, delta, "--out", tmp_path / "file" / "merged")
    assert str(tmp_path / "file") in error


def test_half_of_a_ranks_variables_is_refused(refused, tmp_path, monkeypatch):
    write_job(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "RANK is set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not" in refused("train", "job.toml")
