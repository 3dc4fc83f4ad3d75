"""Memory of generation, from shapes: what scoring chooses by whether the base is gathered once, and what the plan adds up."""

from __future__ import annotations

from pipeline.job.spec import Decoding

USED = 0.8
"""Share of the free memory that a base gathered once may fill: allocators round up, and activations need room."""


def generation_bytes(layers: int, kv_width: int, vocabulary: int, element_bytes: int, decoding: Decoding) -> int:
    """Keys, values and logits of the largest batch."""
    cached = decoding.batch_tokens * 2 * layers * kv_width * element_bytes
    # A layer's cache grows, and is reordered, by a copy.
    cached += cached // layers
    rows = decoding.batch_tokens // (decoding.max_new_tokens + 1) + 1
    # Logits, their log-softmax and a sorted copy, in fp32.
    return cached + rows * vocabulary * 4 * 3
