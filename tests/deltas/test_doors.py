"""`zlora deltas ...` and `zlora export` on the command line: tables, one JSON object with its keys, one line where it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.deltas.merge import merge

BELOW = get_command(app).commands["deltas"].commands


@pytest.mark.parametrize("name", sorted(BELOW))
def test_every_command_has_an_example_that_parses(name):
    example = BELOW[name].help.partition(f"Example: zlora deltas {name} ")[2]
    assert example
    BELOW[name].make_context(name, example.split())


def test_tables_and_json_say_the_same(zlora, deltas, tmp_path):
    code, out, error = zlora("deltas", "resize", deltas["mlp"], "--rank", 1, "--out", tmp_path / "one", "--json")
    assert (code, error) == (0, "")
    report = json.loads(out)
    assert set(report) == {"schema_version", "made_by", "from", "asked", "modules", "total"}
    assert set(report["total"]) == {"norm", "error", "relative_error", "kept_energy"}
    code, out, error = zlora("deltas", "resize", deltas["mlp"], "--rank", 1, "--out", tmp_path / "two")
    assert (code, error) == (0, "")
    assert f"{report['total']['kept_energy']:.4%} of the squared norm is kept" in out
    assert all(name in out for name in report["modules"])
    code, out, error = zlora("deltas", "combine", f"{deltas['qv']}:0.7", f"{deltas['mlp']}:-0.3", "--out", tmp_path / "both", "--json")
    assert (code, error) == (0, "")
    assert [row["weight"] for row in json.loads(out)["from"]] == [0.7, -0.3]


def test_extract_tells_what_it_leaves_out(zlora, deltas, llama_base, tmp_path):
    merge(llama_base, deltas["norms"], tmp_path / "tuned")
    asked = ("deltas", "extract", "--base", llama_base, "--finetuned", tmp_path / "tuned", "--rank", 2, "--out")
    code, out, _ = zlora(*asked, tmp_path / "one")
    assert code == 0
    assert "left out: model.norm.weight" in out
    code, out, _ = zlora(*asked, tmp_path / "two", "--json")
    assert set(json.loads(out)) == {
        *("schema_version", "made_by", "from", "asked", "modules", "left_out", "only_in_finetuned", "total"),
    }


def test_one_json_object_where_no_accelerator_is_named(deltas, llama_base, tmp_path):
    """DeepSpeed says on standard output that it found no GPU; it has no part in what is done file to file."""
    merge(llama_base, deltas["qv"], tmp_path / "tuned")
    commands = (
        ("merge", llama_base, deltas["qv"], "--out", tmp_path / "merged", "--check-logits"),
        ("deltas", "extract", "--base", llama_base, "--finetuned", tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "delta"),
        ("import", tmp_path / "delta", "--base", llama_base, "--out", tmp_path / "imported"),
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    for command in commands:
        words = [sys.executable, "-m", "pipeline", *map(str, command), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
        assert json.loads(done.stdout)["schema_version"]


def test_export_and_what_vllm_takes(zlora, deltas, llama_base, tmp_path):
    checked = ("--check", "vllm", "--base", llama_base)
    code, out, error = zlora("export", deltas["qv"], *checked)
    assert (code, error) == (0, "")
    assert out.startswith("vLLM loads it: vllm serve BASE --enable-lora --max-lora-rank 8 ")
    code, out, _ = zlora(
        "export", deltas["qv"], "--check", "vllm", "--base", llama_base, "--format", "peft", "--out", tmp_path / "a", "--json"
    )
    found = json.loads(out)
    assert (code, set(found)) == (0, {"schema_version", "vllm", "delta", "format", "out", "files"})
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    code, out, error = zlora(
        "export", deltas["labels"], "--check", "vllm", "--base", llama_base, "--format", "peft", "--out", tmp_path / "b"
    )
    assert (code, out, (tmp_path / "b").exists()) == (2, "", False)
    assert error.startswith("error: ")
    assert "modules_to_save" in error
    for more in ((), ("--format", "peft"), ("--check", "vllm", "--out", tmp_path / "c")):
        code, out, error = zlora("export", deltas["qv"], *more)
        assert (code, out, error.count("\n")) == (2, "", 1)
