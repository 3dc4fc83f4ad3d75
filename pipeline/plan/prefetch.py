"""What a memory configuration says of ZeRO-3's gathers, in elements, and the bytes in which a parameter comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.job.zero import one_by_one

INT8_GROUP = 128
"""So many elements share a scale where matrices come in 8 bits."""


@dataclass(frozen=True)
class Prefetch:
    """Of `zero_optimization`, in elements, with DeepSpeed's defaults."""

    bucket: int
    persistence: int
    live: int
    reuse: int
    one_by_one: bool = True

    def keeps(self, elements: int) -> bool:
        """Whether all of a base of so many, but for its tables, may be gathered at once: then micro-batches hand it on."""
        return elements <= min(self.live, self.reuse)


def prefetch_of(zero: dict[str, Any]) -> Prefetch:
    section = zero["zero_optimization"]
    return Prefetch(
        int(section.get("stage3_prefetch_bucket_size", 50_000_000)),
        int(section.get("stage3_param_persistence_threshold", 100_000)),
        int(section.get("stage3_max_live_parameters", 1_000_000_000)),
        int(section.get("stage3_max_reuse_distance", 1_000_000_000)),
        one_by_one(zero),
    )


def sent(element_bytes: int, int8: bool) -> float:
    """Share of a matrix' bytes in which it comes.

    Args:
        int8: in 8 bits, with its scales in fp32.
    """
    return (1 + 4 / INT8_GROUP) / element_bytes if int8 else 1.0


def sent_bytes(elements: int, vectors: int, element_bytes: int, int8: bool) -> int:
    """Args:
    vectors: elements of norms and biases among them.
    """
    return round((elements - vectors) * element_bytes * sent(element_bytes, int8)) + vectors * element_bytes
