"""Writes docs/scaling.md from the plan: `python docs/make_scaling.py`. A test keeps the two equal. No torch, no GPU."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.job.spec import Job
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import ATTAINED, GIB, gpu_of
from pipeline.plan.lint import lean_prefetch
from pipeline.plan.memory import Memory, Setting, memory, setting
from pipeline.plan.shapes import Shape
from pipeline.plan.work import Work, work

TARGET = Path(__file__).parent / "scaling.md"
GPT3 = Path(__file__).parents[1] / "pipeline" / "plan" / "bases" / "gpt3-175b"
COUNTS, NODE = (8, 16, 32, 64, 128, 256, 512), 8
GPUS = {"v100-32g": "V100-32", "a100-80g": "A100-80"}
LONG, SHORT = 2048, 512
"""Tokens of a micro-batch, which is one example; a step is one micro-batch on every GPU."""
COLUMNS = (
    *("GPUs", "sharded over", "memory GiB", "gathered GB", "exchanged GB", "between nodes GB", "to hide"),
    *("step s", "tokens/s", f"at {SHORT}"),
)
_LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": False, "vocab_size": 32000}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
HEAD = f"""# Scaling

What the plan says of bases of 7B and 70B (the shapes of Llama 2) and of 175B (GPT-3) on 8 to 512 GPUs: memory, bytes that move, and how
fast it would be. No step of these has been run: it is arithmetic on shapes, made by `docs/make_scaling.py`. That the bytes are counted
rightly is measured on small bases: [benchmarks/scaling.py](../benchmarks/README.md) takes steps on 1, 2, 4 and 8 gloo ranks, with groups
and without, and every count must be the plan's to the byte.

**Assumed.** LoRA of rank 16 on q, k, v, o; fp16 on V100, bf16 on A100; activations recomputed; a step is one micro-batch of {LONG:,}
tokens on every GPU, so it grows with the GPUs; memory configuration as `"auto"` makes it (a layer gathered ahead, nothing kept longer
than it is used). {NODE} GPUs a node; to their peers 150 GB/s (V100) and 300 GB/s (A100), between nodes 50 and 200 GB/s a node, in one
direction; all of them the makers' figures, reached in full. Computing reaches {ATTAINED:.0%} of the maker's dense rate, and gathers run
beside it: a step takes the longer of both. Correct these by one measured step (`zlora profile`), and by `zlora doctor --nodes N` for
the links. Host memory, disks and the queue are not in it.

**Columns.** *sharded over*: the GPUs of a node (`zero_hpz_partition_size = {NODE}`: each node holds a copy of the base) or all.
*memory*: the most of a training step on a GPU, context and margin included; **bold** does not fit. *gathered*: what a GPU receives of
the base in a step, from its node and from others. *exchanged*: what it receives in place of the vocabulary's tables. *between nodes*:
what a node takes in from others, once for all its GPUs. *to hide*: tokens of a micro-batch from which on computing takes longer than
these. *tokens/s*: of all GPUs; *at {SHORT}*: with micro-batches of {SHORT} tokens. GB are 10^9 bytes, GiB 2^30. A way that does not fit
has no speed.
"""
TAIL = """## What to choose

1. **Whole on every GPU, if it fits** (`zero0.json`): nothing is gathered, and all that crosses nodes is the delta's gradient.
2. **Else within nodes** (`zero3_node.json`), if a node holds the base beside activations: nothing of the base crosses nodes, a GPU's
   memory and what it receives do not depend on the number of nodes, and short micro-batches keep their speed.
3. **Else over all GPUs** (`zero3.json`): memory falls as nodes are added, but never below activations and the gathered layers; traffic
   between nodes rises towards the whole base twice a step (once a pass) and per micro-batch. From 64 GPUs on it hardly changes: (N - 1)
   / N of it.
4. **Make micro-batches at least as long as *to hide* says**, with a factor of two or three for links that do not reach their figures.
   More micro-batches in a step do not help: each gathers again, unless the configuration lets the whole base be gathered at once
   (`max_live_parameters`, `max_reuse_distance`); then one gather serves all of a step.

`memory.config = "auto"` goes through 1, 2 and 3 for your job, and `zlora plan JOB --gpus N` prints these numbers for it.
"""


@dataclass(frozen=True)
class Row:
    asked: Setting
    found: Memory
    done: Work

    @property
    def within(self) -> bool:
        """Sharded over a node's GPUs."""
        return self.asked.sharers == NODE

    @property
    def fits(self) -> bool:
        return self.found.training_peak <= self.asked.gpu.memory_bytes

    @property
    def memory_gib(self) -> float:
        return self.found.training_peak / GIB

    @property
    def tokens_s(self) -> float:
        return self.asked.batch_examples * self.asked.example_tokens / self.done.step_s

    @property
    def short_tokens_s(self) -> float:
        """With the short micro-batches."""
        short = replace(self.asked, example_tokens=SHORT, micro_batch_tokens=SHORT)
        return short.batch_examples * SHORT / work(short, memory(short)).step_s


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for name, shape in shapes().items():
        for gpu, title in GPUS.items():
            found = rows(shape, gpu)
            lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *map(line, found)]
            parts.append("\n".join([f"## {name} on {title}", "", *lines, "", reading(found), ""]))
    return "\n".join([*parts, TAIL])


