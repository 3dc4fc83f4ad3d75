"""Which runs are one row, which count, and which is best."""

from __future__ import annotations

import statistics

import pytest

from pipeline.compare.collect import collect
from pipeline.compare.group import compare
from pipeline.compare.methods import family, method_name
from pipeline.job.errors import JobError
from tests.compare.folders import ADAPTER, LORA, ended_with, evaluated, spread_of, write_delta, write_run

BLEU = {4: (0.60, 0.62, 0.67), 8: (0.64, 0.63, 0.50)}


@pytest.fixture
def study(tmp_path):
    """Two ranks, three seeds each."""
    for rank, scores in BLEU.items():
        for seed, bleu in enumerate(scores, 1):
            run = tmp_path / "study" / f"rank={rank},seed={seed}"
            write_run(run, LORA, f"methods.0.rank={rank}", f"train.seed={seed}", scores={"BLEU": bleu, "perplexity": 10 - 5 * bleu})
    return tmp_path / "study"


def test_runs_that_differ_in_seeds_only_are_one_row(study):
    found = compare(collect([study]))
    assert [row.method for row in found.rows] == ["lora q+v r=4", "lora q+v r=8"]
    assert found.differ == ("methods[0].rank", "train.seed")
    assert found.keys == ()
    for row, values in zip(found.rows, BLEU.values(), strict=True):
        cell = row.cells["valid BLEU"]
        assert cell.values == values
        assert cell.mean == pytest.approx(sum(values) / 3)
        assert cell.median == sorted(values)[1]
        assert cell.std == pytest.approx(spread_of(*values))
        assert cell.std == pytest.approx(statistics.stdev(values))
    assert found.rows[0].cells["valid BLEU"].mean == pytest.approx(0.63)
    assert found.rows[0].cells["valid BLEU"].std == pytest.approx(0.0013**0.5)


def test_the_best_is_the_largest_or_the_smallest_as_the_metric_is_and_as_it_is_asked(study):
    mean, median = (compare(collect([study]), middle).rows for middle in ("mean", "median"))
    assert [row.best for row in mean] == [{"valid BLEU", "valid perplexity"}, frozenset()]
    assert [row.best for row in median] == [frozenset(), {"valid BLEU", "valid perplexity"}]
    alone = compare(collect([study / "rank=4,seed=1", study / "rank=4,seed=2"]))
    assert [row.best for row in alone.rows] == [frozenset()], "nothing to be better than"


def test_ter_is_better_where_it_is_lower(tmp_path):
    for rank, scores in {4: {"TER": 0.5, "METEOR": 0.4}, 8: {"TER": 0.4, "METEOR": 0.4}}.items():
        write_run(tmp_path / f"{rank}", LORA, f"methods.0.rank={rank}", task="dart", scores=scores)
    assert [row.best for row in compare(collect([tmp_path])).rows] == [{"valid METEOR"}, {"valid METEOR", "valid TER"}]


def test_scores_on_other_data_are_not_held_against_one_another(tmp_path):
    for number, (name, changed) in enumerate((("rte", 4), ("rte", 8), ("mrpc", 4))):
        job = ('task={kind="glue", name="' + name + '"}', LORA, f"methods.0.rank={changed}")
        write_run(tmp_path / str(number), *job, scores={"accuracy": 0.7 + 0.1 * number})
    write_run(tmp_path / "few", *job, "task.train_examples=100", scores={"accuracy": 0.6})
    rows = compare(collect([tmp_path])).rows
    assert [bool(row.best) for row in rows] == [False, True, True, False], "with fewer examples learnt it is the same test"


def test_what_did_not_end_well_is_named_and_not_counted(study):
    write_run(study / "rank=4,seed=4", LORA, "train.seed=4", finished=False)
    ended_with(study / "rank=4,seed=4", 4)
    write_run(study / "rank=4,seed=5", LORA, "train.seed=5", finished=False)
    write_run(study / "rank=4,seed=6", LORA, "train.seed=1", scores={"BLEU": 0.9})
    (study / "jobs").mkdir()
    for name in ("rank=4,seed=7", "rank=4,seed=1"):
        (study / "jobs" / f"{name}.toml").write_text((study / "rank=4,seed=2" / "job.toml").read_text().replace("seed = 2", "seed = 7", 1))
    (study / "queued").mkdir()
    (study / "queued" / "slurm.jsonl").touch()
    found = compare(collect([study]))
    names = {run.rpartition("/")[2]: why for run, why in found.left_out.items()}
    assert names == {
        "rank=4,seed=4": "diverged",
        "rank=4,seed=5": "not begun",
        "rank=4,seed=6": f"the same job and seeds as {study / 'rank=4,seed=1'}",
        "rank=4,seed=7": "not begun",
        "queued": "not begun",
    }
    assert len(found.rows[0].runs) == 3
    assert len(found.rows[0].left_out) == 4
    assert found.rows[0].cells["valid BLEU"].values == BLEU[4]


