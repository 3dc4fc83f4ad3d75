"""Is the plan true? Jobs are trained on CPU ranks with every tensor storage followed, and what the plan said is put beside it.

    python benchmarks/plan.py [--record FILE]

Bases are random and small: GPT-2's and Llama's shapes, fp32 and bf16, with and without checkpointing, several methods, lengths and memory
configurations, on 1 and 2 ranks. The last cases are of settings that no formula was made on. Exits with 1 if a promise is broken.
Peak memory is that of tensor storages; anonymous resident memory, with the allocator as `zlora train` sets it, is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import origin
from plan_rank import predict
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from pipeline.cluster.launch import rank_environment

HERE = Path(__file__).parent
EXACT = ("base_shard", "delta", "gradients", "optimizer")
WITHIN = {"kept": 0.10, "step": 0.10, "gathered_elements": 0.05}
EVEN, UNEVEN, LONG = [256] * 4, [300, 200, 37], [500, 500]
BASES = {
    "gpt2": GPT2Config(vocab_size=1000, n_positions=512, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0),
    "gpt2-wide": GPT2Config(vocab_size=5003, n_positions=600, n_embd=320, n_layer=3, n_head=5, n_inner=800, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(
        vocab_size=1000, max_position_embeddings=512, hidden_size=256, intermediate_size=680, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    ),
    "llama-tied": LlamaConfig(
        vocab_size=4001, max_position_embeddings=600, hidden_size=320, intermediate_size=864, num_hidden_layers=3,
        num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True, attention_bias=True, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip
LEAN = {"stage": 3, "stage3_prefetch_bucket_size": 300_000, "stage3_max_live_parameters": 1_500_000, "stage3_max_reuse_distance": 700_000}
JOB = """
[base]
model = "{base}"
[[methods]]
kind = "lora"
[task]
kind = "jsonl"
data = "{data}"
[train]
batch_examples = 4
"""


def cases(folder: Path) -> list[dict[str, Any]]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "lean.json").write_text(json.dumps({"zero_optimization": LEAN}))
    for name, config in BASES.items():
        model = LlamaForCausalLM if isinstance(config, LlamaConfig) else GPT2LMHeadModel
        model(config).save_pretrained(folder / name)
        (folder / f"{name}.toml").write_text(JOB.format(base=folder / name, data=data))

    def case(base: str, tokens: list[int], ranks: int, *changes: str, labels: int = 200, micro_batches: int = 1) -> dict[str, Any]:
        found = {"job": str(folder / f"{base}.toml"), "set": list(changes), "tokens": tokens, "label_tokens": labels}
        title = [base, f"{len(tokens)} x {max(tokens)}", f"{ranks} ranks", *(change.split(".")[-1] for change in changes)]
        return {**found, "micro_batches": micro_batches, "ranks": ranks, "name": ", ".join(title).replace(str(folder) + "/", "")}

    bf16, recompute = "base.dtype=bf16", "memory.gradient_checkpointing=true"
    fp32, lean, whole = "base.dtype=fp32", f"memory.config={folder / 'lean.json'}", "memory.config=zero0.json"
    grid = [
        case(base, tokens, 2, dtype, *more)
        for base in ("gpt2", "llama")
        for dtype, tokens in ((fp32, EVEN), (bf16, UNEVEN))
        for more in ((), (recompute,), (lean,))
    ]
    grid += [case("gpt2", EVEN, 1, fp32), case("llama", UNEVEN, 1, bf16, whole), case("gpt2", UNEVEN, 2, fp32, whole, recompute)]
    grid += [case("llama", EVEN, 2, bf16, "methods.0.targets=['q','v','o','mlp_out']", "methods.0.rank=16")]
    # Of these no formula has seen anything.
    held_out = [
        case("llama-tied", EVEN, 2, bf16, "methods.0.targets=['k','o']", labels=600),
        case("gpt2-wide", LONG, 2, fp32, lean, labels=300),
    ]
    # These were held out too, until two of them showed what was said too high: the loss beside a tied head's buffers.
    grid += [
        case("gpt2-wide", LONG, 2, bf16, "methods.0.targets=['q','k','v','o','mlp_in']", "methods.0.rank=4", labels=700, micro_batches=2),
        case("llama-tied", UNEVEN, 2, fp32, "methods.0.targets=['mlp_gate','mlp_in']", "methods.0.rank=32", labels=400),
        case("gpt2-wide", UNEVEN, 2, fp32, recompute, lean, "methods.0.dropout=0.1", labels=100),
        case("llama-tied", LONG, 1, bf16, recompute, "methods.0.targets=['q','v','mlp_out']", labels=998),
    ]
    return grid + [{**each, "name": f"{each['name']} (held out)"} for each in held_out]


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """Each case in ranks of its own, so that no memory is left from another."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "case.json").write_text(json.dumps(case))
        command = [sys.executable, str(HERE / "plan_rank.py"), str(folder / "case.json"), str(folder / "out.json")]
        logs = [(folder / f"log{rank}").open("w+") for rank in range(case["ranks"])]
        ranks = [
            subprocess.Popen(command, env=rank_environment(rank, case["ranks"], folder, 0), stdout=log, stderr=subprocess.STDOUT)
            for rank, log in enumerate(logs)
        ]
        if any(list(map(subprocess.Popen.wait, ranks))):
            logs[0].seek(0)
            raise SystemExit(f"{case['name']}: {logs[0].read()[-3000:]}")
        return json.loads((folder / "out.json").read_text())


