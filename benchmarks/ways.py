"""The ways that are measured side by side, each in fresh processes: `zlora`, its peer (PEFT + Trainer + DeepSpeed ZeRO-3), the bare step.

In: a `Setup`. Out: a `Run`: when each step ended, its loss, bytes gathered, memory of each rank. All take the same steps: the same
examples, the same first A, AdamW at a constant learning rate, gradients clipped at 1, loss summed over the target tokens and divided by
their number in the whole step. The first steps (`warm_up`) have the same examples each, so losses are compared there; in the timed ones the
peer has the very same examples grouped by length.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from pipeline.cluster.launch import CPU_RANK
from pipeline.job.zero import deepspeed_config
from pipeline.tasks.e2e import linearise

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "ds_configs"
FILMS = HERE.parent / "jobs" / "demo" / "data" / "films" / "train.jsonl"
ALPHA, LEARNING_RATE = 32, 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
END = "<|endoftext|>"
VOCABULARY = 1500
"""Of the tokenizer that is made from the data: with so many tokens an example of E2E is about as long as with GPT-2's."""
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
QUIET |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ALLOCATOR = {name: value for name, value in CPU_RANK.items() if name not in QUIET}
"""What `zlora train` sets for its ranks; the peer and the bare step get the same."""
JOB = """
[base]
model = "{base}"
dtype = "{dtype}"
[[methods]]
kind = "lora"
targets = {targets}
rank = {rank}
alpha = {alpha}
[task]
kind = "jsonl"
data = "{data}"
separator = "{end}"
[train]
steps = {steps}
batch_examples = {examples}
micro_batch_tokens = {micro_batch_tokens}
learning_rate = {learning_rate}
schedule = "constant"
save_every_steps = {save_every_steps}
[memory]
config = "{memory}"
"""


@dataclass(frozen=True)
class Shape:
    """A base to be made, and what is adapted in it."""

    config: PreTrainedConfig
    ours: tuple[str, ...]
    """Targets: whole modules, so that both train the same A and B."""
    peer: tuple[str, ...]
    fan_in_fan_out: bool = False


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Ours has the base's own off, as the paper does; the peer's is what the base says."""
SHAPES = {
    "gpt2-small": Shape(GPT2Config(n_layer=6, n_embd=384, n_head=6, **NO_DROPOUT), ("c_attn",), ("c_attn",), True),
    "gpt2": Shape(GPT2Config(**NO_DROPOUT), ("c_attn",), ("c_attn",), True),
    "llama": Shape(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=4096,
        ),
        ("q", "v"),
        ("q_proj", "v_proj"),
    ),
}
"""30M, 124M and 101M parameters."""


@dataclass(frozen=True)
class Setup:
    shape: str
    base: Path
    data: Path
    """JSON lines of prompt and completion."""
    folder: Path
    """For what the ways write."""
    dtype: str
    ranks: int
    examples: int
    """Of a step."""
    warm_up: int
    """Steps before the timed ones: ZeRO-3 records its trace, and losses are compared."""
    steps: int
    """Timed."""
    micro_batch_tokens: int = 4096
    save_every_steps: int = 0
    """0: the peer saves nothing, ours at its end."""
    device: str = "cpu"
    rank: int = 4
    memory: str = "zero3.json"
    """A file of ds_configs/; the peer has its stage and where it keeps parameters."""

    @property
    def environment(self) -> dict[str, str]:
        """Of every process; what `zlora train` sets for its own ranks of a CPU comes to the others from `ALLOCATOR`."""
        return QUIET if self.device == "cpu" else {name: QUIET[name] for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")}


@dataclass(frozen=True)
class Run:
    """One way, once."""

    setup: Setup
    started: float
    reports: list[dict[str, Any]]
    """Of each rank."""

    @cached_property
    def losses(self) -> list[float]:
        """Of each step over all ranks. Ours knows that on every rank; a peer's rank knows its part, times ranks; a bare part its own."""
        return [sum(each) / len(each) for each in zip(*(report["losses"] for report in self.reports), strict=True)]

    @property
    def first_step_s(self) -> float:
        """From the process' start to the end of the first step."""
        return max(report["ends"][0] for report in self.reports) - self.started

    @property
    def step_s(self) -> float:
        """Mean of the timed steps, of the slowest rank."""
        return max(report["ends"][-1] - report["ends"][self.setup.warm_up - 1] for report in self.reports) / self.setup.steps

    def summary(self) -> dict[str, Any]:
        last = [report["gathered_bytes"][-1] for report in self.reports]
        return {
            "step_s": self.step_s,
            "examples_per_s": self.setup.examples / self.step_s,
            "first_step_s": self.first_step_s,
            "gpu_peak_bytes": [report["gpu_peak_bytes"] for report in self.reports],
            "peak_bytes": [report["peak_bytes"] for report in self.reports],
            "peak_steps_bytes": [report["peak_steps_bytes"] for report in self.reports],
            "base_bytes": [report["base_bytes"] for report in self.reports],
            "gathered_bytes": max(last),
            "gathers": max(report["gathers"][-1] for report in self.reports),
            "sent_bytes": max(report["sent_bytes"][-1] for report in self.reports),
            "losses": self.losses[: self.setup.warm_up],
        }