def test_one_run_of_a_sweep_stands_for_itself(study):
    (study / "jobs").mkdir()
    (study / "jobs" / "rank=4,seed=9.toml").write_text((study / "rank=4,seed=2" / "job.toml").read_text())
    found = compare(collect([study / "rank=4,seed=1", study / "rank=8,seed=1"]))
    assert found.left_out == {}
    assert found.each
    whole = collect([study, study / "rank=4,seed=1"])
    assert len(whole) == len({run.folder for run in whole}) == 7


def test_a_score_that_some_runs_lack_says_of_how_many_it_is(study):
    evaluated(study / "rank=4,seed=1", BLEU=0.5)
    evaluated(study / "rank=4,seed=2", BLEU=0.7)
    row = compare(collect([study])).rows[0]
    assert row.cells["test BLEU"].values == (0.5, 0.7)
    assert len(row.runs) == 3


def test_what_zlora_evaluate_scored_is_of_the_delta_that_is_there(study):
    run = study / "rank=4,seed=1"
    evaluated(run, BLEU=0.5)
    evaluated(run, BLEU=0.55)
    evaluated(run, delta="best", sha256="of the best", BLEU=0.58)
    evaluated(run, changed={"task.test_categories": "unseen"}, BLEU=0.3)
    write_delta(run, 1000, "of the best", "best")
    (found,) = collect([run])
    assert {name: value for name, value in found.results.items() if "test" in name} == {
        "test BLEU": 0.55,
        "best test BLEU": 0.58,
        "test BLEU (test_categories=unseen)": 0.3,
    }
    write_delta(run, 1000, "trained on")
    (found,) = collect([run])
    assert [name for name in found.results if "test" in name] == ["best test BLEU"]


def test_a_row_a_run_and_chosen_columns(study):
    found = compare(collect([study]), each=True, metrics=("BLEU",))
    assert [len(row.runs) for row in found.rows] == [1] * 6
    assert found.keys == ("train.seed",)
    assert found.columns == ("valid BLEU",)
    assert compare(collect([study]), metrics=("valid perplexity",)).columns == ("valid perplexity",)


def test_what_differs_is_shown_once(tmp_path):
    write_run(tmp_path / "a", LORA, "train.learning_rate=1e-3")
    write_run(tmp_path / "b", ADAPTER, "train.learning_rate=1e-4")
    write_run(tmp_path / "c", 'methods=[{kind="full"}]')
    found = compare(collect([tmp_path]))
    assert [row.method for row in found.rows] == ["lora q+v r=4", "adapter lin r=6", "full"]
    assert found.keys == ("train.learning_rate",), "alpha differs because only LoRA has it"
    assert {"methods[0].kind", "methods[0].alpha", "methods[0].rank"} < {*found.differ}
    write_run(tmp_path / "d", LORA, "methods.0.alpha=16")
    assert compare(collect([tmp_path])).keys == ("methods[0].alpha", "train.learning_rate")


def test_a_job_that_another_version_wrote_is_filled_up_with_defaults(tmp_path):
    for name in ("a", "b"):
        run = write_run(tmp_path / name, LORA, f"train.seed={1 + (name == 'b')}", scores={"BLEU": 0.5})
    text = (run / "job.toml").read_text()
    assert "packing = true\n" in text
    (run / "job.toml").write_text(text.replace("packing = true\n", ""))
    assert len(compare(collect([tmp_path])).rows) == 1
    (run / "job.toml").write_text(f"{text}[from_tomorrow]\nkey = 1\n")
    found = compare(collect([tmp_path]))
    assert len(found.rows) == 2
    assert "from_tomorrow.key" in found.keys


def test_nothing_to_compare_is_said(tmp_path):
    (tmp_path / "slurm.jsonl").touch()
    with pytest.raises(JobError, match=r"not a run to compare.* Name runs that have begun"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("methods", "name", "line"),
    [
        ('[{kind="lora", targets=["q", "v"], rank={q=4, v=8}, alpha={q=1, v=1}}]', "lora q+v r=4,8", "lora"),
        ('[{kind="adapter", placement="drop", rank=48, first_layer=8}]', "adapter drop r=48 from layer 8", "adapter drop"),
        ('[{kind="prefix_embed", prefix_tokens=32, infix_tokens=8}]', "prefix_embed 32+8", "prefix_embed"),
        ('[{kind="full_top"}]', "full_top 2", "full_top"),
        ('[{kind="bitfit"}]', "bitfit", "bitfit"),
        ('[{kind="lora", rank=2}, {kind="prefix_layer"}]', "lora q+v r=2 + prefix_layer 8+8", "lora + prefix_layer"),
    ],
)
def test_what_methods_are_called(methods, name, line, tmp_path):
    (run,) = collect([write_run(tmp_path / "run", f"methods={methods}")])
    assert (method_name(run.settings), family(run.settings)) == (name, line)
