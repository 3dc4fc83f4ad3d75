"""E2E: the official CSV and the paper's text as published, and what is said about a malformed line."""

from __future__ import annotations

import csv

import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import E2E
from pipeline.tasks.e2e import linearise
from pipeline.tasks.example import grouped
from pipeline.tasks.open import has_split
from tests.tasks.reading import read_examples, stub_hub

# Novikova, Dusek and Rieser 2017, table 1; the training and development counts are those of the released files.
ROWS = {"train": 42_061, "valid": 4_672, "test": 4_693}
PROMPTS = {"train": 4_862, "valid": 547, "test": 630}
OFFICIAL = {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"}


def task(folder):
    return E2E(kind="e2e", data=str(folder))


def refused(folder, split="train"):
    with pytest.raises(JobError) as caught:
        read_examples(task(folder), split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("split", ROWS)
def test_the_official_files_are_read_whole_and_in_order(shared_data, split):
    examples = read_examples(task(shared_data / "e2e"), split)
    assert len(examples) == ROWS[split]
    assert len(grouped(examples)) == PROMPTS[split]
    with (shared_data / "e2e" / OFFICIAL[split]).open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [example.completion for example in examples] == [" " + row["ref"].strip() for row in rows]
    # The same words in the same order, whatever the marks between them.
    marks = str.maketrans("[],|:", "     ")
    assert [e.prompt.translate(marks).split() for e in examples] == [row["mr"].translate(marks).split() for row in rows]


@pytest.mark.parametrize("split", ROWS)
def test_the_papers_text_is_read_whole_and_in_order(shared_data, split):
    examples = read_examples(task(shared_data / "e2e_lora_format"), split)
    assert len(examples) == ROWS[split]
    assert len(grouped(examples)) == PROMPTS[split]
    lines = (shared_data / "e2e_lora_format" / f"{split}.txt").read_text(encoding="utf-8").split("\n")
    assert [f"{e.prompt}||{e.completion[1:]}" for e in examples] == [line.strip() for line in lines if line]


def test_an_examples_source_is_its_line(shared_data):
    for folder, name in (("e2e", "testset_w_refs.csv"), ("e2e_lora_format", "test.txt")):
        lines = (shared_data / folder / name).read_text(encoding="utf-8").split("\n")
        for example in read_examples(task(shared_data / folder), "test")[::500]:
            file, _, number = example.source.rpartition(":")
            assert file.endswith(name)
            assert example.completion.strip().replace('"', '""') in lines[int(number) - 1]


def test_references_of_one_prompt_stay_together_in_file_order(shared_data):
    examples = read_examples(task(shared_data / "e2e"), "test")
    prompts = grouped(examples)
    assert sum(len(prompt.references) for prompt in prompts) == len(examples)
    first = prompts[0]
    assert first.references == tuple(e.completion for e in examples if e.prompt == first.text)
    assert len(first.references) > 1


def test_a_meaning_becomes_the_papers_line():
    meaning = "name[Blue Spice], eatType[coffee shop], area[city centre], priceRange[£20-25]"
    assert linearise(meaning) == "name : Blue Spice | eatType : coffee shop | area : city centre | priceRange : £20-25"
    assert linearise("name[The Wrestlers, Ltd.],near[x]") == "name : The Wrestlers, Ltd. | near : x"


@pytest.mark.parametrize("meaning", ["", "name", "name[a", "name a]", "name[a] area", "name[a], area", "[a]", "name[a[b]]"])
def test_what_is_no_meaning_is_refused(meaning):
    with pytest.raises(ValueError, match=r".*"):
        linearise(meaning)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("name a,A place.", '"name a" is not of the form name[value]'),
        ("name[a]", "1 columns, but the header has 2"),
        ("name[a],A place.,more", "3 columns, but the header has 2"),
        ("name[a],", "the reference is empty"),
        ('name[a],"A place.', "not valid CSV"),
        ('name[a],"A" place.', "not valid CSV"),
    ],
)
def test_a_malformed_csv_line_is_named(tmp_path, row, part):
    (tmp_path / "trainset.csv").write_text(f'mr,ref\n"name[b], area[c]","A\nplace."\n{row}\nname[d],Another.\n')
    assert f"trainset.csv:4: {part}" in refused(tmp_path)


