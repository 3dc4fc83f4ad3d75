"""The LoRA paper's figures for GPT-3 175B (section 4.2) beside this program's own, each with what it assumes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.memory import Setting

_ADAM_BYTES = 16
"""Mixed precision by Adam: 2 weights, 2 gradient, 4 master, 4 + 4 moments."""


@dataclass(frozen=True)
class Figure:
    what: str
    paper: str
    ours_bytes: int
    assumes: str


def is_gpt3(asked: Setting) -> bool:
    shape = asked.shape
    return (shape.layers, shape.width, shape.vocabulary) == (96, 12288, 50257)


def figures(asked: Setting) -> list[Figure]:
    """Memory and checkpoints of full fine-tuning and of the job's method. Bytes are decimal, as the paper's are."""
    n, trained, half = asked.shape.parameters, asked.trained, 2
    base = n * half
    return [
        Figure(
            "training memory, full fine-tuning with Adam",
            "1.2 TB",
            n * _ADAM_BYTES,
            f"{_ADAM_BYTES} bytes a parameter without activations; 1.2 TB would be 6.8, which the paper does not explain",
        ),
        Figure(
            "training memory, LoRA",
            "350 GB",
            base + trained * 16,
            "base in 16 bits; delta, gradient and two moments in fp32; without activations",
        ),
        Figure("checkpoint, full", "350 GB", base, "16 bits"),
        Figure("checkpoint, LoRA", "35 MB", trained * half, f"{trained:,} parameters in 16 bits; zlora writes fp32, twice that"),
        Figure("100 tasks", "354 GB", base + 100 * trained * half, "one base and 100 deltas in 16 bits; 100 full checkpoints: 35 TB"),
    ]
