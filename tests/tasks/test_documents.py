"""Plain text: what a document is, long ones in pieces that change no token, and blocks that together are all of the text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pipeline.job.errors import JobError
from pipeline.job.task import PlainText
from pipeline.tasks import documents as documents_file
from pipeline.tasks import encode as encode_file
from pipeline.tasks.documents import documents
from pipeline.tasks.example import Document
from pipeline.tasks.tokens import Tokens
from tests.bases import make_tokenizer
from tests.tasks.making import encoder
from tests.tasks.reading import read_examples
from tests.tasks.test_tokens import give_lead

LINES = [
    "The Blue Spice is here .",
    "  indented",
    "\tx = [1, 2]",
    "",
    "   ",
    '"Quoted," he said...',
    "don't",
    "日本語 テキスト",
    "a  b   c",
    "/end",
    "# 12 34",
]


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(tmp_path)
    return tmp_path


def make_sentencepiece(folder):
    """As Llama 2's: a blank before every text, blanks are marked, no words, bytes where there is no letter."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "he",
        "▁the",
        "▁▁",
    ]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def write(folder, text, name="train.txt"):
    (folder / name).write_bytes(text.encode())
    return folder / name


def texts(file, document):
    return [(d.text, int(d.source.rpartition(":")[2])) for d in documents(file, document)]


def random_text(seed, end="\n"):
    rng = random.Random(seed)
    return "".join(rng.choice(LINES) + rng.choice([end, end, end + end, " " + end]) for _ in range(300))


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ("line", [("a ", 2), (" b", 3), ("c", 6), ("d", 8)]),
        ("paragraph", [("a \n b", 2), ("c", 6), ("d", 8)]),
        ("file", [("\na \n b\n\n  \nc\n\nd", 1)]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_document_is_a_file_a_paragraph_or_a_line(tmp_path, document, wanted, end):
    file = write(tmp_path, "\na \n b\n\n  \nc\n\nd\n\n".replace("\n", end))
    assert texts(file, document) == [(text.replace("\n", end), line) for text, line in wanted]


def test_each_file_of_a_folder_is_a_document(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("b.txt", "a.txt", "c.txt"):
        write(tmp_path / "train", "" if name == "b.txt" else name, name)
    assert [d.text for d in read_examples(PlainText(kind="text", data=str(tmp_path)), "train")] == ["a.txt", "c.txt"]


def test_a_byte_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\nb\xff\n")
    with pytest.raises(JobError, match=r"a\.txt:2: not UTF-8 text"):
        list(documents(tmp_path / "a.txt", "file"))


@pytest.mark.parametrize("kind", ["tests", "gpt2", "sentencepiece", "lead"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_document_in_pieces_has_the_tokens_that_it_has_in_one(folder, kind, end, monkeypatch, request):
    if kind == "gpt2":
        folder = request.getfixturevalue("shared_data") / "gpt2_tokenizer"
    elif kind == "sentencepiece":
        make_sentencepiece(folder)
    elif kind == "lead":
        give_lead(folder, "<s> $A", "<s>")
    made = encoder(folder, block_tokens=50)
    data = request.getfixturevalue("tmp_path_factory").mktemp("data")
    for seed in range(10):
        file = write(data, random_text(seed, end))
        (whole,) = documents(file, "file")
        with monkeypatch.context() as small:
            small.setattr(documents_file, "_PIECE_CHARACTERS", 40)
            small.setattr(encode_file, "_BATCH_CHARACTERS", 100)
            pieces = list(documents(file, "file"))
            in_pieces = [ids for sequence, _ in made.sequences(pieces) for ids in sequence.tokens]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [piece.continued for piece in pieces] == [False] + [True] * (len(pieces) - 1)
        assert len(pieces) > 40
        assert in_pieces == [ids for sequence, _ in made.sequences([whole]) for ids in sequence.tokens]


def test_a_piece_is_named_by_its_line_and_text_without_words_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_file, "_PIECE_CHARACTERS", 10)
    text = "".join(f"line {chr(97 + number)} has words\n" for number in range(20))
    file = write(tmp_path, text)
    before = ""
    for piece in documents(file, "file"):
        assert piece.source == f"{file}:{1 + before.count(chr(10))}"
        before += piece.text
    assert before == text.rstrip("\n")
    (whole,) = documents(write(tmp_path, "1234567890\n" * 1000), "file")
    assert whole.text == ("1234567890\n" * 1000).rstrip("\n")


@pytest.mark.parametrize("block", [2, 7, 64, 10_000])
@pytest.mark.parametrize("lead", [False, True])
def test_all_blocks_together_are_all_documents_with_an_end_token_after_each(folder, block, lead, monkeypatch):
    monkeypatch.setattr(encode_file, "_BATCH_CHARACTERS", 100)
    if lead:
        give_lead(folder, "<s> $A", "<s>")
    tokens = Tokens(folder)
    rng = random.Random(0)
    found = [Document(" ".join(rng.choices(LINES, k=rng.randrange(1, 9))), f"{number}.txt:1") for number in range(60)]
    wanted, owners = [], []
    for document in found:
        ids = [*tokens.lead, *tokens.ids([document.text])[0], tokens.end_id]
        wanted += ids
        owners += [document.source] * len(ids)
    made = list(encoder(folder, block_tokens=block).sequences(found))
    together = [token for sequence, _ in made for token in sequence.tokens]
    assert together == wanted[: len(together)]
    assert len(wanted) - len(together) == (len(wanted) % block == 1)
    assert {len(sequence) for sequence, _ in made[:-1]} <= {block}
    assert all(sequence.spans == ((1, len(sequence)),) for sequence, _ in made)
    assert [source for _, source in made] == owners[: len(together) : block]


def test_a_separator_has_no_place_in_running_text():
    with pytest.raises(ValueError, match="Leave the key out"):
        PlainText(kind="text", data="x", separator="")
