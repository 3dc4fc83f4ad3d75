"""Added tokens: the same as transformers with resized embeddings of which the new rows alone are trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.deltas.merge import merge
from pipeline.job.errors import JobError
from pipeline.job.files import memory_config
from pipeline.job.zero import deepspeed_config
from pipeline.methods.added import attach_added
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.tasks.batch import collate
from pipeline.tasks.tokens import NewTokens, Tokens, vocabulary_with
from pipeline.weights.manifest import ADDED_EMBEDDINGS, ADDED_HEAD
from tests.bases import VOCABULARY
from tests.families import make_family
from tests.generate.test_generate import answers
from tests.tasks.making import learnt_from
from tests.training import trained, write_job

CPU = torch.device("cpu")
NEW = ("<begin>", "<end of it>")
DECODERS = ["gpt2", "llama", "gemma", "gemma2", "gemma3_text", "opt", "gpt_neox", "qwen3"]


@pytest.mark.parametrize("inside", [False, True], ids=["behind the vocabulary", "in rows that the base has already"])
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradients_are_transformers_own_with_resized_embeddings(family, inside, tmp_path):
    folder = make_family(family, tmp_path / family)
    base = load_base(folder, read_config(folder), torch.float32, CPU, deepspeed_config(memory_config("zero0.json")))
    vocabulary = base.model.config.vocab_size
    ids = (vocabulary - 1, vocabulary) if inside else (vocabulary, vocabulary + 1)
    new = NewTokens(NEW, ids)
    overlay, added = attach_added(base, new, CPU)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.resize_token_embeddings(vocabulary_with(vocabulary, new), mean_resizing=False)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert set(overlay.rows) == ({ADDED_EMBEDDINGS} if tied else {ADDED_EMBEDDINGS, ADDED_HEAD})
    assert len(added.rows[ADDED_EMBEDDINGS]) >= 1
    tables = {ADDED_EMBEDDINGS: model.get_input_embeddings().weight, ADDED_HEAD: model.lm_head.weight}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, rows in overlay.rows.items():
            mean = tables[name][:vocabulary].double().mean(0).float()
            torch.testing.assert_close(rows, mean.expand_as(rows), atol=1e-6, rtol=1e-5)
            rows += 0.2 * torch.randn(rows.shape, generator=generator)
            tables[name][list(ids)] = rows
    sequences = [learnt_from([7, ids[0], 9, ids[1], 30, ids[1], ids[0], 4], 3), learnt_from([ids[1], 8, 12], 1)]
    loss, *_ = Causal(base.model, base.family)(batch=collate(sequences, [0, 1], base.family.packs, CPU), smoothing=0.1)
    (loss * 0.5).backward()
    total = torch.zeros(())
    for sequence in sequences:
        tokens, start = torch.tensor([sequence.tokens]), sequence.spans[0][0]
        logits = model(tokens).logits[0, start - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, tokens[0, start:], reduction="sum", label_smoothing=0.1)
    (total * 0.5).backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=2e-6)
    for name, rows in overlay.rows.items():
        torch.testing.assert_close(rows.grad, tables[name].grad[list(ids)], atol=2e-5, rtol=2e-5)


def job_with_new_tokens(folder: Path, base: Path, more: tuple[str, ...]) -> Path:
    job = write_job(folder, base)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line in lines:
        line["prompt"], line["completion"] = f"<begin>{line['prompt']}", f"{line['completion']}<end of it>"
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job.write_text(job.read_text().replace('dtype = "fp32"', f'dtype = "fp32"\nadded_tokens = {json.dumps(NEW + more)}'))
    return job


@pytest.mark.parametrize(("name", "more"), [("gpt2", ()), ("llama", tuple(f"<{n}>" for n in range(20)))], ids=["gpt2", "llama, with rows"])
def test_they_are_trained_saved_generated_and_merged(name, more, gpt2_base, llama_base, ranks1, ranks2, tmp_path):
    base = {"gpt2": gpt2_base, "llama": llama_base}[name]
    job = job_with_new_tokens(tmp_path, base, more)
    course = ("train.steps=30", "train.learning_rate=0.05")
    one, two = trained(ranks1, job, tmp_path / "one", *course), trained(ranks2, job, tmp_path / "two", *course)
    assert one.losses[0] == pytest.approx(two.losses[0], rel=1e-6)
    assert one.losses[-1] < one.losses[0] / 1.25
    delta = tmp_path / "two" / "delta"
    assert ADDED_EMBEDDINGS in load_file(delta / "adapter_model.safetensors")
    assert not (delta / "adapter_config.json").exists(), "PEFT would leave the rows out"
    merge(base, delta, tmp_path / "merged")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    size = max(VOCABULARY, *(token + 1 for token in tokenizer.convert_tokens_to_ids(list(NEW + more))))
    assert (size > VOCABULARY) == bool(more)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == size
    prompts = ["<begin>Blue Spice", "<begin>Mill"]
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt + " ->", return_tensors="pt")
        found = model.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(found[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
    assert any(NEW[1] in text for text in texts), "it was learnt"
    assert answers(ranks2, base, tmp_path / "two", prompts=prompts, max_new_tokens=9) == texts
    assert answers(ranks1, tmp_path / "merged", separator=" ->", prompts=prompts, max_new_tokens=9) == texts


def test_what_cannot_be_added_is_refused(gpt2_base, tmp_path):
    tokens = Tokens(gpt2_base, NEW)
    assert tokens.ids(["a<begin>b"])[0].count(tokens.new.ids[0]) == 1
    assert tokens.digest != Tokens(gpt2_base).digest
    for again in ((NEW[0], NEW[0]), (tokens.end_text,)):
        with pytest.raises(JobError, match=r"base.added_tokens: .* is a token already"):
            Tokens(gpt2_base, again)
    folder = make_family("olmo2", tmp_path / "olmo2")
    base = load_base(folder, read_config(folder), torch.float32, CPU, deepspeed_config(memory_config("zero0.json")))
    with pytest.raises(JobError, match='how a "olmo2" computes its logits is not known'):
        attach_added(base, NewTokens(NEW, (320, 321)), CPU)
    assert vocabulary_with(320, None) == vocabulary_with(320, NewTokens(NEW, (310, 311))) == 320
