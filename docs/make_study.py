"""Writes the tables of docs/study.md, and its pictures, from benchmarks/results/study.json: `python docs/make_study.py`. No torch, no runs.

What stands between `<!-- made: NAME -->` and `<!-- end -->` is made; all else on the page is written by hand and stays. Without a page, a
first one is written with the headings. A test holds the page to the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, TARGET, IMAGES = ROOT / "benchmarks" / "results" / "study.json", ROOT / "docs" / "study.md", ROOT / "docs" / "images"
Row = dict[str, Any]
Study = dict[str, Any]
NOT_RUN = "Not run."
HUNDREDS = ("BLEU", "METEOR", "ROUGE_L", "accuracy")
"""Of 1; shown as the paper prints them."""
NAMES = {
    "lora": "LoRA",
    "full": "full",
    "full_top": "last two layers",
    "bitfit": "BitFit",
    "houlsby": "Adapter-H",
    "lin": "Adapter-L",
    "pfeiffer": "Adapter-P",
    "drop": "AdapterDrop",
    "prefix_layer": "prefix-layer",
    "prefix_embed": "prefix-embed",
}
TABLE_3 = {"full": 68.2, "lin": 66.3, "houlsby": 67.3, "full_top": 68.1, "prefix_layer": 69.7, "lora": 70.4}
"""GPT-2 medium on E2E, BLEU; Adapter-L of 0.37M, Adapter-H of 11.09M."""
TABLE_18 = {1: 68.72, 2: 69.17, 4: 70.38, 8: 69.57, 16: 69.61, 32: 69.33, 64: 69.24}
"""The rank, GPT-2 medium on E2E, BLEU."""
TABLE_5 = {"q r=8": 70.4, "k r=8": 70.0, "v r=8": 73.0, "o r=8": 73.2, "q+k r=4": 71.4, "q+v r=4": 73.7, "q+k+v+o r=2": 73.7}
"""GPT-3 on WikiSQL, accuracy."""
TABLE_16 = {
    "full": "60.2 / 85.8 / 89.5",
    "lora": "63.8 / 85.6 / 91.7",
    "prefix_layer": "48.3 / 82.5 / 89.6",
    "prefix_embed": "37.6 / 75.2 / 88.6",
}
"""GPT-3 on MNLI with 100, 1,000 and all examples, accuracy."""
PAGE = """# A study

The paper's comparisons at a size that two CPU cores finish in an evening: [benchmarks/study.py](../benchmarks/README.md) trains the
jobs of [jobs/study](../jobs/README.md), and `docs/make_study.py` makes the tables and pictures here from `benchmarks/results/study.json`.
The bases and the steps are far smaller than the paper's: the order of methods can be compared, not the scores. Each method has the best of
three learning rates, chosen with seed 1 on the dev prompts that are reported too; E2E's test prompts have chosen nothing.

<!-- made: origin -->
<!-- end -->

## Methods on E2E

<!-- made: e2e -->
<!-- end -->

## Methods on SST-2

<!-- made: sst2 -->
<!-- end -->

## The rank

<!-- made: rank -->
<!-- end -->

## Which weights

<!-- made: weights -->
<!-- end -->

## Few examples

<!-- made: few -->
<!-- end -->

## Learning rates

<!-- made: rates -->
<!-- end -->

## What agrees with the paper

Not written yet.

## What does not

