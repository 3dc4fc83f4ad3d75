"""`zlora methods`: what people and programs get, without torch and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, OPTConfig

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter
from pipeline.plan.published import rows
from pipeline.planning.methods import make_counts, settings_text
from tests.planning.test_plan import ROOT, keys_of

KEYS = Path(__file__).parent / "methods_keys.txt"
"""Renew it by hand when keys are added; a key that goes or changes its meaning raises schema_version."""


def call(folder, *words, program=("-m", "pipeline")):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "none")}
    return subprocess.run([sys.executable, *program, "methods", *words], capture_output=True, text=True, cwd=folder, env=environment)


def test_programs_get_the_paper_s_list_without_torch(tmp_path):
    script = "import sys; from pipeline.cli import app\ntry: app()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = call(tmp_path, "--json", program=("-c", script))
    assert done.stderr.strip() == "False"
    counts = json.loads(done.stdout)
    # What a section has beside its kind is the job's to say.
    assert sorted(key for key in keys_of(counts) if ".sections[]." not in key or key.endswith(".kind")) == KEYS.read_text().split()
    assert sum(len(base["methods"]) for base in counts["bases"]) == len(rows())
    lora = counts["bases"][0]["methods"][-1]
    assert (lora["trained_parameters"], lora["ours_millions"], lora["printed_millions"]) == (393_216, "0.39", "0.35")
    assert lora["sections"][0]["targets"] == ["q", "v"]
    assert lora["share_of_base"] == pytest.approx(393_216 / 354_823_168)


def test_people_read_both_figures_and_the_reason(tmp_path):
    # A folder of that name is no base of the paper's.
    (tmp_path / "gpt2-medium").mkdir()
    lines = call(tmp_path).stdout.splitlines()
    fine, tune = (next(line for line in lines if line.split()[:1] == [name]) for name in ("LoRA", "FT"))
    assert " ".join(fine.split()) == "LoRA q v, rank 4 393,216 0.111 % 0.39 M 0.35 M ≠ [7]"
    assert " ".join(tune.split()) == "FT 354,823,168 100 % 354.82 M 354.92 M ≠ [1]"
    assert "  [7] the printed figure is 0.1 % of the model" in lines
    assert max(map(len, lines)) <= 120


def test_any_base_with_every_method(tmp_path):
    OPTConfig(
        hidden_size=32, ffn_dim=56, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ).save_pretrained(tmp_path / "opt")
    shown = call(tmp_path, "--base", "opt").stdout
    assert "paper" not in shown
    (base,) = make_counts(str(tmp_path / "opt"))["bases"]
    found = {(method["name"], method["settings"]): method["trained_parameters"] for method in base["methods"]}
    for (name, settings), count in found.items():
        assert f"{name} {settings} {count:,}".replace("  ", " ") in " ".join(shown.split())
    assert found["prefix_embed", "8 prefix, 8 infix"] == 16 * 16
    assert found["adapter", "drop from layer 1 on, rank 16"] == 2 * 32 * 16 + 16 + 32
    assert found["full_top", "2 layers"] < found["full", ""] == base["parameters"]
    assert len(found) == 10


def test_what_a_base_does_not_have_is_a_note_in_its_row(tmp_path):
    LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99).save_pretrained(tmp_path)
    (base,) = make_counts(str(tmp_path))["bases"]
    refused = {(method["name"], method["note"]) for method in base["methods"] if method["trained_parameters"] is None}
    assert refused == {
        ("full_top", "methods[0].layers = 2: the base has 1 layers. Use fewer."),
        ("bitfit", 'methods[0].kind = "bitfit": this llama has no bias vectors. Use another method.'),
        ("adapter", "methods[0].rank = 16: the base is 8 wide. Use a smaller rank."),
        ("adapter", "methods[0].first_layer = 1: the last layer is 0. Use a lower one."),
    }
    lines = call(tmp_path, "--base", ".").stdout.splitlines()
    assert any(line.split() == ["bitfit", "none", "[2]"] for line in lines)


def test_a_base_of_the_paper_by_its_hub_id():
    assert make_counts("microsoft/deberta-v2-xxlarge")["bases"][0]["parameters"] == 1_564_549_632


def test_norms_of_layers_are_named():
    norms = Adapter(kind="adapter", placement="pfeiffer", rank=3, train_layernorm=True)
    assert settings_text(norms) == "pfeiffer, rank 3, layers' norms"


def test_an_unknown_base_is_one_line(tmp_path):
    done = call(tmp_path, "--base", "no/such")
    assert done.returncode == 2
    assert done.stderr.startswith('error: base "no/such": not, or not all of it, in the cache here')
    with pytest.raises(JobError, match=r"config.json: cannot be read"):
        make_counts(str(tmp_path))
