"""Every shipped job is read, counted and planned, and has the settings that the LoRA paper prints for it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline.job.labels import labels_of
from pipeline.job.metrics import names_of
from pipeline.job.read import read_job
from pipeline.job.spec import Job
from pipeline.job.toml import Asked, read_toml
from pipeline.plan.families import read_shape
from pipeline.plan.published import rows
from pipeline.plan.trained import trained
from pipeline.planning.job import make_plan
from pipeline.weights.hub import local_config

ROOT = Path(__file__).parents[1] / "jobs"
COUNTS = {"demo": 2, "e2e": 24, "webnlg": 11, "dart": 11, "glue": 112, "gpt3": 126}
STAND_IN = "facebook/opt-66b"
TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
GLUE_ROWS = (392_702, 67_349, 3_668, 8_551, 104_743, 363_846, 2_490, 5_749)
"""Training examples."""
FROM_MNLI = ("mrpc", "rte", "stsb")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    """All of them, `folder/name` -> job, read in a folder that has the data and the runs that they name."""
    here = tmp_path_factory.mktemp("jobs")
    (here / "jobs").symlink_to(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        found = {}
        for file in sorted(Path("jobs").glob("*/*.toml")):
            # What several jobs share is no job of its own; those of the study are not the paper's (tests/test_study.py).
            if file.parent.name not in ("common", "study"):
                keys = read_toml(file).merged
                for folder in (keys["task"].get("data"), *(method.get("start") for method in keys["methods"])):
                    Path(folder or ".").mkdir(parents=True, exist_ok=True)
                found[f"{file.parent.name}/{file.stem}"] = read_job(file)
    return found


def named(name: str) -> Path:
    return ROOT / f"{name}.toml"


def heads(asked: Asked) -> str:
    """The comments above a job's keys, its own first, then those of what it extends."""
    own = asked.file.read_text().partition("\n\n")[0]
    return " ".join([*re.findall(r"^# (.*)", own, re.MULTILINE), *map(heads, reversed(asked.under))])


def methods_of(job: Job) -> tuple:
    """What decides how much is trained."""
    return tuple(
        method.model_copy(update={"start": None} | ({"alpha": 16.0, "dropout": 0.0} if method.kind == "lora" else {}))
        for method in job.methods
    )


def test_every_job_is_there_says_what_it_is_and_what_to_expect(jobs):
    assert Counter(name.partition("/")[0] for name in jobs) == COUNTS
    assert len(jobs) == 286
    for name, job in jobs.items():
        text = named(name).read_text()
        assert text.startswith("# "), f"{name} has no header"
        assert job.published or re.search(r"^# Expected", text, re.MULTILINE), f"{name} states no expected score"


PAPER = {
    "e2e/gpt2_large_adapter_lin_small": (880_000, {"test BLEU": (0.691, 0.001), "test CIDEr": (2.49, 0.0)}),
    "webnlg/gpt2_medium_full_top": (25_190_000, {"test TER (test_categories=unseen)": (0.99, None), "test BLEU": (36.0, None)}),
    "dart/gpt2_large_lora": (770_000, {"test BLEU": (47.5, 0.1), "test METEOR": (0.39, None), "test TER": (0.45, None)}),
    "glue/roberta_base_bitfit_rte": (100_000, {"best valid accuracy": (0.815, None)}),
    "glue/deberta_xxlarge_lora_stsb": (4_700_000, {"best valid pearson": (0.93, 0.002)}),
    "glue/roberta_base_lora_cola": (300_000, {"best valid matthews": (0.634, 0.012)}),
    "gpt3/175b_lora_wikisql": (18_800_000, {"valid lf_accuracy": (0.737, 0.005)}),
    "gpt3/opt_66b_lora_samsum": (37_700_000, {"test ROUGE_1": (0.534, 0.002), "test ROUGE_L": (0.451, 0.001)}),
    "e2e/gpt2_medium_lora_rank_4": (350_000, {"valid loss": (1.18, None), "test ROUGE_L": (0.7186, None)}),
}
"""Of the paper's tables: trained, value and what stands behind its ±."""


