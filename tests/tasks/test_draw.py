"""A share held back and a small draw: by seed, disjoint, complete, the same whenever and in whatever order they are read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import Pairs, PlainText
from pipeline.tasks.draw import drawn, held_back
from pipeline.tasks.example import Chat, Document, Dropped, Labelled, Message, Pair, Source
from pipeline.tasks.open import open_split
from tests.tasks.reading import read_examples

PAIRS = [Pair(f"prompt {number // 3}", f"text {number}", f"a:{number}") for number in range(3000)]
PIECES = [Document(f"{number // 4} {number}", f"a:{number}", continued=number % 4 > 0) for number in range(4000)]
KINDS = {
    "pairs": PAIRS,
    "chats": [Chat((Message("user", f"{n // 2}"), Message("assistant", f"{n}")), f"a:{n}") for n in range(2000)],
    "labelled": [Labelled((f"{n}", "b"), float(n % 2), f"a:{n}") for n in range(1500)],
    "documents": PIECES,
}


def source_of(examples):
    return Source((Path("a"),), lambda: iter(examples))


def halves(examples, fraction=0.2, seed=1):
    return [list(held_back(source_of(examples), fraction, seed, taken).read()) for taken in (True, False)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_is_held_back_and_the_rest_is_learnt(kind):
    examples = KINDS[kind]
    dev, train = halves(examples)
    assert len(dev) + len(train) == len(examples)
    for side in (set(dev), set(train)):
        assert [example for example in examples if example in side] in (dev, train)
    assert abs(len(dev) / len(examples) - 0.2) < 0.05
    assert [dev, train] == halves(examples)
    assert dev != halves(examples, seed=2)[0]
    assert set(dev) < set(halves(examples, fraction=0.5)[0])


def test_examples_with_the_same_prompt_are_on_one_side():
    dev, train = halves(PAIRS)
    assert {pair.prompt for pair in dev}.isdisjoint(pair.prompt for pair in train)


def test_the_choice_does_not_depend_on_the_order_of_rows():
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    assert set(halves(shuffled)[0]) == set(halves(PAIRS)[0])
    assert set(halves(PAIRS[:500])[0]) == set(halves(PAIRS)[0]) & set(PAIRS[:500])


def test_pieces_of_a_document_stay_together():
    for side in halves(PIECES):
        assert [piece.continued for piece in side] == [False, True, True, True] * (len(side) // 4)
    chosen = list(drawn(source_of(PIECES), 10, 1).read())
    assert [piece.continued for piece in chosen] == [False, True, True, True] * 10


def test_what_is_left_out_is_counted_once():
    torn = Dropped("torn", "a:2")
    dev, train = halves([PAIRS[0], torn, *PAIRS[1:]])
    assert torn in train
    assert torn not in dev


@pytest.mark.parametrize(("fraction", "taken", "part"), [(0.01, True, "none is held back"), (0.99, False, "all are held back")])
def test_an_empty_side_is_refused_with_the_repair(fraction, taken, part):
    examples = [Pair("same", str(number), "a:1") for number in range(50)]
    with pytest.raises(JobError) as caught:
        list(held_back(source_of(examples), fraction, 1, taken).read())
    assert str(caught.value).startswith(f"task.dev_fraction = {fraction}: of 50 examples in the training split {part}")
    assert "Set task.dev_seed" in str(caught.value)


def test_a_file_that_is_one_document_cannot_be_shared(tmp_path):
    (tmp_path / "train.txt").write_text("a\n\nb\n\nc\n\nd\n\ne\n\nf\n")
    task = PlainText(kind="text", data=str(tmp_path), dev_fraction=0.3)
    with pytest.raises(JobError, match=r'task\.document = "paragraph"'):
        read_examples(task, "valid")
    parts = [read_examples(task.model_copy(update={"document": "paragraph"}), split) for split in ("train", "valid")]
    assert sorted(d.text for part in parts for d in part) == list("abcdef")
    assert all(parts)


@pytest.mark.parametrize("kind", ["pairs", "labelled", "documents"])
def test_a_small_draw_is_part_of_a_larger_one(kind):
    def draw(count, seed=1):
        found = list(drawn(source_of(KINDS[kind]), count, seed).read())
        chosen = set(found)
        assert found == [example for example in KINDS[kind] if example in chosen]
        assert sum(not (isinstance(example, Document) and example.continued) for example in found) == count
        return chosen

    assert draw(10) < draw(100) < draw(500)
    assert draw(100) == draw(100)
    assert draw(100) != draw(100, seed=2)


def test_more_than_there_are_is_refused():
    assert list(drawn(source_of(PAIRS), 3000, 1).read()) == PAIRS
    with pytest.raises(JobError, match=r"task\.train_examples = 3001: the training split has 3000 examples"):
        list(drawn(source_of(PAIRS), 3001, 1).read())


def test_a_job_learns_from_what_is_not_held_back_and_of_that_a_draw(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"prompt": "{n}", "completion": "x"}}\n' for n in range(200)))
    keys = {"kind": "jsonl", "data": str(tmp_path), "dev_fraction": 0.25}
    task = Pairs(**keys, train_examples=20)
    dev, few = read_examples(task, "valid"), read_examples(task, "train")
    everything = read_examples(Pairs(**keys), "train")
    assert len(few) == 20
    assert set(few) < set(everything)
    assert len(dev) + len(everything) == 200
    assert [found.source for found in open_split(task, "valid").read()] == [example.source for example in dev]
