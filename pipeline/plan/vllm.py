"""What vLLM would refuse of an adapter, said before it is trained or sent: reasons, each with its repair. No torch.

After vLLM's own checks: `PEFTHelper.validate_legal` (vllm/lora/peft_helper.py, docs of v0.10.0 and latest), `from_local_checkpoint` and
`LoRALayerWeights.from_config` (vllm/lora/lora_model.py at 0306474e9d1f), `MaxLoRARanks` (vllm/config/lora.py, docs of v0.22.1) and the LoRA
column of docs/models/supported_models.md. An adapter is padded to `max_lora_rank`, so any rank up to 512 is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.job.labels import labels_of
from pipeline.job.method import Lora
from pipeline.job.spec import Job
from pipeline.job.task import Mix

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_TAKES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "opt", "qwen2", "qwen3")
_TAKES_NONE = ("bert", "deberta-v2", "gpt2", "gpt_neox", "roberta")
_MERGE = "Merge it (zlora merge) and serve the merged checkpoint"


@dataclass(frozen=True)
class Served:
    """What matters of a delta, trained or to be."""

    model_type: str | None
    """None: the base's config is not at hand."""
    others: tuple[str, ...]
    """What is trained beside LoRA, in words."""
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    """alpha / rank of each target."""
    head: bool
    added_tokens: bool


@dataclass(frozen=True)
class Verdict:
    reasons: tuple[str, ...]
    """Why vLLM refuses it, or would compute something else; none: it loads it."""
    notes: tuple[str, ...]
    max_lora_rank: int | None
    """The smallest `--max-lora-rank` that it needs."""

    @property
    def refusal(self) -> str:
        """In one line."""
        return " ".join(f"{place}) {reason}" for place, reason in enumerate(self.reasons, 1))

    @property
    def lines(self) -> list[str]:
        """What a person reads where there is no reason."""
        command = f"vllm serve BASE --enable-lora --max-lora-rank {self.max_lora_rank} --lora-modules NAME=FOLDER"
        return [f"vLLM loads it: {command}", *(f"note: {note}" for note in self.notes)]


def of_job(job: Job, model_type: str | None) -> Served:
    """The delta that a job would train."""
    lora = [method for method in job.methods if isinstance(method, Lora)]
    first = job.task.sources[0] if isinstance(job.task, Mix) else job.task
    return Served(
        model_type,
        tuple(method.kind for method in job.methods if not isinstance(method, Lora)),
        tuple(method.rank_of(target) for method in lora for target in method.targets),
        tuple(method.scale_of(target) for method in lora for target in method.targets),
        labels_of(first) != (),
        bool(job.base.added_tokens),
    )


def judge(served: Served) -> Verdict:
    """What vLLM would say."""
    reasons, notes = [], []
    if served.model_type in _TAKES_NONE:
        reasons.append(f"vLLM has no LoRA for a {served.model_type}. {_MERGE}.")
    elif served.model_type not in _TAKES:
        what = f"a {served.model_type}" if served.model_type else "the base, whose config.json is not at hand,"
        notes.append(f"whether vLLM has LoRA for {what} is not known here; its table of supported models says it")
    if not served.ranks:
        reasons.append(f"vLLM loads LoRA alone, and there is none. {_MERGE}, or train methods.kind = lora.")
    if served.others:
        reasons.append(f"vLLM loads LoRA alone, and {', '.join(served.others)} is trained too. Leave it out, or merge what merges.")
    if served.head:
        reasons.append(f"A head of its own is not taken (modules_to_save). {_MERGE}.")
    if served.added_tokens:
        reasons.append(f"Added tokens are not taken. {_MERGE}.")
    if len(set(served.scales)) > 1:
        told = ", ".join(f"{scale:g}" for scale in sorted(set(served.scales)))
        reasons.append(
            f"Releases of vLLM scale every module by one lora_alpha / r, and these have {told}, so its answers would be others. "
            "Give all targets one alpha / rank, or write one: zlora deltas resize DELTA --rank R."
        )
    largest = max(served.ranks, default=0)
    if largest > MAX_LORA_RANKS[-1]:
        reasons.append(f"Rank {largest} is above the largest max_lora_rank, {MAX_LORA_RANKS[-1]}. zlora deltas resize DELTA --rank 512.")
    fits = next((rank for rank in MAX_LORA_RANKS if rank >= largest), None)
    return Verdict(tuple(reasons), tuple(notes), fits if served.ranks else None)