@pytest.mark.parametrize("name", PAPER)
def test_a_job_names_the_papers_row(jobs, name):
    parameters, scores = PAPER[name]
    row = jobs[name].published
    assert row.parameters == parameters
    for column, (value, spread) in scores.items():
        assert (row.scores[column], row.spread.get(column)) == (value, spread), column


def test_what_is_published_stands_in_a_column_that_runs_have(jobs):
    rows = 0
    for name, job in jobs.items():
        if not job.published:
            continue
        rows += 1
        for column in job.published.scores:
            found = re.fullmatch(r"(best )?(valid|test) (\w+)( \(test_categories=(un)?seen\))?", column)
            assert found, (name, column)
            assert found[3] in names_of(job.task), (name, column)
            assert (found[3] == job.evaluate.best_metric and found[2] == job.evaluate.split) == bool(found[1]), (name, column)
            assert not found[4] or job.task.kind == "webnlg"
    assert rows == 286 - 3


def test_what_a_header_counts_is_what_is_trained(jobs):
    counted = 0
    for name, job in jobs.items():
        if name.startswith("demo/") or name == "e2e/local" or job.base.model == STAND_IN:
            continue
        said = re.search(r"([\d,]+) trained parameters|: ([\d,]+) trained,", heads(read_toml(named(name))))
        assert said, f"{name} does not say how much it trains"
        shape = read_shape(local_config(job.base.model, job.base.revision))
        assert trained(shape, *job.methods) == int((said[1] or said[2]).replace(",", "")), name
        counted += 1
    assert counted == 286 - 3 - 24


def test_every_row_of_the_papers_list_has_its_jobs(jobs):
    tasks = {"gpt2-medium": {"e2e"}, "gpt2-large": {"e2e"}, "gpt3-175b": {"wikisql", "mnli"}}
    covered = 0
    for row in rows():
        if row.base == "deberta-v2-xxlarge" and row.methods[0].kind == "lora" and row.methods[0].rank == 8:
            continue  # the same row by the table of hyperparameters; the job has the rank of the printed count
        here = {
            getattr(job.task, "name", job.task.kind)
            for job in jobs.values()
            if local_config(job.base.model, None).name in (row.base, row.base.removeprefix("gpt3-")) and methods_of(job) == row.methods
        }
        assert here >= tasks.get(row.base, set(TASKS)), row
        covered += 1
    assert covered == 12 + 13 + 31


def test_every_job_is_planned_and_fits_on_the_gpus_of_its_precision(jobs):
    planned = set()
    for name, job in jobs.items():
        train, memory = job.train, job.memory
        same = (job.base, str(methods_of(job)), train.max_tokens, train.micro_batch_tokens, memory.gradient_checkpointing)
        if same in planned:
            continue  # others of the same differ in the data and the number of steps
        planned.add(same)
        plan = make_plan(job, "a100-80g" if job.base.dtype == "bf16" else "v100-32g", None, None, None)
        labels = labels_of(job.task)
        shape = read_shape(local_config(job.base.model, None))
        head = 0 if labels == () else shape.head_parameters(len(labels or "1"))
        assert plan["trained_parameters"] == trained(shape, *job.methods) + head, name
        assert plan["fits"], name
    assert len(planned) > 150


def test_a_run_that_a_job_begins_from_is_that_of_a_job_here(jobs):
    begun = {name: job for name, job in jobs.items() if job.methods[0].start}
    assert len(begun) == 3 * 3 + 3
    for name, job in begun.items():
        run, best = Path(job.methods[0].start).parent, Path(job.methods[0].start).name
        first = jobs[f"glue/{run.name}"]
        assert (first.task.name, methods_of(first), first.base) == ("mnli", methods_of(job), job.base), name
        assert (run.parent.name, best) == ("runs", "best")
        assert first.evaluate.best_metric == "accuracy"
        assert job.task.name in FROM_MNLI


