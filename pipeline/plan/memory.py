"""Memory of one GPU by part and by phase, and what a run needs beside it. Integers from shapes; each line says where it is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pipeline.job.method import PrefixEmbed, PrefixLayer, trains_matrices
from pipeline.job.spec import Decoding, Job
from pipeline.job.zero import Offload, group_of, offload_of, zero_stage
from pipeline.plan.activations import Activations, activations
from pipeline.plan.adapted import Everywhere, adapt
from pipeline.plan.gathering import Gathered, gathered
from pipeline.plan.generation import USED, generation_bytes
from pipeline.plan.hardware import Gpu
from pipeline.plan.layers import MicroBatch
from pipeline.plan.prefetch import Prefetch, prefetch_of, sent
from pipeline.plan.shapes import Shape
from pipeline.plan.tables import Loss, Tables, loss_of, tables_of
from pipeline.plan.trained import Trained, counted

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
_READ_ELEMENTS = 1 << 20
"""Elements converted at a time while loading (pipeline/weights/read.py)."""
_PROCESS_BYTES = 3 << 30
"""Main memory of a rank's process beside a GPU, libraries and pinned buffers: an assumption."""


@dataclass(frozen=True)
class Setting:
    """All that the plan depends on; a question is another setting."""

    shape: Shape
    adapted: Everywhere
    counts: Trained
    """By the methods."""
    head_outputs: int
    """Of a task's own head; 0: the vocabulary."""
    dtype: str
    gpu: Gpu
    ranks: int
    nodes: int
    stage: int
    offload: Offload | None
    """Shards in main memory, or on a disk of each node."""
    prefetch: Prefetch
    checkpointing: bool
    micro_batch_tokens: int
    dropout: float
    decoding: Decoding
    batch_examples: int
    example_tokens: int
    keep_states: int
    keeps_best: bool
    steps: int | None
    group: int | None = None
    """So many consecutive ranks hold one copy of the base among them. None: all ranks together."""
    trains_matrices: bool = False
    """Of the base: they cannot be sharded within groups."""
    auto: bool = False
    """Stage, group, offload and prefetch are still to be chosen."""
    int8_gathers: bool = False
    """Matrices come from other ranks in 8 bits."""
    nvme_path: str | None = None
    """A folder for shards on disk, where one may be chosen."""
    main_memory_bytes: int | None = None
    """Of a node. None: not known."""

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def sharers(self) -> int:
        """Ranks that hold one copy of the base among them."""
        if self.stage == 0:
            return 1
        return self.group or self.ranks

    @property
    def local_ranks(self) -> int:
        """Of a node."""
        return -(-self.ranks // self.nodes)

    @property
    def copies(self) -> bool:
        """Gathering makes a copy: there are other shards than this rank's, or they are not where it computes."""
        return self.sharers > 1 or (self.stage == 3 and self.offload is not None and self.gpu.name != "cpu")

    @property
    def shard_bytes(self) -> int:
        """Of the base, on one rank."""
        if self.stage != 3:
            return self.base_bytes
        return self.tables.shard_elements(self.shape, self.sharers) * self.element_bytes

    @property
    def tables(self) -> Tables:
        """Those that no rank has whole."""
        return tables_of(self.shape, self.adapted, self.prefetch.persistence) if self.stage == 3 else Tables(False, False)

    def loss(self, labels: int) -> Loss | None:
        """How a micro-batch's loss is computed where no rank has the head's table.

        Args:
            labels: of one rank.
        """
        if self.head_outputs or not self.tables.head:
            return None
        return loss_of(self.shape, labels, self.sharers, bool(self.adapted.end.added_tokens))

    @property
    def trained(self) -> int:
        """Trained elements."""
        return self.counts.parameters + self.shape.head_parameters(self.head_outputs)

    @property
    def trained_on_rank(self) -> int:
        """Of them, those that this rank holds."""
        return self.counts.on_rank(self.sharers) + self.shape.head_parameters(self.head_outputs)

    @property
    def sharded_matrices(self) -> tuple[int, ...]:
        """Trained matrices of the base, in elements, of which every rank has a run."""
        return self.counts.matrices if self.stage == 3 else ()

    @property
    def base_bytes(self) -> int:
        return self.shape.parameters * self.element_bytes

    @property
    def micro_batches(self) -> int:
        """Of one rank in a step."""
        return max(1, -(-self.batch_examples * self.example_tokens // (self.ranks * self.micro_batch_tokens)))


def setting(
    job: Job,
    zero: dict[str, Any] | None,
    shape: Shape,
    gpu: Gpu,
    ranks: int,
    nodes: int | None,
    head_outputs: int,
    example_tokens: int | None,
) -> Setting:
    """Args:
    zero: the memory configuration. None: to be chosen.
    nodes: None: as few as hold the ranks.
    head_outputs: of a task's own head.
    example_tokens: tokens of an example. None: the longest there can be.
    """
    train, auto = job.train, zero is None
    zero = zero or {"zero_optimization": {"stage": 3}}
    added = len(job.base.added_tokens)
    # Special tokens stand in the examples, beside their own (pipeline/tasks/specials.py).
    special = sum(method.prefix_tokens + method.infix_tokens for method in job.methods if isinstance(method, PrefixEmbed | PrefixLayer))
    longest = min(train.max_tokens or shape.context, shape.context - special)
    return Setting(
        shape=shape,
        adapted=adapt(shape, *job.methods, added_tokens=added),
        counts=counted(shape, *job.methods, added_tokens=added),
        head_outputs=head_outputs,
        dtype=job.base.dtype,
        gpu=gpu,
        ranks=ranks,
        nodes=nodes or gpu.nodes_for(ranks),
        stage=zero_stage(zero),
        offload=offload_of(zero),
        prefetch=prefetch_of(zero),
        checkpointing=job.memory.gradient_checkpointing,
        micro_batch_tokens=train.micro_batch_tokens,
        dropout=train.dropout,
        decoding=job.evaluate,
        batch_examples=train.batch_examples,
        example_tokens=(example_tokens or longest) + special,
        keep_states=train.keep_states,
        keeps_best=job.evaluate.best_metric is not None,
        steps=train.steps,
        group=group_of(zero),
        trains_matrices=trains_matrices(job.methods) is not None,
        auto=auto,
        nvme_path=job.memory.nvme_path,
        int8_gathers=job.memory.int8_gathers,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    parts: dict[str, int]
    """Each part at its largest. They do not all come together: `phases` says which do."""
    allocated: dict[str, int]
    """The most in each phase."""
    phases: dict[str, int]
    """The same, context and margin included."""
    activations: Activations
    gathered: Gathered
    gathers_once: bool
    """Scoring gathers the whole base once."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def training_peak(self) -> int:
        return max(count for name, count in self.phases.items() if name != "generate")


def memory(asked: Setting, batch: MicroBatch | None = None) -> Memory:
    """Args:
    batch: the micro-batch. None: a full one of examples of one length, with a label on every token.
    """
    shape, e, gpu = asked.shape, asked.element_bytes, asked.gpu
    batch = batch or _full(asked)
    sharers = asked.sharers if asked.stage == 3 else None
    loss = asked.loss(batch.label_tokens)
    acts = activations(
        shape,
        asked.adapted,
        batch,
        e,
        asked.checkpointing,
        asked.dropout,
        bool(asked.head_outputs),
        sharers,
        loss,
        "cpu" if gpu.name == "cpu" else "cuda",
    )
    if asked.head_outputs:
        acts = replace(acts, logits=batch.label_tokens * (asked.head_outputs + shape.width) * _FP32)
    sharded = asked.stage == 3
    own_head, seen = bool(asked.head_outputs), min(asked.sharers, 8)
    several = asked.micro_batches > 1
    share = sent(e, asked.int8_gathers)
    gathers = (shape, asked.adapted, asked.prefetch, seen, asked.checkpointing, own_head, several, share)
    found = _gathered(*gathers) if asked.copies else _NOTHING
    base = asked.shard_bytes
    # A CPU rank computes where shards in main memory are.
    away = sharded and (asked.offload == "nvme" or (asked.offload == "cpu" and gpu.name != "cpu"))
    on_device = 0 if away else base
    delta = asked.trained_on_rank * _FP32
    # A flat buffer of what is whole, two slots for the loss and the vote, another of the runs; two moments (pipeline/train/step.py).
    gradients, optimizer = delta + 2 * _FP32, 2 * delta
    resident = on_device + delta + gradients + optimizer
    kv_width = shape.kv_heads * shape.head_width
    # Labels are not generated.
    cache = 0 if asked.head_outputs else generation_bytes(shape.layers, kv_width, shape.vocabulary, e, asked.decoding)
    free = gpu.memory_bytes - gpu.context_bytes - resident
    once = asked.copies and {
        "auto": shape.parameters * e + cache <= USED * free, "once": True, "each_pass": False
    }[asked.decoding.gather]  # fmt: skip
    whole = shape.parameters * e if once else found.forward * e
    # Where the embeddings are gathered, there are a few tensors of the hidden states only; at the last norm, beside what is kept.
    few = 3 * batch.tokens * shape.width * e
    used = {
        "load": on_device + min(_READ_ELEMENTS * _FP32, base),
        "forward": resident
        + max(
            acts.kept + acts.forward + found.layers * e,
            acts.kept + few + found.head * e,
            acts.kept + acts.logits + found.loss * e,
            acts.below + found.below * e,
            few + found.start * e,
        ),
        "backward": resident + max(acts.backward + found.backward * e, max(few, acts.finish) + found.finish * e),
        # Fused AdamW works in place; the gathered small parameters stay.
        "step": resident + found.between * e,
        "save": resident + found.between * e + _captured(asked),
        # The prompts' pass, with nothing kept.
        "generate": resident + whole + cache + asked.decoding.batch_tokens * 4 * shape.ffn * e if cache else 0,
        # File to file, in main memory, a few small blocks (pipeline/deltas/pieces.py).
        "merge": 0,
    }
    margin = {name: int(gpu.fragmentation * count) + gpu.context_bytes if count else 0 for name, count in used.items()}
    phases = {name: count + margin[name] for name, count in used.items()}
    parts = {
        "base_shard": on_device,
        "gathered": max(found.forward, found.backward, found.finish) * e,
        "delta": delta,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": max(acts.kept + acts.forward, acts.backward),
        "logits_and_loss": acts.logits,
        "communication_buffers": (asked.trained - sum(asked.sharded_matrices) + 2) * _FP32,
        "generation_cache": cache,
        "margin": max(phases.values()) - max(used.values()) - gpu.context_bytes,
        "context": gpu.context_bytes,
    }
    return Memory(parts, used, phases, acts, found, once)


def _captured(asked: Setting) -> int:
    """Of the first rank's device, while it copies masters and moments to main memory (Stepper.capture)."""
    matrices = asked.sharded_matrices
    largest = max(matrices, default=0) * _FP32
    if asked.gpu.name == "cpu":
        # It is there already.
        return 3 * asked.trained * _FP32 + largest
    # A flat copy of one kind at a time, or a matrix from all ranks.
    return max((asked.trained - sum(matrices)) * _FP32, largest)


def _full(asked: Setting) -> MicroBatch:
    n, length = asked.micro_batch_tokens, asked.example_tokens
    examples = max(1, n // length)
    return MicroBatch(n, n, examples if asked.head_outputs else n, examples, length, n * length)


_NOTHING = Gathered(*[0] * 10)
_gathered = lru_cache(maxsize=64)(gathered)
"""Ranks enter by a few elements of padding only; it is asked for many times with the same."""


@dataclass(frozen=True)
class Beside:
    """Bytes beside the GPUs."""

    host_per_node: int
    nvme_per_node: int
    disk_per_run: int
    base_on_disk: int
    delta_file: int
    state_file: int


def beside(asked: Setting) -> Beside:
    local = asked.local_ranks
    delta, state = asked.trained * _FP32, 3 * asked.trained * _FP32
    if asked.keeps_best:
        state += delta
    held, mapped = (asked.shard_bytes if asked.stage == 3 and asked.offload == place else 0 for place in ("cpu", "nvme"))
    # The first rank holds a copy of the state while it is written behind training (pipeline/train/saver.py), and the one before; a matrix
    # is put together beside them.
    joined = max(asked.sharded_matrices, default=0) * _FP32
    process = asked.gpu.context_bytes if asked.gpu.name == "cpu" else _PROCESS_BYTES
    host = local * (process + held) + 2 * state + joined
    # A state is written before the oldest goes.
    deltas = delta * (2 if asked.keeps_best else 1)
    return Beside(host, local * mapped, (asked.keep_states + 1) * state + deltas, asked.base_bytes, delta, state)
