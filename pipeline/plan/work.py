"""What a step computes and moves, and how long that takes on given links.

FLOPs by the 4N rule: with the base frozen, each of its elements costs two per token forward and two backward (the gradient of the
activations); the gradient of weights, the third pair of the usual 6N, only where they are trained. Below everything trained there is
no backward pass. Checkpointing adds the forward pass again, and takes the backward pass through all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.plan.hardware import ATTAINED
from pipeline.plan.memory import Memory, Setting
from pipeline.plan.tables import looked_up


@dataclass(frozen=True)
class Work:
    flops_per_step: float
    """Of all ranks."""
    flops_per_token: float
    gathered_bytes: int
    """What each rank receives of the base in a step."""
    between_nodes_bytes: int
    """What each node receives of it, and instead of it, from other nodes in a step."""
    exchanged_bytes: int
    """What each rank receives in a step instead of the vocabulary's tables: looked-up rows, others' hidden states, its own's gradients,
    and the ids, labels and sums that go with them."""
    reduced_bytes: int
    """Of gradients that ranks sum in a step: one all-reduce of what is whole, and for each micro-batch those of trained matrices that are
    sharded."""
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
    swapped, told, table = _exchanged(asked)
    fetched = found.gathered.bytes_in_step(asked.micro_batches, asked.element_bytes, asked.int8_gathers) + table * asked.element_bytes
    stored = (found.gathered.in_step(asked.micro_batches) + table) * asked.element_bytes
    gathered = fetched * (sharers - 1) // sharers
    exchanged = swapped + told
    # Every node takes in what its own ranks do not hold, once for all of them; nothing where they hold all.
    spanned = 1 if asked.local_ranks % sharers == 0 else max(2, -(-sharers // asked.local_ranks))
    between = fetched * (spanned - 1) // spanned
    if spanned > 1:
        # Of what comes from others, that of the other nodes. What all ranks are told comes to a node once.
        between += (asked.local_ranks * swapped + told) * sharers * (spanned - 1) // (spanned * (sharers - 1))
    runs = sum(asked.sharded_matrices)
    whole, scattered = (asked.trained - runs + 2) * 4, runs * 4 * asked.micro_batches
    seconds = (gathered + exchanged) / gpu.peers_bytes_s + between / gpu.node_bytes_s
    if asked.offload:
        own = stored // sharers
        seconds += own / gpu.host_bytes_s
        seconds += own * asked.local_ranks / gpu.disk_bytes_s if asked.offload == "nvme" else 0
    slowest = gpu.node_bytes_s if nodes > 1 else gpu.peers_bytes_s
    # To sum and to hand out again; a matrix's runs stay where they are.
    reduce_s = (2 * whole + scattered) / slowest if ranks > 1 else 0.0
    # A rank's share cannot be cut below a micro-batch's longest example; steps of fewer examples than ranks leave some idle.
    busy = min(ranks, asked.batch_examples)
    compute = tokens * per_token / busy / rate
    hide = seconds / asked.micro_batches * rate / per_token
    flops = tokens * per_token
    return Work(
        flops,
        per_token,
        gathered,
        between,
        exchanged,
        whole + scattered,
        compute,
        seconds + reduce_s,
        max(compute, seconds) + reduce_s,
        round(hide),
    )


def _exchanged(asked: Setting) -> tuple[int, int, int]:
    """Of one rank in a step, with a label on every token.

    Returns:
        Bytes that each other rank sends to this one alone: ids and rows of the embedding, gradients of its hidden states.
        Bytes that each sends to all: its hidden states, labels and sums.
        Elements of the head's table, where that is gathered.
    """
    tokens = min(asked.micro_batch_tokens, -(-asked.batch_examples * asked.example_tokens // asked.ranks))
    rows, ids = looked_up(asked.shape, tokens, asked.sharers) if asked.tables.embedding else (0, 0)
    swapped, told, table = rows * asked.element_bytes + ids, 0, 0
    if loss := asked.loss(tokens):
        swapped += loss.states * asked.element_bytes
        told, table = loss.states * asked.element_bytes + loss.told_bytes, loss.table
    return swapped * asked.micro_batches, told * asked.micro_batches, table * asked.micro_batches


def model_flops(asked: Setting, lengths: Iterable[int], labels: int) -> tuple[float, float]:
    """What a step of examples of these lengths needs, and what recomputing adds to it.

    Args:
        labels: tokens whose logits are computed.
    """
    needed, again = float(labels * _head_flops(asked)), 0.0
    for tokens, count in Counter(lengths).items():
        own, recomputed = _flops_of_token(asked, tokens)
        needed += count * tokens * own
        again += count * tokens * recomputed
    return needed, again


def _flops_per_token(asked: Setting) -> float:
    return sum(_flops_of_token(asked, asked.example_tokens)) + _head_flops(asked)


def _flops_of_token(asked: Setting, example_tokens: int) -> tuple[float, float]:
    """Of the layers, and of their forward pass once more where it is recomputed."""
    shape, layers = asked.shape, asked.adapted.layers
    # Scores and sums over half of an example's tokens on average, causal; twice as much again backward.
    attention = 2 * 2 * shape.heads * shape.head_width * example_tokens / 2
    matrices = 2 * shape.matmul_parameters / shape.layers
    forward = shape.layers * (matrices + attention)
    back = sum(asked.checkpointing or layer.reached or layer.any for layer in layers)
    backward = back * (matrices + 2 * attention) + sum(layer.weights for layer in layers) * matrices
    # What methods add to a layer is multiplied with every token three times.
    added = 6 * sum(layer.layer_parameters(shape) for layer in layers)
    return forward + backward + added, forward if asked.checkpointing else 0.0


def _head_flops(asked: Setting) -> int:
    """Logits of a token, and in the same pass the gradient of the hidden states and of the weight."""
    return 0 if asked.head_outputs else (6 if asked.adapted.end.weights else 4) * asked.shape.vocabulary * asked.shape.width