def test_the_page_of_jobs_has_every_job(jobs):
    page = (ROOT / "README.md").read_text()
    patterns = re.findall(r"`((?:demo|e2e|webnlg|dart|glue|gpt3)/[\w*\[\]]+)`", page.partition("\n## ")[0])
    assert len(patterns) > 40
    found = {pattern: {f"{file.parent.name}/{file.stem}" for file in ROOT.glob(f"{pattern}.toml")} for pattern in patterns}
    assert all(found.values())
    assert set().union(*found.values()) == set(jobs)


@pytest.mark.parametrize(
    ("name", "layers", "width", "published"),
    [
        ("e2e/gpt2_medium_lora", 24, 1024, 393_216),
        ("e2e/gpt2_large_lora", 36, 1280, 737_280),
        ("webnlg/gpt2_medium_lora", 24, 1024, 393_216),
        ("webnlg/gpt2_large_lora", 36, 1280, 737_280),
        ("dart/gpt2_medium_lora", 24, 1024, 393_216),
        ("dart/gpt2_large_lora", 36, 1280, 737_280),
    ],
)
def test_gpt2_has_the_settings_of_table_11(jobs, name, layers, width, published):
    job, task = jobs[name], name.partition("/")[0]
    regularised = task != "dart"
    lora, train = job.methods[0], job.train
    assert layers * len(lora.targets) * 2 * width * lora.rank == published
    assert (lora.alpha, lora.dropout) == (32, 0.1 * regularised)
    assert (train.batch_examples, train.epochs, train.learning_rate) == (8, 5, 2e-4)
    assert (train.weight_decay, train.label_smoothing) == (0.01 * regularised, 0.1 * regularised)
    assert (train.warmup_steps, train.schedule, train.clip_norm) == (500, "linear", 0)


def test_all_of_gpt2_is_decoded_as_table_11_says(jobs):
    for name, job in jobs.items():
        if job.base.model.startswith("gpt2"):
            decoding = job.evaluate
            assert (decoding.beams, decoding.length_penalty) == (10, 0.9 if job.task.kind == "e2e" else 0.8), name
            assert (decoding.no_repeat_ngram, decoding.ngram_scope, decoding.eos_tokens) == (4, "generated", (628,))


def test_the_sweep_of_the_rank_on_e2e(jobs):
    sweep = {job.methods[0].rank: job for name, job in jobs.items() if "_rank_" in name}
    assert sorted(sweep) == [2**power for power in range(11)]
    for job in sweep.values():
        assert (job.train.steps, job.methods[0].alpha, job.base.model) == (26_000, 32, "gpt2-medium")
        own = {"methods": (), "published": None}
        assert job.model_copy(update=own) == sweep[4].model_copy(update=own)


TABLE_9 = {
    "roberta_base": ("16 16 16 32 32 16 32 16", "30 60 30 80 25 25 80 40", "5 5 4 4 4 5 5 4", "512 " * 8),
    "roberta_large": ("4 4 4 4 4 4 8 8", "10 10 20 20 10 20 20 30", "3 4 3 2 2 3 4 2", "128 128 512 128 512 512 512 512"),
    "deberta_xxlarge": ("8 8 32 4 6 8 4 4", "5 16 30 10 8 11 11 10", "1 .6 2 1 1 1 2 2", "256 128 128 64 512 320 320 128"),
    "roberta_large_lora_restricted": ("4 " * 8, "10 10 20 20 10 20 20 10", "3 4 3 2 2 3 4 2", "128 " * 8),
    "roberta_large_adapter_pfeiffer_large": ("32 " * 8, "10 20 20 20 10 20 20 20", ".3 .3 3 3 3 3 3 3", "128 " * 8),
    "roberta_large_adapter_pfeiffer_small": ("32 " * 8, "5 20 20 20 10 20 20 20", "3 " * 8, "128 " * 8),
    "roberta_large_adapter_houlsby_large": ("32 " * 8, "10 5 10 10 5 20 20 10", ".3 3 3 3 3 3 3 3", "128 " * 8),
    "roberta_large_adapter_houlsby_small": ("32 " * 8, "10 5 10 10 5 20 20 10", "3 " * 8, "128 " * 8),
}
"""Batch, epochs, learning rate in 1e-4, longest example; DeBERTa's are table 10."""