def shapes() -> dict[str, Shape]:
    """Of the bases, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, sizes in (("7B", _7B), ("70B", _70B)):
            (Path(scratch) / "config.json").write_text(json.dumps(_LLAMA | sizes), encoding="utf-8")
            found[name] = read_shape(Path(scratch))
    return found | {"175B": read_shape(GPT3)}


def rows(shape: Shape, gpu: str) -> list[Row]:
    return [row_of(shape, gpu, count, group) for count in COUNTS for group in ((NODE, None) if count > NODE else (None,))]


def row_of(shape: Shape, gpu: str, count: int, group: int | None) -> Row:
    card = gpu_of(gpu)
    job = Job.model_validate(
        {
            "base": {"model": "base", "dtype": "bf16" if card.bf16 else "fp16"},
            "methods": [{"kind": "lora", "rank": 16, "targets": ["q", "k", "v", "o"]}],
            "task": {"kind": "jsonl", "data": "train.jsonl"},
            "train": {"batch_examples": count, "max_tokens": LONG, "micro_batch_tokens": LONG},
            "memory": {"gradient_checkpointing": True},
        }
    )
    asked = setting(job, {"zero_optimization": {"stage": 3}}, shape, card, count, None, 0, None)
    asked = replace(asked, group=group, prefetch=lean_prefetch(asked))
    found = memory(asked)
    return Row(asked, found, work(asked, found))


def line(row: Row) -> str:
    moved = row.done
    cells = [
        str(row.asked.ranks),
        "a node" if row.within else "all",
        f"{row.memory_gib:.1f}" if row.fits else f"**{row.memory_gib:.1f}**",
        f"{moved.gathered_bytes / 1e9:.1f}",
        f"{moved.exchanged_bytes / 1e9:.2f}",
        f"{moved.between_nodes_bytes / 1e9:.1f}",
        f"{moved.tokens_to_hide:,}",
        *([f"{moved.step_s:.2f}", f"{row.tokens_s:,.0f}", f"{row.short_tokens_s:,.0f}"] if row.fits else ["-"] * 3),
    ]
    return f"| {' | '.join(cells)} |"


def reading(found: list[Row]) -> str:
    """What a table says, in sentences."""
    within, over = [row for row in found if row.within], [row for row in found if not row.within]
    node, first, last = within[0], over[0], over[-1]
    card = node.asked.gpu
    said = [
        f"Within a node a GPU needs {node.memory_gib:.1f} of {card.memory_bytes / GIB:.0f} GiB however many nodes there are"
        + ("; " if node.fits else ", which is too much; ")
        + f"over all GPUs {first.memory_gib:.1f} GiB on {first.asked.ranks} and {last.memory_gib:.1f} on {last.asked.ranks}, of which "
        f"{last.found.parts['base_shard'] / GIB:.1f} are its shard."
    ]
    said.append(
        f"Over all GPUs a node takes in {first.done.between_nodes_bytes / 1e9:,.0f} GB a step on two nodes and "
        f"{last.done.between_nodes_bytes / 1e9:,.0f} GB on {last.asked.nodes}, within nodes none; "
        f"micro-batches of {last.done.tokens_to_hide:,} tokens hide it there, of {node.done.tokens_to_hide:,} within a node."
    )
    fitting = [row for row in over if row.fits]
    if node.fits and fitting:
        share = last.short_tokens_s / within[-1].short_tokens_s
        said.append(
            f"So with {LONG:,} tokens both are as fast, and with {SHORT} sharding over all {last.asked.ranks} GPUs reaches "
            f"{share:.0%} of the other's speed."
        )
    whole = replace(node.asked, stage=0)
    if memory(whole).training_peak <= card.memory_bytes:
        said.append(
            f"But the base fits whole, in {memory(whole).training_peak / GIB:.1f} GiB: choose that, and nothing is gathered at all."
        )
    elif node.fits:
        said.append("Choose groups of a node's GPUs: there is room, and the network between nodes is left to the gradient.")
    elif fitting:
        least = fitting[0]
        said.append(
            f"Choose all GPUs, from {least.asked.ranks} on, and micro-batches longer than {last.done.tokens_to_hide:,} tokens by as much "
            "as the network between nodes is slower than assumed."
        )
    else:
        said.append("Neither fits: shards in main memory (`zero3_offload.json`), shorter micro-batches, or larger GPUs.")
    return "\n".join(said)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
