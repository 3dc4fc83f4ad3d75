"""Options of several commands; and those that are keys of a job too: a test keeps names, defaults and sentences equal to the job's.

Not made from the job's types: `--help` answers before pydantic could be imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.job.spec import Decoding, Job

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job, a TOML file.")]
RunFolder = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run folder; runs/<job name> when absent.")]
RankCount = Annotated[int | None, typer.Option("--ranks", min=1, help="Ranks to start here; the GPUs, else 1, when absent.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job: train.steps=20.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Files made at a time; the cores when absent.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")]

MaxNewTokens = Annotated[int, typer.Option(help="Longest generated text.")]
Beams = Annotated[int, typer.Option(help="Beam search over so many; 1: greedy.")]
LengthPenalty = Annotated[float, typer.Option(help="A beam's score is its log-probability / new tokens ** this.")]
EarlyStopping = Annotated[bool, typer.Option("--early-stopping", help="End a text's search as soon as `beams` texts are finished.")]
NoRepeatNgram = Annotated[int, typer.Option(help="No run of so many tokens comes twice; 0: no rule.")]
NgramScope = Annotated[Literal["all", "generated"], typer.Option(help="Where runs are looked for.")]
EosTokens = Annotated[list[int] | None, typer.Option(metavar="ID", help="Token ids that end a text, beside the tokenizer's end token.")]
Temperature = Annotated[float, typer.Option(help="Draw tokens from the softmax of logits / temperature; 0: take the likeliest.")]
TopK = Annotated[int, typer.Option(help="Draw from the likeliest so many; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest that have this share together.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens of one batch on one rank.")]
Gather = Annotated[Literal["auto", "once", "each_pass"], typer.Option(help="Under ZeRO-3: the whole base on every rank.")]


def say_of_sweep(file: Path, job: Job) -> None:
    """What a command says that looks at one job, where that stands for many."""
    if job.sweep:
        more = "--set gives it a member's settings, and zlora submit plans every member"
        print(f"note: {file} has a [sweep], and this is of the job as it stands: {more}.", file=sys.stderr)


def decoding_of(given: dict[str, Any]) -> Decoding:
    """The options' values as the job's type.

    Args:
        given: option name -> value, others among them.

    Raises:
        JobError: a value that the job would refuse, by its option.
    """
    from pydantic import ValidationError

    from pipeline.job.spec import Decoding

    values: dict[str, Any] = {name: given[name] if given[name] is not None else () for name in Decoding.model_fields}
    try:
        return Decoding(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:
            raise JobError(f"--beams {values['beams']} --temperature {values['temperature']}: {problem['ctx']['error']}") from None
        option = f"--{str(problem['loc'][0]).replace('_', '-')}"
        message = problem["msg"]
        raise JobError(f"{option} {problem['input']}: {message[:1].lower()}{message[1:]}. Correct the value.") from None