Not written yet.
"""


def page(study: Study, text: str = PAGE) -> str:
    """The page with what is made put in its place.

    Raises:
        KeyError: the page has a mark that nothing is made for.
    """
    made: dict[str, Callable[[Study], list[str]]] = {
        "origin": origin,
        "e2e": e2e,
        "sst2": sst2,
        "rank": rank,
        "weights": weights,
        "few": few,
        "rates": rates,
    }

    def put(mark: re.Match[str]) -> str:
        return "\n".join([mark[1], *made[mark[2]](study), "<!-- end -->"])

    return re.sub(r"(<!-- made: (\w+) -->)\n.*?<!-- end -->", put, text, flags=re.DOTALL)


def origin(study: Study) -> list[str]:
    base, first = study["base"], study["parts"]["e2e"][0]
    return [
        *study["measured_on"],
        f"- the base: {base['parameters']:,} parameters, {base['steps']:,} steps on other text, perplexity "
        f"{base['valid']['perplexity']:.1f} on held-out documents of it",
        f"- E2E: {first['steps']} steps of {first['batch_examples']} examples; mean ± standard deviation of {first['runs']} seeds",
        *(f"- **not finished**: {count} runs of `{part}`" for part, count in study["left"].items()),
    ]


def e2e(study: Study) -> list[str]:
    columns = ("valid BLEU", "valid NIST", "valid METEOR", "valid ROUGE_L", "valid CIDEr", "valid perplexity", "test BLEU")
    table = _methods(study, "e2e", columns, TABLE_3, "BLEU of GPT-2 medium, table 3")
    return _under("![BLEU against trained parameters](images/study-methods.png)", table)


def sst2(study: Study) -> list[str]:
    return _methods(study, "sst2", ("valid accuracy", "valid loss"), {}, "")


def rank(study: Study) -> list[str]:
    rows = sorted(_of(study, "rank"), key=lambda row: row["rank"])
    heads = ("rank", "trained", *(columns := ("valid BLEU", "valid perplexity")), "BLEU of GPT-2 medium, table 18")
    lines = [[str(row["rank"]), f"{row['parameters']:,}", *_cells(row, columns), f"{TABLE_18.get(row['rank'], '')}"] for row in rows]
    return _under("![BLEU against the rank](images/study-rank.png)", _table(heads, lines))


def weights(study: Study) -> list[str]:
    names = {row["method"].removeprefix("lora "): row for row in _of(study, "weights")}
    heads = ("weights and rank", "trained", *(columns := ("valid BLEU", "valid perplexity")), "WikiSQL accuracy of GPT-3, table 5")
    lines = [
        [name, f"{names[name]['parameters']:,}", *_cells(names[name], columns), f"{paper}"]
        for name, paper in TABLE_5.items()
        if name in names
    ]
    return _table(heads, lines)


def few(study: Study) -> list[str]:
    rows = _of(study, "few")
    counts = _counts(rows)
    heads = ("method", *(f"BLEU, {_many(count)}" for count in counts), *(f"perplexity, {_many(count)}" for count in counts))
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = {row["examples"]: row for row in rows if row["kind"] == kind}
        cells = [_cell(own.get(count), column) for column in ("valid BLEU", "valid perplexity") for count in counts]
        lines.append([NAMES[kind], *cells, TABLE_16.get(kind, "")])
    return _under(
        "![BLEU against the number of examples](images/study-few.png)", _table((*heads, "MNLI accuracy of GPT-3, table 16"), lines)
    )


def rates(study: Study) -> list[str]:
    lines = []
    for job, found in study["rates"].items():
        told = [f"{rate}: {_shown(score, 'BLEU')}" for rate, score in found["tried"].items()]
        lines.append([job, *told, f"{found['chosen']:g}"])
    most = max(len(line) for line in lines) - 2
    return _table(
        ("job", *(["rate: dev score of seed 1"] * most), "chosen"),
        [[*line[:-1], *[""] * (most + 2 - len(line)), line[-1]] for line in lines],
    )


def _methods(study: Study, part: str, columns: Sequence[str], paper: dict[str, float], said: str) -> list[str]:
    rows = _of(study, part)
    columns = [column for column in columns if any(column in row["results"] for row in rows)]
    heads = ["method", "trained", "learning rate", *columns, *([said] if paper else [])]
    lines = []
    for row in rows:
        end = [f"{paper.get(row['kind'], '')}"] if paper else []
        lines.append([NAMES[row["kind"]], f"{row['parameters']:,}", f"{row['learning_rate']:g}", *_cells(row, columns), *end])
    return _table(heads, lines)


def _of(study: Study, part: str) -> list[Row]:
    return study["parts"].get(part, [])


def _counts(rows: list[Row]) -> list[int | None]:
    """Numbers of examples, all of them last."""
    return sorted({row["examples"] for row in rows}, key=lambda count: count or 10**9)


def _many(count: int | None) -> str:
    return f"{count:,} examples" if count else "all"


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [_cell(row, column) for column in columns]


def _cell(row: Row | None, column: str) -> str:
    if row is None or (found := row["results"].get(column)) is None:
        return ""
    metric = column.rpartition(" ")[2]
    seeds = f" (n={len(found['values'])})" if len(found["values"]) < 3 else ""
    return _shown(found["mean"], metric) + (f" ± {_shown(found['std'], metric)}" if found["std"] is not None else "") + seeds


def _shown(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric in HUNDREDS else f"{value:.2f}"


def _table(heads: Sequence[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)] if lines else [NOT_RUN]


def _under(picture: str, table: list[str]) -> list[str]:
    return table if table == [NOT_RUN] else ["", picture, "", *table]


def draw(study: Study, folder: Path) -> None:
    """The three pictures."""
    points = [(row["parameters"], row) for row in _of(study, "e2e")]
    _picture({NAMES[row["kind"]]: [(x, row)] for x, row in points}, "trained parameters", folder / "study-methods.png")
    ranks = sorted(((row["rank"], row) for row in _of(study, "rank")), key=lambda point: point[0])
    _picture({"LoRA of q and v": ranks}, "rank", folder / "study-rank.png")
    lines: dict[str, list[tuple[float, Row]]] = {}
    for count in _counts(_of(study, "few")):
        for row in _of(study, "few"):
            if row["examples"] == count:
                lines.setdefault(NAMES[row["kind"]], []).append((count or row["steps"] * row["batch_examples"], row))
    _picture(lines, "different examples seen", folder / "study-few.png")


def _picture(lines: dict[str, list[tuple[float, Row]]], x: str, file: Path) -> None:
    from matplotlib.figure import Figure

    if not any(lines.values()):
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(lines.items()):
        cells = [row["results"]["valid BLEU"] for _, row in points]
        y, spread = ([100 * (cell[key] or 0) for cell in cells] for key in ("mean", "std"))
        axes.errorbar([at for at, _ in points], y, spread, label=name, marker="osD^vP*X<>"[place % 10], capsize=3)
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel("BLEU on the dev set x 100")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    study = json.loads(RESULTS.read_text(encoding="utf-8"))
    TARGET.write_text(page(study, TARGET.read_text(encoding="utf-8") if TARGET.exists() else PAGE), encoding="utf-8")
    draw(study, IMAGES)


if __name__ == "__main__":
    main()
