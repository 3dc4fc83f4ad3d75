"""E2E's metrics against the official script's numbers on ten published systems, to the printed digit."""

from __future__ import annotations

import csv
import io

import pytest

from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.evaluate.metrics.cider import cider
from pipeline.evaluate.metrics.mteval import bleu, nist
from pipeline.evaluate.metrics.ptb import words
from pipeline.evaluate.metrics.rouge import rouge_l_coco

SYSTEMS = ["tgen", "tnt2", "gong", "tr1", "slug-alt", "sheff1", "zhaw2", "dangnt", "tuda", "forge1"]


def all_references(shared_data):
    groups: dict[str, list[str]] = {}
    with (shared_data / "e2e" / "testset_w_refs.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            groups.setdefault(row["mr"], []).append(row["ref"])
    assert len(groups) == 630
    return list(groups.values())


def official_scores(shared_data):
    text = (shared_data / "e2e_eval" / "official_scores.tsv").read_text()
    return {row.pop("system"): row for row in csv.DictReader(io.StringIO(text), delimiter="\t")}


@pytest.fixture(scope="module")
def references(shared_data):
    return all_references(shared_data)


@pytest.fixture(scope="module")
def words_of_references(references):
    return [[words(text) for text in group] for group in references]


@pytest.fixture(scope="module")
def official(shared_data):
    rows = official_scores(shared_data)
    assert sorted(rows) == sorted(SYSTEMS)
    return rows


def outputs(shared_data, system):
    lines = (shared_data / "e2e_eval" / "primary" / f"{system}.tsv").read_text(encoding="utf-8").split("\n")[1:]
    # Some systems wrapped their texts in quotation marks, which the official reader takes off.
    texts = [line.split("\t")[1].strip().strip("'\"").strip() for line in lines if line]
    assert len(texts) == 630
    return texts


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_but_meteor_is_the_official_script_s(system, shared_data, references, words_of_references, official):
    texts = outputs(shared_data, system)
    found = [words(text) for text in texts]
    ours = {
        "BLEU_mteval_v13a": bleu(texts, references, "13a", lowercase=True, smooth=True) / 100,
        "NIST_mteval_v13a": nist(texts, references, "mteval"),
        "NIST_pymteval(-p)": nist(texts, references, "pymteval"),
        "ROUGE_L": rouge_l_coco(found, words_of_references),
        "CIDEr": cider(found, words_of_references),
    }
    assert {name: f"{value:.4f}" for name, value in ours.items()} == {name: official[system][name] for name in ours}
    assert official[system]["BLEU_pymteval(-p)"] == official[system]["BLEU_mteval_v13a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eagle isn't cheap (£20-25).", "the eagle is n't cheap -lrb- # 20-25 -rrb-"),
        ("It's child-friendly; they'll say “yes”, rated 3/5...", "it 's child-friendly they 'll say yes rated 3/5"),
        ("You cannot eat in the city center., e.g. at St. James'", "you can not eat in the city center. e.g. at st. james"),
        ("R&B hors d'oeuvres cost $1,000.50 or 10% — [sic]", "r&b hors d'oeuvres cost $ 1,000.50 or 10 % -lsb- sic -rsb-"),
        ("", ""),
    ],
)
def test_words_are_stanford_s(text, expected):
    assert " ".join(words(text)) == expected


def test_an_empty_prediction_scores_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    references = [["a cheap pub", "a pub"], ["near the river"]]
    for script in ("mteval", "pymteval"):
        metrics, _ = metrics_of("e2e", ["", ""], references, script)
        assert set(metrics.values()) == {0.0}, script


def test_a_perfect_prediction_scores_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    texts = ["the eagle is a cheap pub near the river", "alimentum serves french food in the city centre"]
    metrics, _ = metrics_of("e2e", texts, [[text] for text in texts])
    assert metrics["BLEU"] == pytest.approx(1)
    assert metrics["ROUGE_L"] == pytest.approx(1)
    assert metrics["CIDEr"] == pytest.approx(10)
