"""Generation on ranks against transformers' own on the whole model, and scores against the libraries'."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import sacrebleu
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NoRepeatNGramLogitsProcessor

from pipeline.evaluate.metrics.own import bleu
from pipeline.evaluate.search import Search
from pipeline.job.spec import Decoding
from tests.training import write_job

PROMPTS = ["Blue Spice", "The Eagle near the riverside cafe Mill high cheap", "pub", "Italian city", "x" * 100, "The", "French pub"]
CONTEXT, ROOM = 128, 24


def generate_on_ranks(ranks, job: str, prompts: list[str], settings: dict) -> list[list[int]]:
    from pipeline.evaluate.gather import choose
    from pipeline.evaluate.generate import generate
    from pipeline.job.read import read_job
    from pipeline.job.spec import Evaluate
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen

    session = open_session(read_job(Path(job)), ranks, Screen(io.StringIO(), shown=False))
    evaluate = Evaluate(**{"max_new_tokens": ROOM, **settings})
    session.root.eval()
    gathering = choose(session.root, evaluate, ranks)
    ends = (session.tokens.end_id, *evaluate.eos_tokens)
    with gathering.held(session.root):
        ids = generate(
            session.root, session.encoder(session.job.task, 0).prompts(prompts), ranks, evaluate, ends, CONTEXT, gathering.each_pass
        )
    session.engine.release()
    return ids


def same_on_all(pool, job: Path, **settings) -> list[list[int]]:
    answers = pool.run(generate_on_ranks, str(job), PROMPTS, settings)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def transformers_texts(folder: Path, processor=None, ends: tuple[int, ...] = (), **settings) -> list[list[int]]:
    """A prompt at a time, on the whole model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt + " ->", return_tensors="pt")
        length = inputs.input_ids.shape[1]
        found = model.generate(
            **inputs,
            max_new_tokens=min(ROOM, CONTEXT - length),
            pad_token_id=0,
            eos_token_id=[tokenizer.eos_token_id, *ends],
            logits_processor=[processor(length)] if processor else [],
            **settings,
        )[0, length:].tolist()
        texts.append(found)
    return texts


