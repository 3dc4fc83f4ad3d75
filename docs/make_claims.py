"""Writes one section of docs/memory.md, the paper's figures for GPT-3 beside ours: `python docs/make_claims.py`. A test keeps them equal.

In: the plan of the paper's jobs (jobs/gpt3/175b_full_wikisql.toml, 175b_lora_wikisql.toml); benchmarks/results/claims.md. No torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import fill

from pipeline.job.read import read_job
from pipeline.plan.families import read_shape
from pipeline.plan.hardware import ATTAINED, gpu_of
from pipeline.plan.memory import Setting, memory, setting
from pipeline.plan.paper import figures
from pipeline.plan.work import work
from pipeline.planning.job import make_plan

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).parent / "memory.md"
MEASURED = ROOT / "benchmarks" / "results" / "claims.md"
HEADING = "## The paper's figures, and ours\n"
JOBS = {name: ROOT / "jobs" / "gpt3" / f"175b_{name}_wikisql.toml" for name in ("full", "lora")}
GPU, TOKENS_S = "v100-32g", {"full": 32.5, "lora": 43.1}
"""Of a V100, as the paper prints them; at equal sharding."""
STATE = ("base_shard", "delta", "gradients", "optimizer")
EXAMPLES = 8
"""Of a micro-batch, in the speeds that are compared."""


def page() -> str:
    """docs/memory.md with the section as it must be."""
    before, _, rest = TARGET.read_text(encoding="utf-8").partition(HEADING)
    _, next_heading, after = rest.partition("\n## ")
    return f"{before}{HEADING}\n{section()}{next_heading}{after}"


def section() -> str:
    fewest = {name: make_plan(read_job(file), GPU, None, None, None)["answers"]["fewest_gpus"] for name, file in JOBS.items()}
    parts = [
        filled(
            "The LoRA paper's section 4.2 of GPT-3 175B (Adam, LoRA of rank 4 on q and v), beside what the plan says of its shape. Bytes "
            "are decimal, as the paper's are. Made by `python docs/make_claims.py`."
        ),
        table(["", "paper", "ours", "assumed"], sizes(fewest)),
        speeds(fewest["full"][GPU]),
        measured(),
    ]
    return "\n\n".join(parts) + "\n"


def sizes(fewest: dict[str, dict[str, int | None]]) -> list[list[str]]:
    full, lora = (asked_of(name, fewest[name][GPU]) for name in JOBS)
    n, trained = lora.shape.parameters, lora.trained
    printed = [[one.what, one.paper, size(one.ours_bytes), one.assumes] for one in figures(lora)]
    memory_full, memory_lora, checkpoint_full, checkpoint_lora, tasks = printed

    def on_gpus(asked: Setting, why: str) -> list[str]:
        held = state_bytes(asked)
        return ["", "", size(held), f"by the plan on {asked.ranks} V100-32, {held / n:.1f} bytes a parameter of the base: {why}"]

    between = "6 bytes a parameter (weights and both moments in 16 bits) to 8 (gradients too): the printed figure is between them"
    smaller = f"both in 16 bits; {n / trained / 2:,.0f} as zlora writes it; 10,000 would be a delta of {size(2 * n / 1e4)}"
    rows = [
        memory_full,
        ["", "", f"{size(6 * n)} to {size(8 * n)}", between],
        on_gpus(full, "gradients are fp32 too, and vectors whole on every GPU"),
        memory_lora,
        on_gpus(lora, f"the delta's part, {size(16 * trained)}, is whole on every GPU"),
        checkpoint_full,
        checkpoint_lora,
        ["full / LoRA", "10,000", f"{n / trained:,.0f}", smaller],
        tasks,
        ["", "", size(2 * n + 400 * trained), "deltas in fp32, as zlora writes them"],
    ]
    for gpu in (GPU, "a100-80g"):
        counts = " and ".join(str(fewest[name][gpu]) for name in JOBS)
        rows.append([f"fewest {gpu.upper()}, full and LoRA", "", counts, "WikiSQL's job, activations recomputed, margins included"])
    return rows


def speeds(gpus: int | None) -> str:
    """Throughput at equal sharding."""
    rows, flops = [], {}
    for recompute in (True, False):
        asked = {name: replace(asked_of(name, gpus), checkpointing=recompute) for name in JOBS}
        # A micro-batch on every GPU: the job's own step leaves some idle.
        asked = {name: replace(one, batch_examples=one.ranks * EXAMPLES) for name, one in asked.items()}
        done = {name: work(one, memory(one)) for name, one in asked.items()}
        rate = {name: one.batch_examples * one.example_tokens / done[name].step_s / one.ranks for name, one in asked.items()}
        fits = all(memory(one).training_peak <= one.gpu.memory_bytes for one in asked.values())
        ratio = done["full"].flops_per_token / done["lora"].flops_per_token
        flops[recompute] = {name: one.flops_per_token for name, one in done.items()}
        rule = "8N and 6N" if recompute else "6N and 4N"
        rows.append(
            [
                f"by the plan, activations {'recomputed' if recompute else 'kept'}",
                *([f"{rate[name]:.1f}" for name in JOBS] if fits else ["does not fit"] * 2),
                f"+{100 * (rate['lora'] / rate['full'] - 1):.0f} %" if fits else "-",
                f"+{100 * (ratio - 1):.0f} % ({rule})",
            ]
        )
    full, lora = TOKENS_S.values()
    gain = f"+{100 * (lora / full - 1):.1f} % ({100 * (1 - full / lora):.1f} % less time: its 25 %)"
    printed = ["the paper", f"{full}", f"{lora}", gain, ""]
    reached = [TOKENS_S[name] * flops[True][name] / 1e12 for name in JOBS]
    peak = gpu_of(GPU).half_flops / 1e12
    tokens = f"{EXAMPLES} examples of {asked_of('lora', gpus).example_tokens} tokens"
    said = (
        f"Ours on {gpus} V100-32, {tokens} a micro-batch, one micro-batch on each GPU, at {ATTAINED:.0%} of the maker's rate and links at "
        f"theirs: assumptions. With activations recomputed the printed speeds are {reached[0]:.1f} and {reached[1]:.1f} TFLOP/s, "
        f"{reached[0] / peak:.0%} of the V100's peak: if the paper recomputed, which it does not say, its gain is the gradient of the "
        "weights that is not computed, 2 of 8 N. The plan's gain is larger, because `full` also sums the gradient of every matrix over the "
        "ranks, in fp32, which it takes not to be hidden."
    )
    heads = ["tokens/s a V100", "full", "LoRA", "LoRA over full", "of computing alone"]
    return f"{table(heads, [printed, *rows])}\n\n{filled(said)}"


def measured() -> str:
    text = (
        "**Measured at a small scale**, both ways under the same sharding ([results](../benchmarks/results/claims.md), "
        "`python benchmarks/claims.py`): "
    )
    if not MEASURED.exists():
        return filled(text + "not recorded yet.")
    lines = MEASURED.read_text(encoding="utf-8").splitlines()
    title = next(line for line in lines if line.startswith("GPT-2 of"))
    seconds = "" if any(line.startswith("| a step") for line in lines) else " Seconds of a step are not recorded yet."
    return filled(text + title + seconds) + "\n\n" + "\n".join(line for line in lines if line.startswith("|"))


def asked_of(name: str, gpus: int | None) -> Setting:
    assert gpus
    shape = read_shape(ROOT / "pipeline" / "plan" / "bases" / "gpt3-175b")
    return setting(read_job(JOBS[name]), {"zero_optimization": {"stage": 3}}, shape, gpu_of(GPU), gpus, None, 0, None)


def state_bytes(asked: Setting) -> int:
    """Of all GPUs together, activations and gathered layers left out."""
    found = memory(asked).parts
    return asked.ranks * sum(found[part] for part in STATE)


def size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.{2 if unit == 1e12 else 1}f} {name}"
    return f"{count:.0f} B"


def filled(text: str) -> str:
    return fill(text, 140, break_long_words=False, break_on_hyphens=False)


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
