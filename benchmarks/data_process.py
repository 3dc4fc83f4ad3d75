"""One process of `data.py`: tokenises a file, or reads from what is tokenised; says seconds, processor seconds, tokens and private memory.

python data_process.py ours|datasets build|read FILE BASE
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

READ_EXAMPLES = 4096
SAMPLE_S = 0.02


def main(way: str, step: str, file: Path, base: Path) -> None:
    prepared = (ours if way == "ours" else peer)(step, file, base)
    before, peak, over = private_bytes(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_S):
            peak = max(peak, private_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    start, begun = time.perf_counter(), time.process_time()
    try:
        tokens = prepared()
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - begun
        peak = max(peak, private_bytes())
    finally:
        over.set()
        watcher.join()
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "tokens": tokens, "private_bytes": peak - before}))


def ours(step: str, file: Path, base: Path) -> Callable[[], int]:
    from pipeline.job.task import Pairs
    from pipeline.tasks.encode import Encoder
    from pipeline.tasks.open import content_keys, open_split
    from pipeline.tasks.order import Stream
    from pipeline.tasks.store import open_store
    from pipeline.tasks.tokens import Tokens

    task, tokens = Pairs(kind="jsonl", data=str(file)), Tokens(base)
    encoder = Encoder(tokens, "", 0, len(tokens.tokenizer))
    tokens.ids(["a"])

    def build() -> int:
        settings = (content_keys(task), encoder.settings, "train")
        store = open_store(open_split(task, "train"), settings, encoder.sequences, "train", lambda places, _: places)
        if step == "build":
            return store.about.total_tokens
        order = Stream((len(store),), seed=1).examples(0, READ_EXAMPLES)
        return sum(len(store[index]) for index in order)

    return build


def peer(step: str, file: Path, base: Path) -> Callable[[], int]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(["a"])

    def encoded(rows: dict[str, list[str]]) -> dict[str, list]:
        prompts = tokenizer(rows["prompt"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        completions = tokenizer(rows["completion"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids = [[*p, *c, tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
        return {"input_ids": ids, "start": list(map(len, prompts)), "length": list(map(len, ids))}

    def build() -> int:
        rows = datasets.load_dataset("json", data_files=str(file), split="train")
        return sum(rows.map(encoded, batched=True, remove_columns=rows.column_names)["length"])

    return build


def private_bytes() -> int:
    """What belongs to this process alone: not the pages of files, which processes share."""
    found = re.search(r"Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
