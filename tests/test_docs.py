"""Documents stay true to the code."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.job.method import Adapter, Method
from pipeline.job.read import read_job
from pipeline.job.task import Task
from pipeline.plan.hardware import GIB, gpus
from pipeline.planning.job import make_plan
from pipeline.planning.methods import make_counts, show_counts
from pipeline.screen import Screen
from pipeline.tasks.open import sources_of
from tests.tasks.reading import read_examples

ROOT = Path(__file__).parents[1]


PAGES = [page for room in (".", "docs", "benchmarks", "benchmarks/results", "jobs") for page in sorted((ROOT / room).glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, place = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not place or place in places(target), link


def places(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", ["claims", "jobs", "scaling"])
def test_a_made_page_is_what_its_script_makes(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"make_{name}", ROOT / "docs" / f"make_{name}.py")
    maker = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module there.
    monkeypatch.setitem(sys.modules, spec.name, maker)
    spec.loader.exec_module(maker)
    assert maker.TARGET.read_text() == maker.page(), f"run: python docs/make_{name}.py"


def test_the_recorded_bytes_between_ranks_are_the_plan_s():
    file = ROOT / "benchmarks" / "results" / "scaling.json"
    if not file.exists():
        pytest.skip("not recorded: run python benchmarks/scaling.py --record benchmarks/results/scaling.md")
    rows = json.loads(file.read_text())["settings"]
    assert {row["ranks"] for row in rows} == {1, 2, 4, 8}
    assert {row["group"] for row in rows if row["ranks"] == 8} == {2, 4, 8}
    for row in rows:
        assert row["measured"] == row["plan"], row
        assert row["measured"]["invalidations"] == 0
        if row["group"] < row["ranks"]:
            assert row["measured"]["between_nodes"] == 0


def test_the_recorded_state_of_full_and_lora_is_the_plan_s():
    file = ROOT / "benchmarks" / "results" / "claims.json"
    if not file.exists():
        pytest.skip("not recorded: run python benchmarks/claims.py --record benchmarks/results/claims.md")
    report = json.loads(file.read_text())
    for name, parts in report["parts"].items():
        assert len(parts) == 4
        for part, each in parts.items():
            assert each["measured"] == each["predicted"], (name, part)
        # fp32, but for sums of the loss beside the gradients.
        assert parts["optimizer"]["measured"] == 2 * parts["delta"]["measured"] >= 8 * report["trained"][name]


def test_the_readme_has_the_recorded_measurements():
    spec = importlib.util.spec_from_file_location("headline", ROOT / "benchmarks" / "headline.py")
    headline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(headline)
    text = (ROOT / "README.md").read_text()
    assert headline.with_headline(text) == text, "run: python benchmarks/headline.py"


def test_the_page_of_methods_has_every_kind_and_what_the_command_prints():
    page, printed = (ROOT / "docs" / "methods.md").read_text(), io.StringIO()
    kinds = [kind for method in get_args(get_args(Method)[0]) for kind in get_args(method.model_fields["kind"].annotation)]
    assert len(kinds) == 7
    placements = get_args(Adapter.model_fields["placement"].annotation)
    for name in [*(f"`{kind}`" for kind in kinds if kind != "adapter"), *(f"`adapter`, `{placement}`" for placement in placements)]:
        assert f"\n| {name} |" in page, name
    show_counts(make_counts(None), Screen(printed))
    lines = [line.rstrip() for line in printed.getvalue().strip().splitlines()]
    assert page.partition("```\n")[2].removesuffix("```\n").splitlines() == lines, "put the output of zlora methods there"


def test_the_pages_of_tasks_and_data_have_every_kind():
    page = "".join((ROOT / "docs" / name).read_text() for name in ("tasks.md", "data.md"))
    kinds = [kind for task in get_args(get_args(Task)[0]) for kind in get_args(task.model_fields["kind"].annotation)]
    assert len(kinds) == 14
    titles = re.findall(r"^## (`.+`)$", page, re.MULTILINE)
    assert sorted(kind for title in titles for kind in re.findall(r"`(\w+)`", title)) == sorted(kinds)
    for job in re.findall(r"jobs/\w+/\w+\.toml", page):
        assert (ROOT / job).is_file(), job


def test_the_rows_of_the_page_of_data_are_read_by_the_jobs_beside_them(tmp_path, monkeypatch):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    head, read = '[base]\nmodel = "gpt2"\n[[methods]]\nkind = "lora"\n', 0
    for section in (ROOT / "docs" / "data.md").read_text().split("\n## `")[1:]:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
        (job,) = (text for form, text in blocks if form == "toml")
        for form, rows in [block for block in blocks if block[0] != "toml"] or [("jsonl", '{"prompt": "a", "completion": "b"}\n')]:
            file = tmp_path / "data" / "mine" / f"train.{form}"
            file.write_text(rows)
            Path("job.toml").write_text(head + (job.replace('kind = "jsonl"', 'kind = "csv"') if form in ("csv", "tsv") else job))
            for task in sources_of(read_job(Path("job.toml")).task):
                assert read_examples(task, "train"), (section, form)
                read += 1
            file.unlink()
    assert read == 11


def test_the_readme_names_every_folder_and_the_docs_every_command():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    rooms = [p.name for p in (ROOT / "pipeline").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(rooms) == 23
    for room in rooms:
        assert f"`pipeline/{room}/`" in readme
    pages = index + "".join((ROOT / "docs" / name).read_text() for name in ("generate.md", "deltas.md", "analyze.md", "latency.md"))
    commands = get_command(app).commands
    assert set(commands) == {
        *("doctor", "submit", "batch", "check", "fetch", "data", "plan", "methods", "profile", "train", "evaluate", "generate", "score"),
        *("merge", "switch", "unmerge", "verify", "import", "export", "deltas", "analyze"),
        *("sweep", "compare", "status", "logs", "cancel", "latency"),
    }
    below = {f"deltas {name}": command for name, command in commands["deltas"].commands.items()}
    for name, command in (commands | below).items():
        assert f"`zlora {name} " in index
        for option in command.params:
            for text in option.opts:
                assert not text.startswith("--") or text in pages, (name, text)


def test_where_the_bytes_of_a_70b_job_go_is_what_the_plan_says(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    others = {"vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **others}))
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job = tmp_path / "job.toml"
    job.write_text(
        f'[base]\nmodel = "{tmp_path}"\ndtype = "bf16"\n[[methods]]\nkind = "lora"\nrank = 16\ntargets = ["q", "k", "v", "o"]\n'
        f'[task]\nkind = "jsonl"\ndata = "{tmp_path / "data.jsonl"}"\n[train]\nmax_tokens = 4096\n[memory]\ngradient_checkpointing = true\n'
    )
    page = (ROOT / "docs" / "memory.md").read_text()
    picture = page.partition("```\nGiB a GPU")[2].partition("```")[0].splitlines()
    rows = {row[:17].strip(): re.findall(r"\d+\.\d", row[17:]) for row in picture}
    for column, ranks in ((0, 8), (-1, 64)):
        plan = make_plan(read_job(job), "a100-80g", ranks, None, None)
        parts, phases = plan["parts_bytes"], plan["phases_bytes"]
        said = {
            "base shard": parts["base_shard"],
            "gathered": parts["gathered"],
            "delta + gradients": parts["delta"] + parts["gradients"],
            "optimizer": parts["optimizer"],
            "activations": parts["activations"],
            "context, margin": parts["context"] + parts["margin"],
            "a training step": max(phases["forward"], phases["backward"]),
            "generation": phases["generate"],
        }
        for name, count in said.items():
            assert float(rows[name][column]) == pytest.approx(count / GIB, abs=0.051), name
    without = make_plan(read_job(job, ("memory.gradient_checkpointing=false",)), "a100-80g", 8, None, None)
    assert f"activations are {without['parts_bytes']['activations'] / GIB:.1f} GiB" in page
    assert without["answers"]["fewest_gpus"]["a100-80g"] is None


def test_the_page_of_memory_names_every_gpu_and_the_plan_s_settings():
    page = (ROOT / "docs" / "memory.md").read_text()
    for name in gpus():
        assert name in page, name
    assert "price_per_gpu_hour" in page