def test_a_quotation_mark_left_open_in_a_large_file_is_named_by_its_line(tmp_path):
    (tmp_path / "trainset.csv").write_text('mr,ref\nname[a],A place.\n"name[b],A place.\n' + "name[c],A place.\n" * 10_000)
    assert "trainset.csv:3: not valid CSV" in refused(tmp_path)


@pytest.mark.parametrize("header", ["MR,text", "mr;ref", "mr,ref,extra", "name[a],A place."])
def test_a_wrong_header_is_refused_with_what_was_found(tmp_path, header):
    (tmp_path / "trainset.csv").write_text(f"{header}\nname[a],A place.\n")
    message = refused(tmp_path)
    assert "trainset.csv:1: the columns are" in message
    assert header.split(",")[0] in message


@pytest.mark.parametrize("line", ["name : a", "name : a|A place .", "||A place .", "name : a||", "name : a||  "])
def test_a_malformed_text_line_is_named(tmp_path, line):
    (tmp_path / "train.txt").write_text(f"name : a||A place .\n\n{line}\n")
    assert "train.txt:3: not of the form context||reference" in refused(tmp_path)


@pytest.mark.parametrize(("name", "first"), [("trainset.csv", b"mr,ref"), ("train.txt", b"name : a||A place .")])
def test_a_line_that_is_not_utf8_is_named(tmp_path, name, first):
    (tmp_path / name).write_bytes(first + b"\nname[a],caf\xe9||x\n")
    assert f"{name}:2: not UTF-8 text (byte 0xe9 at column 12)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("trainset.csv", "mr,ref\r\nname[a],A café.\r\n\r\n"), ("train.txt", "name : a||A café.\r\n\r\n")],
)
def test_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    (example,) = read_examples(task(tmp_path), "train")
    assert (example.prompt, example.completion) == ("name : a", " A café.")


def test_unicode_line_separators_end_no_line(tmp_path):
    (tmp_path / "train.txt").write_text("name : a||A\u2028place\x85here\n", encoding="utf-8")
    (example,) = read_examples(task(tmp_path), "train")
    assert example.completion == " A\u2028place\x85here"


def test_a_file_without_examples_is_refused(tmp_path):
    (tmp_path / "trainset.csv").write_text("mr,ref\n")
    assert "the train split has no examples" in refused(tmp_path)
    (tmp_path / "trainset.csv").write_text("")
    assert "trainset.csv:1" in refused(tmp_path)


def test_a_folder_without_the_split_is_told_which_files_to_put_there(tmp_path):
    (tmp_path / "trainset.csv").write_text("mr,ref\nname[a],A place.\n")
    message = refused(tmp_path, "test")
    assert "testset_w_refs.csv" in message
    assert "test.txt" in message


def test_a_file_in_the_folders_place_is_told_to_name_the_folder(tmp_path):
    file = tmp_path / "trainset.csv"
    file.write_text("mr,ref\nname[a],A place.\n")
    assert f"{file}: is a file. Name the folder" in refused(file)


def test_the_hubs_copy_out_of_reach_is_answered_with_the_files_to_name():
    with pytest.raises(JobError) as caught:
        read_examples(E2E(kind="e2e"), "train")
    assert "task.data: absent" in str(caught.value)
    assert "official CSV" in str(caught.value)
    assert has_split(E2E(kind="e2e"), "test")


def test_the_hubs_copy_gives_the_same_examples_as_the_files(monkeypatch, tmp_path):
    row = {"meaning_representation": "name[Blue Spice], area[city centre]", "human_reference": "It is in the centre."}
    asked = stub_hub(monkeypatch, [row])
    (tmp_path / "devset.csv").write_text('mr,ref\n"name[Blue Spice], area[city centre]",It is in the centre.\n')
    (hub,) = read_examples(E2E(kind="e2e"), "valid")
    (file,) = read_examples(E2E(kind="e2e", data=str(tmp_path)), "valid")
    assert (hub.prompt, hub.completion) == (file.prompt, file.completion)
    assert asked == {"name": "tuetschek/e2e_nlg", "revision": "refs/convert/parquet", "split": "validation"}
