"""Text to token ids: the boundary of the loss, the end token, the separator, and a lead token only where there is one."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from pipeline.job.errors import JobError
from pipeline.job.task import E2E, Pairs
from pipeline.tasks.example import Pair
from pipeline.tasks.open import separator_text
from pipeline.tasks.tokens import Tokens
from tests.bases import make_tokenizer
from tests.tasks.making import encoded, encoder, start_of

EXAMPLE = Pair("name : Blue Spice | food : Italian", " The Blue Spice is Italian .", "here:1")


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(tmp_path)
    return tmp_path


def ids(folder, text):
    """By the tokenizers library itself."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def give_lead(folder, template, bos):
    """Makes the tokenizer one that puts special tokens around a text, as Llama's or BERT's does."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([bos])
    known = [(token, tokenizer.token_to_id(token)) for token in (bos, "<|endoftext|>")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=known)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": bos}))
    return tokenizer.token_to_id(bos)


def test_the_loss_begins_at_the_completion_and_counts_the_end_token(folder):
    (sequence,) = encoded(encoder(folder, " =>"), [EXAMPLE])
    start = start_of(sequence)
    assert list(sequence.tokens[:start]) == ids(folder, EXAMPLE.prompt + " =>")
    assert list(sequence.tokens[start:]) == [*ids(folder, EXAMPLE.completion), Tokens(folder).end_id]
    assert sequence.targets == len(ids(folder, EXAMPLE.completion)) + 1


def test_the_papers_tasks_are_separated_by_the_end_token_and_own_texts_by_nothing(folder):
    e2e, own = E2E(kind="e2e"), Pairs(kind="jsonl", data="x")
    tokens = Tokens(folder)
    made = encoder(folder, separator_text(e2e, tokens.end_text))
    assert made.prompts([EXAMPLE.prompt]) == [[*ids(folder, EXAMPLE.prompt), tokens.end_id]]
    made = encoder(folder, separator_text(own, tokens.end_text))
    assert made.prompts([EXAMPLE.prompt]) == [ids(folder, EXAMPLE.prompt)]


def test_a_separator_of_the_job_takes_the_place_of_the_tasks_own(folder):
    for task in (E2E(kind="e2e", separator=""), Pairs(kind="jsonl", data="x", separator=" |")):
        assert encoder(folder, separator_text(task, "<|endoftext|>")).prompts(["name"]) == [ids(folder, "name" + task.separator)]


def test_generation_sees_exactly_the_prompt_tokens_of_training(folder):
    made = encoder(folder, "<|endoftext|>")
    examples = [EXAMPLE, Pair("", "x", "2"), Pair("Blue", "Spice", "3")]
    for sequence, prompt in zip(encoded(made, examples), made.prompts([e.prompt for e in examples]), strict=True):
        assert list(sequence.tokens[: start_of(sequence)]) == prompt


def test_an_empty_prompt_still_gives_the_first_target_something_to_follow(folder):
    (sequence,) = encoded(encoder(folder), [Pair("", "x", "1")])
    assert start_of(sequence) == 1
    assert sequence.tokens[0] == Tokens(folder).end_id


def test_a_lead_token_stands_before_the_prompt_only_where_the_tokenizer_adds_one(folder):
    (plain,) = encoded(encoder(folder), [EXAMPLE])
    lead = give_lead(folder, "<s> $A", "<s>")
    (led,) = encoded(encoder(folder), [EXAMPLE])
    assert led.tokens == (lead, *plain.tokens)
    assert start_of(led) == start_of(plain) + 1
    assert encoder(folder).prompts([""]) == [[lead]]


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(folder):
    plain = encoded(encoder(folder), [EXAMPLE])
    give_lead(folder, "$A <|endoftext|>", "<s>")
    assert encoded(encoder(folder), [EXAMPLE]) == plain


def test_many_examples_keep_their_order(folder):
    examples = [Pair(f"{number}", f" {number}", "x") for number in range(2100)]
    made, tokens = encoder(folder), Tokens(folder)
    sequences = encoded(made, examples)
    assert len(sequences) == 2100
    for number in (0, 1023, 1024, 1025, 2047, 2048, 2099):
        assert [sequences[number]] == encoded(made, [examples[number]])
        assert tokens.text(list(sequences[number].tokens[start_of(sequences[number]) :]), (tokens.end_id,)) == str(number)


def test_generated_text_ends_at_the_end_token(folder):
    tokens = Tokens(folder)
    new = ids(folder, " The Blue Spice")
    assert tokens.text([*new, tokens.end_id, *new], (tokens.end_id,)) == "The Blue Spice"
    assert tokens.text(new, (tokens.end_id,)) == "The Blue Spice"
    assert tokens.text(new, (tokens.end_id, new[-1])) == "The Blue"
    assert tokens.text([tokens.end_id], (tokens.end_id,)) == ""


def test_gpt2s_own_tokenizer_gives_the_papers_sequence(shared_data):
    folder = shared_data / "gpt2_tokenizer"
    tokens = Tokens(folder)
    made = encoder(folder, separator_text(E2E(kind="e2e"), tokens.end_text))
    (sequence,) = encoded(made, [Pair("name : Blue Spice | Type : coffee shop", " A coffee shop .", "1")])
    # GPT-2's published vocabulary: 50256 is <|endoftext|>.
    assert tokens.end_id == 50256
    assert [place for place, token in enumerate(sequence.tokens) if token == 50256] == [start_of(sequence) - 1, len(sequence) - 1]
    assert tokens.text(list(sequence.tokens[start_of(sequence) :]), (tokens.end_id,)) == "A coffee shop ."


def test_a_folder_without_a_tokenizer_is_refused_even_if_its_config_names_one(folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for config in (None, '{"model_type": "gpt2"}'):
        if config:
            (bare / "config.json").write_text(config)
        with pytest.raises(JobError, match="no tokenizer"):
            Tokens(bare)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '{"added_tokens": [], "model": {"type": "Nope"}}'])
def test_a_corrupt_tokenizer_is_refused_by_its_folder(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(JobError) as caught:
        Tokens(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_refused_with_the_repair(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.rmtree(folder / "special_tokens_map.json", ignore_errors=True)
    with pytest.raises(JobError, match="Set eos_token"):
        Tokens(folder).require_end()