def broken(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the parts that are further from the truth than promised."""
    wrong = [name for name in EXACT if expected[name] != found[name]]
    return wrong + [name for name, bound in WITHIN.items() if abs(expected[name] - found[name]) > bound * found[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file")
    asked = parser.parse_args()
    console, rows, failed = Console(highlight=False, soft_wrap=True), [], []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        for case in cases(Path(scratch)):
            expected, found = predict(case, case["ranks"]), measured(case)
            wrong = broken(expected, found)
            failed += [f"{case['name']}: {', '.join(wrong)}"] if wrong else []
            rows.append(row(case, expected, found, wrong))
            console.print(" | ".join(rows[-1]))
    summary = f"{len(rows)} jobs, {len(failed)} with a promise broken"
    console.print(summary)
    if asked.record:
        head = ["# The plan beside measurement", "", *origin("plan.py", "torch", "deepspeed", "transformers"), "", summary, ""]
        names = [
            "job",
            "exact parts",
            "fetched",
            "kept MB",
            "said / measured",
            "forward",
            "gathered",
            "peak MB",
            "said / measured",
            "anonymous MB",
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *rows]]
        asked.record.write_text("\n".join([*head, *lines, "", *NOTES]), encoding="utf-8")
    sys.exit(bool(failed))


def row(case: dict[str, Any], expected: dict[str, Any], found: dict[str, Any], wrong: list[str]) -> list[str]:
    def ratio(name: str) -> str:
        return f"{expected[name] / found[name]:.3f}" if found[name] else "-"

    exact = "equal" if not set(wrong) & set(EXACT) else f"NOT: {', '.join(wrong)}"
    anonymous = found["anonymous"]["peak"] - found["anonymous"]["start"]
    kept, peak = f"{found['kept'] / 1e6:.1f}", f"{found['step'] / 1e6:.1f}"
    return [
        case["name"],
        exact,
        ratio("gathered_elements"),
        kept,
        ratio("kept"),
        ratio("forward"),
        ratio("gathered"),
        peak,
        ratio("step"),
        f"{anonymous / 1e6:.0f}",
    ]


NOTES = [
    "exact parts: base shard, delta, gradients, optimizer. fetched, forward, gathered: said / measured of the elements gathered in a",
    "step, of the forward pass's peak, of gathered weights at their most. kept: activations between forward and backward. peak: of",
    "tensor storages in a step. anonymous: the most beyond what the process had before loading; it has kernels' scratch memory, Python's",
    "own and what the allocator keeps. MB are 10^6 bytes.",
    "",
]


if __name__ == "__main__":
    main()
