"""A plan as tables for people."""

from __future__ import annotations

import json
from itertools import zip_longest
from typing import Any

from pipeline.plan.memory import Memory, Setting
from pipeline.plan.work import Work
from pipeline.screen import Screen, size_text


def show_plan(plan: dict[str, Any], screen: Screen, explain: bool) -> None:
    """Tables for people."""
    asked, base, answers = plan["setting"], plan["base"], plan["answers"]
    verdict = "fits" if plan["fits"] else "does not fit"
    screen.table(
        f"{base['model']}: {base['parameters']:,} parameters, {plan['trained_parameters']:,} trained",
        [
            ("on", f"{asked['gpus']} x {asked['gpu']} on {asked['nodes']} node{'s' if asked['nodes'] > 1 else ''}, {asked['dtype']}"),
            ("trains by", " + ".join(plan["methods"])),
            (verdict, f"{size_text(plan['peak_bytes'])} of {size_text(plan['capacity_bytes'])} a GPU"),
            ("micro-batch", f"{asked['micro_batch_tokens']:,} tokens; largest that fits: {_count(answers['largest_micro_batch_tokens'])}"),
            *_generation(plan),
        ],
    )
    if plan["notes"]:
        screen.table("to be taken with care", [("note", note) for note in plan["notes"]])
    screen.table("memory of a GPU, by part", [(_words(name), _part(plan, name)) for name, count in plan["parts_bytes"].items() if count])
    screen.table("at most, by phase", [(name, size_text(count)) for name, count in plan["phases_bytes"].items() if count])
    moved, done, needs = plan["communication"], plan["work"], plan["beside_bytes"]
    tokens = asked["batch_examples"] * asked["example_tokens"]
    instead = moved["exchanged_bytes_per_step"]
    bound = "computing" if done["compute_s"] >= moved["seconds_per_step"] else "gathering"
    screen.table(
        f"a step of {asked['batch_examples']} examples of {asked['example_tokens']} tokens",
        [
            ("computes", f"{done['flops_per_step'] / 1e12:,.1f} TFLOP, {done['micro_batches_per_rank']} micro-batches a rank"),
            ("gathers", f"{size_text(moved['gathered_bytes_per_step'])} a rank{_from_others(plan)}"),
            *([("exchanges", f"{size_text(instead)} a rank instead of the vocabulary's tables")] if instead else []),
            *([("sums", f"{size_text(moved['reduced_bytes_per_step'])} of gradients")] if asked["gpus"] > 1 else []),
            ("hidden from", f"{moved['tokens_to_hide']:,} tokens a micro-batch on"),
            ("takes", f"{done['step_s']:.3g} s ({tokens / done['step_s']:,.0f} tokens/s), bound by {bound}"),
            *_run_rows(plan["whole_run"]),
        ],
    )
    screen.table(
        "beside it",
        [
            ("main memory", f"{size_text(needs['host_per_node'])} a node"),
            *([("disk of a node", f"{size_text(needs['nvme_per_node'])} for shards")] if needs["nvme_per_node"] else []),
            ("disk", f"{size_text(needs['disk_per_run'])} a run, base {size_text(needs['base_on_disk'])} once"),
            ("delta, state", f"{size_text(needs['delta_file'])}, {size_text(needs['state_file'])}"),
        ],
    )
    screen.table("fewest GPUs with these settings", [(name, _count(count)) for name, count in answers["fewest_gpus"].items()])
    if answers["changes"]:
        rows = [
            (c["what"], f"{size_text(c['peak_bytes'])}{'' if c['fits'] else ', still too much'}; {c['cost']}") for c in answers["changes"]
        ]
        screen.table("to need less", rows)
    if plan["chosen"]:
        section = plan["chosen"]["config"]["zero_optimization"]
        rows = [(f"{key} = {json.dumps(value)}", plan["chosen"]["reasons"][key]) for key, value in section.items()]
        screen.table("memory configuration chosen", rows)
    if plan["lint"]["findings"]:
        rows = [(f["key"], _costs(f)) for f in plan["lint"]["findings"]]
        screen.table(f"what costs in {plan['lint']['file']} (--mend FILE writes a better one)", rows)
    if plan["paper"]:
        rows = [(f["what"], f"paper {f['paper']}; ours {_decimal(f['ours_bytes'])} ({f['assumes']})") for f in plan["paper"]]
        screen.table("the paper's figures", rows)
    if explain:
        rows = [(line["what"], f"{size_text(line['bytes'])} = {line['formula']}") for line in plan["arithmetic"]]
        screen.table("arithmetic (N tokens, P padded, D width, F ffn, H heads, R rank, e bytes an element)", rows)