def make_data(file: Path, folder: Path) -> Path:
    """E2E's training file as JSON lines, so that both ways read the same prompts."""
    with file.open(encoding="utf-8", newline="") as rows, (folder / "e2e.jsonl").open("w", encoding="utf-8") as out:
        for row in csv.DictReader(rows):
            out.write(json.dumps({"prompt": linearise(row["mr"]), "completion": f" {row['ref'].strip()}"}) + "\n")
    return folder / "e2e.jsonl"


def make_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte pairs as GPT-2's, learnt from the data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    rows = map(json.loads, data.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def make_base(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, dtype: str = "fp32", device: str = "cpu") -> Path:
    """Random weights, and the tokenizer."""
    logging.disable_progress_bar()
    torch.manual_seed(1)
    end = tokenizer.eos_token_id
    config.bos_token_id = config.eos_token_id = end
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_ours(setup: Setup) -> Run:
    out, job = _fresh(setup.folder / "ours"), setup.folder / "job.toml"
    job.write_text(
        JOB.format(
            base=setup.base,
            dtype=setup.dtype,
            targets=json.dumps(SHAPES[setup.shape].ours),
            rank=setup.rank,
            memory=setup.memory,
            alpha=ALPHA,
            data=setup.data,
            end=END,
            steps=setup.warm_up + setup.steps,
            save_every_steps=setup.save_every_steps or setup.warm_up + setup.steps,
            examples=setup.examples,
            micro_batch_tokens=setup.micro_batch_tokens,
            learning_rate=LEARNING_RATE,
        )
    )
    words = [HERE / "ours.py", setup.folder, "train", job, "--run", out / "run", "--fresh", "--ranks", setup.ranks]
    started = start([words], setup.environment | {"XDG_CACHE_HOME": str(setup.folder.parent / "cache")})
    return _collected(setup, started, setup.folder)


def run_peer(setup: Setup, workers: int = 0, allocator: bool = True, grouped: bool = True) -> Run:
    out, shape = _fresh(setup.folder / "peer"), SHAPES[setup.shape]
    given = json.loads((setup.folder / "given.json").read_text())
    spec = _spec(setup) | {
        "data": str(setup.data),
        "targets": shape.peer,
        "config": peer_config(setup),
        "examples_a_rank": setup.examples // setup.ranks,
        "steps": setup.warm_up + setup.steps,
        "save_steps": setup.save_every_steps,
        "workers": workers,
        "indices": order(given, setup) if grouped else [one["index"] for step in given for one in step],
    }
    file = setup.folder / "peer.json"
    file.write_text(json.dumps(spec))
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setup.ranks}", HERE / "peer.py", file, out]
    cache = {"HF_DATASETS_CACHE": str(setup.folder.parent / "datasets")}
    started = start([words], setup.environment | cache | (ALLOCATOR if allocator else {}))
    return _collected(setup, started, out)