@pytest.mark.parametrize("row", TABLE_9)
def test_glue_has_the_settings_of_tables_9_and_10(jobs, row):
    name = row if row.count("_") > 1 else f"{row}_lora"
    for place, task in enumerate(TASKS):
        job = jobs[f"glue/{name}_{task}"]
        train = job.train
        batch, epochs, rate, longest = (float(column.split()[place]) for column in TABLE_9[row])
        assert (train.batch_examples, train.epochs, train.max_tokens) == (batch, epochs, longest), task
        assert train.learning_rate == pytest.approx(rate * 1e-4)
        assert (train.warmup_ratio, train.schedule) == (0.1 if row.startswith("deberta") else 0.06, "linear")
        assert job.task.name == task
        assert job.evaluate.best_metric == {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
        assert job.evaluate.every_steps == -(-GLUE_ROWS[place] // train.batch_examples)
        assert task != "mnli" or job.task.section == "both"
        assert bool(job.methods[0].start) == (task in FROM_MNLI and name.endswith("e_lora"))
        if row.startswith("deberta"):
            assert train.weight_decay == (0, 0.01, 0.01, 0, 0.01, 0.01, 0.01, 0.1)[place]
            assert train.classifier_dropout == (0.15, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2)[place]
        if job.methods[0].kind == "lora":
            alpha = {"roberta_base": 8, "deberta_xxlarge": 32}.get(row, 16)
            assert (job.methods[0].targets, job.methods[0].alpha, job.methods[0].dropout) == (("q", "v"), alpha, 0)


def test_gpt3_has_the_settings_of_tables_12_and_17(jobs):
    rates = {"full": 5e-6, "prefix_embed": 5e-4, "prefix_layer": 1e-4, "bitfit": 1.6e-3, "adapter": 1e-4, "lora": 2e-4}
    longest = {"wikisql": 384, "mnli": 768, "samsum": 2048}
    low = {
        100: (20, 40, {"full": 5e-6, "prefix_embed": 2e-4, "prefix_layer": 5e-5, "lora": 2e-4}),
        1000: (20, 40, {"full": 5e-6, "prefix_embed": 2e-4, "prefix_layer": 5e-5, "lora": 2e-4}),
        10000: (100, 4, {"full": 5e-6, "prefix_embed": 4e-4, "prefix_layer": 5e-5, "lora": 2e-4}),
    }
    series = Counter()
    for name, job in jobs.items():
        if name.startswith("gpt3/"):
            train, first = job.train, job.methods[0]
            batch, epochs, of_kind = low.get(job.task.train_examples, (128, 2, rates))
            assert (train.batch_examples, train.epochs, train.learning_rate) == (batch, epochs, of_kind[first.kind]), name
            assert train.max_tokens == longest[getattr(job.task, "name", job.task.kind)]
            assert (train.schedule, train.weight_decay, job.base.dtype) == ("linear", 0.1, "fp16")
            series[job.task.train_examples] += 1
            if job.task.train_examples and first.kind.startswith("prefix"):
                tokens = {100: 16, 1000: 32, 10000: 64}[job.task.train_examples] if first.kind == "prefix_embed" else 8
                assert (first.prefix_tokens, first.infix_tokens) == (tokens, 8)
    assert series == {None: 114, 100: 4, 1000: 4, 10000: 4}


def test_the_stand_in_has_the_papers_jobs_of_table_4(jobs):
    twins = {name: job for name, job in jobs.items() if job.base.model == STAND_IN}
    assert len(twins) == 8 * 3
    for name, job in twins.items():
        original = jobs[name.replace("opt_66b", "175b")]
        assert job.model_copy(update={"base": original.base}) == original
        assert job.base.dtype == original.base.dtype
