"""Conversations in a base's template: ids and mask as transformers has them, and the learnt tokens are the assistant's turns."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from pipeline.job.errors import JobError
from pipeline.job.task import Conversations
from pipeline.tasks.example import Chat, Dropped, Message
from pipeline.tasks.tokens import Tokens
from tests.bases import make_tokenizer
from tests.tasks.making import encoded, encoder

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_3 = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|user|>\n' + m.content + eos_token }}
{% elif m.role == 'system' %}
{{ '<|system|>\n' + m.content + eos_token }}
{% elif m.role == 'assistant' %}
{{ '<|assistant|>\n'  + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
FORGETFUL = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last or m.role == 'user' %}{{ m.content }}
{%- else %}{{ '(short)' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ENDS = {CHATML: "<|im_end|>", LLAMA_3: "<|eot_id|>", ZEPHYR: "<|endoftext|>", MISTRAL: "<|endoftext|>", MARKED: "<|im_end|>", PLAIN: "\n"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def chat(*turns, source="chat.jsonl:1"):
    """Turns of user and assistant in alternation, after the system's where it is named."""
    return Chat(tuple(Message(*turn) for turn in turns), source)


ONE = chat(("user", "Where is it?"), ("assistant", "By the river."))
SYSTEM = chat(("system", "Be short."), *((m.role, m.content) for m in ONE.messages))
MANY = chat(
    ("user", "Where\n is it?"),
    ("assistant", "By the\n\nriver 日本 🙂."),
    ("user", "Italian?"),
    ("assistant", "assistant\nItalian"),
    ("user", "Thanks"),
    ("assistant", "Bye"),
)
OPEN = chat(*((m.role, m.content) for m in MANY.messages[:5]))
ALL = {"one": ONE, "system": SYSTEM, "many": MANY, "ends with a user": OPEN}


@pytest.fixture
def base(tmp_path):
    """Gives the folder of a tokenizer with a template."""

    def make(template):
        make_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


def turns_of(conversation):
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def learnt(sequence):
    return [list(sequence.tokens[first:end]) for first, end in sequence.spans]


def refused(folder, conversation):
    with pytest.raises(JobError) as caught:
        encoded(encoder(folder, chat=True), [conversation])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "conversation"),
    [(t, c) for t in (CHATML, LLAMA_3, ZEPHYR, MISTRAL, PLAIN) for c in ALL if (t, c) != (MISTRAL, "system")],
)
def test_ids_are_transformers_and_what_is_learnt_are_the_assistants_turns_with_their_ends(base, template, conversation):
    folder, conversation = base(template), ALL[conversation]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (sequence,) = encoded(encoder(folder, chat=True), [conversation])
    assert list(sequence.tokens) == tokenizer.apply_chat_template(turns_of(conversation), tokenize=True)["input_ids"]
    said = [tokenizer.decode(ids) for ids in learnt(sequence)]
    assert said == [message.content + ENDS[template] for message in conversation.messages if message.role == "assistant"]


