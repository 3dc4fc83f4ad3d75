"""Training on one GPU: `zlora train` beside PEFT + Trainer + DeepSpeed ZeRO-3, on Llama shapes of 1B and 7B with random weights.

    python benchmarks/gpu.py --data FOLDER [--record FILE] [--smoke]

FOLDER has E2E's official trainset.csv, whose texts are joined to documents of exactly 2,048 or 4,096 tokens. LoRA is of rank 16 on all
linear maps of the layers; a step is one pass; nothing is recomputed in the backward pass in either way. MFU: 4 FLOPs for each parameter and
token (forward, and backward to the inputs: the base has no gradients) over the card's dense rate. Every part is a process with its own time
limit, so that all end within 8 minutes; what a part found is written as it comes, and a part that fails says why and costs no other.
--smoke: tiny shapes on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from long import documents
from machine import origin
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig
from ways import SHAPES, Setup, Shape, make_base, make_data, make_tokenizer, run_ours, run_peer

ALL = Shape(
    LlamaConfig(),
    ("q", "k", "v", "o", "mlp_gate", "mlp_in", "mlp_out"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
WIDTHS = {"1B": (2048, 5632, 22, 32, 4), "7B": (4096, 11008, 32, 32, 32), "tiny": (64, 128, 2, 2, 1)}
"""Width, MLP's, layers, heads, key and value heads: TinyLlama's and Llama 2's."""
PARTS = [
    # Shape, dtype, tokens of an example, examples a step, memory, seconds for a way.
    ("1B", "bf16", 2048, 8, "zero3.json", 40),
    ("1B", "fp16", 2048, 8, "zero3.json", 40),
    ("7B", "bf16", 2048, 4, "zero3.json", 60),
    ("7B", "bf16", 4096, 2, "zero3.json", 60),
    ("7B", "bf16", 4096, 2, "zero3_offload.json", 60),
]
WARM_UP, STEPS = 3, 6
LIMIT_S = 460.0
OUT_OF_MEMORY = "out of memory"


def main() -> None:
    asked = arguments()
    if asked.part:
        print(json.dumps(part(json.loads(asked.part))))
        return
    console, begun, found = Console(highlight=False, soft_wrap=True), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="zlora-bench-") as scratch:
        folder = Path(scratch)
        texts = make_data(asked.data / "trainset.csv", folder)
        tokenizer = make_tokenizer(texts)
        tokenizer.save_pretrained(folder / "tokenizer")
        chosen = [("tiny", "bf16", 64, 2, "zero3.json", 300)] if asked.smoke else PARTS
        for length in {length for _, _, length, *_ in chosen}:
            documents(texts, tokenizer, length, folder / f"{length}.jsonl")
        common = {"folder": scratch, "device": "cpu" if asked.smoke else "cuda"}
        for shape, dtype, length, examples, memory, limit_s in chosen:
            one = {**common, "shape": shape, "dtype": dtype, "length": length, "examples": examples, "memory": memory}
            if not (folder / shape).exists():
                apart(one | {"way": "base"}, 90)
            for way in ("ours", "peer"):
                left_s = (1e9 if asked.smoke else LIMIT_S) - (time.monotonic() - begun)
                row = apart(one | {"way": way}, min(limit_s, left_s)) if left_s > 15 else {"error": "no time left"}
                found.append({key: one[key] for key in ("shape", "dtype", "length", "examples", "memory")} | {"way": way} | row)
                console.print(json.dumps({key: value for key, value in found[-1].items() if key not in ("summary", "setup")}))
                if asked.record:
                    record(asked.record, found, time.monotonic() - begun)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with E2E's trainset.csv")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help="also write the results to this Markdown file, and to a JSON file beside it")
    asked = parser.parse_args()
    if not (asked.part or asked.data):
        parser.error("--data is needed")
    return asked


def apart(one: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """What a part says in a process of its own, with all its children ended when its time is over."""
    words = [sys.executable, __file__, "--part", json.dumps(one)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, wrong = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"not over within {limit_s:.0f} s"}
    if process.returncode:
        return {"error": OUT_OF_MEMORY if OUT_OF_MEMORY in wrong.lower() else wrong.strip()[-300:]}
    return json.loads(said.splitlines()[-1])


def part(one: dict[str, Any]) -> dict[str, Any]:
    """Makes a base, or runs a way."""
    folder, shape = Path(one["folder"]), one["shape"]
    width, mlp, layers, heads, kv_heads = WIDTHS[shape]
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = LlamaConfig(vocab_size=32000, num_key_value_heads=kv_heads, max_position_embeddings=4096, **sizes)
    if one["way"] == "base":
        make_base(folder / shape, config, AutoTokenizer.from_pretrained(folder / "tokenizer"), "bf16", one["device"])
        return {}
    SHAPES[shape] = ALL
    out, length = folder / f"{shape}-{one['dtype']}-{one['length']}-{one['memory']}", one["length"]
    out.mkdir(exist_ok=True)
    names: dict[str, Any] = {"dtype": one["dtype"], "examples": one["examples"], "device": one["device"], "memory": one["memory"]}
    data = folder / f"{length}.jsonl"
    setup = Setup(
        shape,
        folder / shape,
        data,
        out,
        ranks=1,
        warm_up=WARM_UP,
        steps=STEPS,
        micro_batch_tokens=length * one["examples"],
        rank=16,
        **names,
    )
    run = run_ours(setup) if one["way"] == "ours" else run_peer(setup)
    summary, tokens_per_s = run.summary(), one["examples"] * length / run.step_s
    # Of linear maps: an embedding is looked up, not multiplied by.
    parameters = layers * (2 * width**2 + 2 * width * width // heads * kv_heads + 3 * width * mlp) + 32000 * width
    found = {"tokens_per_s": round(tokens_per_s), "step_s": run.step_s, "gpu_peak_bytes": max(summary["gpu_peak_bytes"])}
    return found | {"mfu": mfu(4 * parameters * tokens_per_s), "loss": summary["losses"], "summary": summary, "setup": names}


def mfu(flops: float) -> float | None:
    """Of the card's dense half-precision rate, where that is known."""
    import torch

    from pipeline.plan.hardware import named

    if not torch.cuda.is_available():
        return None
    card = named(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    return flops / card.half_flops if card else None


def record(file: Path, found: list[dict[str, Any]], seconds: float) -> None:
    measured_on = [*origin("gpu.py", "torch", "deepspeed", "transformers", "peft"), f"- GPU: {_card()}; {seconds:.0f} s so far"]
    file.with_suffix(".json").write_text(json.dumps({"measured_on": measured_on, "parts": found}, indent=1) + "\n", encoding="utf-8")
    heads = ["base", "dtype", "tokens of an example", "examples a step", "memory", "way", "tokens/s", "MFU", "GPU peak GB"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in found:
        asked = [row["shape"], row["dtype"], f"{row['length']:,}", str(row["examples"]), row["memory"], row["way"]]
        if "error" in row:
            cells = [row["error"].splitlines()[-1] if row["error"] else "failed", "", ""]
        else:
            share = "-" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
            cells = [f"{row['tokens_per_s']:,}", share, f"{row['gpu_peak_bytes'] / 1e9:.1f}"]
        lines.append(f"| {' | '.join([*asked, *cells])} |")
    file.write_text("\n".join(["# One GPU: ours beside PEFT + Trainer", "", *measured_on, "", *lines, ""]), encoding="utf-8")


def _card() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


if __name__ == "__main__":
    main()
