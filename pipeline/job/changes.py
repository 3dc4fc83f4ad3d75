"""What differs between the job a run was begun with and the one it is to go on with, and whether it may."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.spec import Job


class Verdict(Enum):
    FREE = "every step so far would have been the same (but for the schedule, where the length of training changes)"
    DELIBERATE = "the state still fits, but the trajectory, or what the best delta is chosen by, becomes another"
    NEVER = "the state does not fit any more"


_FREE = re.compile(
    r"train\.(epochs|steps|save_every_steps|keep_states|micro_batch_tokens|packing|timeout_s|stop_signals|stop_after_bad_steps)"
    r"|evaluate\..*|memory\.(config|nvme_path|gradient_checkpointing)|cluster\..*|(sweep|published)(\..*)?"
    # Where base and data lie is free: what they hold is compared by digest.
    # Nor does a choice among the valid or test split touch what is trained.
    r"|base\.(model|revision)|task\.(sources\[\d+\]\.)?(data|valid|test|test_categories|section|title)"
)
_MEASURE = re.compile(
    r"evaluate\.(split|script|max_prompts|max_new_tokens|beams|length_penalty|early_stopping|no_repeat_ngram|ngram_scope|eos_tokens"
    r"|temperature|top_k|top_p|seed)|task\.test_categories"
)
"""What a score means: scores of before and after such a change cannot be compared."""
_DELIBERATE = re.compile(
    r"train\.(learning_rate|schedule|warmup_steps|warmup_ratio|weight_decay|adam_betas|adam_eps|clip_norm|label_smoothing|dropout|classifier_dropout)"
    r"|methods\[\d+\]\.dropout|base\.dtype|memory\.int8_gathers"
)


@dataclass(frozen=True)
class Change:
    key: str
    before: Any
    """None where the key was absent."""
    now: Any
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.before)} -> {_shown(self.now)}"


def changes(before: Job, now: Job) -> list[Change]:
    """Every key that differs, in the order of the job's sections."""
    old, new = (flat("", job.model_dump(mode="json")) for job in (before, now))
    chosen = before.evaluate.best_metric is not None
    return [Change(key, old.get(key), new.get(key), _verdict(key, chosen)) for key in {**old, **new} if old.get(key) != new.get(key)]


def measured_otherwise(found: list[Change]) -> bool:
    """Whether the scores so far cannot be compared with those to come."""
    return any(_MEASURE.fullmatch(change.key) for change in found)


def scored_otherwise(before: Job, now: Job) -> dict[str, Any]:
    """The keys in which a scoring differs from those of the run, and their values now; the split apart, which stands beside each score."""
    keys = [change for change in changes(before, now) if _MEASURE.fullmatch(change.key) or change.key.startswith("task.")]
    return {change.key: change.now for change in keys if change.key != "evaluate.split"}


def refuse_changes(found: list[Change], where: str, accept: bool) -> None:
    """Refuses to go on with another job than the run's.

    Args:
        where: the run folder, for the message.
        accept: changes of the trajectory are meant.

    Raises:
        JobError: with every key that stands in the way.
    """
    if never := [change for change in found if change.verdict is Verdict.NEVER]:
        raise JobError(
            f"{where}: holds a run of another job: {_listed(never)}. "
            "Put the job back, use --run for another folder, or --fresh to replace the run."
        )
    deliberate = [change for change in found if change.verdict is Verdict.DELIBERATE]
    if deliberate and not accept:
        raise JobError(
            f"{where}: holds a run of a job with another course: {_listed(deliberate)}. "
            "Put the job back, go on with the change by --accept-changes, or use --run for another folder."
        )


def _verdict(key: str, chosen: bool = False) -> Verdict:
    """Args:
    chosen: the run keeps a best delta, which such a change gives up: it is chosen anew from there on."""
    if chosen and (key == "evaluate.best_metric" or _MEASURE.fullmatch(key)):
        return Verdict.DELIBERATE
    if _FREE.fullmatch(key):
        return Verdict.FREE
    return Verdict.DELIBERATE if _DELIBERATE.fullmatch(key) else Verdict.NEVER


def _listed(found: list[Change]) -> str:
    return "; ".join(map(str, found))


def flat(path: str, value: Any) -> dict[str, Any]:
    match value:
        case dict():
            return {k: v for key, item in value.items() for k, v in flat(f"{path}.{key}" if path else key, item).items()}
        case [{}, *_]:
            return {k: v for place, item in enumerate(value) for k, v in flat(f"{path}[{place}]", item).items()}
        case _:
            return {path: value}


def _shown(value: Any) -> str:
    return "(absent)" if value is None else str(value)
