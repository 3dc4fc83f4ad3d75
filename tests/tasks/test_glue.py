"""GLUE: the published counts where the files are at hand, small files in the official form for the others."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from pipeline.job.labels import labels_of
from pipeline.job.task import Glue
from pipeline.tasks import hub
from pipeline.tasks.example import Dropped
from pipeline.tasks.open import content_keys, open_split, separator_text
from tests.tasks.reading import read_examples, refused, stub_hub

# Rows, and those of label 1 (RTE: not_entailment), of the files that the fixture has; None: withheld.
PUBLISHED = {
    ("cola", "train"): (8_551, 6_023),
    ("cola", "valid"): (1_043, 719),
    ("sst2", "train"): (67_349, 37_569),
    ("sst2", "valid"): (872, 444),
    ("sst2", "test"): (1_821, None),
    ("mrpc", "train"): (4_076, 2_753),
    ("mrpc", "test"): (1_725, 1_147),
    ("rte", "train"): (2_490, 1_241),
    ("rte", "valid"): (277, 131),
    ("rte", "test"): (3_000, None),
}

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 sentence2"
# The header of each official file, and its rows: those cells of the columns that are read.
OFFICIAL = {
    "cola": {
        "train": (None, ["gj04\t1\t\tThe inn is open.", "gj04\t0\t*\tInn the open is."]),
        "valid": (None, ["bc01\t1\t\tIt rains."]),
        "test": ("index sentence", ["0\tIt snows."]),
    },
    "sst2": {
        "train": ("sentence label", ["a warm inn \t1", "a cold inn \t0"]),
        "valid": ("sentence label", ["it 's fine . \t1"]),
        "test": ("index sentence", ["0\tdull"]),
    },
    "stsb": {
        "train": (
            "index genre filename year old_index source1 source2 sentence1 sentence2 score",
            ["0\tnews\ta\t2012\t1\tnone\tnone\tAn inn.\tA pub.\t3.800", "1\tnews\ta\t2012\t2\tnone\tnone\tAn inn.\tAn inn.\t5"],
        ),
        "valid": ("index genre sentence1 sentence2 score", ["0\tnews\tAn inn.\tA car.\t0.000"]),
        "test": ("index genre sentence1 sentence2", ["0\tnews\tAn inn.\tA bus."]),
    },
    "qqp": {
        "train": (
            "id qid1 qid2 question1 question2 is_duplicate",
            ['133\t1\t2\t"""What is an ""inn""?"\tWhat\'s an inn?\t1', "134\t3\t4\tWho?\tWhy?\t0"],
        ),
        "valid": ("id qid1 qid2 question1 question2 is_duplicate", ["1\t5\t6\tHow?\tHow so?\t1"]),
        "test": ("id question1 question2", ["0\tWhere?\tWhere to?"]),
    },
    "mnli": {
        "train": (
            f"{MNLI} label1 gold_label",
            [f"{n}\t1\t1n\ttravel\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains.\tIt is {n}.\t{label}\t{label}" for n, label in
             enumerate(("neutral", "entailment", "contradiction"))],
        ),
        "valid": (
            f"{MNLI} label1 label2 label3 label4 label5 gold_label",
            ["0\t1\t1n\tslate\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains.\tIt is wet." + "\tneutral" * 4 + "\tentailment\tneutral"],
        ),
        "test": (MNLI, ["0\t1\t1n\tslate\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains.\tIt is dry."]),
    },
    "qnli": {
        "train": ("index question sentence label", ["0\tWhen?\tAt four.\tentailment", "1\tWho?\tAt four.\tnot_entailment"]),
        "valid": ("index question sentence label", ["0\tWhere?\tAt four.\tnot_entailment"]),
        "test": ("index question sentence", ["0\tWhy?\tAt four."]),
    },
    "rte": {
        "train": ("index sentence1 sentence2 label", ["0\tIt rains.\tIt is wet.\tentailment", "1\tIt rains.\tIt is dry.\tnot_entailment"]),
        "valid": ("index sentence1 sentence2 label", ["0\tIt snows.\tIt is cold.\tentailment"]),
        "test": ("index sentence1 sentence2", ["0\tIt snows.\tIt is hot."]),
    },
}  # fmt: skip
# What these become: texts and the label's place or the score.
READ = {
    "cola": ([("The inn is open.", 1), ("Inn the open is.", 0)], [("It rains.", 1)], [("It snows.", None)]),
    "sst2": ([("a warm inn", 1), ("a cold inn", 0)], [("it 's fine .", 1)], [("dull", None)]),
    "stsb": ([("An inn.", "A pub.", 3.8), ("An inn.", "An inn.", 5)], [("An inn.", "A car.", 0)], [("An inn.", "A bus.", None)]),
    "qqp": (
        [('"""What is an ""inn""?"', "What's an inn?", 1), ("Who?", "Why?", 0)],
        [("How?", "How so?", 1)],
        [("Where?", "Where to?", None)],
    ),
    "mnli": (
        [("It rains.", "It is 0.", 1), ("It rains.", "It is 1.", 0), ("It rains.", "It is 2.", 2)],
        [("It rains.", "It is wet.", 1)],
        [("It rains.", "It is dry.", None)],
    ),
    "qnli": ([("When?", "At four.", 0), ("Who?", "At four.", 1)], [("Where?", "At four.", 1)], [("Why?", "At four.", None)]),
    "rte": (
        [("It rains.", "It is wet.", 0), ("It rains.", "It is dry.", 1)],
        [("It snows.", "It is cold.", 0)],
        [("It snows.", "It is hot.", None)],
    ),
}
FILES = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def task(name, folder, **keys):
    return Glue(kind="glue", name=name, data=str(folder), **keys)


