"""What is printed: read back, or taken apart."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.console import Console

from pipeline.compare.collect import collect
from pipeline.compare.forms import as_csv, as_object, drawn, latex, markdown
from pipeline.compare.group import compare
from pipeline.compare.sheet import cost_of, sheet
from pipeline.screen import json_text
from tests.compare.folders import ADAPTER, CPU, LORA, spread_of, write_run

LORA_BLEU = (0.60, 0.62, 0.67)
PAPER = (
    '[published]\nsource = "A & B, 100 %: table_3 | LoRA"\nparameters = 350_000\n'
    'scores = { "valid BLEU" = 0.704, "test TER" = 0.4 }\nspread = { "valid BLEU" = 0.001 }\n'
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of LoRA, published; one of an adapter, and one that did not end."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, bleu in enumerate(LORA_BLEU, 1):
        job = (LORA, f"train.seed={seed}")
        write_run(folder / f"lora{seed}", *job, more=PAPER, scores={"BLEU": bleu}, seconds=3600.0 * seed, devices=(CPU, CPU))
    write_run(folder / "adapter", ADAPTER, scores={"BLEU": 0.61}, parameters=5000, devices=(CPU,))
    write_run(folder / "half", ADAPTER, "train.seed=2", finished=False)
    return collect([folder])


def table_of(text: str) -> list[list[str]]:
    return [re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |")) for line in text.splitlines() if line.startswith("|")]


def test_markdown_is_a_table_with_the_best_in_bold_and_what_is_published_below(runs):
    text = markdown(sheet(compare(runs)))
    head, rule, *rows = table_of(text)
    assert head == ["method", "n", "trained", "steps", "loss", "valid BLEU", "test TER"]
    assert {len(row) for row in (head, rule, *rows)} == {len(head)}
    assert rule == [":---", *["---:"] * 6]
    adapter, lora, published = rows
    assert adapter == ["adapter lin r=6", "1 of 2", "5,000", "400", "1.0000", "0.6100", ""]
    mean, std = sum(LORA_BLEU) / 3, spread_of(*LORA_BLEU)
    assert lora == ["lora q+v r=4", "3", "1,000", "400", "1.0000 ± 0.0000", f"**{mean:.4f} ± {std:.4f}**", ""]
    assert published == ["A & B, 100 %: table_3 &#124; LoRA", "", "350,000", "", "", "0.704 ± 0.001", "0.4"]
    notes = text.partition("\n\n")[2]
    assert "mean ± standard deviation over n runs that differ in seeds only" in notes
    assert f"not counted: {runs[1].folder}: not begun" in notes
    (row,) = (row for row in table_of(markdown(sheet(compare(runs, "median")))) if row[0].startswith("lora"))
    assert row[5] == f"**0.6200 ± {std:.4f}**"


def test_csv_has_every_number_in_full(runs):
    lora, adapter = sorted(csv.DictReader(io.StringIO(as_csv(compare(runs)))), key=lambda row: -int(row["n"]))
    cell = compare(runs).rows[1].cells["valid BLEU"]
    assert [float(lora[f"valid BLEU {part}"]) for part in ("mean", "std", "median", "n")] == [cell.mean, cell.std, cell.median, 3]
    assert (lora["valid BLEU published"], lora["published source"]) == ("0.704", "A & B, 100 %: table_3 | LoRA")
    assert lora["runs"].count("; ") == 2
    assert (adapter["valid BLEU std"], adapter["valid BLEU n"]) == ("", "1")
    assert adapter["not counted"] == f"{runs[1].folder}: not begun"
    assert float(lora["rank_hours"]) == pytest.approx(2 * (1 + 2 + 3) / 3)


def test_latex_is_a_balanced_table_of_booktabs(runs):
    text = latex(sheet(compare(runs), cost=True))
    lines = [line for line in text.splitlines() if line.endswith("\\\\")]
    form = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    assert len(lines) == 4
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(form)}
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert [text.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 1, 1]
    assert "A \\& B, 100 \\%: table\\_3 | LoRA" in text
    assert f"\\textbf{{{sum(LORA_BLEU) / 3:.4f} $\\pm$ {spread_of(*LORA_BLEU):.4f}}}" in text
    assert not re.search(r"(?<!\\)[&%_#](?! )", "".join(line.replace("%", "") for line in lines))


def test_json_keeps_its_keys(runs):
    found = json.loads(json_text(as_object(compare(runs))))
    assert {*found} == {"schema_version", "keys", "columns", "middle", "rows", "not_counted"}
    assert found["schema_version"] == 2
    row = found["rows"][1]
    assert {*row} == {"method", "settings", "runs", "not_counted", "parameters", "steps", "results", "cost", "published"}
    assert {*row["cost"]} == {"seconds", "rank_hours", "gpu", "peak_memory_bytes", "delta_bytes"}
    cell = row["results"]["valid BLEU"]
    assert {*cell} == {"values", "mean", "std", "median", "best"}
    assert (cell["values"], cell["best"]) == (list(LORA_BLEU), True)
    assert found["rows"][0]["results"]["valid BLEU"]["std"] is None
    assert found["not_counted"] == {str(runs[1].folder): "not begun"}
    assert row["published"]["parameters"] == 350_000


def test_cost_is_of_a_run_and_says_what_is_not_known(runs, tmp_path):
    cost = cost_of(compare(runs).rows[1].runs)
    assert (cost.seconds, cost.rank_hours, cost.gpu) == (7200.0, 4.0, False)
    assert (cost.peak_memory_bytes, cost.delta_bytes) == (3 << 30, 4000)
    names = sheet(compare(runs), cost=True).names
    assert names[-4:] == ("time / s", "rank hours", "peak / GiB", "delta / MiB")
    old = write_run(tmp_path / "old", LORA)
    table = sheet(compare(collect([old])), cost=True)
    assert "GPU hours" in table.names
    (old / "environment.json").write_text("{}")
    (row,) = sheet(compare(collect([old])), cost=True).rows
    assert [word.text for word in row[-4:]] == ["1,800.0", "unknown", "3.00", "0.00"]


@pytest.mark.parametrize("coloured", [True, False])
def test_on_the_screen_the_best_is_bold_or_has_a_star(runs, coloured):
    out = io.StringIO()
    Console(file=out, force_terminal=coloured, color_system="standard" if coloured else None, width=300).print(
        drawn(sheet(compare(runs)), coloured)
    )
    mean = f"{sum(LORA_BLEU) / 3:.4f} ± {spread_of(*LORA_BLEU):.4f}"
    assert (f"\x1b[1m{mean}" in out.getvalue()) == coloured
    assert (f"{mean} *" in out.getvalue()) != coloured
    assert "not counted" in out.getvalue()