def plan_markdown(asked: Setting, found: Memory, done: Work) -> str:
    """The plan of a run that begins, for TensorBoard: one table, which shows little at once."""
    cpu = asked.gpu.name == "cpu"
    stage = f"ZeRO stage {asked.stage}{f' in groups of {asked.group}' if asked.group else ''}"
    setting = (
        f"{asked.ranks} x {asked.gpu.name} on {asked.nodes} node{'s'[: asked.nodes > 1]}, {size_text(asked.gpu.memory_bytes)} each; "
        f"{asked.shape.parameters:,} parameters in {asked.dtype}, {asked.trained:,} trained, {stage}; "
        f"steps of {asked.batch_examples:,} examples of at most {asked.example_tokens:,} tokens; micro-batches of at most "
        f"{asked.micro_batch_tokens:,} tokens, activations {'recomputed' if asked.checkpointing else 'kept'}."
    )
    parts = [(_words(name), size_text(count)) for name, count in found.parts.items() if count]
    phases = [(name, size_text(count)) for name, count in found.phases.items() if count]
    step = [
        ("takes", f"{done.step_s:.3g} s"),
        ("computes", f"{done.flops_per_step / 1e12:,.3g} TFLOP in {done.compute_s:.3g} s"),
        ("micro-batches", f"{asked.micro_batches:,} a rank"),
    ]
    if asked.ranks > 1:
        step += [
            ("communicates", f"{done.communication_s:.3g} s"),
            ("gathers", f"{size_text(done.gathered_bytes)} a rank"),
            ("exchanges", f"{size_text(done.exchanged_bytes)} a rank"),
            *([("from other nodes", f"{size_text(done.between_nodes_bytes)} a node")] if done.between_nodes_bytes else []),
            ("hidden from", f"{done.tokens_to_hide:,} tokens a micro-batch on"),
            ("sums", f"{size_text(done.reduced_bytes)} of gradients"),
        ]
    head = (f"memory of a {'rank' if cpu else 'GPU'}, by part", "at its largest", "by phase", "at most", "a full step", "")
    rows = [sum(row, ()) for row in zip_longest(parts, phases, step, fillvalue=("", ""))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, (":---",) * len(head), *rows))
    return "\n\n".join([setting, table, *(f"To be taken with care: {note}" for note in asked.shape.notes)])


def _run_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    if run["steps"] is None:
        return [("all steps", "not known how many: give --examples or train.steps")]
    counted = f", of {run['examples']:,} examples ({run['examples_from']})" if run["examples"] else ""
    rows = [("all steps", f"{run['gpu_hours']:,.1f} GPU hours for {run['steps']:,} steps{counted}, without scoring")]
    if run["cost"] is not None:
        amount = f"{run['cost']:,.2f} {run['currency']}".strip()
        rows.append(("cost", f"{amount}, at {run['price_per_gpu_hour']:g} a GPU hour ({run['price_from']})"))
    return rows


def _generation(plan: dict[str, Any]) -> list[tuple[str, str]]:
    if not plan["phases_bytes"]["generate"]:
        return []
    largest = _count(plan["answers"]["largest_generation_batch_tokens"])
    return [("generation", f"{plan['setting']['generation_batch_tokens']:,} tokens at once; largest that fits: {largest}")]


def _change(change: dict[str, Any]) -> str:
    keys = ", ".join(f"{key} = {value}" for key, value in change["keys"].items())
    return f"{size_text(change['peak_bytes'])}{'' if change['fits'] else ', still too much'}; {change['cost']} ({keys})"


def _costs(finding: dict[str, Any]) -> str:
    value, costs = finding["mended"], finding["costs"]
    if costs.endswith("."):
        return str(costs)
    return f"{costs}; {'leave it out' if value is None else f'better {value:,}'}"


def _words(name: str) -> str:
    return "delta (masters, in fp32)" if name == "delta" else name.replace("_", " ")


def _count(count: int | None) -> str:
    return "none" if count is None else f"{count:,}"


def _decimal(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MB"


def _part(plan: dict[str, Any], name: str) -> str:
    size = size_text(plan["parts_bytes"][name])
    if name != "activations":
        return size
    both = plan["activations_bytes"]
    if plan["setting"]["gradient_checkpointing"]:
        return f"{size}, recomputed; {size_text(both['kept'])} if they were kept"
    return f"{size}; {size_text(both['recomputed'])} if they were recomputed"


def _from_others(plan: dict[str, Any]) -> str:
    """What comes into a node from the others."""
    if plan["setting"]["nodes"] == 1:
        return ""
    return f"; {size_text(plan['communication']['between_nodes_bytes_per_step'])} a node from other nodes"