def write(folder, name, split, rows=None):
    """An official file, whole or with other rows."""
    header, official = OFFICIAL[name][split]
    file = FILES[split].replace(".", "_matched.") if name == "mnli" and split != "train" else FILES[split]
    lines = ([] if header is None else ["\t".join(header.split())]) + (official if rows is None else rows)
    (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / file


def found(examples):
    return [(*example.texts, example.label) for example in examples]


@pytest.mark.parametrize(("name", "split"), PUBLISHED)
def test_the_published_rows_are_read_whole(shared_data, name, split):
    rows, ones = PUBLISHED[name, split]
    labels = Counter(example.label for example in read_examples(task(name, shared_data / "glue"), split))
    assert labels == ({None: rows} if ones is None else {0.0: rows - ones, 1.0: ones})


@pytest.mark.parametrize(("split", "rows"), [("train", 5_749), ("valid", 1_500), ("test", 1_379)])
def test_the_published_rows_of_stsb_have_the_benchmarks_own_texts_and_scores(shared_data, split, rows):
    """Against the STS benchmark's files, which GLUE's were made from."""
    folder = shared_data / "glue" / "STS-B"
    examples = read_examples(task("stsb", folder), split)
    assert len(examples) == rows
    own = (folder / f"sts-{FILES[split].removesuffix('.tsv')}.original.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
    cells = [line.split("\t") for line in own]
    assert [example.texts for example in examples] == [(row[5].strip(), row[6].strip()) for row in cells]
    assert [example.label for example in examples] == [None if split == "test" else float(row[4]) for row in cells]


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("folder", ["", "GLUE"])
def test_official_files_are_read(tmp_path, name, folder):
    """From the task's own folder, or from the one that holds all tasks'."""
    names = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
    place = tmp_path / (names.get(name, name.upper()) if folder else "")
    place.mkdir(exist_ok=True)
    for split, expected in zip(FILES, READ[name], strict=True):
        file = write(place, name, split)
        examples = read_examples(task(name, tmp_path), split)
        assert found(examples) == expected
        assert examples[0].source == f"{file}:{1 if name == 'cola' and split != 'test' else 2}"


def test_texts_are_those_of_python_s_csv_without_quoting(shared_data):
    """As the hub's copy was made. MRPC's have quotation marks, some of them open."""
    with (shared_data / "glue" / "MRPC" / "msr_paraphrase_train.txt").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert sum(row["#1 String"].count('"') % 2 for row in rows) > 10
    examples = read_examples(task("mrpc", shared_data / "glue"), "train")
    assert [example.texts for example in examples] == [(row["#1 String"].strip(), row["#2 String"].strip()) for row in rows]


def test_windows_line_ends_marks_and_blank_lines_do_no_harm(tmp_path):
    file = write(tmp_path, "rte", "train")
    text = file.read_text().replace("\n", "\r\n") + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert found(read_examples(task("rte", tmp_path), "train")) == READ["rte"][0]


def test_cola_s_own_release_gives_glue_s_splits(tmp_path):
    """Its development set is in two files."""
    (tmp_path / "in_domain_train.tsv").write_text("a\t1\t\tOne.\n")
    (tmp_path / "in_domain_dev.tsv").write_text("a\t0\t*\tTwo.\n")
    with pytest.raises(Exception, match=r"no CoLA valid file. Put out_of_domain_dev.tsv there"):
        open_split(task("cola", tmp_path), "valid")
    (tmp_path / "out_of_domain_dev.tsv").write_text("b\t1\t\tThree.")
    assert found(read_examples(task("cola", tmp_path), "train")) == [("One.", 1)]
    assert found(read_examples(task("cola", tmp_path), "valid")) == [("Two.", 0), ("Three.", 1)]


def mrpc(folder, *ids):
    rows = "".join(f"{n % 2}\t{n}\t{n + 10}\tFirst {n}.\tSecond {n}.\n" for n in range(5))
    (folder / "msr_paraphrase_train.txt").write_text("\ufeff" + MRPC + rows, encoding="utf-8")
    (folder / "msr_paraphrase_test.txt").write_text("\ufeff" + MRPC + "1\t8\t9\tA.\tB.\n", encoding="utf-8")
    if ids:
        (folder / "dev_ids.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in ids))


def test_mrpc_without_glue_s_list_is_its_own_training_and_test_split(tmp_path):
    mrpc(tmp_path)
    assert found(read_examples(task("mrpc", tmp_path), "train")) == [(f"First {n}.", f"Second {n}.", n % 2) for n in range(5)]
    assert found(read_examples(task("mrpc", tmp_path), "test")) == [("A.", "B.", 1)]
    with pytest.raises(Exception, match=r"no MRPC valid file. Put dev.tsv or dev_ids.tsv there"):
        open_split(task("mrpc", tmp_path), "valid")


def test_glue_s_list_parts_mrpc_s_training_file(tmp_path):
    mrpc(tmp_path, (3, 13), (0, 10))
    train, valid = (open_split(task("mrpc", tmp_path), split) for split in ("train", "valid"))
    assert [example.texts[0] for example in train.read()] == ["First 1.", "First 2.", "First 4."]
    assert [example.texts[0] for example in valid.read()] == ["First 0.", "First 3."]
    assert train.files == valid.files == (tmp_path / "msr_paraphrase_train.txt", tmp_path / "dev_ids.tsv")


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (((3, 13), (3, 10)), "dev_ids.tsv: 1 of its 2 pairs are not in"),
        (((3, 13), ("", 5)), "dev_ids.tsv:2: 1 ids, expected those of a pair"),
    ],
)
def test_a_list_that_is_not_of_this_file_is_named(tmp_path, ids, part):
    mrpc(tmp_path, *ids)
    assert part in refused(task("mrpc", tmp_path), "valid")


def test_mrpc_as_glue_s_script_leaves_it_is_read_from_the_parts(tmp_path):
    """The script leaves MSR's files there. Its own dev split is not among the training examples."""
    mrpc(tmp_path)
    (tmp_path / "dev.tsv").write_text(MRPC + "1\t3\t13\tFirst 3.\tSecond 3.\n")
    with pytest.raises(Exception, match=r"no MRPC train file. Put train.tsv there"):
        open_split(task("mrpc", tmp_path), "train")
    (tmp_path / "train.tsv").write_text(MRPC + "0\t2\t12\tFirst 2.\tSecond 2.\n")
    (tmp_path / "test.tsv").write_text("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t8\t9\tA.\tB.\n")
    splits = [found(read_examples(task("mrpc", tmp_path), split)) for split in FILES]
    assert splits == [[("First 2.", "Second 2.", 0)], [("First 3.", "Second 3.", 1)], [("A.", "B.", 1)]]
    (tmp_path / "msr_paraphrase_test.txt").unlink()
    assert found(read_examples(task("mrpc", tmp_path), "test")) == [("A.", "B.", None)]


def test_mnli_s_sections_are_chosen_and_joined(tmp_path):
    for split in ("valid", "test"):
        matched = write(tmp_path, "mnli", split)
        matched.with_name(matched.name.replace("_matched", "_mismatched")).write_text(matched.read_text().replace("rains", "snows"))
        expected = {"matched": ["It rains."], "mismatched": ["It snows."], "both": ["It rains.", "It snows."]}
        for section, texts in expected.items():
            assert [e.texts[0] for e in read_examples(task("mnli", tmp_path, section=section), split)] == texts
    assert [e.texts[0] for e in read_examples(task("mnli", tmp_path), "valid")] == ["It rains."]


def test_only_mnli_has_sections(tmp_path):
    with pytest.raises(ValueError, match='"both": rte has no sections'):
        task("rte", tmp_path, section="both")


def test_small_draws_of_mnli_are_seeded_and_part_of_larger_ones(tmp_path):
    """The paper's MNLI-n."""
    first, *_ = OFFICIAL["mnli"]["train"][1]
    write(tmp_path, "mnli", "train", [first.replace("It is 0.", f"It is {n}.") for n in range(400)])
    write(tmp_path, "mnli", "valid")

    def draw(count, seed=1):
        source = open_split(task("mnli", tmp_path, train_examples=count, train_examples_seed=seed), "train")
        return [int(example.texts[1].removeprefix("It is ").removesuffix(".")) for example in source.read()]

    small, large = draw(20), draw(100)
    assert (len(small), len(large)) == (20, 100)
    assert small == sorted(small)
    assert set(small) < set(large)
    assert draw(20) == small
    assert set(draw(20, seed=2)) != set(small)
    assert draw(400) == list(range(400))
    assert len(read_examples(task("mnli", tmp_path, train_examples=20), "valid")) == 1


def test_the_cache_of_tokens_tells_glue_s_tasks_apart():
    keys = [repr(content_keys(Glue(kind="glue", name=name))) for name in OFFICIAL]
    assert len(set(keys)) == len(keys)


HUB = {
    "cola": {"sentence": "It rains.", "label": 1, "idx": 0},
    "mrpc": {"sentence1": "A.", "sentence2": "B. ", "label": 1, "idx": 0},
    "stsb": {"sentence1": "A.", "sentence2": "B.", "label": 4.75, "idx": 0},
    "qqp": {"question1": "A?", "question2": "B?", "label": 0, "idx": 0},
    "mnli": {"premise": "A.", "hypothesis": "B.", "label": 2, "idx": 0},
    "qnli": {"question": "A?", "sentence": "B.", "label": 1, "idx": 0},
}


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_copy_is_read(monkeypatch, name):
    row = HUB[name]
    asked = stub_hub(monkeypatch, [row])
    texts = tuple(str(value).strip() for key, value in row.items() if key not in ("label", "idx"))
    hub = Glue(kind="glue", name=name)
    assert found(read_examples(hub, "train")) == [(*texts, float(row["label"]))]
    assert asked == {
        "name": "nyu-mll/glue", "revision": "refs/convert/parquet", "split": "train", "data_files": {"train": f"{name}/train/*.parquet"}
    }  # fmt: skip
    stub_hub(monkeypatch, [{**row, "label": -1}])
    assert found(read_examples(hub, "test")) == [(*texts, None)]


def test_the_hubs_sections_of_mnli_are_read_one_after_the_other(monkeypatch):
    import datasets

    def load(name, split, **kwargs):
        return datasets.Dataset.from_list([{**HUB["mnli"], "premise": split}])

    monkeypatch.setattr(hub, "load", load)
    examples = read_examples(Glue(kind="glue", name="mnli", section="both"), "valid")
    assert [example.texts[0] for example in examples] == ["validation_matched", "validation_mismatched"]


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"label": -1}, 'nyu-mll/glue/train:1: "-1" is not a label of mnli'),
        ({"label": 3}, '"3" is not a label of mnli'),
        ({"premise": " "}, "a text is empty"),
        ({"premise": None}, "a text is empty"),
        ({"label": None}, '"None" is not a label of mnli'),
    ],
)
def test_a_row_of_the_hubs_copy_that_cannot_be_used_is_named(monkeypatch, changed, part):
    stub_hub(monkeypatch, [{**HUB["mnli"], **changed}])
    assert part in refused(Glue(kind="glue", name="mnli"))


