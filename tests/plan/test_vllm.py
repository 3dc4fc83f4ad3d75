"""What vLLM would refuse, by its own rules: of a job before it is trained, on the command line, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.plan.vllm import MAX_LORA_RANKS, Served, judge

LORA = '[[methods]]\nkind = "lora"\n'


@pytest.mark.parametrize(("rank", "needs"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (300, 320), (512, 512)])
def test_any_rank_up_to_the_largest_is_padded_to_the_next(rank, needs):
    verdict = judge(Served("qwen2", (), (rank,), (2.0,), False, False))
    assert (verdict.reasons, verdict.max_lora_rank) == ((), needs)
    assert f"--max-lora-rank {needs} " in verdict.lines[0]


def test_ranks_above_it_are_refused():
    verdict = judge(Served("qwen2", (), (513,), (2.0,), False, False))
    assert "Rank 513 is above the largest max_lora_rank, 512. zlora deltas resize" in verdict.refusal
    assert MAX_LORA_RANKS[-1] == 512


@pytest.mark.parametrize(
    ("model_type", "reasons", "notes"),
    [("llama", 0, 0), ("gpt2", 1, 0), ("gpt_neox", 1, 0), ("roberta", 1, 0), ("bloom", 0, 1), (None, 0, 1)],
)
def test_which_bases_take_lora_is_known_or_said_not_to_be(model_type, reasons, notes):
    verdict = judge(Served(model_type, (), (8,), (2.0,), False, False))
    assert (len(verdict.reasons), len(verdict.notes)) == (reasons, notes)


def test_each_reason_is_told_with_its_repair():
    verdict = judge(Served("gpt2", ("bitfit",), (8, 600), (2.0, 1.0), True, True))
    assert len(verdict.reasons) == 6
    for reason in verdict.reasons:
        assert any(word in reason for word in ("zlora ", "Leave it out")), reason


@pytest.fixture
def check(tmp_path):
    """`zlora check JOB --check vllm` for a job of these lines on a base of this type, in a process that must not load torch."""

    def run(lines, model_type="llama", extra=""):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        job = tmp_path / "job.toml"
        task = f'[task]\nkind = "jsonl"\ndata = "{tmp_path / "data.jsonl"}"\n'
        job.write_text(f'[base]\nmodel = "{tmp_path}"\n{extra}{lines}{task}')
        program = (
            "import sys\nfrom pipeline.cli import main\nsys.argv = ['zlora', 'check', sys.argv[1], '--check', 'vllm']\n"
            "try: main()\nfinally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
        )
        return subprocess.run([sys.executable, "-c", program, str(job)], capture_output=True, text=True)

    return run


def test_a_job_is_judged_before_it_is_trained(check):
    done = check(LORA + "rank = 12\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vLLM loads it: vllm serve BASE --enable-lora --max-lora-rank 16 ")


@pytest.mark.parametrize(
    ("lines", "model_type", "extra", "said"),
    [
        (LORA, "gpt2", "", "no LoRA for a gpt2"),
        (LORA + "rank = 600\n", "llama", "", "Rank 600 is above"),
        (LORA + "rank = { q = 4, v = 8 }\n", "llama", "", "scale every module by one lora_alpha / r, and these have 2, 4"),
        (LORA, "llama", 'added_tokens = ["<a>"]\n', "Added tokens are not taken"),
        (LORA + '[[methods]]\nkind = "bitfit"\n', "llama", "", "and bitfit is trained too"),
        ('[[methods]]\nkind = "full"\n', "llama", "", "vLLM loads LoRA alone, and there is none"),
    ],
)
def test_a_job_that_it_would_refuse_ends_with_code_2(lines, model_type, extra, said, check):
    done = check(lines, model_type, extra)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
