"""`zlora plan`: a job and a GPU's name -> what it needs and what fits, as one object for programs (tables.py shows it). No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.files import AUTO
from pipeline.job.labels import labels_of
from pipeline.job.spec import Job, Train
from pipeline.job.task import Mix
from pipeline.job.zero import deepspeed_config
from pipeline.plan.answers import changes, fewest_gpus, fits, largest_generation_batch, largest_micro_batch, on
from pipeline.plan.choose import choose
from pipeline.plan.examples import Examples, examples_of, steps_of
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import ATTAINED, gpu_of, gpus
from pipeline.plan.lint import lint, mended
from pipeline.plan.memory import Setting, beside, memory, setting
from pipeline.plan.paper import figures, is_gpt3
from pipeline.plan.price import Price, price_of
from pipeline.plan.work import work
from pipeline.weights.hub import local_config

SCHEMA_VERSION = 2


def make_plan(
    job: Job,
    gpu: str,
    ranks: int | None,
    nodes: int | None,
    example_tokens: int | None,
    examples: int | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """The whole plan, ready for JSON.

    Args:
        ranks: GPUs in all. None: the fewest on which the job fits; 8 where it fits on none.
        nodes: None: as few as hold them.
        example_tokens: tokens of an example. None: the longest there can be.
        examples: of the training set. None: as many as are known of.
        price: of a GPU hour. None: the settings'.

    Raises:
        JobError: an unknown GPU or target; more nodes than GPUs; bf16 on a V100; an encoder for a task of text; examples longer than
            a micro-batch; a base without the keys that make a shape.
    """
    row = gpu_of(gpu).shared_by(-(-(ranks or 1) // (nodes or 1)))
    if job.base.dtype == "bf16" and not row.bf16:
        raise JobError(f'base.dtype = "bf16": {row.name} does not compute in bf16. Use --set base.dtype=fp16.')
    if nodes and ranks and nodes > ranks:
        raise JobError(f"--nodes {nodes}: more than the {ranks} GPUs of --gpus. Name the GPUs of all nodes together.")
    first = job.task.sources[0] if isinstance(job.task, Mix) else job.task
    labels = labels_of(first)
    folder = local_config(job.base.model, job.base.revision)
    auto, config = job.memory.config == AUTO, Path(job.memory.config)
    shape, zero = read_shape(folder), None if auto else deepspeed_config(config, job.memory.nvme_path, lenient=True)
    written = None if auto else json.loads(config.read_text(encoding="utf-8"))
    if shape.head is None and labels == ():
        raise JobError(
            f"base.model: {shape.family} is an encoder, which generates no text. Use a decoder, or give it a task with labels: "
            '"glue", "classification", "regression".'
        )
    asked = setting(job, zero, shape, row, ranks or 1, nodes, 1 if labels is None else len(labels), example_tokens)
    if asked.example_tokens > asked.micro_batch_tokens:
        raise JobError(
            f"train.micro_batch_tokens = {asked.micro_batch_tokens}: an example may have {asked.example_tokens} tokens. "
            "Set it to that or more, set train.max_tokens, or give --example-tokens."
        )
    if ranks and asked.group and ranks % asked.group:
        raise JobError(f"--gpus {ranks}: zero_hpz_partition_size = {asked.group} does not divide them. Use a multiple of it, or change it.")
    fewest = fewest_gpus(asked, row)
    if ranks is None:
        asked = on(asked, row, fewest or row.per_node)
        asked = replace(asked, nodes=nodes or asked.nodes)
    known = Examples(examples, "--examples") if examples else examples_of(job.task)
    return _plan(job, asked, written, fewest, known, price_of(row.name, price))


def _plan(
    job: Job, asked: Setting, written: dict[str, Any] | None, fewest: int | None, known: Examples | None, price: Price | None
) -> dict[str, Any]:
    open_question, choice = asked, choose(asked) if written is None else None
    asked = choice.setting if choice else asked
    found, needs = memory(asked), beside(asked)
    done = work(asked, found)
    only_lora = [method.kind for method in job.methods] == ["lora"]
    found_wanting = lint(asked, written) if written else []
    return {
        "schema_version": SCHEMA_VERSION,
        "base": {
            "model": job.base.model,
            "family": asked.shape.family,
            "parameters": asked.shape.parameters,
            "bytes": asked.base_bytes,
        },
        "methods": [method.kind for method in job.methods],
        "notes": _notes(asked),
        "setting": {
            "gpu": asked.gpu.name,
            "gpus": asked.ranks,
            "nodes": asked.nodes,
            "dtype": asked.dtype,
            "zero_stage": asked.stage,
            "group": asked.group,
            "offload": asked.offload,
            "int8_gathers": asked.int8_gathers,
            "gradient_checkpointing": asked.checkpointing,
            "micro_batch_tokens": asked.micro_batch_tokens,
            "generation_batch_tokens": asked.decoding.batch_tokens,
            "batch_examples": asked.batch_examples,
            "example_tokens": asked.example_tokens,
        },
        "fits": fits(asked),
        "capacity_bytes": asked.gpu.memory_bytes,
        "peak_bytes": found.peak,
        "parts_bytes": found.parts,
        "activations_bytes": {
            "kept": memory(replace(asked, checkpointing=False)).parts["activations"],
            "recomputed": memory(replace(asked, checkpointing=True)).parts["activations"],
        },
        "phases_bytes": found.phases,
        "scoring_gathers_once": found.gathers_once,
        "trained_parameters": asked.trained,
        "beside_bytes": asdict(needs),
        "communication": {
            "gathered_bytes_per_step": done.gathered_bytes,
            "exchanged_bytes_per_step": done.exchanged_bytes,
            "between_nodes_bytes_per_step": done.between_nodes_bytes,
            "reduced_bytes_per_step": done.reduced_bytes,
            "tokens_to_hide": done.tokens_to_hide,
            "seconds_per_step": done.communication_s,
        },
        "work": {
            "flops_per_step": done.flops_per_step,
            "micro_batches_per_rank": asked.micro_batches,
            "compute_s": done.compute_s,
            "step_s": done.step_s,
            "attained_share": ATTAINED,
        },
        "whole_run": _whole_run(job.train, done.step_s * asked.ranks, known, price),
        "answers": {
            "fewest_gpus": {name: fewest if name == asked.gpu.name else fewest_gpus(open_question, row) for name, row in gpus().items()},
            "largest_micro_batch_tokens": largest_micro_batch(asked),
            "largest_generation_batch_tokens": None if asked.head_outputs else largest_generation_batch(asked),
            "changes": [asdict(change) for change in changes(asked)],
        },
        "chosen": choice and {"config": choice.config, "reasons": choice.reasons},
        "lint": {
            "file": job.memory.config,
            "findings": [asdict(finding) for finding in found_wanting],
            "mended": mended(written, found_wanting) if written and found_wanting else None,
        },
        "paper": [asdict(figure) for figure in figures(asked)] if is_gpt3(asked) and only_lora else None,
        "arithmetic": _arithmetic(asked),
    }


def _notes(asked: Setting) -> list[str]:
    """What of the plan is a guess."""
    embeddings, notes = asked.adapted.embeddings, list(asked.shape.notes)
    if asked.int8_gathers:
        notes.append("int8 gathers: what rounding and its temporaries take is not counted")
    if asked.checkpointing and asked.shape.family == "deberta-v2" and (embeddings.weights or embeddings.biases):
        # pipeline/model/build.py recomputes in another way there.
        more = "its relative positions are trained: with recomputing, up to twice as many bytes are gathered as is said"
        notes.append(more)
    return notes


def _whole_run(train: Train, step_gpu_s: float, known: Examples | None, price: Price | None) -> dict[str, Any]:
    """Steps, GPU hours and cost, as far as they are known, and by what."""
    steps = steps_of(train, known.count if known else None)
    hours = None if steps is None else steps * step_gpu_s / 3600
    return {
        "examples": known.count if known else None,
        "examples_from": known.source if known else None,
        "steps": steps,
        "gpu_hours": hours,
        "price_per_gpu_hour": price.per_gpu_hour if price else None,
        "price_from": price.source if price else None,
        "currency": price.currency if price else None,
        "cost": hours * price.per_gpu_hour if hours is not None and price else None,
    }


def _arithmetic(asked: Setting) -> list[dict[str, Any]]:
    """Name, formula and bytes, a line each."""
    found, shape, e = memory(asked), asked.shape, asked.element_bytes
    ranks = asked.sharers
    largest = "layer" if asked.checkpointing else "module"
    lines = [
        ("base shard", f"{shape.parameters:,} parameters x {e} / {ranks}", found.parts["base_shard"]),
        (
            "gathered",
            f"modules in use and ahead, at least a {largest}; small ones always" + ("; their int8" if asked.int8_gathers else ""),
            found.parts["gathered"],
        ),
        ("delta", _counted(asked), found.parts["delta"]),
        ("gradients", "the same", found.parts["gradients"]),
        ("optimizer", "two moments, the delta's size each", found.parts["optimizer"]),
    ]
    lines += [(f"a layer keeps: {term.what}", term.formula, term.bytes) for term in found.activations.terms]
    keeps = "the layers' inputs" if asked.checkpointing else f"{shape.layers} layers"
    lines += [
        ("kept for backward", f"{keeps} and the last norm, {asked.micro_batch_tokens} tokens", found.activations.kept),
        ("logits and loss", "2 fp32 runs of at most 2^25 logits, 3 where there are several", found.activations.logits),
        ("backward at most", "kept, gradients of activations and of weights, what one layer recomputes", found.activations.backward),
    ]
    return [{"what": what, "formula": formula, "bytes": count} for what, formula, count in lines]


def _counted(asked: Setting) -> str:
    """How the delta's bytes come about: of a base's trained weights it is the fp32 master copy."""
    matrices = sum(asked.sharded_matrices)
    whole = f"{asked.trained - matrices:,} parameters x 4"
    return f"{matrices:,} of sharded matrices x 4 / {asked.sharers}, {whole}" if matrices else whole


def write_mended(plan: dict[str, Any], file: Path) -> None:
    """The memory configuration as the plan would have it: the job's own without what costs, or the one chosen.

    Raises:
        JobError: the file is there already.
    """
    told = plan["lint"]
    config = plan["chosen"]["config"] if plan["chosen"] else told["mended"] or json.loads(Path(told["file"]).read_text(encoding="utf-8"))
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(json.dumps(config, indent=2) + "\n")
    except FileExistsError:
        raise JobError(f"--mend {file}: is there already. Name another file.") from None
