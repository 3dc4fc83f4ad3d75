"""One rank of the peer of `step.py` and `save.py`: PEFT + transformers' Trainer + DeepSpeed ZeRO-3, as its users write it.

torchrun --nproc-per-node=2 benchmarks/step_peer.py BASE DATA CONFIG STEPS EXAMPLES_A_RANK OUT [SAVE_STEPS]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Seconds of every optimizer step, and of every save."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.saves: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self._end = time.perf_counter()
        self.seconds.append(self._end - self._start)

    def on_save(self, *_: object, **__: object) -> None:
        self.saves.append(time.perf_counter() - self._end)


def main() -> None:
    base, data, config, steps, examples, out, *save_steps = sys.argv[1:]
    arguments = TrainingArguments(
        output_dir=f"{out}.trainer",
        use_cpu=True,
        deepspeed={**json.loads(Path(config).read_text()), "train_micro_batch_size_per_gpu": int(examples), "gradient_clipping": 1.0},
        per_device_train_batch_size=int(examples),
        max_steps=int(steps),
        learning_rate=1e-3,
        report_to=[],
        save_strategy="steps" if save_steps else "no",
        save_steps=int(save_steps[0]) if save_steps else 500,
        logging_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    dataset = []
    for row in rows:
        prompt = tokenizer(row["prompt"] + tokenizer.eos_token)["input_ids"]
        target = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        dataset.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, object]:
        import torch

        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": tokenizer.eos_token_id, "labels": -100, "attention_mask": 0}
        for row in batch:
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        return {key: torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in batch]) for key in fill}

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    clock = Clock()
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=pad, callbacks=[clock]).train()
    if arguments.process_index == 0:
        Path(out).write_text(json.dumps({"steps": clock.seconds, "saves": clock.saves}))


if __name__ == "__main__":
    main()