BAD = {
    "a short row": ("qqp", ["5\tWhat is"], "2 columns, expected 6 (id, qid1,"),
    "a long row": ("qnli", ["0\tWhen?\tAt\tfour.\tentailment"], "5 columns, expected 4"),
    "an empty text": ("qqp", ["5\t1\t2\tHow can I create an Android app?\t\t0"], "a text is empty"),
    "blanks for a text": ("sst2", [" \t1"], "a text is empty"),
    "an unknown label": ("sst2", ["fine\t2"], '"2" is not a label of sst2 (0 negative, 1 positive)'),
    "a label without gold": ("mnli", ["\t".join("abcdefghijk") + "\t-"], '"-" is not a label of mnli (entailment, neutral, contradiction)'),
    "a name where a place is": ("qqp", ["5\t1\t2\tA?\tB?\tduplicate"], '"duplicate" is not a label of qqp'),
    "a place where a name is": ("rte", ["0\tA.\tB.\t1"], '"1" is not a label of rte'),
    "a score above 5": ("stsb", ["0\tn\ta\t1\t1\tn\tn\tA.\tB.\t5.1"], 'the score is not a number from 0 to 5 ("5.1")'),
    "a score below 0": ("stsb", ["0\tn\ta\t1\t1\tn\tn\tA.\tB.\t-1"], "the score is not a number from 0 to 5"),
    "no score": ("stsb", ["0\tn\ta\t1\t1\tn\tn\tA.\tB.\tnan"], "the score is not a number from 0 to 5"),
    "a word for a score": ("stsb", ["0\tn\ta\t1\t1\tn\tn\tA.\tB.\thigh"], "the score is not a number from 0 to 5"),
    "cola with a header": ("cola", ["source\tlabel\tstar\tsentence"], '"label" is not a label of cola (0 unacceptable, 1 acceptable)'),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_row_that_cannot_be_used_is_named_or_left_out_and_counted(tmp_path, fault):
    name, rows, part = BAD[fault]
    official = OFFICIAL[name]["train"][1]
    file = write(tmp_path, name, "train", [*official, *rows])
    line = len(official) + (2 if name != "cola" else 1)
    message = refused(task(name, tmp_path))
    assert message.startswith(f"{file}:{line}: {part}")
    assert 'task.bad_rows = "drop"' in message
    *good, left = open_split(task(name, tmp_path, bad_rows="drop"), "train").read()
    assert found(good) == READ[name][0]
    assert isinstance(left, Dropped)
    assert left.source == f"{file}:{line}"


def test_rows_with_the_same_fault_are_counted_together(tmp_path):
    """QQP's first release: questions with line ends in them, which make two torn rows each."""
    write(tmp_path, "qqp", "train", ["1\t2\t3\tWhat is", "an inn?\tWhat\t1", "4\t5\t6\tWho is", "he?\tWhy\t0", "7\t8\t9\tA?\tB?\t0"])
    *left, kept = open_split(task("qqp", tmp_path, bad_rows="drop"), "train").read()
    assert Counter(row.reason for row in left) == {"4 columns, expected 6": 2, "3 columns, expected 6": 2}
    assert kept.texts == ("A?", "B?")


def test_a_byte_that_is_not_utf8_spoils_its_row_only(tmp_path):
    file = write(tmp_path, "sst2", "train")
    file.write_bytes(file.read_bytes() + "a café \t1\n".encode("latin-1"))
    assert refused(task("sst2", tmp_path)).startswith(f"{file}:4: not UTF-8 text (byte 0xe9 at column 6)")
    *good, left = open_split(task("sst2", tmp_path, bad_rows="drop"), "train").read()
    assert (len(good), left.reason) == (2, "not UTF-8 text")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("sentence", 'the header does not name "label" once (sentence)'),
        ("sentence label label", 'the header does not name "label" once'),
        ("review label", 'the header does not name "sentence" once'),
        ("", 'the header does not name "sentence" once ()'),
    ],
)
def test_another_header_is_named_whatever_is_left_out(tmp_path, header, part):
    (tmp_path / "train.tsv").write_text("\t".join(header.split()) + "\nfine\t1\n")
    for bad_rows in ("refuse", "drop"):
        message = refused(task("sst2", tmp_path, bad_rows=bad_rows))
        assert message.startswith(f"{tmp_path}/train.tsv:1: {part}")
        assert "SST-2's official file" in message


