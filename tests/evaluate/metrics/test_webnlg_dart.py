"""WebNLG's and DART's metrics against the challenge's own logs, and the paper's script against its definition."""

from __future__ import annotations

import random
import re

import pytest

from pipeline.evaluate.metrics.choose import metrics_of, padded
from pipeline.evaluate.metrics.mteval import bleu
from pipeline.evaluate.metrics.ter import ter_pyter, ter_tercom


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    """METEOR costs seconds a call."""
    monkeypatch.setenv("PATH", str(tmp_path))


TEAMS = ["UPF-TALN", "Tilburg_University-1", "Tilburg_University-3", "Baseline"]


def read(shared_data, team, part):
    folder = shared_data / "webnlg_systems"
    texts = (folder / "teams" / f"{team}_{part}-cat.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    files = [(folder / "references" / f"gold-{part}-cat-reference{n}.lex").read_text(encoding="utf-8").split("\n") for n in range(3)]
    groups = [[line for line in group if line.strip()] for group in zip(*(lines[: len(texts)] for lines in files), strict=True)]
    return texts, groups


def logged(shared_data, name, pattern):
    return re.search(pattern, (shared_data / "webnlg_systems" / "eval" / name).read_text())[1]


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize(("part", "count"), [("all", 1862), ("old", 971), ("new", 891)])
def test_bleu_is_the_challenge_s(team, part, count, shared_data):
    texts, groups = read(shared_data, team, part)
    assert len(texts) == count
    official = logged(shared_data, f"bleu3ref-{team}_{part}-cat.txt", r"BLEU = ([\d.]+)")
    assert f"{bleu(texts, padded(groups), 'none', lowercase=True, smooth=False):.2f}" == official


@pytest.mark.parametrize(("team", "part"), [*((team, "new") for team in TEAMS), ("Baseline", "old")])
def test_ter_is_the_challenge_s(team, part, shared_data):
    official = logged(shared_data, f"ter3ref-{team}-{part}-cat.txt", r"Total TER: ([\d.]+)")
    assert ter_tercom(*read(shared_data, team, part)) == pytest.approx(float(official), abs=1e-12)


def naive_rate(words, other):
    """pyter's definition: the best shift until none helps; ties go to the text that sorts last."""

    def distance(text):
        row = list(range(len(other) + 1))
        for n, word in enumerate(text, 1):
            row, before = [n], row
            for place, same in enumerate(other):
                row.append(min(before[place + 1] + 1, row[place] + 1, before[place] + (word != same)))
        return row[-1]

    shifts = 0
    while True:
        moves = []
        for i in range(len(words)):
            for j in range(len(other)):
                length = 0
                while i + length < len(words) and j + length < len(other) and words[i + length] == other[j + length]:
                    length += 1
                if length and i != j:
                    rest = words[:i] + words[i + length :]
                    rest[j:j] = words[i : i + length]
                    moves.append((distance(words) - distance(rest), rest))
        gain, moved = max(moves, default=(0, words))
        if gain <= 0:
            return (shifts + distance(words)) / len(other)
        shifts, words = shifts + 1, moved


def test_the_paper_s_ter_is_its_definition():
    draw = random.Random(1)
    for _ in range(150):
        text, other = ([draw.choice("abcdef") for _ in range(draw.randint(low, 12))] for low in (0, 1))
        assert ter_pyter([" ".join(text)], [[" ".join(other)]]) == pytest.approx(naive_rate(text, other))


def test_pyter_s_own_example():
    text = "THIS WEEK THE SAUDIS denied information published in the new york times"
    other = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    assert f"{ter_pyter([text], [[other]]):.3f}" == "0.308"


def test_the_paper_s_script_lower_cases_tokenises_and_takes_six_references(no_java):
    texts = ["The Eagle is near Burger-King, isn't it?"]
    metrics, _ = metrics_of("webnlg", texts, [["the eagle is near burger - king , isn ' t it ?"]])
    assert metrics["BLEU"] == pytest.approx(100)
    assert metrics["TER"] == 0
    many = [["something else"] * 6 + ["the eagle is near burger-king, isn't it?"]]
    assert metrics_of("dart", texts, many)[0]["TER"] > 0.5


def test_filling_up_references_changes_nothing(no_java):
    texts, groups = ["a b c d e", "f g h i"], [["a b c d f"], ["f g h", "f g i h"]]
    filled = [group + [group[0]] * (6 - len(group)) for group in groups]
    assert metrics_of("webnlg", texts, groups)[0] == pytest.approx(metrics_of("webnlg", texts, filled)[0])


def test_bleu_is_the_published_one_on_dart(shared_data):
    folder = shared_data / "dart" / "upstream_head"
    texts = (folder / "bart-large_dart.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    files = [(folder / f"all-delex-reference{n}.lex").read_text(encoding="utf-8").split("\n") for n in range(3)]
    groups = [[line for line in group if line.strip()] for group in zip(*(lines[: len(texts)] for lines in files), strict=True)]
    assert len(texts) == len(groups) == 5097
    assert f"{bleu(texts, padded(groups), 'none', lowercase=False, smooth=False):.2f}" == "48.56"


def test_tercom_counts_shifts_once_and_takes_the_nearest_reference():
    assert ter_tercom(["b a c d"], [["a b c d"]]) == pytest.approx(0.25)
    assert ter_tercom(["a b c d"], [["x y", "a b c d e f"]]) == pytest.approx(2 / 4)


def test_tercom_s_beam_gives_up_ways_far_from_the_diagonal():
    """The one word kept, far behind the others: with 22 words before it tercom no longer sees it (it would be 23 edits)."""
    for count, edits in [(21, 22), (22, 25)]:
        assert ter_tercom(["a b"], [[" ".join([f"w{n}" for n in range(count)] + ["a b c"])]]) == pytest.approx(edits / (count + 3))
