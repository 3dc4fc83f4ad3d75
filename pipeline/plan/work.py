"""What a step computes and moves, and how long that takes on given links.

FLOPs by the 4N rule: with the base frozen, each of its elements costs two per token forward and two backward (the gradient of the
activations); there is no gradient of weights, the third pair of the usual 6N. Checkpointing adds the forward pass again.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.hardware import ATTAINED
from pipeline.plan.memory import Memory, Setting


@dataclass(frozen=True)
class Work:
    flops_per_step: float
    """Of all ranks."""
    flops_per_token: float
    gathered_bytes: int
    """What each rank receives of the base in a step."""
    between_nodes_bytes: int
    """What each node receives of it from other nodes in a step."""
    reduced_bytes: int
    """Of the one all-reduce of the gradient."""
    compute_s: float
    communication_s: float
    step_s: float
    """The longer of both: gathers run beside the computation."""
    tokens_to_hide: int
    """Of one rank's micro-batch, for its computation to take as long as its gathers."""


def work(asked: Setting, found: Memory) -> Work:
    """With `ATTAINED` of the GPU's peak rate."""
    gpu, tokens = asked.gpu, asked.batch_examples * asked.example_tokens
    per_token = _flops_per_token(asked)
    rate = ATTAINED * (gpu.single_flops if asked.dtype == "fp32" else gpu.half_flops)
    ranks, nodes, sharers = asked.ranks, asked.nodes, asked.sharers
    one = found.gathered.fetched * asked.element_bytes
    gathered = one * (sharers - 1) // sharers * asked.micro_batches
    # Every node takes in what its own ranks do not hold, once for all of them; nothing where they hold all.
    spanned = 1 if asked.local_ranks % sharers == 0 else max(2, -(-sharers // asked.local_ranks))
    between = one * (spanned - 1) // spanned * asked.micro_batches
    reduced = (asked.trained + 2) * 4
    seconds = gathered / gpu.peers_bytes_s + between / gpu.node_bytes_s
    if asked.offload:
        own = one // sharers * asked.micro_batches
        seconds += own / gpu.host_bytes_s
        seconds += own * asked.local_ranks / gpu.disk_bytes_s if asked.offload == "nvme" else 0
    slowest = gpu.node_bytes_s if nodes > 1 else gpu.peers_bytes_s
    reduce_s = 2 * reduced / slowest if ranks > 1 else 0.0
    # A rank's share cannot be cut below a micro-batch's longest example; steps of fewer examples than ranks leave some idle.
    busy = min(ranks, asked.batch_examples)
    compute = tokens * per_token / busy / rate
    hide = seconds / asked.micro_batches * rate / per_token
    flops = tokens * per_token
    return Work(flops, per_token, gathered, between, reduced, compute, seconds + reduce_s, max(compute, seconds) + reduce_s, round(hide))


def _flops_per_token(asked: Setting) -> float:
    shape = asked.shape
    # Scores and sums over half of an example's tokens on average, causal; twice as much again backward.
    attention = 2 * 2 * shape.layers * shape.heads * shape.head_width * asked.example_tokens / 2
    forward = 2 * shape.matmul_parameters + attention
    backward = 2 * shape.matmul_parameters + 2 * attention
    # Logits, and in the same pass the gradient of the hidden states.
    head = 0 if asked.head_outputs else 4 * shape.vocabulary * shape.width
    return forward + backward + head + 6 * asked.trained + (forward if asked.checkpointing else 0)