def test_another_task_s_folder_is_named(tmp_path):
    write(tmp_path, "rte", "train")
    assert 'the header does not name "question" once (index, sentence1, sentence2, label)' in refused(task("qnli", tmp_path))


def test_a_split_without_its_file_is_told_its_name(tmp_path):
    assert refused(task("mnli", tmp_path, section="both"), "valid") == f"{tmp_path}: no MNLI valid file. Put dev_matched.tsv there."
    assert "Name the folder that holds train.tsv" in refused(task("rte", write(tmp_path, "rte", "train")))


def test_labels_as_text_are_prompts_and_words(tmp_path):
    header = "index\tpromptID\tpairID\tgenre\ta\tb\tc\td\tsentence1\tsentence2\tlabel1\tgold_label"
    rows = [f"{n}\tx\tx\tx\tx\tx\tx\tx\tA pub {n} .\tA cafe .\tx\t{label}" for n, label in enumerate(("neutral", "entailment"))]
    (tmp_path / "train.tsv").write_text("\n".join([header, *rows]) + "\n")
    task = Glue(kind="glue", name="mnli", form="text", data=str(tmp_path))
    assert [(e.prompt, e.completion) for e in read_examples(task, "train")] == [
        ("premise: A pub 0 .\nhypothesis: A cafe .", " neutral"),
        ("premise: A pub 1 .\nhypothesis: A cafe .", " entailment"),
    ]
    assert separator_text(task, "") == "\nanswer:"
    assert labels_of(task) == ()


def test_withheld_labels_cannot_be_generated(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    task = Glue(kind="glue", name="rte", form="text", data=str(tmp_path))
    assert "test.tsv:2: labels of this split are withheld" in refused(task, "test")


def test_scores_are_no_words():
    with pytest.raises(ValueError, match="stsb has scores"):
        Glue(kind="glue", name="stsb", form="text")
