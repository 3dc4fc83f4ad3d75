"""The doors. Everything heavy is imported inside its command, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline import options
from pipeline.job.errors import JobError, of_system

if TYPE_CHECKING:
    from pipeline.job.spec import Job
    from pipeline.screen import Screen
    from pipeline.train.engine import Ranks

app = typer.Typer(
    name="zlora",
    help="Adapt billion-scale transformers: a frozen base sharded by ZeRO-3, a trained delta of megabytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job, a TOML file.")]
RunFolder = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run folder; runs/<job name> when absent.")]
RankCount = Annotated[int | None, typer.Option("--ranks", min=1, help="Ranks to start here; the GPUs, else 1, when absent.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job: train.steps=20.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")]


def main() -> None:
    """Runs the command line; what the user can repair becomes one line and exit code 2."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # By way of an exception, so that a half-written folder is removed on the way out. What nohup ignores stays ignored.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        app()
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (text := of_system(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


@app.command()
def check(job: JobFile, overrides: Overrides = None) -> None:
    """Read and validate a job; print it resolved.

    Example: zlora check jobs/e2e/local.toml
    """
    from pipeline.job.read import job_toml, read_job

    print(job_toml(read_job(job, tuple(overrides or ()))), end="")


@app.command()
def plan(
    job: JobFile,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="v100-16g, v100-32g, a100-40g, a100-80g, h100, h200, l40s, cpu.")] = "a100-80g",
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all; the fewest on which the job fits, when absent.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes they are on; as few as hold them, when absent.")] = None,
    example_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an example; the longest there can be, when absent.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Training examples; as many as are known of, when absent.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU hour; the settings', when absent.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic.")] = False,
    mend: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the memory configuration without what costs.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Will it fit, on how many GPUs, how fast; what to change and what that costs. Needs the base's config.json, not its weights.

    Example: zlora plan jobs/gpt3/175b_lora_wikisql.toml --gpu v100-32g
    """
    from pipeline.job.read import read_job
    from pipeline.plan_report import show_plan
    from pipeline.planning import make_plan, write_mended
    from pipeline.screen import Screen

    found = make_plan(read_job(job, tuple(overrides or ()), lenient=True), gpu, gpus, nodes, example_tokens, examples, price)
    if mend:
        write_mended(found, mend)
    if as_json:
        print(json.dumps(found))
        return
    show_plan(found, Screen(sys.stdout), explain)


@app.command()
def methods(
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Folder or hub id of a base; the paper's list when absent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count what each method trains, from shapes alone: the LoRA paper's list beside its printed figures, or every method on a base.

    Example: zlora methods --base gpt2-medium
    """
    from pipeline.counting import make_counts, show_counts
    from pipeline.screen import Screen

    counts = make_counts(base)
    if as_json:
        print(json.dumps(counts))
        return
    show_counts(counts, Screen(sys.stdout))


@app.command()
def fetch(job: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Download a job's base and data into the hub's cache, so that ranks need no network. Interrupted? The same again goes on.

    Example: zlora fetch jobs/e2e/local.toml
    """
    from pipeline.fetch import fetch_job
    from pipeline.job.read import read_job
    from pipeline.screen import Screen

    found = fetch_job(read_job(job, tuple(overrides or ())), Screen(sys.stderr if as_json else sys.stdout))
    if as_json:
        print(json.dumps(found))


@app.command()
def data(
    job: JobFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="Show so many training examples of each source, token by token.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what a job's model will see: counts, lengths, labels, what is left out, and examples with the tokens that are learnt.

    Reads no weights and needs no ranks. Exit code 2 with training's own line where training would refuse the data.

    Example: zlora data jobs/e2e/local.toml --examples 1
    """
    # transformers imports torch wherever it is; its tokenizers do not need it, and so start in half the time.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from pipeline.data import look
    from pipeline.data_report import show_data
    from pipeline.job.read import read_job
    from pipeline.screen import Screen, json_text

    screen = Screen(sys.stderr if as_json else sys.stdout)
    report = look(read_job(job, tuple(overrides or ())), examples, screen)
    if as_json:
        print(json_text(report))
    else:
        show_data(screen, report)
    if report["refusal"]:
        raise JobError(report["refusal"])


@app.command()
def train(
    job: JobFile,
    run: RunFolder = None,
    ranks: RankCount = None,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the run in the run folder instead of going on with it.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with another learning rate, schedule or the like than the run began with.")
    ] = False,
) -> None:
    """Train a job's delta on this machine, or on the ranks that torchrun or srun started. A run that was begun goes on.

    Example: zlora train jobs/e2e/local.toml --ranks 2 --set train.steps=200
    """
    from pipeline.cluster.launch import JOB_ERROR, inside_ranks, launch
    from pipeline.job.read import read_job
    from pipeline.run_folder import refuse_foreign, remove_if_empty_handed

    asked = read_job(job, tuple(overrides or ()))
    folder = run or Path("runs") / job.stem
    refuse_foreign(folder)
    if not inside_ranks():
        code = launch(sys.argv[1:], ranks, asked.train.stop_signals)
        if code == JOB_ERROR:
            remove_if_empty_handed(folder)
        sys.exit(code)
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> None:
        from pipeline.run import train as train_here

        train_here(asked, folder, joined, screen, fresh, accept_changes)

    as_rank(folder, body, training=asked.train)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="What to score.")] = "test",
    delta: Annotated[
        Literal["best", "last"] | None, typer.Option("--delta", help="best where the job has evaluate.best_metric, else last, when absent.")
    ] = None,
    ranks: RankCount = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score a run's delta by its task's own metrics, loss and perplexity; write the predictions.

    Example: zlora evaluate runs/local --set evaluate.max_prompts=100
    """
    from pipeline.cluster.launch import inside_ranks, launch

    asked = _job_of(run, overrides)
    which = delta or ("best" if asked.evaluate.best_metric else "last")
    if which == "best" and not (run / "best").is_dir():
        raise JobError(f"{run}: has no best delta: none was asked for by evaluate.best_metric, or none scored yet. Use --delta last.")
    if not inside_ranks():
        sys.exit(launch(sys.argv[1:], ranks))
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> dict[str, Any]:
        from pipeline.run import evaluate as evaluate_here

        return evaluate_here(asked, run, split, which, joined, screen)

    as_rank(run, body, as_json)


@app.command()
def generate(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base.")],
    delta: Annotated[Path | None, typer.Option("--delta", metavar="DIR", help="A delta folder, or the run folder that holds it.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help='One a line; .jsonl: {"prompt": ...} a line, other keys are kept.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="JSON lines go there; a file that is there is never replaced.")
    ] = None,
    as_json: AsJson = False,
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
    ranks: RankCount = None,
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
    Ctrl-D ends a conversation, Ctrl-C an answer.

    Example: zlora generate --base gpt2-medium --delta runs/local --prompt "name : Blue Spice | area : riverside" --beams 4
    """
    from pipeline.cluster.launch import inside_ranks, launch
    from pipeline.cluster.talk import talk
    from pipeline.job.files import memory_config
    from pipeline.tasks.prompts import read_prompts

    decoding = options.decoding_of(context.params)
    file = memory_config(memory)
    asked = read_prompts(prompt or [], prompt_file)
    if not asked and (out or as_json):
        raise JobError(f"{'--out' if out else '--json'}: belongs to --prompt or --prompt-file. Give one of them.")
    if not inside_ranks():
        if out and out.exists():
            raise JobError(f"{out}: already there. Choose another name for --out, or remove it first.")
        sys.exit(launch(sys.argv[1:], ranks, talk=None if asked else talk))
    from pipeline.rank import as_rank

    def body(joined: Ranks, screen: Screen) -> None:
        from pipeline.generation import answer_all, converse
        from pipeline.generator import Source, open_generator

        source = Source(base, revision, delta, separator, dtype, file)
        generator = open_generator(source, decoding, too_long, joined, screen)
        if asked:
            answer_all(generator, asked, out, as_json)
        else:
            converse(generator)

    as_rank(None, body, as_json=True)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base that the delta was trained on.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A run's folder delta/ or best/.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged checkpoint goes; absent or empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge a delta into its base: an ordinary checkpoint, and merge.json as its certificate.

    Example: zlora merge gpt2-medium runs/gpt2_medium_lora/delta --out merged
    """
    from pipeline.deltas.merge import CERTIFICATE
    from pipeline.deltas.merge import merge as merge_files
    from pipeline.screen import Screen
    from pipeline.weights.hub import local_base

    screen = Screen(sys.stderr)
    certificate = merge_files(local_base(base, revision), delta, out, lambda items: screen.progress("merging", items))
    if as_json:
        print(json.dumps(certificate))
        return
    errors = certificate["largest_rounding_error"]
    rows = [
        ("merged", str(out)),
        ("tensors", f"{len(errors)} changed, the others copied byte by byte"),
        ("rounding", f"{max(errors.values()):.3g} at most"),
        ("certificate", str(out / CERTIFICATE)),
    ]
    Screen(sys.stdout).table("done", rows)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A loralib checkpoint, or the folder of a LoRA that PEFT saved.")],
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Folder or hub id of the base that it was trained on.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the delta goes; absent or empty.")],
    alpha: Annotated[float | None, typer.Option(min=0.0, help="Of a loralib checkpoint, which does not hold it.")] = None,
    parts: Annotated[str, typer.Option(metavar="q,v", help="What a loralib checkpoint's pairs of a fused map are of, in its order.")] = "",
    labels: Annotated[
        str, typer.Option(metavar="A,B,C", help="Names of the classes of its head, in its order; LABEL_0, ... when absent.")
    ] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a delta of a checkpoint of loralib's, the paper's own library, or of a LoRA that PEFT saved; its head too.

    Example: zlora import mnli.bin --base roberta-base --alpha 16 --out mnli
    """
    from pipeline.importing import import_delta
    from pipeline.screen import Screen

    chosen, names = (tuple(filter(None, text.split(","))) for text in (parts, labels))
    found = import_delta(source, base, revision, out, alpha, chosen, names)
    if as_json:
        print(json.dumps(found))
        return
    rows = [("delta", found["delta"]), ("modules", str(found["modules"])), ("parameters", f"{found['parameters']:,}")]
    Screen(sys.stdout).table("imported", [*rows, ("head", ", ".join(found["labels"] or found["head"]) or "none")])


@app.command()
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
    as_json: AsJson = False,
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


def _job_of(run: Path, overrides: list[str] | None) -> Job:
    from pipeline.job.read import read_job

    if not (run / "job.toml").is_file():
        raise JobError(f"{run}: not a run folder: it has no job.toml. Name the folder that zlora train wrote.")
    return read_job(run / "job.toml", tuple(overrides or ()))