@pytest.mark.parametrize("conversation", ALL)
def test_a_template_that_marks_the_answers_is_taken_at_its_word(base, conversation):
    folder, conversation = base(MARKED), ALL[conversation]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer.apply_chat_template(turns_of(conversation), return_dict=True, return_assistant_tokens_mask=True)
    (sequence,) = encoded(encoder(folder, chat=True), [conversation])
    assert list(sequence.tokens) == theirs["input_ids"]
    mask = [any(first <= place < end for first, end in sequence.spans) for place in range(len(sequence))]
    assert mask == list(map(bool, theirs["assistant_masks"]))
    (found,) = encoded(encoder(base(CHATML), chat=True), [conversation])
    assert found == sequence


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, ZEPHYR, MARKED])
def test_the_prompt_of_an_evaluation_is_the_conversation_up_to_the_last_answer(base, template):
    folder = base(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = encoder(folder, chat=True)
    for conversation in (MANY, OPEN):
        place = 5 if conversation is MANY else 3
        (pair,) = made.asked([conversation])
        wanted = tokenizer.apply_chat_template(turns_of(conversation)[:place], add_generation_prompt=True)["input_ids"]
        assert made.prompts([pair.prompt]) == [wanted]
        assert pair.completion == conversation.messages[place].content
        (sequence,) = encoded(made, [chat(*((m.role, m.content) for m in conversation.messages[: place + 1]))])
        assert list(sequence.tokens[: len(wanted)]) == wanted
    assert made.typed(["Where is it?"]) == [tokenizer.apply_chat_template(turns_of(ONE)[:1], add_generation_prompt=True)["input_ids"]]


def test_many_conversations_keep_their_order_and_their_sources(base):
    made = encoder(base(CHATML), chat=True)
    chats = [chat(("user", str(number)), ("assistant", f"{number}!"), source=f"c:{number}") for number in range(1100)]
    found = list(made.sequences(chats))
    assert [source for _, source in found] == [conversation.source for conversation in chats]
    assert found[1099][0] == encoded(made, [chats[1099]])[0]


def test_a_template_that_renders_earlier_turns_differently_is_refused_for_several_answers_only(base):
    folder = base(FORGETFUL)
    assert encoded(encoder(folder, chat=True), [ONE]) == encoded(encoder(base(CHATML), chat=True), [ONE])
    message = refused(base(FORGETFUL), MANY)
    assert message.startswith("chat.jsonl:1: the base's chat template renders turn 2 differently when others follow")


def test_roles_that_the_template_refuses_are_named_or_left_out(base):
    folder = base(MISTRAL)
    message = refused(folder, SYSTEM)
    assert message.startswith("chat.jsonl:1: the base's chat template refuses this conversation (Conversation roles must alternate")
    made = encoder(folder, chat=True)
    reason = "the base's chat template refuses this conversation"
    assert list(made.usable([ONE, SYSTEM, Dropped("x", "y"), MANY])) == [ONE, Dropped(reason, SYSTEM.source), Dropped("x", "y"), MANY]


def test_a_conversation_that_begins_with_an_answer_is_refused_where_the_template_does_not_mark_it(base):
    first = chat(("assistant", "Hello"), ("user", "a"), ("assistant", "b"))
    assert refused(base(CHATML), first).startswith("chat.jsonl:1: the first turn is the assistant's: nothing asks for it")
    folder = base(MARKED)
    (sequence,) = encoded(encoder(folder, chat=True), [first])
    assert [AutoTokenizer.from_pretrained(folder).decode(ids) for ids in learnt(sequence)] == ["Hello<|im_end|>", "b<|im_end|>"]
    alone = chat(("assistant", "Hello"), ("user", "a"))  # nothing that could be scored
    assert refused(folder, alone).startswith("chat.jsonl:1: the first turn is the assistant's: nothing asks for it")


def test_a_base_without_a_template_is_refused_with_the_repair(base):
    folder = base(None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "the base has no chat template" in refused(folder, ONE)
    with pytest.raises(JobError, match="no chat template"):
        list(encoder(folder, chat=True).usable([ONE]))
    with pytest.raises(JobError, match="no chat template"):
        encoder(folder, chat=True).typed(["a"])


def test_several_templates_without_a_default_are_refused(base):
    folder = base(None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "rag", "template": CHATML}, {"name": "tools", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": several}))
    assert "several chat templates" in refused(folder, ONE)


def test_a_template_that_is_broken_is_named(base):
    assert "refuses this conversation" in refused(base("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}"), ONE)
    assert "refuses this conversation" in refused(base("{% for m in %}"), ONE)


def test_a_slow_tokenizer_is_refused(base, monkeypatch):
    made = Tokens(base(CHATML))
    monkeypatch.setattr(type(made.tokenizer), "is_fast", False)
    assert "no fast form" in refused(made.folder, ONE)


@pytest.mark.parametrize("separator", ["", "\n"])
def test_a_separator_has_no_place_in_a_conversation(separator):
    with pytest.raises(ValueError, match="Leave the key out"):
        Conversations(kind="chat", data="x", separator=separator)
