"""The cache of tokens: what it holds, when it is read, made again or made by one of many, and what a rank's memory pays for it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import Classification, Pairs, PlainText
from pipeline.tasks import store as store_file
from pipeline.tasks.example import Chat, Document, Labelled, Message, Pair, Reason, Source
from pipeline.tasks.open import content_keys, open_split
from pipeline.tasks.store import open_store
from tests.bases import make_tokenizer
from tests.ranks import forks
from tests.tasks.making import encoder

ROWS = [("a" * (1 + n % 9), "the Blue Spice " * (1 + n % 5)) for n in range(40)]
TEMPLATE = """{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
EXAMPLES = {
    "pairs": [Pair(p, c, f"a.jsonl:{n}") for n, (p, c) in enumerate(ROWS, 1)],
    "labelled": [Labelled((p, c), None if n % 7 == 0 else n / 3, f"a.jsonl:{n}") for n, (p, c) in enumerate(ROWS, 1)],
    "chats": [
        Chat((Message("user", p), Message("assistant", c), Message("user", c), Message("assistant", p)), f"a.jsonl:{n}")
        for n, (p, c) in enumerate(ROWS, 1)
    ],
    "documents": [Document(c, f"{'ab'[n // 20]}.txt:{n}") for n, (_, c) in enumerate(ROWS)],
}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; gives the folder of tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zlora" / "tokens"


def write_rows(file, rows=ROWS):
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "".join(json.dumps({"prompt": p, "completion": c, "note": p, "label": "yn"[n % 2]}) + "\n" for n, (p, c) in enumerate(rows))
    )
    return file


def opened(task, base, source=None, encode=None, block=16, progress=lambda places, total: places):
    made = encoder(base, task.separator or "", block_tokens=block)
    source = source or open_split(task, "train")
    return open_store(source, (content_keys(task), made.settings, "train"), encode or made.sequences, "the train split", progress)


def pairs(data, **keys):
    return Pairs(kind="jsonl", data=str(data), **keys)


def fails(*_):
    raise AssertionError("it was read or tokenised again")


def second_start(task, base):
    """Neither reads nor tokenises."""
    return opened(task, base, replace(open_split(task, "train"), read=fails), fails)


def sequences(store):
    return [store[index] for index in range(len(store))]


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("kind", EXAMPLES)
def test_what_is_read_is_what_was_tokenised(tmp_path, base, kind, monkeypatch):
    monkeypatch.setattr(store_file, "_BATCH_ROWS", 7)
    examples, made = EXAMPLES[kind], encoder(base, " =>" if kind == "pairs" else "", block_tokens=16)
    (tmp_path / "a").write_text("a\n" * 40)
    store = open_store(Source((tmp_path / "a",), lambda: iter(examples)), kind, made.sequences, "", lambda places, _: places)
    expected = list(made.sequences(examples))
    assert sequences(store) == [sequence for sequence, _ in expected]
    places = range(len(expected))
    assert [store.source(place) for place in places] == [source for _, source in expected]
    assert [store.tokens(place) for place in places] == [len(sequence) for sequence, _ in expected] == store.lengths().tolist()
    assert [store.targets(place) for place in places] == [sequence.targets for sequence, _ in expected]
    assert store.longest == store.about.longest == max(len(sequence) for sequence, _ in expected)
    assert store.about.total_tokens == sum(len(sequence) for sequence, _ in expected)
    assert store.about.total_targets == sum(sequence.targets for sequence, _ in expected)
    named = [source.rpartition(":")[0] for _, source in expected]
    assert [(file.file, file.examples) for file in store.about.files] == [(name, named.count(name)) for name in dict.fromkeys(named)]


def test_a_second_start_neither_reads_nor_tokenises(tmp_path, base):
    task = pairs(write_rows(tmp_path / "a.jsonl"))
    first = opened(task, base)
    assert sequences(second_start(task, base)) == sequences(first)
    assert second_start(task, base).about == first.about


