"""GLUE against scikit-learn and SciPy, ROUGE against rouge-score, WikiSQL on cases of the official format."""

from __future__ import annotations

import json
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as sklearn

from pipeline.evaluate.metrics import glue
from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.evaluate.metrics.rouge import rouge
from pipeline.evaluate.metrics.wikisql import logical_form
from pipeline.job.errors import JobError


@pytest.mark.parametrize("labels", ["01", "012"])
def test_accuracy_f1_and_matthews_are_scikit_learn_s(labels):
    draw = random.Random(2)
    for count in (5, 60):
        found, wanted = ([draw.choice(labels) for _ in range(count)] for _ in range(2))
        assert glue.accuracy(found, wanted) == pytest.approx(sklearn.accuracy_score(wanted, found))
        assert glue.matthews(found, wanted) == pytest.approx(sklearn.matthews_corrcoef(wanted, found))
        theirs = sklearn.f1_score(wanted, found, labels=["1"], average=None, zero_division=0)[0]
        assert glue.f1(found, wanted, "1") == pytest.approx(theirs)


def test_correlations_are_scipy_s():
    draw = random.Random(3)
    for count in (2, 3, 100):
        found, wanted = (
            [draw.random() * 1e6 for _ in range(count)],
            [draw.choice([0.0, 1.5, 2.0, 5.0]) + draw.random() / 9 for _ in range(count)],
        )
        assert glue.pearson(found, wanted) == pytest.approx(stats.pearsonr(found, wanted)[0])
        assert glue.spearman(found, wanted) == pytest.approx(stats.spearmanr(found, wanted)[0])
    tied, other = [1.0, 1.0, 2.0, 3.0, 3.0], [2.0, 1.0, 2.0, 2.0, 5.0]
    assert glue.spearman(tied, other) == pytest.approx(stats.spearmanr(tied, other)[0])
    assert glue.pearson([1.0, 1.0], [1.0, 2.0]) == 0


def test_each_glue_task_has_its_metrics():
    texts, groups = ["1", "0", "1"], [["1"], ["1"], ["1"]]
    assert set(metrics_of("cola", texts, groups)[0]) == {"matthews", "accuracy"}
    assert metrics_of("mrpc", texts, groups)[0] == pytest.approx({"accuracy": 2 / 3, "f1": 0.8})
    assert set(metrics_of("stsb", texts, groups)[0]) == {"pearson", "spearman"}
    for task in ("sst2", "mnli", "qnli", "rte"):
        assert metrics_of(task, texts, groups)[0] == pytest.approx({"accuracy": 2 / 3})
    for wrong in ("good", "1e400", "nan"):
        with pytest.raises(JobError, match=f'number 2 is "{wrong}", not a finite number'):
            metrics_of("stsb", ["1", wrong, "2"], groups)


ROUGE = [
    ("Amanda baked cookies and will bring Jerry some tomorrow.", ["Amanda will bring Jerry some of the cookies she baked."]),
    ("police killed the gunman", ["the gunman was killed by the police", "police kill the gunman"]),
    ("Ürün 5-star naïve café's running RUNS ran", ["running naive 5 star cafes run"]),
    ("", ["nothing was said"]),
    ("one", ["two"]),
]


def google_s(texts, groups):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score_multi(group, text) for text, group in zip(texts, groups, strict=True)]
    return {f"ROUGE_{key[-1]}": sum(row[key].fmeasure for row in rows) / len(rows) for key in ("rouge1", "rouge2", "rougeL")}


def test_rouge_is_google_s():
    for text, group in ROUGE:
        assert rouge([text], [group]) == pytest.approx(google_s([text], [group])), text


def test_rouge_is_google_s_on_samsum(shared_data):
    rows = [json.loads(line) for line in (shared_data / "samsum" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:100]]
    texts, groups = [row["dialogue"][:200] for row in rows], [[row["summary"]] for row in rows]
    assert metrics_of("samsum", texts, groups)[0] == pytest.approx(google_s(texts, groups))


REFERENCE = '{"sel": 1, "agg": 3, "conds": [[0, 0, "Rome"], [2, 1, 1990]]}'
SQL = "SELECT COUNT(City Name) FROM table WHERE Year > 1990 AND Country = 'It''s Italy'"


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        (REFERENCE, REFERENCE, 1),
        ('{"query": {"sel": 1, "agg": 3, "conds": [[2, 1, "1990"], [0, 0, "ROME"]]}}', REFERENCE, 1),
        (REFERENCE.replace("3", "0", 1), REFERENCE, 0),
        (REFERENCE.replace("Rome", "Roma"), REFERENCE, 0),
        ('{"sel": 1, "agg": 3, "conds": []}', REFERENCE, 0),
        ('{"error": "no idea"}', REFERENCE, 0),
        (f'{{"error": "no idea", "query": {REFERENCE}}}', REFERENCE, 0),
        ("SELECT", REFERENCE, 0),
        ("SELECT COUNT(col1) FROM table WHERE col2 > 1990 AND col0 = 'Rome'", REFERENCE, 1),
        (SQL, SQL, 1),
        ('select count(city name) from 1-100-1 where country = "It\'s Italy" and year > 1990;', SQL, 1),
        (SQL.replace(">", "<"), SQL, 0),
        ("SELECT City FROM table", "SELECT city FROM table", 1),
        ("SELECT City FROM table WHERE Name", "SELECT city FROM table", 0),
    ],
)
def test_logical_form_is_the_official_comparison(prediction, reference, right):
    assert logical_form([prediction], [reference]) == right


def test_a_reference_that_is_no_query_is_refused():
    with pytest.raises(JobError, match="number 2 is neither WikiSQL's JSON nor its SQL"):
        metrics_of("wikisql", [REFERENCE, REFERENCE], [[REFERENCE], ["SELEKT x"]])


def test_every_published_query_equals_itself(shared_data):
    rows = [json.loads(line) for line in (shared_data / "wikisql" / "mlx_subset" / "test.jsonl").read_text().splitlines()]
    queries = [row["text"].rpartition("\nA: ")[2].strip() for row in rows]
    assert len(queries) == 100
    assert logical_form(queries, queries) == 1