@pytest.fixture(scope="module", params=["gpt2_base", "llama_base"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("gather", ["once", "each_pass"])
@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_greedy_is_transformers_own(base, gather, batch_tokens, ranks2, tmp_path):
    ours = same_on_all(ranks2, write_job(tmp_path, base), gather=gather, batch_tokens=batch_tokens)
    assert ours == transformers_texts(base, do_sample=False)


BEAMS = [
    {"beams": 4},
    {"beams": 3, "length_penalty": 0.8, "no_repeat_ngram": 2},
    {"beams": 5, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram": 1},
    {"beams": 2, "length_penalty": -1.0, "no_repeat_ngram": 4},
    {"beams": 10, "length_penalty": 0.9, "no_repeat_ngram": 4, "eos_tokens": (7, 19, 40)},
    {"beams": 1, "no_repeat_ngram": 2, "eos_tokens": (7, 19, 40)},
    # Many texts end early: when a search may stop matters.
    {"beams": 2, "length_penalty": 0.5, "eos_tokens": tuple(range(5, 60))},
    {"beams": 3, "length_penalty": 1.5, "eos_tokens": tuple(range(5, 60))},
    {"beams": 3, "length_penalty": 0.0, "eos_tokens": tuple(range(5, 60)), "early_stopping": True},
]


@pytest.mark.parametrize("settings", BEAMS, ids=lambda settings: str(settings)[:60])
def test_beam_search_is_transformers_own(base, settings, ranks2, tmp_path):
    ours = same_on_all(ranks2, write_job(tmp_path, base), **settings)
    theirs = transformers_texts(
        base,
        ends=settings.get("eos_tokens", ()),
        do_sample=False,
        num_beams=settings["beams"],
        length_penalty=settings.get("length_penalty", 1.0),
        early_stopping=settings.get("early_stopping", False),
        no_repeat_ngram_size=settings.get("no_repeat_ngram", 0),
    )
    assert ours == theirs


def test_special_tokens_of_a_prompt_ban_nothing():
    logits = torch.arange(10.0)[None]
    for tokens, best in (([10, 11, 3], 9), ([9, 10, 11], 8)):
        search = Search(Decoding(no_repeat_ngram=1), (0,), [tokens], [5], [0])
        assert search.advance(logits.clone()).tokens.tolist() == [best]


class GeneratedOnly(NoRepeatNGramLogitsProcessor):
    """The paper's decoder looks for repeated n-grams in the generated text only."""

    def __init__(self, size: int, prompt: int) -> None:
        super().__init__(size)
        self._prompt = prompt

    def __call__(self, input_ids, scores):
        return super().__call__(input_ids[:, self._prompt :], scores)


def test_the_papers_decoder_looks_at_the_generated_text_only(gpt2_base, ranks2, tmp_path):
    settings = {"beams": 3, "length_penalty": 0.9, "no_repeat_ngram": 1}
    job = write_job(tmp_path, gpt2_base)
    ours = same_on_all(ranks2, job, ngram_scope="generated", **settings)
    reference = {"do_sample": False, "num_beams": 3, "length_penalty": 0.9}
    assert ours == transformers_texts(gpt2_base, lambda prompt: GeneratedOnly(1, prompt), **reference)
    assert ours != same_on_all(ranks2, job, ngram_scope="all", **settings)


@pytest.mark.parametrize("settings", [{}, {"beams": 3, "no_repeat_ngram": 3}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}], ids=str)
def test_texts_do_not_depend_on_ranks_batches_or_gathering(settings, gpt2_base, ranks1, ranks2, ranks3, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    texts = [
        same_on_all(pool, job, gather=gather, batch_tokens=batch_tokens, **settings)
        for pool, gather, batch_tokens in (
            (ranks1, "auto", 100_000),
            (ranks2, "once", 300),
            (ranks2, "each_pass", 100_000),
            (ranks3, "each_pass", 200),
            (ranks3, "once", 1),
        )
    ]
    assert all(other == texts[0] for other in texts[1:])


def test_draws_follow_the_softmax_and_the_seed(gpt2_base, ranks1, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    prompts = ["Blue Spice"] * 400
    settings = {"temperature": 1.5, "top_k": 3, "max_new_tokens": 1}
    one, again, other = (ranks1.run(generate_on_ranks, str(job), prompts, {**settings, "seed": seed})[0] for seed in (1, 1, 2))
    assert one == again != other
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2_base), AutoTokenizer.from_pretrained(gpt2_base)
    with torch.no_grad():
        logits = model(**tokenizer("Blue Spice ->", return_tensors="pt")).logits[0, -1]
    best, tokens = (logits / 1.5).topk(3)
    wanted = dict(zip(tokens.tolist(), best.softmax(-1).tolist(), strict=True))
    drawn = [text[0] for text in one]
    assert set(drawn) <= set(wanted)
    for token, share in wanted.items():
        assert drawn.count(token) / 400 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 400))
    # A share that only the likeliest has: no choice is left.
    greedy = ranks1.run(generate_on_ranks, str(job), prompts[:3], {"max_new_tokens": 5})[0]
    assert ranks1.run(generate_on_ranks, str(job), prompts[:3], {"temperature": 1.0, "top_p": 1e-6, "max_new_tokens": 5})[0] == greedy


def test_fewer_prompts_than_ranks_end(gpt2_base, ranks3, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    for gather in ("once", "each_pass"):
        answers = ranks3.run(generate_on_ranks, str(job), PROMPTS[:1], {"gather": gather, "beams": 2})
        assert answers[0] == answers[1] == answers[2]


def test_gathering_is_chosen_by_memory_and_leaves_the_shards_as_they_were(gpt2_base, ranks2, tmp_path):
    (first, second) = ranks2.run(gathering_on_ranks, str(write_job(tmp_path, gpt2_base)))
    assert first == second
    assert first["small"] == (True, False)
    assert first["large"] == (True, True)
    assert first["before"] == first["after"]
    assert first["whole"], "inside, every parameter is whole"


def gathering_on_ranks(ranks, job: str) -> dict:
    from pipeline.evaluate import gather
    from pipeline.job.read import read_job
    from pipeline.job.spec import Evaluate
    from pipeline.model.zero3 import shape_of, shard_of
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen

    session = open_session(read_job(Path(job)), ranks, Screen(io.StringIO(), shown=False))
    real = gather._free_bytes

    def chosen(free: int):
        # One rank without room is enough.
        gather._free_bytes = lambda _: free if ranks.rank == 1 else 1 << 40
        found = gather.choose(session.root, Evaluate(), ranks)
        return found.sharded, found.each_pass

    def summary():
        return [(p.numel(), shard_of(p).double().sum().item() if ranks.rank == 0 else 0) for p in session.root.parameters()]

    try:
        small, large = chosen(1 << 40), chosen(1 << 20)
    finally:
        gather._free_bytes = real
    before = summary()
    with gather.choose(session.root, Evaluate(gather="once"), ranks).held(session.root):
        whole = all(tuple(p.shape) == shape_of(p) for p in session.root.parameters())
    return {"small": small, "large": large, "before": [n for n, _ in before], "after": [n for n, _ in summary()], "whole": whole}


def score_on_ranks(ranks, job: str, overrides: tuple[str, ...]) -> dict:
    """Scores the training file, which a test has written, as a split."""
    from pipeline.job.read import read_job
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen

    session = open_session(read_job(Path(job), overrides), ranks, Screen(io.StringIO(), shown=False))
    (data,) = session.evaluation("train")
    scores = session.score((data,))
    (part,) = scores.parts
    return {
        "metrics": scores.metrics,
        "references": [p.references for p in part.predictions],
        "prompt_tokens": data.prompt_tokens,
        "sequences": len(data.sequences),
        "too_long": part.too_long,
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
    assert one["metrics"]["loss"] == pytest.approx(total / count, rel=1e-5)
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
