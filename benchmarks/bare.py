"""The limit: a step without sharding, logging or framework. A plain frozen transformers model, LoRA as a module of six lines, AdamW.

    python benchmarks/bare.py SPEC OUT PART PARTS

Examples are dealt and packed as ours are, before the clock starts; logits only where there is a label. Of PARTS processes side by side each
takes its PART of every step and talks to nobody; only the timed steps begin together. Writes OUT/rank<PART>.json (see `tally.py`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tally import Tally
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.model.attention import NAME, no_mask, register
from pipeline.tasks.batch import MicroBatch, collate
from pipeline.tasks.example import Sequence
from pipeline.tasks.order import deal


class Lora(nn.Module):
    def __init__(self, linear: nn.Module, a: torch.Tensor, out_features: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(out_features, a.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + nn.functional.linear(nn.functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype) * self.scale)


def main() -> None:
    spec, out, part, parts = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tally = Tally(out / f"rank{part}.json")
    register()
    dtype = torch.bfloat16 if spec["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=dtype, attn_implementation=NAME).requires_grad_(False).eval()
    trained = []
    for name, a in load_file(spec["a"]).items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        columns, rows = linear.weight.shape if spec["fan_in_fan_out"] else linear.weight.shape[::-1]
        assert columns == a.shape[1]
        adapted = Lora(linear, a, rows, spec["alpha"] / spec["rank"])
        setattr(model.get_submodule(parent), child, adapted)
        trained += [adapted.a, adapted.b]
    optimizer = torch.optim.AdamW(trained, lr=spec["learning_rate"], weight_decay=0.0, fused=True)
    steps = [dealt(step, part, parts, spec["micro_batch_tokens"]) for step in json.loads(Path(spec["given"]).read_text())]
    tally.base(model)
    for number, (batches, targets) in enumerate(steps):
        if number == spec["warm_up"]:
            together(out, part, parts)
        total = 0.0
        for batch in batches:
            loss = loss_of(model, batch) / targets
            loss.backward()
            total += float(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tally.took(total)
    tally.write()


def dealt(examples: list[dict], part: int, parts: int, tokens: int) -> tuple[list[MicroBatch], int]:
    """This part's micro-batches of a step, and the target tokens of all parts."""
    sequences = [Sequence(tuple(one["tokens"]), ((one["learnt_from"], len(one["tokens"])),)) for one in examples]
    bins = deal([len(one.tokens) for one in sequences], parts, tokens, packed=True)[part]
    cpu = torch.device("cpu")
    batches = [collate([sequences[i] for i in chosen], chosen, True, cpu) for chosen in bins]
    return batches, sum(one.targets for one in sequences)


def loss_of(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Summed over the labels."""
    inputs = {"input_ids": batch.tokens, "position_ids": batch.positions, "layout": batch.layout, "use_cache": False}
    hidden = model.base_model(**inputs, attention_mask=no_mask(batch.layout, batch.tokens.device)).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(hidden[batch.label_index]).float()
    return nn.functional.cross_entropy(logits, batch.labels, reduction="sum")


def together(out: Path, part: int, parts: int) -> None:
    (out / f"ready{part}").touch()
    while not all((out / f"ready{other}").exists() for other in range(parts)):
        time.sleep(0.005)


if __name__ == "__main__":
    main()