def run_bare(setup: Setup) -> Run:
    """As many side by side as the setup has ranks."""
    out, file = _fresh(setup.folder / "bare"), setup.folder / "bare.json"
    file.write_text(json.dumps(_spec(setup)))
    started = start([[HERE / "bare.py", file, out, part, setup.ranks] for part in range(setup.ranks)], QUIET | ALLOCATOR)
    run = _collected(setup, started, out)
    # The parts' losses are shares of the whole step's; `Run` takes a mean.
    for report in run.reports:
        report["losses"] = [loss * setup.ranks for loss in report["losses"]]
    return run


def peer_config(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's part of what Trainer's documentation shows: `auto` lets Trainer set prefetching and persistence from the base's width.

    It gathers one by one as ours does, which its users would have to know of: the peer is to have what is best for it.
    """
    zero = {**deepspeed_config(CONFIGS / setup.memory)["zero_optimization"], "reduce_bucket_size": "auto"}
    zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    # No train_batch_size: Trainer's own is of all ranks, and the base is loaded before DeepSpeed knows of them.
    half = {name: {"enabled": setup.dtype == name} for name in ("bf16", "fp16")}
    return {"zero_optimization": zero, **half, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}


def order(given: list[list[dict]], setup: Setup) -> list[int]:
    """Indices of the peer's examples: the first steps as they are, then the timed ones' grouped by length and shuffled by step.

    Each rank's part of a step is as long as the others': neighbours in length go to different ranks.
    """
    indices = [one["index"] for step in given[: setup.warm_up] for one in step]
    pool = sorted((one for step in given[setup.warm_up :] for one in step), key=lambda one: len(one["tokens"]))
    groups = [pool[first : first + setup.examples] for first in range(0, len(pool), setup.examples)]
    random.Random(1).shuffle(groups)
    return indices + [one["index"] for group in groups for rank in range(setup.ranks) for one in group[rank :: setup.ranks]]


def start(commands: list[list[object]], environment: dict[str, str]) -> float:
    """Runs commands of this Python's side by side to their end; seconds since the epoch when they began."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as said:
        started = time.time()
        options: dict[str, Any] = {"stdout": said, "stderr": said, "env": {**os.environ, "PYTHONPATH": path, **environment}}
        running = [subprocess.Popen([sys.executable, *map(str, words)], **options) for words in commands]
        codes = [process.wait() for process in running]
        if any(codes):
            said.seek(0)
            raise SystemExit(said.read()[-6000:])
    return started


def tokens_of(setup: Setup) -> dict[str, float]:
    """Of the timed steps, in the mean."""
    given = json.loads((setup.folder / "given.json").read_text())[setup.warm_up :]
    lengths = [len(one["tokens"]) for step in given for one in step]
    targets = [len(one["tokens"]) - one["learnt_from"] for step in given for one in step]
    return {"tokens": sum(lengths) / len(given), "target_tokens": sum(targets) / len(given), "longest": max(lengths)}


def _spec(setup: Setup) -> dict[str, Any]:
    folder = setup.folder
    return {
        "base": str(setup.base),
        "dtype": setup.dtype,
        "rank": setup.rank,
        "device": setup.device,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "fan_in_fan_out": SHAPES[setup.shape].fan_in_fan_out,
        "given": str(folder / "given.json"),
        "a": str(folder / "a.safetensors"),
        "warm_up": setup.warm_up,
        "micro_batch_tokens": setup.micro_batch_tokens,
    }


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _collected(setup: Setup, started: float, out: Path) -> Run:
    return Run(setup, started, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(setup.ranks)])
