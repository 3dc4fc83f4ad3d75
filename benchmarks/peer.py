"""One rank of the peer: PEFT + transformers' Trainer + DeepSpeed ZeRO-3, as its users write it.

    torchrun --nproc-per-node=2 benchmarks/peer.py SPEC OUT

SPEC is a JSON file (see `ways.py`): base, data (JSON lines of prompt and completion), targets, dtype, memory configuration, examples a
rank, steps, save_steps (0: none), data workers, indices (the examples in order), a (the first A of each module, as a safetensors file).
Each rank writes OUT/rank<N>.json (see `tally.py`); the first also the seconds of every save, OUT/saves.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tally import Tally

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    # Before DeepSpeed is imported.
    tally = Tally(out / f"rank{os.environ['RANK']}.json")
    from datasets import Dataset, load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        use_cpu=spec["device"] == "cpu",
        bf16=spec["dtype"] == "bf16",
        fp16=spec["dtype"] == "fp16",
        deepspeed=spec["config"],
        per_device_train_batch_size=spec["examples_a_rank"],
        max_steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        average_tokens_across_devices=True,
        train_sampling_strategy="sequential",
        dataloader_num_workers=spec["workers"],
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="steps" if spec["save_steps"] else "no",
        save_steps=spec["save_steps"] or 500,
        logging_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])

    def encoded(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = tokenizer.eos_token_id
        asked = tokenizer([prompt + tokenizer.eos_token for prompt in rows["prompt"]])["input_ids"]
        told = [[*ids, end] for ids in tokenizer(rows["completion"])["input_ids"]]
        pairs = list(zip(asked, told, strict=True))
        return {"input_ids": [a + t for a, t in pairs], "labels": [[-100] * len(a) + t for a, t in pairs]}

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch]
        fill = {"input_ids": tokenizer.eos_token_id, "labels": -100, "attention_mask": 0}
        return {key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows]) for key, value in fill.items()}

    with arguments.main_process_first():
        raw = load_dataset("json", data_files=spec["data"], split="train")
        dataset: Dataset = raw.map(encoded, batched=True, remove_columns=raw.column_names)
    dataset = dataset.select(spec["indices"])
    base = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=DTYPES[spec["dtype"]])
    adapted = {"r": spec["rank"], "lora_alpha": spec["alpha"], "target_modules": spec["targets"], "fan_in_fan_out": spec["fan_in_fan_out"]}
    model = get_peft_model(base, LoraConfig(**adapted))
    for name, a in load_file(spec["a"]).items():
        with torch.no_grad():
            model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.copy_(a)

    class Told(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    saves: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            tally.base(model)

        def on_step_end(self, *_: object, **__: object) -> None:
            # Summed over this rank's tokens, over the step's tokens, times ranks: the mean over ranks is the step's loss.
            tally.took(float(trainer.last_loss))
            self._end = time.perf_counter()

        def on_save(self, *_: object, **__: object) -> None:
            saves.append(time.perf_counter() - self._end)

    trainer = Told(model=model, args=arguments, train_dataset=dataset, data_collator=pad, callbacks=[Clock()])
    trainer.train()
    tally.write()
    if arguments.process_index == 0:
        (out / "saves.json").write_text(json.dumps(saves))
    # A rank that is left by the other while it ends aborts, and so may threads of libraries at the interpreter's end.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