CHANGES = {
    "separator": {"separator": " =>"},
    "column": {"prompt": "note"},
    "kind": None,
    "draw": {"train_examples": 40},
    "share": {"dev_fraction": 0.5},
    "bad rows": {"bad_rows": "drop"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_tokens_makes_other_tokens(tmp_path, base, cache, change):
    file = write_rows(tmp_path / "a.jsonl")
    opened(pairs(file), base)
    task = (
        pairs(file, **CHANGES[change])
        if CHANGES[change]
        else Classification(kind="classification", data=str(file), text="prompt", labels=("y", "n"))
    )
    with pytest.raises(AssertionError, match="again"):
        second_start(task, base)
    opened(task, base)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("changed", ["a row", "its format", "the tokenizer", "the block"])
def test_other_content_makes_other_tokens(tmp_path, base, changed):
    file = tmp_path / "a.txt"
    file.write_text("text\nthe river\n")
    task, block = PlainText(kind="text", data=str(file)), 16
    opened(task, base)
    match changed:
        case "a row":
            stat = file.stat()
            file.write_text("text\nthe rivers\n")
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "its format":
            task = PlainText(kind="text", data=str(file.rename(tmp_path / "a.csv")))
        case "the tokenizer":
            settings = json.loads((base / "tokenizer.json").read_text())
            settings["pre_tokenizer"]["add_prefix_space"] = True
            (base / "tokenizer.json").write_text(json.dumps(settings))
        case "the block":
            block = 3
    found = sequences(opened(task, base, block=block))
    assert found == [sequence for sequence, _ in encoder(base, block_tokens=block).sequences(open_split(task, "train").read())]


def test_names_and_settings_that_change_no_token_are_no_reason_to_tokenise(tmp_path, base):
    file = write_rows(tmp_path / "one" / "a.jsonl", [*ROWS, ("x", "")])
    first = opened(pairs(file, bad_rows="drop"), base)
    assert first.about.dropped == (Reason('"completion" is empty', 1, f"{file}:41"),)
    moved = tmp_path / "two" / "b.jsonl"
    moved.parent.mkdir()
    shutil.move(file, moved)
    later = second_start(pairs(moved, bad_rows="drop", title="t", weight=2.0, too_long="drop", valid="x", test="y"), base)
    assert later.source(3) == f"{moved}:4"
    assert [(f.file, f.sha256) for f in later.about.files] == [(str(moved), first.about.files[0].sha256)]
    assert later.about.dropped == (Reason('"completion" is empty', 1, f"{moved}:41"),)


def test_the_sum_of_a_file_is_of_its_examples_alone(tmp_path, base, monkeypatch):
    """So that resuming can say which file has changed."""

    def sums(first):
        folder = tmp_path / "train"
        write_rows(folder / "a.jsonl", ROWS[:first])
        write_rows(folder / "b.jsonl")
        return {Path(f.file).name: f.sha256 for f in opened(pairs(tmp_path), base).about.files}

    monkeypatch.setattr(store_file, "_BATCH_ROWS", 16)
    one, two = sums(10), sums(11)
    assert one["b.jsonl"] == two["b.jsonl"]
    assert one["a.jsonl"] != two["a.jsonl"]


def test_progress_is_in_lines_of_all_files(tmp_path, base, monkeypatch):
    monkeypatch.setattr(store_file, "_SAID_EVERY", 1)
    for name in ("a", "b"):
        write_rows(tmp_path / "train" / f"{name}.jsonl")
    said = []

    def progress(places, total):
        for place in places:
            said.append((place, total))
            yield place

    opened(pairs(tmp_path), base, progress=progress)
    assert said == [(place, 80) for place in range(1, 81)]


def test_an_error_on_the_way_leaves_nothing(tmp_path, base, cache):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{\n')
    with pytest.raises(JobError, match=r"a\.jsonl:2: not valid JSON"):
        opened(pairs(file), base)
    assert entries(cache) == []
    file.write_text("\n")
    with pytest.raises(JobError, match="the train split has no examples"):
        opened(pairs(file), base)
    assert entries(cache) == []


def write_slowly(cache: str, base: Path, file: Path, pause_s: float, pipe: Connection) -> None:
    """In a process of its own: says when it is in the middle, and how many sequences there are at the end."""
    os.environ["XDG_CACHE_HOME"] = cache

    def slow(examples):
        for number, found in enumerate(encoder(base, "").sequences(examples)):
            if number == 5:
                pipe.send("writing")
                time.sleep(pause_s)
            yield found

    pipe.send(len(opened(pairs(file), base, encode=slow)))


def writer_process(tmp_path, base, file, pause_s):
    here, there = forks().Pipe()
    process = forks().Process(target=write_slowly, args=(str(tmp_path / "cache"), base, file, pause_s, there), daemon=True)
    process.start()
    there.close()
    assert here.recv() == "writing"
    return process, here


def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_whole(tmp_path, base, cache):
    task = pairs(write_rows(tmp_path / "a.jsonl"))
    process, _ = writer_process(tmp_path, base, tmp_path / "a.jsonl", 60)
    process.kill()
    process.join()
    assert len(entries(cache)) == 2  # its lock and its half
    assert len(opened(task, base)) == 40
    assert len(entries(cache)) == 1
    second_start(task, base)


def test_of_two_processes_one_writes_and_the_other_waits_and_reads(tmp_path, base, cache):
    task = pairs(write_rows(tmp_path / "a.jsonl"))
    process, pipe = writer_process(tmp_path, base, tmp_path / "a.jsonl", 1)
    begin = time.monotonic()
    assert len(second_start(task, base)) == 40
    assert 0.3 < time.monotonic() - begin < 30
    assert pipe.recv() == 40
    process.join()
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "byte", "about", "keys"])
def test_tokens_that_are_damaged_are_made_again(tmp_path, base, cache, damage):
    task = pairs(write_rows(tmp_path / "a.jsonl"))
    first = sequences(opened(task, base))
    (folder,) = cache.iterdir()
    arrow, about = folder / "sequences.arrow", folder / "about.json"
    content = arrow.read_bytes()
    match damage:
        case "cut":
            arrow.write_bytes(content[: len(content) // 2])
        case "empty":
            arrow.write_bytes(b"")
        case "gone":
            arrow.unlink()
        case "byte":
            arrow.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
        case "about":
            about.write_text(about.read_text()[:100])
        case "keys":
            about.write_text("{}")
    assert sequences(opened(task, base)) == first
    assert sequences(second_start(task, base)) == first
    assert entries(cache) == [folder.name]


def read_only(monkeypatch):
    """The administrator may write anywhere, so a folder's mode alone does not show what others meet."""
    real = Path.open

    def refuse(self, mode="r", *rest, **others):
        if set(mode) & set("wax"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, *rest, **others)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: refuse(Path("x"), "w"))


def test_a_cache_that_can_only_be_read_is_read(tmp_path, base, monkeypatch):
    task, other = pairs(write_rows(tmp_path / "a.jsonl")), pairs(write_rows(tmp_path / "b.jsonl", ROWS[:9]))
    opened(task, base)
    (tmp_path / "cache" / "zlora" / "digests.json").unlink()
    read_only(monkeypatch)
    assert len(second_start(task, base)) == 40
    with pytest.raises(JobError, match=r"tokens: tokens cannot be kept here \(Read-only file system\)\. Set XDG_CACHE_HOME"):
        opened(other, base)


def test_a_cache_in_a_files_place_is_named(tmp_path, base):
    (tmp_path / "cache").write_text("")
    with pytest.raises(JobError, match="tokens cannot be kept here"):
        opened(pairs(write_rows(tmp_path / "a.jsonl")), base)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said_by_its_name(tmp_path, base, cache, monkeypatch):
    real = pa.OSFile
    monkeypatch.setattr(store_file.pa, "OSFile", lambda _, mode: real("/dev/full", mode))
    with pytest.raises(JobError) as caught:
        opened(pairs(write_rows(tmp_path / "a.jsonl")), base)
    assert str(caught.value).startswith(f"{cache}/")
    assert "No space left on device. Make room, or set XDG_CACHE_HOME to another folder." in str(caught.value)
    assert entries(cache) == []


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this kernel does not tell private memory")
def test_private_memory_does_not_grow_with_the_file(tmp_path, base):
    """As `benchmarks/data.py` measures it on a gigabyte."""
    root = Path(__file__).parents[2]
    text = " ".join(f"the Blue Spice {number}" for number in range(60))
    line = json.dumps({"prompt": text, "completion": text}) + "\n"

    def grown(step, size):
        file = tmp_path / f"{size}.jsonl"
        file.write_text(line * (size // len(line)))
        words = [sys.executable, str(root / "benchmarks" / "data_process.py"), "ours", step, str(file), str(base)]
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["private_bytes"]

    small, large = grown("build", 1_000_000), grown("build", 24_000_000)
    assert large < 80e6
    # As tuples the tokens alone are 55 MB more, as arrays 27 MB; what the allocator keeps varies by a few.
    assert large - small < 18e6
    assert grown("read", 24_000_000) < 60e6
