"""Are the plan's bytes true? Steps on 1, 2, 4 and 8 gloo ranks, with all that comes from other ranks counted, beside the plan.

    python benchmarks/scaling.py [--ranks 1,2,4,8] [--record FILE]

A small random GPT-2 (tied table, fp32) and Llama (table and head apart, bf16), with everything kept from the forward to the backward pass
and with nothing kept, sharded over all ranks and in groups of 2 and 4 (`zero_hpz_partition_size`), one micro-batch a step and three. For
each: elements gathered, bytes received in their place and for the vocabulary, bytes that come from other nodes (two ranks make one that is
thought of; a group is one), gradient bytes summed, traces that broke. Every number must be the plan's to the byte; exits with 1 if one is
not. It counts and takes no times, so it may run beside other work. docs/scaling.md is made from the same plan.
With --record FILE.md the table goes to that file, and every number to FILE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import scaling_rank
from machine import origin
from ranks import on_ranks, prepare
from rich.console import Console
from tables import markdown_table
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.utils import logging

TOKENS, WORLDS = 64, (1, 2, 4, 8)
"""Of a micro-batch; sizes divide by 8, so that no shard is padded."""
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
BASES: dict[str, tuple[str, PretrainedConfig]] = {
    # At 8 ranks its head's table is less to send than hidden states, so it is gathered.
    "gpt2": ("fp32", GPT2Config(vocab_size=512, n_positions=TOKENS, n_embd=64, n_layer=3, n_head=4, **_ENDS)),
    "llama": (
        "bf16",
        LlamaConfig(
            vocab_size=2048, max_position_embeddings=TOKENS, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **_ENDS,
        ),
    ),
}  # fmt: skip
CONFIGS: dict[str, dict[str, int]] = {
    "kept": {},
    "lean": {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
}
JOB = f"""
[base]
model = "{{base}}"
dtype = "{{dtype}}"
[[methods]]
kind = "lora"
[task]
kind = "jsonl"
data = "{{data}}"
[train]
max_tokens = {TOKENS}
micro_batch_tokens = {TOKENS}
"""
COLUMNS = {
    "elements": "elements gathered",
    "received": "bytes received",
    "between_nodes": "of other nodes",
    "reduced": "gradient bytes",
    "invalidations": "broken traces",
}
"""What is compared. Bytes received: of the base and instead of the vocabulary's tables, by each rank; of other nodes: by each node."""


def cases(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Those of so many ranks; writes their memory configurations to the folder."""
    found = []
    for base in BASES:
        for name, keys in CONFIGS.items():
            for group in (ranks, *(count for count in (2, 4) if count < ranks)):
                file = folder / f"{name}-{ranks}-{group}.json"
                section = {"stage": 3, "stage3_param_persistence_threshold": 1000, **keys}
                if group < ranks:
                    section["zero_hpz_partition_size"] = group
                file.write_text(json.dumps({"zero_optimization": section}))
                found += [
                    {
                        "base": base,
                        "config": name,
                        "ranks": ranks,
                        "group": group,
                        "micro_batches": count,
                        "per_node": min(ranks, group if group < ranks else 2),
                        "tokens": TOKENS,
                        "job": str(folder / f"{base}.toml"),
                        "set": [f"memory.config={file}", f"train.batch_examples={count * ranks}"],
                    }
                    for count in (1, 3)
                ]
    return found


def counted(case: dict[str, Any], everyone: tuple[dict[str, int], ...]) -> dict[str, int]:
    """Of all ranks' counts, those of one: they must be the same. Of those of a node together, what comes from other nodes."""
    per_rank = {(rank["elements"], rank["invalidations"], rank["gathers"] + rank["swaps"], rank["reduced"]) for rank in everyone}
    if len(per_rank) > 1:
        raise SystemExit(f"the ranks differ: {case}: {per_rank}")
    ((elements, invalidations, received, reduced),) = per_rank
    # A gather brings every rank of a node the same; what goes to one rank alone comes for each.
    between = everyone[0]["far gathers"] + sum(rank["far swaps"] for rank in everyone[: case["per_node"]])
    return {"elements": elements, "received": received, "between_nodes": between, "reduced": reduced, "invalidations": invalidations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    worlds = {"type": lambda text: [int(part) for part in text.split(",")], "default": list(WORLDS)}
    parser.add_argument("--ranks", **worlds, help="of 1, 2, 4, 8")
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to one of the same name as JSON")
    asked = parser.parse_args()
    prepare("scaling_rank")
    logging.disable_progress_bar()
    console, rows = Console(highlight=False, soft_wrap=True), []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        folder = Path(scratch)
        write_jobs(folder)
        for ranks in asked.ranks:
            these = cases(folder, ranks)
            for case, everyone in zip(these, zip(*on_ranks(ranks, scaling_rank.on_rank, these), strict=True), strict=True):
                said, found = scaling_rank.said(case), counted(case, everyone)
                kept = {name: case[name] for name in ("base", "config", "ranks", "group", "micro_batches", "per_node")}
                rows.append(kept | {"plan": said, "measured": found, "equal": said == found})
                console.print(" | ".join(cells(rows[-1])))
    wrong = sum(not row["equal"] for row in rows)
    summary = f"{len(rows)} settings, {len(rows) - wrong} equal to the plan to the byte"
    console.print(summary)
    report = {"measured_on": origin("scaling.py", "torch", "deepspeed", "transformers"), "summary": summary, "settings": rows}
    if asked.record:
        asked.record.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        asked.record.write_text(markdown(report), encoding="utf-8")
    sys.exit(bool(wrong))


def write_jobs(folder: Path) -> None:
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    for name, (dtype, config) in BASES.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        (folder / f"{name}.toml").write_text(JOB.format(base=folder / name, dtype=dtype, data=data))


def cells(row: dict[str, Any]) -> list[str]:
    """Of a table: a setting, then each count, and the plan's where it is another."""
    numbers = [
        f"{found:,}" if (said := row["plan"][name]) == (found := row["measured"][name]) else f"{found:,} (plan: {said:,})"
        for name in COLUMNS
    ]
    group = "all" if row["group"] == row["ranks"] else str(row["group"])
    return [row["base"], row["config"], str(row["ranks"]), group, str(row["micro_batches"]), *numbers]


def markdown(report: dict[str, Any]) -> str:
    head = ["base", "configuration", "ranks", "sharers", "micro-batches", *COLUMNS.values()]
    lines = markdown_table(head, map(cells, report["settings"]))
    return "\n".join(["# Bytes between ranks beside the plan", "", *report["measured_on"], "", report["summary"], "", *lines, "", *NOTES])


NOTES = [
    "Measured; where the plan says another number, it stands beside it. A step on a rank, after two that record ZeRO-3's trace. kept:",
    "everything stays gathered from the forward to the backward pass, and for the next micro-batch; lean: nothing does. sharers: ranks",
    "that hold one copy of the base. bytes received: by each rank from others, (W - 1) / W of the gathered bytes, and what goes between",
    "ranks instead of the vocabulary's tables. of other nodes: by each node of 2 ranks, or of a group's.",
    "",
]


if __name__ == "__main__":
    main()
