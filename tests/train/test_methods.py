"""Every kind of method through the program's own front door: trained, stopped and gone on with, started from, evaluated, generated from."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.run import evaluate
from pipeline.screen import Screen
from tests.generate.test_generate import answers
from tests.ranks import RankError
from tests.training import JOB, delta_bytes, read_run, rows, train_here, train_until, trained, write_examples

LORA = 'kind = "lora"\ntargets = ["q", "v"]\nrank = 3\nalpha = 12\n'
METHODS = {
    "full": 'kind = "full"\n',
    "full_top": 'kind = "full_top"\nlayers = 1\n',
    "bitfit": 'kind = "bitfit"\n',
    "prefix_embed": 'kind = "prefix_embed"\nprefix_tokens = 3\ninfix_tokens = 2\n',
    "houlsby": 'kind = "adapter"\nrank = 4\ntrain_layernorm = true\n',
    "lin": 'kind = "adapter"\nplacement = "lin"\nrank = 4\n',
    "lora+pl": LORA + '[[methods]]\nkind = "prefix_layer"\nprefix_tokens = 3\ninfix_tokens = 2\n',
}
COURSE = ("train.steps=8", "train.warmup_steps=3", "train.save_every_steps=3", "evaluate.max_new_tokens=6", "train.label_smoothing=0.1")


def job_of(folder: Path, base: Path, name: str, start: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder / "train.jsonl")
    method = METHODS[name] + (f'start = "{start}"\n' if start else "")
    text = JOB.format(base=base, data=folder / "train.jsonl").replace(LORA, method)
    assert method in text
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def close(one: Path, other: Path) -> None:
    a, b = read_run(one), read_run(other)
    np.testing.assert_allclose(a.losses, b.losses, rtol=2e-4)
    for name, tensor in a.tensors.items():
        # A gradient that is rounding alone, as of a key's bias, moves Adam by a whole step.
        if not name.endswith("c_attn.bias"):
            np.testing.assert_allclose(tensor, b.tensors[name], atol=4e-3, err_msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_goes_on_bit_by_bit_and_on_other_ranks_to_rounding(name, gpt2_base, ranks1, ranks2, tmp_path):
    job = job_of(tmp_path, gpt2_base, name)
    whole = trained(ranks2, job, tmp_path / "whole", *COURSE)
    assert len(set(whole.losses)) == 8
    for pool, run in ((ranks2, tmp_path / "same"), (ranks1, tmp_path / "other")):
        ranks2.run(train_until, str(job), str(run), COURSE, 4)
        pool.run(train_here, str(job), str(run), COURSE)
    assert rows(tmp_path / "same") == rows(tmp_path / "whole")
    assert delta_bytes(tmp_path / "same") == delta_bytes(tmp_path / "whole")
    close(tmp_path / "other", tmp_path / "whole")


@pytest.mark.parametrize("settings", [('base.dtype="fp16"',), ('base.dtype="bf16"', "memory.gradient_checkpointing=true")], ids=str)
def test_full_in_half_precision_keeps_fp32_masters(settings, gpt2_base, ranks2, tmp_path):
    job = job_of(tmp_path, gpt2_base, "full")
    slow = (*COURSE, *settings, "train.learning_rate=1e-5")
    whole = trained(ranks2, job, tmp_path / "whole", *slow)
    ranks2.run(train_until, str(job), str(tmp_path / "same"), slow, 4)
    ranks2.run(train_here, str(job), str(tmp_path / "same"), slow)
    assert delta_bytes(tmp_path / "same") == delta_bytes(tmp_path / "whole")
    # So small a step is below half precision's resolution of most weights, and is not lost.
    from safetensors.numpy import load_file

    before = load_file(gpt2_base / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    moved = np.abs(whole.tensors[name] - before.get(name, before.get(name.removeprefix("transformer."))))
    assert 0 < np.median(moved) < 1e-4


def scored(ranks, job: str, run: str) -> dict | str:
    try:
        return evaluate(read_job(Path(job)), Path(run), "test", "last", ranks, Screen(io.StringIO(), shown=False))
    except JobError as error:
        return str(error)


@pytest.mark.parametrize("name", ["full", "prefix_embed", "houlsby", "lora+pl"])
def test_what_was_trained_is_what_is_evaluated_and_generated_from(name, gpt2_base, ranks1, ranks2, tmp_path):
    job = job_of(tmp_path, gpt2_base, name)
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    text = job.read_text().replace(str(tmp_path / "train.jsonl"), str(tmp_path))
    job.write_text(text + '[evaluate]\nsplit = "test"\nmax_new_tokens = 6\n')
    trained(ranks2, job, tmp_path / "run", "train.steps=6", "train.learning_rate=0.05")
    result = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    for pool in (ranks1, ranks2):
        again = pool.run(scored, str(job), str(tmp_path / "run"))[0]
        assert again["metrics"]["loss"] == pytest.approx(result["loss"], rel=1e-5)
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "test.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in predictions]
    for pool in (ranks1, ranks2):
        texts = answers(pool, gpt2_base, tmp_path / "run", prompts=prompts, max_new_tokens=6)
        assert texts == [row["prediction"] for row in predictions]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_begins_from_another_s_delta(name, gpt2_base, ranks2, tmp_path):
    before = job_of(tmp_path / "before", gpt2_base, name)
    trained(ranks2, before, tmp_path / "first", "train.steps=5")
    after = job_of(tmp_path / "after", gpt2_base, name, tmp_path / "first")
    shown = ranks2.run(train_here, str(after), str(tmp_path / "second"), ("train.steps=1", "train.learning_rate=1e-12"))[0]
    if name == "lora+pl":
        # The key is its last method's; LoRA begins as ever.
        assert "from" in shown
        return
    assert f"from {tmp_path / 'first' / 'delta'}, after 5 steps" in " ".join(shown.split())
    one, other = read_run(tmp_path / "first").tensors, read_run(tmp_path / "second").tensors
    for key, tensor in one.items():
        np.testing.assert_allclose(tensor, other[key], atol=1e-9, err_msg=key)


def test_a_start_that_does_not_fit_is_refused(gpt2_base, llama_base, ranks1, tmp_path):
    trained(ranks1, job_of(tmp_path / "bitfit", gpt2_base, "bitfit"), tmp_path / "first", "train.steps=1")
    for base, name, told in (
        (gpt2_base, "full", "methods[0].start needs one of the same method and settings."),
        (llama_base, "full", "Name the base it was trained on."),
    ):
        job = job_of(tmp_path / "next", base, name, tmp_path / "first")
        with pytest.raises(RankError) as caught:
            ranks1.run(train_here, str(job), str(tmp_path / "second"), ("train.steps=1",))
        assert told in str(caught.value)
        assert not (tmp_path / "second" / "delta").exists()


def test_biases_that_are_not_there_are_refused(llama_base, ranks1, tmp_path):
    with pytest.raises(RankError, match="this llama has no bias vectors"):
        ranks1.run(train_here, str(job_of(tmp_path, llama_base, "bitfit")), str(tmp_path / "run"), ("train.steps=1",))


def test_lora_begins_with_the_same_update_whatever_its_own_alpha(gpt2_base, ranks1, tmp_path):
    first = job_of(tmp_path / "before", gpt2_base, "lora+pl")
    text = first.read_text()
    first.write_text(text.replace(METHODS["lora+pl"], LORA))
    trained(ranks1, first, tmp_path / "first", "train.steps=5")
    for alpha in (12, 3):
        job = job_of(tmp_path / f"after{alpha}", gpt2_base, "lora+pl")
        job.write_text(text.replace(METHODS["lora+pl"], LORA.replace("12", str(alpha)) + f'start = "{tmp_path / "first"}"\n'))
        trained(ranks1, job, tmp_path / str(alpha), "train.steps=1", "train.learning_rate=1e-12")
    one, other = read_run(tmp_path / "12"), read_run(tmp_path / "3")
    assert one.losses[0] == pytest.approx(other.losses[0], rel=1e-6)
    assert one.losses[0] < read_run(tmp_path / "first").losses[0]


def test_special_tokens_that_fill_the_context_are_refused(gpt2_base, ranks1, tmp_path):
    job = job_of(tmp_path, gpt2_base, "prefix_embed")
    job.write_text(job.read_text().replace("prefix_tokens = 3", "prefix_tokens = 600"))
    with pytest.raises(RankError, match=r"methods: 602 special tokens fill the base's \d+ positions\. Use fewer"):
        ranks1.run(train_here, str(job), str(tmp_path / "run"), ("train.steps=1",))
