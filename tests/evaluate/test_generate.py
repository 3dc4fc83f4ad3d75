"""Greedy generation on shards against transformers' own on the whole model, and scores against the libraries'."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import sacrebleu
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluate.score import bleu
from tests.training import write_job

PROMPTS = ["Blue Spice", "The Eagle near the riverside cafe Mill high cheap", "pub", "Italian city", "x" * 100]


def generate_on_ranks(ranks, job: str, prompts: list[str], batch: int) -> list[list[int]]:
    from pipeline.evaluate.generate import generate_greedy
    from pipeline.job.read import read_job
    from pipeline.screen import Screen
    from pipeline.session import open_session

    session = open_session(read_job(Path(job)), ranks, Screen(io.StringIO(), shown=False))
    session.root.eval()
    ids = generate_greedy(session.root, session.tokens.prompts(prompts), ranks, batch, 30, 128, session.tokens.end_id)
    session.engine.release()
    return ids


@pytest.mark.parametrize("base", ["gpt2_base", "llama_base"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_rank_has_transformers_own_texts(base, batch, request, ranks2, tmp_path):
    folder = request.getfixturevalue(base)
    answers = ranks2.run(generate_on_ranks, str(write_job(tmp_path, folder)), PROMPTS, batch)
    assert answers[0] == answers[1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, ours in zip(PROMPTS, answers[0], strict=True):
        inputs = tokenizer(prompt + " ->", return_tensors="pt")
        room = min(30, 128 - inputs.input_ids.shape[1])
        theirs = model.generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=0)[0, inputs.input_ids.shape[1] :]
        assert ours == theirs.tolist(), prompt


def score_on_ranks(ranks, job: str, overrides: tuple[str, ...]) -> dict:
    """Scores the training file, which a test has written, as a split."""
    from pipeline.job.read import read_job
    from pipeline.screen import Screen
    from pipeline.session import open_session

    session = open_session(read_job(Path(job), overrides), ranks, Screen(io.StringIO(), shown=False))
    data = session.evaluation("train")
    scores = session.score(data)
    return {
        "metrics": scores.metrics,
        "references": [p.references for p in scores.predictions],
        "prompt_tokens": data.prompt_tokens,
        "sequences": len(data.sequences),
        "too_long": scores.too_long,
    }


def job_with(folder: Path, base: Path, rows: list[tuple[str, str]]) -> str:
    job = write_job(folder, base)
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(job)


def test_perplexity_and_bleu_are_the_libraries(gpt2_base, ranks2, tmp_path):
    rows = [("a", " one two"), ("a", " one two three four five"), ("b", " six"), ("c", " Blue Spice is near the Eagle")]
    one, two = ranks2.run(score_on_ranks, job_with(tmp_path, gpt2_base, rows), ())
    assert one == two
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2_base), AutoTokenizer.from_pretrained(gpt2_base)
    total, count = 0.0, 0
    for prompt, completion in rows:
        head, tail = tokenizer(prompt + " ->").input_ids, [*tokenizer(completion).input_ids, 0]
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction="sum").item()
        count += len(tail)
    assert one["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert one["references"] == [("one two", "one two three four five"), ("six",), ("Blue Spice is near the Eagle",)]


def test_bleu_takes_any_number_of_references():
    texts = ["the cat sat on the mat today", "a dog runs in the park now"]
    references = [("the cat sat on the mat", "the cat was on the mat today"), ("a dog runs in a park",)]
    padded = [["the cat sat on the mat", "a dog runs in a park"], ["the cat was on the mat today", None]]
    assert bleu(texts, references) == pytest.approx(sacrebleu.corpus_bleu(texts, padded).score)
    # A reference repeated counts once: filling up with the first one must give the same.
    filled = [padded[0], ["the cat was on the mat today", "a dog runs in a park"]]
    assert bleu(texts, references) == pytest.approx(sacrebleu.corpus_bleu(texts, filled).score)
    assert bleu(["the cat sat on the mat"], [(" the cat sat on the mat ",)]) == pytest.approx(100.0)


def test_the_first_prompts_bring_all_their_references(gpt2_base, ranks1, tmp_path):
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]
    (scores,) = ranks1.run(score_on_ranks, job_with(tmp_path, gpt2_base, rows), ("evaluate.max_prompts=1",))
    assert scores["references"] == [("1", "3")]
    assert scores["sequences"] == 2


def test_what_does_not_fit_is_counted_and_no_prompt_depends_on_its_references(gpt2_base, ranks1, tmp_path):
    long = " and more" * 60
    settings = ('task.too_long="truncate"', "train.max_tokens=10", "evaluate.max_new_tokens=4")
    answers = []
    for n, completions in enumerate((["short", long], [long, "short"])):
        rows = [("Blue Spice near the Eagle", text) for text in completions] + [("x" * 200, "long prompt")]
        (scores,) = ranks1.run(score_on_ranks, job_with(tmp_path / str(n), gpt2_base, rows), settings)
        assert scores["too_long"] == 2
        answers.append(scores["prompt_tokens"])
    assert answers[0] == answers[1]
    assert [len(ids) for ids in answers[0]] == [len(answers[0][0]), 124]
    assert 10 < len(answers[0][0]) < 40, "train.max_tokens does not bind evaluation, and the prompt is whole"
