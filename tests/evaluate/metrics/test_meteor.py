"""METEOR of ten systems of E2E and three of WebNLG against the official figures, in one run of the program."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.evaluate.metrics.meteor import arguments, find_jar
from pipeline.evaluate.metrics.ptb import words
from tests.evaluate.metrics.test_e2e import SYSTEMS, all_references, official_scores, outputs
from tests.evaluate.metrics.test_webnlg_dart import TEAMS, logged, read

LOGGED = [team for team in TEAMS if team != "Baseline"]


def stanford(text):
    return " ".join(words(text))


def final_score(rows):
    """METEOR 1.5 of the sums of all texts' statistics (Denkowski and Lavie 2014, section 3.1, and its English parameters)."""
    # A text that is its reference is in no pieces: columns are both lengths, ..., chunks, and the words of both that have a partner.
    rows = [[*row[:-3], 0 if row[-3] == 1 and row[:2] == row[-2:] else row[-3], *row[-2:]] for row in rows]
    length, length_other, function, function_other, *stages, chunks, matched, matched_other = map(sum, zip(*rows, strict=True))

    def share(content, of_function, length, function):
        weighed = sum(w * (0.75 * c + 0.25 * f) for w, c, f in zip((1.0, 0.6, 0.8, 0.6), content, of_function, strict=True))
        return weighed / (0.75 * (length - function) + 0.25 * function)

    precision = share(stages[0::4], stages[2::4], length, function)
    recall = share(stages[1::4], stages[3::4], length_other, function_other)
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    return mean * (1 - 0.6 * (chunks / ((matched + matched_other) / 2)) ** 0.2)


@pytest.fixture(scope="module")
def scores(shared_data, tmp_path_factory):
    """Loading its tables is most of what a small run of the program costs, so all texts go in one."""
    if (java := shutil.which("java")) is None or (jar := find_jar()) is None:
        pytest.skip("METEOR needs java and the extra zlora[meteor]")
    references = [[stanford(text) for text in group] for group in all_references(shared_data)]
    sets = {system: ([stanford(text) for text in outputs(shared_data, system)], references) for system in SYSTEMS}
    sets |= {(team, part): read(shared_data, team, part) for team in LOGGED for part in ("old", "new")}
    texts, groups = ([item for pair in sets.values() for item in pair[n]] for n in (0, 1))
    call = arguments(tmp_path_factory.mktemp("meteor"), texts, groups)
    done = subprocess.run(
        [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), *call, "-ssOut"], capture_output=True, text=True, check=True
    )
    rows = iter([float(number) for number in line.split()] for line in done.stdout.splitlines())
    found = {name: [next(rows) for _ in pair[0]] for name, pair in sets.items()}
    assert next(rows, None) is None
    found |= {(team, "all"): found[team, "old"] + found[team, "new"] for team in LOGGED} | {"first": found["tr1"][:40]}
    return {name: final_score(own) for name, own in found.items()}


def test_the_task_s_metric_is_the_program_s_score_and_all_come_together(scores, shared_data):
    metrics, notes = metrics_of("e2e", outputs(shared_data, "tr1")[:40], all_references(shared_data)[:40])
    assert list(metrics) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert notes == []
    assert metrics["METEOR"] == pytest.approx(scores["first"], abs=1e-12)


def test_all_e2e_systems_have_the_official_score(scores, shared_data):
    official = official_scores(shared_data)
    assert {system: f"{scores[system]:.4f}" for system in SYSTEMS} == {system: official[system]["METEOR"] for system in SYSTEMS}


@pytest.mark.parametrize("part", ["all", "old", "new"])
def test_all_webnlg_systems_have_the_logged_score(part, scores, shared_data):
    for team in LOGGED:
        official = float(logged(shared_data, f"meteor-{team}-{part}-cat.txt", r"Final score:\s+(\S+)"))
        assert scores[team, part] == pytest.approx(official, abs=1e-12)
