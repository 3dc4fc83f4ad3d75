"""Texts: `generate`, `score`. Heavy imports are inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.screen import Screen
    from pipeline.train.engine import Ranks


def generate(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base.")],
    delta: Annotated[
        list[str] | None,
        typer.Option("--delta", metavar="[NAME=]DIR", help="A delta folder, or the run folder that holds it; once for each, with names."),
    ] = None,
    use: Annotated[
        str | None, typer.Option("--use", metavar="NAME", help="The delta of prompts that say none; the base when absent.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help='One a line; .jsonl: {"prompt": ..., "delta": NAME} a line.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="JSON lines go there; a file that is there is never replaced.")
    ] = None,
    as_json: options.AsJson = False,
    separator: Annotated[
        str | None, typer.Option("--separator", metavar="TEXT", help="After each prompt; the delta's own, or none, when absent.")
    ] = None,
    too_long: Annotated[
        Literal["refuse", "truncate"], typer.Option(help="A prompt that leaves no room for an answer: refused, or cut on its left.")
    ] = "refuse",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Absent: as the delta was trained, else as the base is stored.")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="FILE", help="A file of ds_configs/, or a path.")] = "zero3.json",
    ranks: options.RankCount = None,
    max_new_tokens: options.MaxNewTokens = 64,
    beams: options.Beams = 1,
    length_penalty: options.LengthPenalty = 1.0,
    early_stopping: options.EarlyStopping = False,
    no_repeat_ngram: options.NoRepeatNgram = 0,
    ngram_scope: options.NgramScope = "all",
    eos_tokens: options.EosTokens = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 1,
    batch_tokens: options.BatchTokens = 16384,
    gather: options.Gather = "auto",
) -> None:
    """Continue prompts with a base and a delta; without --prompt and --prompt-file, those of a conversation or of standard input.

    Answers are JSON lines of prompt and prediction; in a conversation, plain text as it is generated.
    Ctrl-D ends a conversation, Ctrl-C an answer, and /delta NAME changes the delta.

    Example: zlora generate --base gpt2-medium --delta runs/local --prompt "name : Blue Spice | area : riverside" --beams 4

    Many deltas on one base, each prompt by its own: zlora generate --base gpt2-medium --delta e2e=runs/e2e --delta dart=runs/dart
    --prompt-file prompts.jsonl
    """
    from pipeline.cluster.launch import inside_ranks, launch
    from pipeline.cluster.talk import talk
    from pipeline.job.files import memory_config
    from pipeline.tasks.named import named_deltas, used
    from pipeline.tasks.prompts import read_prompts

    decoding = options.decoding_of(context.params)
    file = memory_config(memory)
    deltas = named_deltas(delta or [])
    names = tuple(name for name in deltas if name is not None)
    begins = used(use, names)
    asked = read_prompts(prompt or [], prompt_file, names, begins)
    if not asked and (out or as_json):
        raise JobError(f"{'--out' if out else '--json'}: belongs to --prompt or --prompt-file. Give one of them.")
    if not inside_ranks():
        if out and out.exists():
            raise JobError(f"{out}: already there. Choose another name for --out, or remove it first.")
        sys.exit(launch(sys.argv[1:], ranks, talk=None if asked else talk))
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> None:
        from pipeline.generate.generator import Source, open_generator
        from pipeline.generate.ranks import answer_all, converse

        source = Source(base, revision, deltas, separator, dtype, file)
        generator = open_generator(source, decoding, too_long, joined, screen)
        if asked:
            answer_all(generator, asked, out, as_json)
        else:
            converse(generator, begins)

    as_rank(None, body, as_json=True)


def score(
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="e2e, webnlg, dart, samsum, wikisql, cola (or another of GLUE), texts, ...")
    ],
    predictions: Annotated[Path, typer.Option("--predictions", metavar="FILE", help="One a line; or .jsonl of evaluate or generate.")],
    references: Annotated[
        Path | None, typer.Option("--references", metavar="FILE", help="One a line, an empty line between those of two predictions.")
    ] = None,
    script: Annotated[
        str | None, typer.Option("--script", help="e2e: mteval or pymteval; webnlg, dart: generation_eval or challenge.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option("--tables", metavar="PATH", help="wikisql: its .tables.jsonl or .db, or their folder; for ex_accuracy.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Score any file by a task's metrics, equal to the official scripts'.

    Example: zlora score --task e2e --predictions out.txt --references refs.txt
    """
    from pipeline.evaluate.metrics.choose import metrics_of, refuse_unknown
    from pipeline.evaluate.metrics.read import read_scored
    from pipeline.job.metrics import shown
    from pipeline.screen import Screen, json_text

    refuse_unknown(task, script, tables)
    found, groups = read_scored(predictions, references)
    metrics, notes = metrics_of(task, found, groups, script, tables)
    if as_json:
        report = {"schema_version": 1, "task": task, "script": script, "predictions": len(found), "metrics": metrics, "notes": notes}
        print(json_text(report))
        return
    screen = Screen(sys.stdout)
    screen.table(f"{task}: {len(found)} predictions", [(name, shown(task, name, value)) for name, value in metrics.items()])
    for note in notes:
        print(note, file=sys.stderr)
